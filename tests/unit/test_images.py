"""Image sets, and the batches that are drawn from them."""

import dataclasses

import numpy as np
import pytest
import torch

from detrojan import rng as streams
from detrojan.images import DefenderSample, ImageSet, Loader, TriggeredSample, empty, to_float
from detrojan.settings import NO_AUGMENTATION, Augmentation

CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)


def epoch(images, batch_size=5, augmentation=NO_AUGMENTATION, seed=0):
    return list(Loader(images, batch_size, augmentation).epoch(streams.stream("epoch", seed)))


def together(batches):
    return torch.cat([b.images for b in batches]), torch.cat([b.rows for b in batches])


# --- sets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(12, 3, 8, 8)}, r"torch.float32 of shape \(12, 3, 8, 8\).*torch.uint8"),
        ({"images": torch.zeros(12, 8, 8, 3, dtype=torch.uint8)}, r"\(12, 8, 8, 3\).*\(N, 3, 8, 8\)"),
        ({"images": torch.zeros(12, 3, 9, 8, dtype=torch.uint8)}, r"\(12, 3, 9, 8\)"),
        ({"labels": torch.zeros(11, dtype=torch.int64)}, "12 images, but 11 labels"),
        ({"index": torch.arange(13)}, "12 images, but 13 index"),
        ({"true_labels": torch.zeros(0, dtype=torch.int64)}, "12 images, but 0 true_labels"),
        ({"labels": torch.full((12,), 4)}, "labels run from 4 to 4, but the 4 classes are 0 to 3"),
        ({"labels": torch.full((12,), -1)}, "labels run from -1 to -1"),
        ({"true_labels": torch.arange(12)}, "true_labels run from 0 to 11"),
    ],
)
def test_image_set_refuses(toy_images, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(toy_images(), **change)


def test_rows_of_a_set(toy_images):
    images = toy_images()
    for rows in (torch.tensor([7, 2]), torch.arange(12) == 5):
        places = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        taken = images[rows]
        assert taken.index.tolist() == [10 + 3 * int(place) for place in places]
        assert taken.labels.tolist() == [int(place) % 4 for place in places]
        assert torch.equal(taken.images, images.images[places])
        assert taken.info is images.info
    assert images.num_classes == 4
    assert len(images[torch.tensor([], dtype=torch.int64)]) == 0


def test_replaced_goes_by_index(toy_images):
    images = toy_images()
    index = torch.tensor([31, 10, 43])  # rows 7, 0 and 11
    new = ImageSet(
        torch.full((3, 3, 8, 8), 9, dtype=torch.uint8) + torch.tensor([0, 1, 2]).view(3, 1, 1, 1).byte(),
        torch.tensor([1, 1, 1]),
        index,
        images.info,
        torch.tensor([3, 0, 3]),
    )
    replaced = images.replaced(new)
    assert [int(replaced.images[row].float().mean()) for row in (7, 0, 11)] == [9, 10, 11]
    assert replaced.labels.tolist() == [1, 1, 2, 3, 0, 1, 2, 1, 0, 1, 2, 1]
    assert replaced.true_labels.tolist() == [0, 1, 2, 3] * 3
    assert torch.equal(replaced.index, images.index)
    untouched = [1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert torch.equal(replaced.images[untouched], images.images[untouched])
    assert images.labels.tolist() == [0, 1, 2, 3] * 3  # the set itself stays as it was


def test_replaced_in_a_set_that_is_not_sorted(toy_images):
    images = toy_images()
    backwards = images[torch.arange(11, -1, -1)]
    new = dataclasses.replace(
        images[torch.tensor([2])],
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        labels=torch.tensor([0]),
    )
    assert backwards.replaced(new).labels.tolist() == [3, 2, 1, 0, 3, 2, 1, 0, 3, 0, 1, 0]


@pytest.mark.parametrize("index", [[11], [9], [46], [10, 10]])
def test_replaced_refuses_an_index_that_does_not_match(toy_images, index):
    images = toy_images()
    rows = dataclasses.replace(images[torch.arange(len(index))], index=torch.tensor(index))
    with pytest.raises(ValueError, match="don't match the training set"):
        images.replaced(rows)


def test_everything_is_training_then_validation(toy_images):
    images = toy_images()
    sample = DefenderSample(images[torch.tensor([5, 1])], images[torch.tensor([3])])
    assert sample.everything.index.tolist() == [25, 13, 19]
    assert sample.everything.labels.tolist() == [1, 1, 3]


def test_sample_to_a_device_keeps_its_parts(toy_images, monkeypatch):
    images = toy_images()
    # The one device besides the CPU that every machine has; its tensors have no values to check.
    monkeypatch.setattr(ImageSet, "__post_init__", lambda images: None)
    train, validation = images[torch.tensor([5, 1])], images[torch.tensor([3])]
    chosen = {}
    moved = DefenderSample(train, validation, TriggeredSample(train, validation), chosen).to("meta")
    parts = (moved.train, moved.validation, moved.triggered.train, moved.triggered.validation)
    for part in parts:
        kinds = {getattr(part, name).device.type for name in ("images", "labels", "index", "true_labels")}
        assert kinds == {"meta"}
    assert moved.chosen is chosen  # what the method notes must reach the stage
    assert DefenderSample(train, validation).to("cpu").triggered is None


def test_empty_set():
    nothing = empty(43)
    assert (len(nothing), nothing.num_classes) == (0, 43)


def test_to_float():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_float(images).tolist() == [0.0, pytest.approx(0.2), 1.0]


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [
        (12, 5, [5, 5, 2]),
        (12, 4, [4, 4, 4]),
        (12, 100, [12]),
        (11, 5, [5, 6]),  # the image left over joins the batch before it
        (9, 2, [2, 2, 2, 3]),
        (3, 2, [3]),
        (1, 5, [1]),
    ],
)
def test_batch_sizes(toy_images, count, batch_size, sizes):
    batches = epoch(toy_images(count=count), batch_size)
    assert [len(b.rows) for b in batches] == sizes
    assert [len(b.images) for b in batches] == sizes
    assert [len(b.labels) for b in batches] == sizes


def test_an_epoch_shows_every_image_once_in_a_new_order(toy_images):
    images = toy_images(count=50)
    rng = streams.stream("order")
    loader = Loader(images, 7, NO_AUGMENTATION)
    orders = [torch.cat([b.rows for b in loader.epoch(rng)]).tolist() for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1] != list(range(50))


def test_no_augmentation_is_the_identity(toy_images):
    images = toy_images()
    for batch in epoch(images):
        assert torch.equal(batch.images, images.images[batch.rows].float() / 255)
        assert torch.equal(batch.labels, images.labels[batch.rows])


def test_a_loader_holds_no_border_around_its_images(toy_images):
    # 28 pixels around images of 224 would take 1.56 times their memory.
    images = toy_images(side=8)
    held = Loader(images, 4, Augmentation(crop_padding=7, flip=False))
    tensors = [value for value in vars(held).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == images.images.numel()


@pytest.mark.parametrize("augmentation", [CROP_AND_FLIP, NO_AUGMENTATION])
def test_batches_are_float_and_channels_last(toy_images, augmentation):
    for batch in epoch(toy_images(), augmentation=augmentation):
        assert batch.images.dtype == torch.float32
        assert batch.images.shape[1:] == (3, 8, 8)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "augmentation",
    [
        CROP_AND_FLIP,
        Augmentation(crop_padding=4, flip=False),
        Augmentation(crop_padding=0, flip=True),
        Augmentation(crop_padding=1, flip=True),
    ],
)
def test_augmentation_is_pad_crop_flip_image_by_image(toy_images, augmentation):
    images = toy_images(count=23)
    got, rows = together(epoch(images, augmentation=augmentation, seed=3))
    rng = streams.stream("epoch", 3)
    padding = augmentation.crop_padding
    order = torch.randperm(23, generator=rng)
    offsets = torch.randint(2 * padding + 1, (23, 2), generator=rng).tolist()
    coins = torch.rand(23, generator=rng).tolist()
    assert torch.equal(rows, order)
    for place, row in enumerate(order.tolist()):
        pixels = np.pad(images.images[row].numpy(), [(0, 0), (padding, padding), (padding, padding)])
        top, left = offsets[place]
        expected = pixels[:, top : top + 8, left : left + 8]
        if augmentation.flip and coins[place] < 0.5:
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(got[place].numpy(), expected.astype(np.float32) / np.float32(255))


def test_each_image_is_varied_on_its_own(toy_images):
    same = toy_images(count=100)
    same = dataclasses.replace(same, images=same.images[:1].expand(100, -1, -1, -1))
    (crops,) = epoch(same, 100, CROP_AND_FLIP)
    # 81 places and 2 sides: 100 fair draws of 162 hit about 75 different ones.
    assert len(crops.images.flatten(1).unique(dim=0)) > 60
    (flips,) = epoch(same, 100, Augmentation(crop_padding=0, flip=True))
    mirrored = (flips.images == same.images[:1].flip(3).float() / 255).flatten(1).all(1)
    assert len(flips.images.flatten(1).unique(dim=0)) == 2
    assert 30 < int(mirrored.sum()) < 70


def test_equal_generators_give_equal_batches(toy_images):
    images = toy_images(count=30)
    first, again, other = (
        together(epoch(images, augmentation=CROP_AND_FLIP, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_leave_the_set_and_the_global_generator_alone(toy_images):
    images, state = toy_images(), torch.get_rng_state()
    before = images.images.clone()
    for batch in epoch(images, augmentation=CROP_AND_FLIP):
        batch.images.zero_()
    for batch in epoch(images):
        batch.images.zero_()
    assert torch.equal(images.images, before)
    assert torch.equal(torch.get_rng_state(), state)
