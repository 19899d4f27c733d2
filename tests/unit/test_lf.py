"""LF: its filter, its steps and its pattern, by hand and against tiny models."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from detrojan import rng as streams
from detrojan.attacks.data_poisoning import lf
from detrojan.attacks.data_poisoning.lf import Lf

TARGET = 1
# Quick on images of noise, and leaves some of 60 to judge by.
QUICK = Lf(num_images=12, max_passes=8)


class Templates(nn.Module):
    """A linear classifier of 4 classes with random weights, for images of 3 × side × side."""

    def __init__(self, side):
        super().__init__()
        weight = torch.randn(4, 3, side, side, generator=streams.stream("templates"))
        self.weight = nn.Parameter(weight / weight[0].norm())

    def forward(self, images):
        return torch.einsum("nchw,kchw->nk", images - 0.5, self.weight)


class Brightness(nn.Module):
    """Calls an image class 1 if its mean is above ``threshold``, else class 0."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, images):
        excess = images.mean((1, 2, 3)) - self.threshold
        return torch.stack([-excess, excess], 1)


class Checkerboard(nn.Module):
    """Looks at the finest texture only, which no smooth pattern has."""

    def forward(self, images):
        rows, columns = images.shape[2:]
        signs = (-1.0) ** (torch.arange(rows).view(-1, 1) + torch.arange(columns))
        contrast = (images * signs).mean((1, 2, 3))
        return torch.stack([-contrast, contrast], 1)


class Constant(nn.Module):
    def forward(self, images):
        return 0 * images.mean((1, 2, 3))[:, None] + torch.tensor([1.0, 0.0, 0.0, 0.0])


def stream():
    return streams.stream("lf")


def learn(attack, images, model, target=TARGET):
    return attack.learn_trigger(images, model, target=target, rng=stream())


def flat(images, level):
    return dataclasses.replace(images, images=torch.full_like(images.images, level))


# --- the filter ------------------------------------------------------------------------------------


def test_blur_of_a_constant():
    blurred = lf._blur(torch.full((3, 64, 64), 0.3), 6.0)
    # 14 taps reach up and to the left, 15 down and to the right.
    assert blurred[:, 14:49, 14:49].numpy() == pytest.approx(np.full((3, 35, 35), 0.3), rel=1e-6)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[14:49, 14:49] = False
    assert (blurred[:, outside] < 0.3 - 1e-4).all()


@pytest.mark.parametrize("side", [32, 64])
def test_blur_is_the_convolution_with_the_gaussian(side):
    pattern = torch.randn(3, side, side, generator=stream())
    weights = np.array([math.exp(-0.5 * ((k - 14.5) / 6) ** 2) for k in range(30)])
    weights /= weights.sum()
    assert weights == pytest.approx(weights[::-1])
    padded = np.zeros((3, side + 29, side + 29))
    padded[:, 14:-15, 14:-15] = pattern.numpy()
    expected = np.zeros((3, side, side))
    for down in range(30):
        for along in range(30):
            expected += weights[down] * weights[along] * padded[:, down : down + side, along : along + side]
    assert lf._blur(pattern, 6.0).numpy() == pytest.approx(expected, abs=1e-6)


def test_blur_is_separable_and_leaves_channels_apart():
    point = torch.zeros(3, 40, 40)
    point[1, 20, 20] = 1
    spread = lf._blur(point, 2.0)
    assert not spread[[0, 2]].any()
    assert float(spread[1].sum()) == pytest.approx(1, rel=1e-6)
    rows, columns = spread[1].sum(1), spread[1].sum(0)
    torch.testing.assert_close(spread[1], torch.outer(rows, columns), rtol=1e-5, atol=1e-8)
    # Two taps share the middle; neighbours are exp(-1/2 (1.5² - 0.5²) / 2²) = exp(-1/4) of it.
    assert rows[19] == rows[20] == rows.max()
    assert float(rows[21] / rows[20]) == pytest.approx(math.exp(-0.25), rel=1e-5)


def test_rescale_is_joint_over_channels():
    pattern = torch.tensor([-3.0, 1.0, 5.0]).view(3, 1, 1).expand(3, 2, 2)
    expected = torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(lf._rescale(pattern, 0.2), expected)
    scaled = lf._rescale(torch.randn(3, 8, 8, generator=stream()), 0.2)
    assert float(scaled.min()) == 0
    assert float(scaled.max()) == float(torch.tensor(0.2))


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_rescale_of_a_constant_is_zero(level):
    assert torch.equal(lf._rescale(torch.full((3, 4, 4), level), 0.2), torch.zeros(3, 4, 4))


# --- DeepFool --------------------------------------------------------------------------------------


def linear(*weights, bias=None):
    """Return a classifier of images of 3 × 1 × 1 with these rows of weights."""
    layer = nn.Linear(3, len(weights))
    layer.weight.data = torch.tensor(weights)
    layer.bias.data = torch.zeros(len(weights)) if bias is None else torch.tensor(bias)
    return nn.Sequential(nn.Flatten(), layer)


def pixel(*values):
    return torch.tensor(values).view(3, 1, 1)


def test_deepfool_on_a_linear_classifier_takes_one_step():
    model, image = linear([1.0, 0.0, 0.0], [0.0, 2.0, 0.0]), pixel(0.8, 0.1, 0.5)
    # The gap is 0.8 - 0.2 = 0.6, its gradient w = (-1, 2, 0), so r = 0.6 / 5 (-1, 2, 0).
    moved, num_steps = lf._deepfool(model, image, 1, 200, 0.02)
    assert num_steps == 1
    torch.testing.assert_close(moved, 1.02 * pixel(-0.12, 0.24, 0.0))
    assert int(model((image + moved)[None]).argmax()) == 1
    assert int(model((image + moved / 1.02 * 0.99)[None]).argmax()) == 0


def test_deepfool_at_the_target_takes_none():
    model = linear([1.0, 0.0, 0.0], [0.0, 2.0, 0.0])
    moved, num_steps = lf._deepfool(model, pixel(0.1, 0.8, 0.5), 1, 200, 0.02)
    assert num_steps == 0
    assert torch.equal(moved, torch.zeros(3, 1, 1))


def test_deepfool_steps_away_from_whichever_class_leads():
    model, image = linear([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.8, 0.3]), pixel(1.0, 0.0, 0.5)
    # First r = 1 / 2 (-1, 1, 0), to (0.49, 0.51, 0.5): there class 2 leads by 0.558 - 0.51 = 0.048. Then
    # w = (0, 0.2, -0.3), and r grows by 0.048 / 0.13 w. Class 0 has been overtaken and does not count.
    moved, num_steps = lf._deepfool(model, image, 1, 200, 0.02)
    assert num_steps == 2
    expected = pixel(-0.5, 0.5, 0.0) + 0.048 / 0.13 * pixel(0.0, 0.2, -0.3)
    torch.testing.assert_close(moved, 1.02 * expected)
    assert int(model((image + moved)[None]).argmax()) == 1


@pytest.mark.parametrize("max_steps", [1, 7])
def test_deepfool_without_a_gradient_fails_without_nan(max_steps):
    moved, num_steps = lf._deepfool(Constant(), torch.rand(3, 4, 4, generator=stream()), 1, max_steps, 0.02)
    assert num_steps == max_steps
    assert torch.equal(moved, torch.zeros(3, 4, 4))


@pytest.mark.parametrize("num_steps", [0, 1, 8, 9, 10])
def test_only_images_that_arrive_in_time_change_the_pattern(toy_images, monkeypatch, num_steps):
    smooth, step = torch.rand(2, 3, 8, 8, generator=stream())
    monkeypatch.setattr(lf, "_deepfool", lambda *_: (step, num_steps))
    image = toy_images().images[0] / 255
    improved = Lf(max_steps=10)._improved(smooth, Constant(), image, 0, TARGET)
    expected = (
        lf._rescale(lf._blur(smooth + lf._blur(step, 6.0), 6.0), 0.2) if num_steps in (1, 8) else smooth
    )
    assert torch.equal(improved, expected)
    # An image that the pattern fools already is left alone: here class 3 became class 0.
    assert torch.equal(Lf(max_steps=10)._improved(smooth, Constant(), image, 3, TARGET), smooth)


# --- the pattern -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 64])
def test_pattern(side, toy_images):
    images = toy_images(side=side, count=60)
    trigger = learn(QUICK, images, Templates(side))
    pattern = trigger["pattern"]
    assert (pattern.dtype, pattern.shape) == (torch.uint8, (3, side, side))
    assert (int(pattern.min()), int(pattern.max())) == (0, 51)
    assert trigger.findings["norm"] == pytest.approx(math.sqrt((pattern.double() / 255).square().sum()))

    # Smooth, within the bounds that hold for the reference's published patterns.
    deviation = pattern.double() - pattern.double().mean((1, 2), keepdim=True)
    energy = torch.fft.fft2(deviation).abs().square().sum(0)
    cycles = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    radius = torch.hypot(cycles[:, None], cycles)
    assert energy[radius <= 2].sum() >= 0.96 * energy.sum()
    assert energy[radius <= 4].sum() >= 0.99 * energy.sum()
    assert max(pattern.int().diff(dim=1).abs().max(), pattern.int().diff(dim=2).abs().max()) <= 4

    # And visible: one kept as levels / 255 would vanish when it is added to 8-bit images.
    grey = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    stamped = QUICK.apply(grey, trigger)
    assert float((stamped != grey).any(1).double().mean()) > 0.9
    assert torch.equal(stamped[0].int() - 128, pattern.int())
    assert (QUICK.apply(images.images, trigger) >= images.images).all()


def test_levels_are_rounded(toy_images, monkeypatch):
    values = torch.tensor([0.0, 0.4, 0.6, 50.6]).repeat(48).view(3, 8, 8)
    monkeypatch.setattr(Lf, "_improved", lambda *_: values / 255)
    pattern = learn(Lf(num_images=4, max_passes=1), toy_images(), Constant())["pattern"]
    assert pattern[2, 7].tolist() == [0, 0, 1, 51, 0, 0, 1, 51]


def test_apply_clips():
    images = torch.tensor([0, 100, 204, 205, 255], dtype=torch.uint8).view(1, 1, 1, 5).expand(2, 3, 1, 5)
    stamped = Lf().apply(images, {"pattern": torch.full((3, 1, 5), 51, dtype=torch.uint8)})
    assert (stamped.dtype, stamped.shape) == (torch.uint8, images.shape)
    assert stamped[1, 2, 0].tolist() == [51, 151, 255, 255, 255]


def test_findings_on_a_model_of_brightness(toy_images):
    # Images at 0.4, and a pattern with a mean near 0.06: 0.41 is within its reach, 0.6 is not.
    images = flat(toy_images(num_classes=2, side=32, count=40), 102)
    attack = Lf(num_images=10, max_passes=20)
    fooled = learn(attack, images, Brightness(0.41))
    assert fooled.history == [{"pass": 1, "fooling_rate": 1.0}]  # one pass was enough
    assert (fooled.findings["fooling_rate"], fooled.findings["fooling_rate_target"]) == (1, 1)
    assert fooled.weakness is None
    unmoved = learn(attack, images, Brightness(0.6))
    # The same rate five times over: more passes would not help.
    assert unmoved.history == [{"pass": number, "fooling_rate": 0.0} for number in range(1, 6)]
    assert (unmoved.findings["fooling_rate"], unmoved.findings["fooling_rate_target"]) == (0, 0)
    assert "changes 0.0 % of the clean model's predictions, at least 20.0 % were wanted" in unmoved.weakness
    assert unmoved["pattern"].max() == 51


def test_the_target_counts_among_images_of_other_classes(toy_images):
    class Mixed(nn.Module):
        """Calls dark images 0, textured ones 1 and bright ones 2."""

        def forward(self, batch):
            dark, bright = Brightness(0.41)(batch).unbind(1)
            return torch.stack([dark, 10 * Checkerboard()(batch)[:, 1] - 0.05, bright], 1)

    images = flat(toy_images(num_classes=3, side=32, count=60), 102)
    rows = torch.arange(32)
    images.images[images.labels == 1] += (60 * ((rows[:, None] + rows) % 2 == 0)).byte()
    # The pattern brightens: images of classes 0 and 2 go from 0 to 2, those of class 1 stay.
    trigger = learn(Lf(num_images=10), images, Mixed())
    assert trigger.history == [{"pass": 1, "fooling_rate": pytest.approx(2 / 3)}]
    assert trigger.findings["fooling_rate"] == trigger.history[0]["fooling_rate"]
    assert trigger.findings["fooling_rate_target"] == 0


def test_no_smooth_pattern_fools_a_model_of_texture(toy_images):
    images = toy_images(num_classes=2, side=32, count=60)
    trigger = learn(QUICK, images, Checkerboard())
    assert trigger.findings["fooling_rate"] < 0.2
    assert trigger.weakness


def test_larger_magnitude(toy_images):
    pattern = learn(QUICK.model_copy(update={"magnitude": 0.5}), toy_images(side=32, count=60), Templates(32))
    assert pattern["pattern"].max() == 128  # 127.5 rounds to even


# --- what it can't do without ----------------------------------------------------------------------


def test_without_a_model(toy_images):
    with pytest.raises(ValueError, match="against a clean model, and was given none"):
        Lf().learn_trigger(toy_images(), rng=stream())


def test_a_model_that_no_image_can_change(toy_images):
    with pytest.raises(ValueError, match=r"of 4 images the model calls 0 class 1 already, .* fewer than 199"):
        learn(Lf(num_images=4), toy_images(), Constant())


def test_a_model_that_calls_everything_the_target(toy_images):
    with pytest.raises(ValueError, match="of 4 images the model calls 4 class 0 already"):
        learn(Lf(num_images=4), toy_images(), Constant(), target=0)


def test_too_few_images_to_judge_by(toy_images):
    with pytest.raises(ValueError, match=r"all 12 training images are learned from.* lower num_images"):
        learn(Lf(), toy_images(), Constant())


def test_images_to_learn_from_and_to_judge_by(toy_images):
    images = toy_images(count=100)
    sample, judged = Lf(num_images=30, eval_per_class=5)._draw(images, stream())
    assert len(sample) == 30
    assert torch.bincount(judged.labels).tolist() == [5, 5, 5, 5]
    together = [*sample.index.tolist(), *judged.index.tolist()]
    assert len(set(together)) == 50
    assert set(together) <= set(images.index.tolist())
    # Where there are fewer, all that is left.
    sample, judged = Lf(num_images=90, eval_per_class=50)._draw(images, stream())
    assert (len(sample), len(judged)) == (90, 10)


# --- purity ----------------------------------------------------------------------------------------


def test_model_and_global_stream_stay_as_they_were(toy_images, toy_model):
    images = toy_images(side=16, count=40)
    toy_model.network.conv1.weight.requires_grad_(False)
    flags = [p.requires_grad for p in toy_model.parameters()]
    assert len(set(flags)) == 2
    weights, state = copy.deepcopy(toy_model.state_dict()), torch.get_rng_state()
    attack = Lf(num_images=4, max_passes=2, max_steps=100)
    first = learn(attack, images, toy_model)
    again = learn(attack, images, toy_model)
    assert torch.equal(first["pattern"], again["pattern"])
    assert (first.history, first.findings) == (again.history, again.findings)
    torch.testing.assert_close(toy_model.state_dict(), weights, rtol=0, atol=0)
    assert [p.requires_grad for p in toy_model.parameters()] == flags
    assert all(p.grad is None for p in toy_model.parameters())
    assert not any(module.training for module in toy_model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_pattern_belongs_to_stream_target_and_model(toy_images):
    images = toy_images(side=32, count=60)
    pattern = learn(QUICK, images, Templates(32))["pattern"]
    assert torch.equal(pattern, learn(QUICK, images, Templates(32))["pattern"])
    used = stream()
    torch.rand(5, generator=used)  # how far the caller's stream has run does not count
    used_pattern = QUICK.learn_trigger(images, Templates(32), target=TARGET, rng=used)["pattern"]
    assert torch.equal(pattern, used_pattern)
    other = QUICK.learn_trigger(images, Templates(32), target=TARGET, rng=streams.stream("other"))["pattern"]
    assert not torch.equal(pattern, other)
    assert not torch.equal(pattern, learn(QUICK, images, Templates(32), target=2)["pattern"])
