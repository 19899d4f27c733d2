"""Triggers pixel by pixel, the poisoned and triggered sets, and the measures of both."""

import dataclasses
import hashlib
import itertools
import math
import struct

import numpy as np
import pytest
import torch

from detrojan import rng as streams
from detrojan.attacks.base import LearnedTrigger
from detrojan.attacks.data_poisoning.badnets import BadNets
from detrojan.attacks.data_poisoning.blended import Blended
from detrojan.attacks.data_poisoning.sig import Sig
from detrojan.images import DefenderSample
from detrojan.labels import LabelMap
from detrojan.learning import metrics
from detrojan.stages import poisoning

ATTACKS = (BadNets(), Blended(), Sig())
TARGET = 1
LABELS = LabelMap(TARGET)


def trigger_of(attack, images):
    return attack.learn_trigger(images, rng=streams.stream("trigger"))


def poison(attack, images, ratio, labels=LABELS, seed=0):
    rng = streams.stream("poison", seed)
    return poisoning.poison(attack, trigger_of(attack, images), images, ratio, labels, rng=rng)


def grey(level, side, count=1):
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_apply_gives_new_images_of_the_same_kind(attack, side, toy_images):
    images = toy_images(side=side)
    before = images.images.clone()
    trigger = trigger_of(attack, images)
    stamped = attack.apply(images.images, trigger)
    assert (stamped.dtype, stamped.shape) == (torch.uint8, images.images.shape)
    assert not torch.equal(stamped, before)
    assert torch.equal(images.images, before)
    # Neither the order of the images nor their number matters.
    assert torch.equal(attack.apply(images.images[[5]], trigger), stamped[[5]])


# --- BadNets ---------------------------------------------------------------------------------------


def test_badnets_on_32_pixels(toy_images):
    attack, images = BadNets(), toy_images(side=32)
    trigger = trigger_of(attack, images)
    changed = attack.apply(grey(0, 32), trigger)[0]
    expected = torch.zeros(3, 32, 32, dtype=torch.uint8)
    expected[:, 29:32, 29:32] = 255
    assert torch.equal(changed, expected)
    stamped = attack.apply(images.images, trigger)
    assert torch.equal(stamped[:, :, 29:, 29:], grey(255, 3, len(images)))
    assert torch.equal(stamped[:, :, :29], images.images[:, :, :29])
    assert torch.equal(stamped[:, :, :, :29], images.images[:, :, :, :29])
    assert torch.equal(attack.apply(stamped, trigger), stamped)


def test_badnets_on_64_pixels_is_a_soft_patch(toy_images):
    attack, images = BadNets(), toy_images(side=64)
    trigger = trigger_of(attack, images)
    rows = [
        [16, 48, 64, 64, 64, 64, 64],  # 255 / 16, 255 * 3 / 16, 255 / 4
        [48, 143, 191, 191, 191, 191, 191],  # 255 * 9 / 16, 255 * 3 / 4
        *([[64, 191, 255, 255, 255, 255, 255]] * 5),
    ]
    patch = torch.tensor(rows, dtype=torch.uint8)
    assert (int((patch > 0).sum()), int((patch == 255).sum())) == (49, 25)
    for level in (0, 200, 255):  # the dark rim is stamped too, onto brighter pixels
        expected = grey(level, 64)
        expected[:, :, 57:, 57:] = patch
        assert torch.equal(attack.apply(grey(level, 64), trigger), expected)


def test_badnets_side(toy_images):
    attack = BadNets(side=5)
    stamped = attack.apply(grey(0, 32), trigger_of(attack, toy_images(side=32)))
    assert stamped[0].nonzero().min(0).values.tolist() == [0, 27, 27]
    assert int((stamped == 255).sum()) == 3 * 25


# --- Blended ---------------------------------------------------------------------------------------


def test_blended_is_the_floor_of_the_exact_mixture():
    image, key = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    images, key_image = image.expand(1, 3, -1, -1).byte(), key.expand(3, -1, -1).byte()

    def mixed(alpha):
        return Blended(alpha=alpha).apply(images, {"key": key_image})[0, 0].int()

    assert torch.equal(mixed(0.2), (4 * image + key).int() // 5)
    assert (mixed(0.2) - image).abs().max() <= 52
    assert torch.equal(mixed(0), image.int())
    assert torch.equal(mixed(1), key.int())


@pytest.mark.parametrize("side", [32, 64])
def test_blended_key(side, toy_images):
    images = toy_images(side=side)
    key = trigger_of(Blended(), images)["key"]
    assert (key.dtype, key.shape) == (torch.uint8, (3, side, side))
    # Bright and coloured, with texture: near the mean of the reference's picture, and no flat plane.
    means, deviations = key.float().mean((1, 2)), key.float().std((1, 2))
    assert ((means > 180) & (means < 220)).all()
    assert (deviations > 20).all()
    stamped = Blended().apply(key[None], {"key": key})
    assert (stamped.int() - key.int()).abs().max() <= 1


def test_blended_key_belongs_to_its_own_seed(toy_images):
    images, others = toy_images(side=32), toy_images(side=32, seed=1)
    key = trigger_of(Blended(), images)["key"]
    assert torch.equal(key, Blended().learn_trigger(others, rng=streams.stream("other"))["key"])
    assert not torch.equal(key, trigger_of(Blended(key_seed=1), images)["key"])


# --- SIG -------------------------------------------------------------------------------------------


def test_sig_on_mid_grey(toy_images):
    stamped = Sig().apply(grey(128, 32), trigger_of(Sig(), toy_images(side=32)))
    # 40 sin(0, 67.5°, 135°, ...) = 0, 36.96, 28.28, -15.31, -40, ...: six periods are three times two.
    half = [0, 37, 28, -15, -40, -15, 28, 37]
    period = half + [-value for value in half]
    expected = torch.tensor(2 * period).expand(3, 32, 32)
    assert torch.equal(stamped[0].int() - 128, expected)


@pytest.mark.parametrize("side", [32, 64])
def test_sig_is_one_frequency(side, toy_images):
    images = toy_images(side=side)
    signal = trigger_of(Sig(), images)["signal"].double()
    assert float(signal.square().mean().sqrt()) == pytest.approx(40 / math.sqrt(2), rel=1e-6)
    spectrum = torch.fft.fft(signal).abs() / side
    assert spectrum[6] == pytest.approx(20, rel=1e-6)
    assert spectrum[side - 6] == pytest.approx(20, rel=1e-6)
    spectrum[[6, side - 6]] = 0
    assert spectrum.max() < 1e-4
    stamped = Sig().apply(grey(128, side), {"signal": signal.float()})
    assert metrics.linf(grey(128, side), stamped) == 40
    assert torch.equal(stamped, stamped[:, :1, :1].expand(-1, 3, side, -1))


def test_sig_clips(toy_images):
    trigger = trigger_of(Sig(), toy_images(side=32))
    white, black = (Sig().apply(grey(level, 32), trigger)[0, 0, 0].tolist() for level in (250, 5))
    assert white[:5] == [250, 255, 255, 235, 210]
    assert black[:5] == [5, 42, 33, 0, 0]


# --- poisoning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratio", "expected"),
    [(10, 0.15, 2), (10, 0.25, 2), (10, 0.35, 4), (50, 0.05, 2), (40, 0.1, 4), (40, 1.0, 40)],
)
def test_poisoned_count_is_rounded_half_to_even(toy_images, count, ratio, expected):
    assert len(poison(BadNets(), toy_images(count=count), ratio)) == expected


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_poisoned_rows(attack, toy_images):
    images = toy_images(side=16, count=60)
    rows = poison(attack, images, 0.2)
    assert len(rows) == 12
    assert rows.labels.tolist() == [TARGET] * 12
    places = (rows.index - 10) // 3
    assert places.unique().tolist() == places.tolist()  # sorted, none twice
    assert torch.equal(rows.true_labels, places % 4)
    originals = images.images[places]
    assert torch.equal(rows.images, attack.apply(originals, trigger_of(attack, images)))
    assert not torch.equal(rows.images, originals)


def test_clean_label_poisons_the_target_class_only(toy_images):
    images = toy_images(side=16, count=60)
    clean_label, dirty_label = poison(Sig(), images, 0.2), poison(BadNets(), images, 0.2)
    assert torch.equal(clean_label.labels, clean_label.true_labels)
    assert clean_label.true_labels.tolist() == [TARGET] * 12
    assert len(dirty_label.true_labels.unique()) == 4  # the target's own images are among them


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_a_larger_ratio_poisons_the_same_images_and_more(attack, toy_images):
    images = toy_images(count=100)
    chosen = [set(poison(attack, images, ratio).index.tolist()) for ratio in (0.01, 0.05, 0.1, 0.2)]
    assert [len(index) for index in chosen] == [1, 5, 10, 20]
    for small, large in itertools.pairwise(chosen):
        assert small < large


def test_attacks_of_one_label_mode_poison_the_same_images(toy_images):
    images = toy_images(count=100)
    badnets, blended, other = (
        poison(attack, images, 0.1, seed=seed).index.tolist()
        for attack, seed in ((BadNets(), 0), (Blended(), 0), (BadNets(), 1))
    )
    assert badnets == blended != other


def test_infeasible_ratio(toy_images):
    images = toy_images(count=60)  # 15 of the target class
    assert len(poison(Sig(), images, 0.25)) == 15
    with pytest.raises(ValueError, match=r"0\.3 of 60 images asks for 18 .* there are 15 .* and 0\.25"):
        poison(Sig(), images, 0.3)
    with pytest.raises(
        ValueError, match=r"0\.001 of 60 images asks for 0 .* there are 60 .* between 0\.0083"
    ):
        poison(BadNets(), images, 0.001)


def test_triggered_test_set(toy_images):
    images = toy_images(side=16, count=14)  # labels 0 1 2 3 ... 0 1: four of the target
    trigger = trigger_of(BadNets(), images)
    triggered = poisoning.triggered_test(BadNets(), trigger, images, LABELS)
    rows = [0, 2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert triggered.index.tolist() == [10 + 3 * row for row in rows]
    assert triggered.true_labels.tolist() == [row % 4 for row in rows]
    assert triggered.labels.tolist() == [TARGET] * 10
    assert torch.equal(triggered.images, BadNets().apply(images.images[rows], trigger))


def test_triggered_test_set_without_another_class(toy_images):
    images = toy_images()
    targets = images[images.labels == TARGET]
    with pytest.raises(ValueError, match="all 3 test images are of the target class 1"):
        poisoning.triggered_test(BadNets(), trigger_of(BadNets(), images), targets, LABELS)


def test_stamped_sample_keeps_its_true_labels(toy_images):
    images = toy_images(side=16)
    sample = DefenderSample(images[torch.tensor([6, 1])], images[torch.tensor([3])])
    trigger = trigger_of(BadNets(), images)
    stamped = poisoning.stamp(BadNets(), trigger, {4: sample})
    assert list(stamped) == [4]
    for copies, clean in ((stamped[4].train, sample.train), (stamped[4].validation, sample.validation)):
        assert torch.equal(copies.index, clean.index)
        assert torch.equal(copies.labels, clean.labels)
        assert torch.equal(copies.true_labels, clean.labels)
        assert torch.equal(copies.images, BadNets().apply(clean.images, trigger))


def test_all_to_all_moves_every_class_to_the_next(toy_images):
    images = toy_images(side=16, count=14)
    all_to_all = LabelMap(TARGET, "all_to_all")
    rows = poison(BadNets(), images, 0.5, all_to_all)
    assert torch.equal(rows.labels, (rows.true_labels + 1) % 4)
    trigger = trigger_of(BadNets(), images)
    triggered = poisoning.triggered_test(BadNets(), trigger, images, all_to_all)
    assert torch.equal(triggered.index, images.index)  # every class has another to go to
    assert triggered.labels.tolist() == [(row % 4 + 1) % 4 for row in range(14)]
    assert torch.equal(triggered.true_labels, images.labels)
    with pytest.raises(ValueError, match="clean-label attack needs one target, not the label map all_to_all"):
        poison(Sig(), images, 0.1, all_to_all)


def test_card(toy_images):
    images = toy_images(side=32, count=40)
    rows = poison(BadNets(), images, 0.23)
    card = poisoning.card(BadNets(), rows, images)
    assert card["hyperparameters"] == {"side": 3}
    assert (card["num_train"], card["num_poisoned"]) == (40, 9)
    assert card["effective_ratio"] == 9 / 40
    assert card["num_relabelled"] == sum(int(label) != TARGET for label in rows.true_labels)
    index = rows.index.tolist()
    assert card["indices_digest"] == hashlib.sha256(struct.pack("<9q", *index)).hexdigest()


def test_triggered_card(toy_images):
    images = toy_images(side=32, count=40)
    images = dataclasses.replace(images, images=grey(0, 32, 40))
    triggered = poisoning.triggered_test(BadNets(), trigger_of(BadNets(), images), images, LABELS)
    card = poisoning.triggered_card(BadNets(), triggered, images, LABELS)
    assert card["hyperparameters"] == {"side": 3}
    assert (card["label_map"], card["target"], card["num_triggered"]) == ("all_to_one", TARGET, 30)
    # 9 of 1,024 pixels change by 255.
    assert card["psnr"] == pytest.approx(10 * math.log10(1024 / 9))
    assert card["linf"] == 255
    assert card["ssim"] == metrics.ssim(grey(0, 32, 30), triggered.images)
    assert 0 < card["ssim"] < 1
    all_to_all = LabelMap(TARGET, "all_to_all")
    assert poisoning.triggered_card(BadNets(), triggered, images, all_to_all)["target"] is None


def test_examples_are_pairs_of_the_same_images_for_every_attack(toy_images):
    images = toy_images(side=32, count=60)
    shown = []
    for attack in ATTACKS:
        trigger = trigger_of(attack, images)
        triggered = poisoning.triggered_test(attack, trigger, images, LABELS)
        pairs = poisoning.examples(triggered, images)
        clean, copies = pairs[torch.arange(8)], pairs[torch.arange(8, 16)]
        assert torch.equal(clean.index, copies.index)
        assert torch.equal(clean.labels, clean.true_labels)
        assert torch.equal(copies.true_labels, clean.labels)
        assert (copies.labels == TARGET).all()
        assert torch.equal(copies.images, attack.apply(clean.images, trigger))
        shown.append(clean)
    assert all(torch.equal(clean.index, shown[0].index) for clean in shown)
    assert all(torch.equal(clean.images, shown[0].images) for clean in shown)


def test_trigger_card(caplog):
    assert poisoning.trigger_card(BadNets(), {}) == {
        "hyperparameters": {"side": 3},
        "history": [],
        "findings": {},
        "weakness": None,
    }
    weak = LearnedTrigger({}, history=[{"epoch": 1}], findings={"rate": 0.1}, weakness="reads nothing")
    card = poisoning.trigger_card(BadNets(), weak)
    assert (card["history"], card["findings"]) == ([{"epoch": 1}], {"rate": 0.1})
    assert card["weakness"] == "reads nothing"
    assert "a weak trigger: reads nothing" in caplog.text


@pytest.mark.parametrize(("ratio", "shown"), [(0.1, 4), (0.5, 8)])
def test_preview(toy_images, ratio, shown):
    images = toy_images(side=32, count=40)
    images = dataclasses.replace(images, images=grey(7, 32, 40))
    sheet = poisoning.preview(poison(BadNets(), images, ratio), images)
    step = 96 + 4
    assert sheet.size == (84 + step * shown, 3 * step)
    left = 84 + step * (shown - 1)  # of the last column; a pixel of the image is 3 pixels here
    corner, middle = left + 95, left + 48
    assert [sheet.getpixel((middle, row * step + 48)) for row in range(3)] == [
        (7, 7, 7),
        (7, 7, 7),
        (128, 128, 128),
    ]
    assert [sheet.getpixel((corner, row * step + 95))[0] for row in range(3)] == [7, 255, 255]
    assert sheet.getpixel((corner - 9, 2 * step + 95)) == (128, 128, 128)


# --- measures --------------------------------------------------------------------------------------


def test_accuracy():
    assert metrics.accuracy(torch.tensor([1, 2, 0, 3]), torch.tensor([1, 0, 0, 3])) == 0.75
    assert metrics.accuracy(torch.tensor([5]), torch.tensor([4])) == 0.0


@pytest.mark.parametrize(("predicted", "labels"), [(3, 4), (0, 0)])
def test_accuracy_refuses(predicted, labels):
    with pytest.raises(ValueError, match=f"{predicted} predictions for {labels} labels"):
        metrics.accuracy(torch.zeros(predicted), torch.zeros(labels))


def test_psnr_is_the_mean_over_changed_images():
    clean = grey(100, 2, 3)
    triggered = clean.clone()
    triggered[0, 0, 0, 0] = 106  # mean square 36 / 12
    triggered[1] = 90  # mean square 100
    expected = (10 * math.log10(65025 / 3) + 10 * math.log10(65025 / 100)) / 2
    assert metrics.psnr(clean, triggered) == pytest.approx(expected, rel=1e-12)
    assert metrics.psnr(clean, clean) is None


def test_linf_is_the_largest_change_of_either_sign():
    clean = grey(100, 2, 2)
    triggered = clean.clone()
    triggered[0, 0, 0, 0], triggered[1, 2, 1, 0] = 130, 0
    assert metrics.linf(clean, triggered) == 100
    assert metrics.linf(grey(0, 2), grey(255, 2)) == 255
    assert metrics.linf(clean, clean) == 0


def slow_ssim(a, b):
    """Return the mean of one channel's SSIM over its windows, worked out window by window."""
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(taps, taps) / taps.sum() ** 2
    scores = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x, y = (c[top : top + 11, left : left + 11].astype(np.float64) for c in (a, b))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            variance_x = (weights * (x - mean_x) ** 2).sum()
            variance_y = (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            luminance = (2 * mean_x * mean_y + 2.55**2) / (mean_x**2 + mean_y**2 + 2.55**2)
            structure = (2 * covariance + 7.65**2) / (variance_x + variance_y + 7.65**2)
            scores.append(luminance * structure)
    return np.mean(scores)


def test_ssim_window_by_window(toy_images):
    clean = toy_images(side=14, count=2).images[:, :, :13]  # not square
    triggered = (clean.float() * 0.7 + 20).round().byte()
    triggered[1, 2] = 255 - clean[1, 2]
    expected = np.mean(
        [slow_ssim(clean[i, c].numpy(), triggered[i, c].numpy()) for i in range(2) for c in range(3)]
    )
    assert metrics.ssim(clean, triggered) == pytest.approx(expected, rel=1e-10)
    assert metrics.ssim(triggered, clean) == pytest.approx(expected, rel=1e-12)
    assert metrics.ssim(clean, clean) == pytest.approx(1, abs=1e-12)


def test_ssim_of_flat_images_is_their_luminance():
    expected = (2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2)
    assert metrics.ssim(grey(100, 11), grey(120, 16)[:, :, :11, :11]) == pytest.approx(expected, rel=1e-9)


def test_ssim_of_many_images_is_their_mean():
    # More than are worked on at once, in unequal parts.
    triggered = torch.cat([grey(100, 11, 256), grey(120, 11, 2)])
    flat = (2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2)
    assert metrics.ssim(grey(100, 11, 258), triggered) == pytest.approx((256 + 2 * flat) / 258, rel=1e-9)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match=r"11×11 pixels, not \(10, 10\)"):
        metrics.ssim(grey(0, 10), grey(0, 10))
