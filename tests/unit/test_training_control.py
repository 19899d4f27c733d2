"""Attacks that control training: their triggers by hand, their batches, what learns with the classifier."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.attacks.training_control import iab
from detrojan.attacks.training_control.bpp import Bpp
from detrojan.attacks.training_control.iab import Generator, Iab
from detrojan.attacks.training_control.wanet import WaNet
from detrojan.images import Batch, Loader, to_float
from detrojan.labels import LabelMap
from detrojan.learning import metrics
from detrojan.learning.on_the_fly import drawn

LABELS = LabelMap(0)
PLAIN = {"crop_probability": 0, "rotation_probability": 0}  # no augmentation after the trigger


def batch_of(images):
    return Batch(to_float(images.images), images.labels, torch.arange(len(images)))


def smooth(images):
    """Return the set with smooth pictures in place of noise."""
    small = images.images[:, :, :4, :4].float()
    side = images.info.height
    pixels = F.interpolate(small, (side, side), mode="bicubic", align_corners=True).clamp(0, 255)
    return dataclasses.replace(images, images=pixels.round().to(torch.uint8))


def start(attack, images, labels=LABELS):
    trigger = attack.learn_trigger(images, rng=streams.stream("trigger"))
    return trigger, attack.poisoner(trigger, images, labels, rng=streams.stream("poisoner"))


# --- how many images of a batch --------------------------------------------------------------------


def test_fractions_are_drawn_so_that_the_mean_is_right():
    rng = streams.stream("drawn")
    counts = [drawn(1.28, rng) for _ in range(4000)]
    assert set(counts) == {1, 2}
    # Standard error of the mean: sqrt(.28 * .72 / 4000) = .0071.
    assert sum(counts) / len(counts) == pytest.approx(1.28, abs=0.03)
    assert {drawn(0.2, rng) for _ in range(100)} == {0, 1}
    assert [drawn(whole, rng) for whole in (0, 0.0, 3, 12.0)] == [0, 0, 3, 12]


# --- augmentation after the trigger ----------------------------------------------------------------


def augmented(attack, images, *, flip=False, seed=0):
    fill = torch.tensor([0.9, 0.8, 0.7])
    return attack.augment(images, fill, flip=flip, rng=streams.stream("augment", seed))


def numbered(count=64, side=9):
    """Return images whose pixels tell where they come from: row / 100 and column / 100."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (torch.stack([rows, columns, rows * 0]) / 100).expand(count, -1, -1, -1)


def test_without_augmentation_nothing_moves():
    images = numbered()
    assert torch.equal(augmented(WaNet(**PLAIN), images), images)


def test_crops_are_shifts_of_their_own_filled_with_the_mean_colour():
    images = numbered(count=400)
    changed = augmented(WaNet(crop_padding=2, crop_probability=1, rotation_probability=0), images)
    shifts = set()
    for image in changed:
        shift = (image[:2, 4, 4] * 100).round().int() - 4
        shifts.add(tuple(shift.tolist()))
        padded = F.pad(images[:1] + 1, [2] * 4)[0]  # what stays 0 is outside
        down, along = shift.tolist()
        window = padded[:, 2 + down : 11 + down, 2 + along : 11 + along]
        expected = torch.where(window > 0, window - 1, torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1))
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
    assert shifts == {(down, along) for down in range(-2, 3) for along in range(-2, 3)}


def test_flips_and_their_share():
    images = numbered(count=1000)
    changed = augmented(WaNet(**PLAIN), images, flip=True)
    mirrored = (changed == images.flip(3)).flatten(1).all(1)
    assert torch.equal(changed[~mirrored], images[~mirrored])
    assert 0.44 < float(mirrored.float().mean()) < 0.56  # within 4 standard errors


def test_rotation_by_a_right_angle(monkeypatch):
    images = numbered(count=1)
    draws = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]])  # the last but one: the largest angle
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: draws)
    attack = WaNet(crop_probability=0, rotation=90, rotation_probability=1)
    (turned,) = augmented(attack, images)
    expected = {torch.rot90(images[0], times, (1, 2)) for times in (1, 3)}
    assert any(torch.equal(turned, image) for image in expected)


def test_rotation_keeps_the_middle_and_each_image_has_its_own_angle():
    images = smooth_ramp()
    attack = WaNet(crop_probability=0, rotation=10, rotation_probability=1)
    changed = augmented(attack, images)
    torch.testing.assert_close(changed[:, :, 16, 16], images[:, :, 16, 16], rtol=0, atol=0.02)
    # Small angles may leave every pixel where it was, so not quite as many as images.
    assert len({image.numpy().tobytes() for image in changed}) > 25
    half = augmented(WaNet(crop_probability=0, rotation_probability=0.5), smooth_ramp(400))
    moved = (half != smooth_ramp(400)).flatten(1).any(1).float().mean()
    assert 0.3 < float(moved) < 0.5  # half, less those whose angle is too small to move a pixel


def smooth_ramp(count=32, side=33):
    return numbered(count, side)


# --- WaNet -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 64])
def test_wanet_displaces_by_about_a_quarter_of_a_pixel(side, toy_images):
    images = toy_images(side=side)
    means, largest = [], []
    for seed in range(40):
        grid = WaNet().learn_trigger(images, rng=streams.stream("field", seed))["grid"]
        identity = WaNet(strength=0).learn_trigger(images, rng=streams.stream("field", seed))["grid"]
        assert grid.shape == (side, side, 2)
        assert float(grid.abs().max()) <= 1
        pixels = (grid - identity) * (side - 1) / 2
        distance = pixels.square().sum(-1).sqrt()
        means.append(float(distance.mean()))
        largest.append(float(distance.max()))
    # The card's figures over 200 seeds: mean .28 (.23 to .35), largest .60 (.49 to .87).
    assert 0.25 < sum(means) / len(means) < 0.31
    assert min(means) > 0.2
    assert max(means) < 0.38
    assert max(largest) < 0.95


def test_wanet_identity_grid_leaves_images_alone(toy_images):
    images = toy_images(side=32)
    trigger = WaNet(strength=0).learn_trigger(images, rng=streams.stream("field"))
    assert torch.equal(WaNet(strength=0).apply(images.images, trigger), images.images)
    # x runs along the columns, y down the rows.
    assert trigger["grid"][0, -1].tolist() == [1, -1]
    assert trigger["grid"][-1, 0].tolist() == [-1, 1]


def test_wanet_on_a_ramp_shifts_by_the_field(toy_images):
    images = toy_images(side=32)
    trigger = WaNet().learn_trigger(images, rng=streams.stream("field"))
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(1, 3, 32, 32)
    warped = WaNet().apply(ramp, trigger)
    columns = (trigger["grid"][..., 0] + 1) / 2 * 31  # bilinear sampling of a ramp is exact
    assert torch.equal(warped[0, 0], (columns * 8).round().to(torch.uint8))
    constant = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(WaNet().apply(constant, trigger), constant)


def test_wanet_batch(toy_images):
    images = smooth(toy_images(side=32, count=20))
    attack = WaNet(**PLAIN)
    trigger, poisoner = start(attack, images)
    batch = batch_of(images)
    poisoned = poisoner.poison(batch, 4, rng=streams.stream("batch"))
    # As in the test set, to the last bit of 8.
    assert torch.equal(poisoned.images[:4], to_float(attack.apply(images.images[:4], trigger)))
    noise = poisoned.images[4:12]
    assert not torch.equal(noise, to_float(attack.apply(images.images[4:12], trigger)))
    assert (noise != batch.images[4:12]).flatten(1).any(1).all()
    assert torch.equal(poisoned.images[12:], batch.images[12:])
    assert poisoned.labels.tolist() == [0] * 4 + images.labels[4:].tolist()
    # More noise than there is room for: the batch is full.
    full = poisoner.poison(batch, 15, rng=streams.stream("batch"))
    assert (full.images != batch.images).flatten(1).any(1).all()
    assert torch.equal(poisoner.trigger()["grid"], trigger["grid"])


def test_wanet_field_belongs_to_its_stream(toy_images):
    images, others = toy_images(side=32), toy_images(side=32, num_classes=7, seed=1)
    grids = [WaNet().learn_trigger(i, rng=streams.stream("field"))["grid"] for i in (images, others)]
    assert torch.equal(*grids)
    assert not torch.equal(grids[0], WaNet().learn_trigger(images, rng=streams.stream("other"))["grid"])


# --- BppAttack -------------------------------------------------------------------------------------


def test_bpp_levels():
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    quantized = Bpp().apply(ramp, {})
    assert quantized.unique().tolist() == [0, 36, 73, 109, 146, 182, 219, 255]  # k * 255 / 7, rounded
    assert (quantized.int() - ramp.int()).abs().max() <= 19
    assert torch.equal(Bpp().apply(quantized, {}), quantized)
    assert Bpp(levels=2).apply(ramp, {}).unique().tolist() == [0, 255]


def test_bpp_dithering_keeps_the_mean(toy_images):
    images = smooth(toy_images(side=32)).images
    dithered = Bpp(dithering=True).apply(images, {})
    assert set(dithered.unique().tolist()) <= {0, 36, 73, 109, 146, 182, 219, 255}
    means = (dithered.float().mean((2, 3)), images.float().mean((2, 3)))
    torch.testing.assert_close(*means, rtol=0, atol=1.5)
    plain = Bpp().apply(images, {})
    local = [F.avg_pool2d(part.float(), 8) for part in (dithered, plain, images)]
    assert (local[0] - local[2]).abs().mean() < (local[1] - local[2]).abs().mean()


def test_floyd_steinberg_by_hand():
    # Levels 0 and 255. 100 -> 0, error 100: right 43.75, below left out, below 31.25, below right 6.25.
    image = torch.tensor([[100, 100], [100, 100]], dtype=torch.uint8).expand(1, 3, 2, 2)
    # Right: 143.75 -> 255, error -111.25: below left 3/16: -20.86, below 5/16: -34.77.
    # Below: 100 + 31.25 - 20.86 = 110.39 -> 0, error 110.39: right 48.30.
    # Below right: 100 + 6.25 - 34.77 + 48.30 = 119.78 -> 0.
    assert Bpp(levels=2, dithering=True).apply(image, {})[0, 0].tolist() == [[0, 255], [0, 0]]


def test_bpp_batch(toy_images):
    images = smooth(toy_images(side=32, count=20))
    attack = Bpp(**PLAIN, negative_ratio=0.25)
    _, poisoner = start(attack, images)
    batch = batch_of(images)
    poisoned = poisoner.poison(batch, 4, rng=streams.stream("batch"))
    assert torch.equal(poisoned.images[:4], to_float(attack.apply(images.images[:4], {})))
    negatives = poisoned.images[4:9]  # a quarter of 20
    errors = to_float(attack.apply(images.images, {})) - to_float(images.images)
    for host, negative in zip(batch.images[4:9], negatives, strict=True):
        # Each is its host plus the error of one training image, clipped.
        candidates = (host + errors).clamp(0, 1)
        assert (candidates - negative).abs().flatten(1).max(1).values.min() < 1e-6
        assert len((negative * 255).round().unique()) > 8  # not on the trigger's lattice
    assert torch.equal(poisoned.images[9:], batch.images[9:])
    assert torch.equal(poisoned.labels[4:], images.labels[4:])
    untouched = poisoner.poison(batch, 0, rng=streams.stream("batch"))
    assert torch.equal(untouched.images, batch.images)


# --- IAB -------------------------------------------------------------------------------------------


def test_iab_generators_have_the_size_of_the_release():
    assert sum(p.numel() for p in Generator(3).parameters()) == 723_273
    assert sum(p.numel() for p in Generator(1).parameters()) == 722_691


@pytest.mark.parametrize("side", [32, 64])
def test_iab_generators_reach_black_and_white(side):
    with streams.global_stream(streams.stream("generator")):
        generator = Generator(3)
    with torch.no_grad():
        generator.layers[-1].weight.fill_(100)
        made = generator(torch.randn(8, 3, side, side, generator=streams.stream("x")))
    assert made.shape == (8, 3, side, side)
    # With the port's second tanh they would stay within [0.119, 0.881].
    assert float(made.min()) == pytest.approx(0, abs=1e-6)
    assert float(made.max()) == pytest.approx(1, abs=1e-6)


def test_iab_threshold_is_nearly_binary():
    values = iab._threshold(torch.tensor([0.3, 0.5, 0.7]))
    torch.testing.assert_close(values, torch.tensor([3.35e-4, 0.5, 0.99966]), rtol=0, atol=1e-4)


def test_iab_diversity_by_hand():
    first, second = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.6)
    made, other = torch.zeros(2, 1, 4, 4), torch.tensor([0.3, 0.1]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert float(iab._alike(first, second, made, other)) == pytest.approx((0.6 / 0.3 + 0.6 / 0.1) / 2)
    # Equal masks: large, and with a derivative.
    same = torch.zeros(2, 1, 4, 4, requires_grad=True)
    iab._alike(first, second, same, same * 1).backward()
    assert same.grad.isfinite().all()


@pytest.fixture(scope="module")
def learned(toy_images):
    """The mask after a few epochs on small pictures, and the attack at work."""
    images = smooth(toy_images(side=16, count=64))
    attack = Iab(mask_epochs=10, mask_batch_size=8)
    trigger, poisoner = start(attack, images)
    return images, attack, trigger, poisoner


def test_iab_mask_shrinks_to_its_density(learned):
    _, attack, trigger, _ = learned
    densities = [row["density"] for row in trigger.history]
    assert len(densities) == 10
    assert densities[-1] < 0.75 * densities[0]
    assert trigger.findings["density"] < 0.75 * densities[0]
    assert attack._weakness(0.02) is None
    assert "cover 0.10% of the pixels, hardly anything, where 3.20%" in attack._weakness(0.001)
    assert "cover 20.00% of the pixels, too much, where 3.20%" in attack._weakness(0.2)


def test_iab_schedule_of_the_mask(toy_images, monkeypatch):
    seen = {}

    def look(parts, images, objective, **options):
        seen["lr"] = [parts["mask"].lr_at(epoch) for epoch in range(options["epochs"])]
        return []

    monkeypatch.setattr(iab, "descend", look)
    Iab(mask_epochs=25).learn_trigger(toy_images(side=16), rng=streams.stream("t"))
    assert seen["lr"] == pytest.approx([0.01] * 10 + [0.001] * 10 + [0.0001] * 5)


def test_iab_batch(learned):
    images, _, trigger, poisoner = learned
    batch = batch_of(images)
    poisoned = poisoner.poison(batch, 10, rng=streams.stream("batch"))
    assert poisoned.labels.tolist() == [0] * 10 + images.labels[10:].tolist()
    assert torch.equal(poisoned.images[20:], batch.images[20:])
    changed = (poisoned.images != batch.images).flatten(1).any(1)
    assert changed[:20].all()
    # Where the mask is nothing, a triggered image is the image.
    mask = iab._restored(trigger, "mask", 1)
    scale = iab._Scale.restored(trigger)
    covered = iab._threshold(mask(scale(batch.images[:10]))).expand(-1, 3, -1, -1)
    away = (poisoned.images[:10] - batch.images[:10]).detach().abs()
    assert (away <= covered + 1e-6).all()
    assert float(poisoned.penalty.detach()) > 0


def test_iab_gradients_reach_the_pattern_and_not_the_mask(learned):
    images, attack, trigger, _ = learned
    poisoner = attack.poisoner(trigger, images, LABELS, rng=streams.stream("poisoner"))
    poisoned = poisoner.poison(batch_of(images), 6, rng=streams.stream("batch"))
    poisoned.images[6:12].sum().backward()  # through the cross images alone
    pattern = poisoner.parts["pattern"].network
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [pattern.layers[0].weight])
    assert not any(p.requires_grad for p in poisoner._mask.parameters())
    after = poisoner.trigger()
    masks = {name for name in after if name.startswith("mask.")}
    assert masks
    assert all(torch.equal(after[name], trigger[name].cpu()) for name in masks)


def test_iab_without_triggered_images_has_no_penalty(learned):
    images, _, _, poisoner = learned
    untouched = poisoner.poison(batch_of(images), 0, rng=streams.stream("batch"))
    assert untouched.penalty is None
    assert torch.equal(untouched.images, batch_of(images).images)
    # No room for as many cross images: half of the batch at most.
    few = poisoner.poison(batch_of(images[torch.arange(5)]), 4, rng=streams.stream("batch"))
    assert few.num_poisoned == 2


def test_iab_patterns_are_of_the_image(learned):
    images, attack, _, poisoner = learned
    stamped = attack.apply(images.images, poisoner.trigger())
    change = (stamped.int() - images.images.int())[:2].flatten(1).double()
    assert not torch.equal(change[0], change[1])
    assert metrics.linf(images.images, stamped) > 0


@pytest.mark.parametrize("attack", [WaNet(), Bpp()])
def test_the_loader_leaves_augmentation_to_the_attack(attack, toy_images):
    images = toy_images(side=16)
    _, poisoner = start(attack, images)
    (batch,) = Loader(images, len(images), poisoner.augmentation).epoch(streams.stream("epoch"))
    assert torch.equal(batch.images, to_float(images.images[batch.rows]))


def test_noise_of_wanet_is_within_a_pixel_over_the_side(toy_images, monkeypatch):
    images = smooth(toy_images(side=32, count=8))
    attack = WaNet(**PLAIN)
    _, poisoner = start(attack, images)
    grids = []
    real = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", lambda x, g, **o: grids.append(g) or real(x, g, **o))
    poisoner.poison(batch_of(images), 2, rng=streams.stream("batch"))
    triggered, noise = grids
    assert (noise.shape[0], triggered.shape[0]) == (4, 2)
    distance = (noise - triggered[0]).abs()
    assert float(distance.max()) <= 1 / 32 + 1e-6
    assert float(distance.max()) > 0.9 / 32
    assert math.isclose(float(noise.abs().max()), 1, abs_tol=1e-6)
