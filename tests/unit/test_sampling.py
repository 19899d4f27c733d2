"""The defender's sample: how many images, which, and how they are split."""

import itertools

import pytest

from detrojan.stages import sampling

CLASSES = 3


@pytest.fixture
def pool(toy_images):
    return toy_images(num_classes=CLASSES, side=2, count=CLASSES * 110)


def draw(pool, spc, number=0, dataset="toy"):
    return sampling.draw_samples(pool, dataset, spc, [number])[number]


def per_class(images):
    return [int((images.labels == label).sum()) for label in range(CLASSES)]


@pytest.mark.parametrize(
    ("spc", "train", "validation"),
    [(1, 1, 0), (2, 1, 1), (5, 4, 1), (10, 9, 1), (15, 14, 1), (19, 18, 1), (20, 18, 2), (100, 90, 10)],
)
def test_spc_counts_all_that_the_defender_holds(pool, spc, train, validation):
    sample = draw(pool, spc)
    assert per_class(sample.train) == [train] * CLASSES
    assert per_class(sample.validation) == [validation] * CLASSES
    assert len(sample.everything.index.unique()) == spc * CLASSES  # none twice, none in both
    assert sample.triggered is None


def test_images_keep_their_labels_and_index(pool):
    sample = draw(pool, 5)
    for images in (sample.train, sample.validation):
        rows = (images.index - 10) // 3
        assert images.labels.tolist() == (rows % CLASSES).tolist()
        assert images.images.tolist() == pool.images[rows].tolist()


def test_a_larger_sample_contains_a_smaller_one(pool):
    held = [set(draw(pool, spc).everything.index.tolist()) for spc in (1, 2, 5, 10, 100)]
    for small, large in itertools.pairwise(held):
        assert small < large


def test_nothing_but_the_names_decides(pool):
    alone = draw(pool, 10, 3)
    among = sampling.draw_samples(pool, "toy", 10, range(5))[3]
    assert alone.train.index.tolist() == among.train.index.tolist()
    assert alone.validation.index.tolist() == among.validation.index.tolist()


def test_draws_and_data_sets_differ(pool):
    held = {
        tuple(sorted(draw(pool, 10, number, dataset).everything.index.tolist()))
        for number in range(3)
        for dataset in ("toy", "other")
    }
    assert len(held) == 6


def test_order_of_the_images_means_nothing(pool):
    labels = draw(pool, 10).train.labels.tolist()
    assert labels != sorted(labels)


def test_a_whole_class_can_be_held(pool):
    assert per_class(draw(pool, 110).everything) == [110] * CLASSES


def test_too_few_images(toy_images):
    # Eleven images take turns in three classes: the last has three.
    pool = toy_images(num_classes=3, count=11)
    with pytest.raises(
        ValueError, match=r"class 2 \(class 2\) has 3 images .* spc asks for 4.*data set cifar"
    ):
        sampling.draw_samples(pool, "cifar", 4, [0])
    assert len(draw(pool, 3).everything) == 9


def test_a_class_without_images(toy_images):
    images = toy_images()
    pool = images[images.labels != 3]
    with pytest.raises(ValueError, match=r"class 3 .* has 0 images"):
        sampling.draw_samples(pool, "toy", 1, [0])
