"""AWN: its two steps against hand-made networks where the answer is known, and a trained backdoor."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from detrojan import models, registry, rng
from detrojan.defenses._parts.channels import Channels
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import Batch, DefenderSample, Loader, to_float
from detrojan.learning import inference, training
from detrojan.settings import NO_AUGMENTATION


def load(**settings):
    return registry.load("defenses", "awn", settings)


def defend(model, clean, **settings):
    return load(**settings)(model, clean, rng=rng.stream("test"))


def gated_by(model):
    frozen = copy.deepcopy(model).requires_grad_(False)
    return functools.partial(Channels(frozen).logits, frozen)


@pytest.fixture
def ajar(planted):
    """Return the planted model with the trigger's channel slightly open on every image.

    A ReLU that is shut on all of them has no gradient that a perturbation could follow.
    """
    planted.network.bn.running_mean[1] = -0.01
    return planted


def start_for(images):
    return torch.zeros(1, 3, images.info.height, images.info.width)


def loader_of(images, batch_size=256):
    return Loader(images, batch_size, NO_AUGMENTATION)


# --- The perturbation ------------------------------------------------------------------------------


def linear(images, masks):
    """Return two logits: 0, and the mean red of each image times the first mask."""
    red = images[:, 0].mean((1, 2)) * masks[0]
    return torch.stack([torch.zeros_like(red), red], 1)


def test_perturbation_is_the_ascent_worked_out_by_hand(planted_sample):
    dark = planted_sample.train[planted_sample.train.labels == 0]
    pixels, rate = 64, 10.0
    # Red is 0, so both logits are, and the first class is what the model says. One step in the mean
    # of -log softmax: the gradient of each red pixel is its share 1/64 of the other class's 1/2.
    defense = load(passes=1, perturbation_lr=rate)
    found, norm = defense._perturb(linear, torch.ones(1), start_for(dark), loader_of(dark), rng.stream("any"))
    expected = torch.zeros(1, 3, 8, 8)
    expected[:, 0] = rate * 0.5 / pixels
    torch.testing.assert_close(found, expected)
    assert norm == pytest.approx(rate * 0.5)
    # The second step starts there: red is now that value, and the labels are still those of the images.
    found, _ = load(passes=2)._perturb(
        linear, torch.ones(1), start_for(dark), loader_of(dark), rng.stream("any")
    )
    red = rate * 0.5 / pixels
    assert found[0, 0, 0, 0].item() == pytest.approx(red + rate / pixels / (1 + math.exp(-red)))


def test_each_batch_is_a_step(planted_sample):
    dark = planted_sample.train[planted_sample.train.labels == 0]
    norms = [
        load(passes=passes)._perturb(
            linear, torch.ones(1), start_for(dark), loader_of(dark, size), rng.stream("any")
        )[1]
        for passes, size in ((4, 8), (2, 4), (1, 2))
    ]
    assert norms[0] == pytest.approx(norms[1])
    assert norms[0] == pytest.approx(norms[2])


def test_perturbation_is_scaled_to_the_bound_and_keeps_its_direction(toy_model, toy_images):
    images = toy_images()
    masks = torch.ones(len(Channels(toy_model)))

    def perturb(bound):
        return load(bound=bound)._perturb(
            gated_by(toy_model), masks, start_for(images), loader_of(images), rng.stream("any")
        )

    (free, norm), (bounded, same_norm) = perturb(1e9), perturb(2.0)
    assert norm == same_norm > 2
    assert free.abs().sum().item() == pytest.approx(norm)
    assert 2 * (1 - 1e-6) < bounded.abs().sum() <= 2 * (1 + 1e-6)
    torch.testing.assert_close(bounded * norm / 2, free)


def test_perturbation_hurts_the_model_as_gated(toy_model, toy_images):
    images = toy_images(count=24)
    gated, masks = gated_by(toy_model), torch.rand(len(Channels(toy_model)), generator=rng.stream("masks"))
    ascent = load(perturbation_lr=1000)  # an untrained network's logits hardly move
    found, _ = ascent._perturb(gated, masks, start_for(images), loader_of(images), rng.stream("any"))
    pixels = to_float(images.images)
    noise = found.flatten()[torch.randperm(found.numel(), generator=rng.stream("shuffle"))].view_as(found)
    said = gated(pixels, masks).argmax(1)

    def loss(perturbation):
        return nn.functional.cross_entropy(gated(pixels + perturbation, masks), said)

    untouched = loss(torch.zeros_like(found))
    assert loss(found) > untouched + 0.1
    assert loss(found) - untouched > 3 * (loss(noise) - untouched)  # the same values in other places


def test_a_perturbation_that_is_not_finite_stops_the_method(toy_model, toy_images):
    broken = copy.deepcopy(toy_model)
    broken.network.linear.bias.data[0] = math.nan
    images = toy_images(count=8)
    with pytest.raises(DivergedError, match="perturbation"):
        defend(broken, DefenderSample(images, images), epochs=1)


# --- The masks -------------------------------------------------------------------------------------


def test_loss_is_that_of_clean_images_and_of_clipped_moved_ones():
    seen = []

    def gated(images, masks):
        seen.append(images)
        return images.flatten(1)[:, :2] * masks.sum()

    pixels = torch.rand(4, 3, 2, 2, generator=rng.stream("pixels"))
    labels = torch.tensor([0, 1, 0, 1])
    perturbation = torch.tensor([0.9, -0.9, 0.0, 0.1] * 3).view(1, 3, 2, 2)
    masks = torch.tensor([0.5, 0.25, 1.0])
    loss, right = load(clean_weight=0.7, sparsity=0.01)._objective(
        gated, masks, perturbation, Batch(pixels, labels, torch.arange(4))
    )
    (both,) = seen  # one doubled batch
    assert torch.equal(both[:4], pixels)
    assert torch.equal(both[4:], (pixels + perturbation).clamp(0, 1))
    assert 0 <= both.min() <= both.max() <= 1
    logs = (both.flatten(1)[:, :2] * 1.75).log_softmax(1)
    clean, moved = -logs[range(4), labels], -logs[range(4, 8), labels]
    assert loss.item() == pytest.approx((0.7 * clean.mean() + 0.3 * moved.mean() + 0.01 * 1.75).item())
    assert right == (pixels.flatten(1)[:, :2].argmax(1) == labels).sum()


def test_each_round_starts_from_no_perturbation_and_at_a_lower_rate(toy_model, toy_images, monkeypatch):
    images, rounds = toy_images(count=8), []
    defense = load(epochs=3, passes=2, lr=0.2, lr_decay=0.5, max_drop=1)
    descend, perturb = training.descend, type(defense)._perturb

    def found(_self, gated, masks, start, loader, stream):
        rounds.append([bool(start.any()), masks.clone()])
        return perturb(_self, gated, masks, start, loader, stream)

    def fitted(parts, *arguments, **options):
        (part,) = parts.values()
        rounds[-1] += [options["epochs"], part.lr_at(0), part.lr_at(1)]
        return descend(parts, *arguments, **options)

    monkeypatch.setattr(type(defense), "_perturb", found)
    monkeypatch.setattr(training, "descend", fitted)
    defense(toy_model, DefenderSample(images, images[torch.arange(0)]), rng=rng.stream("test"))
    rates = [(started, passes, *some) for started, _, passes, *some in rounds]
    assert rates == [(False, 2, rate, rate) for rate in (0.2, 0.1, 0.05)]
    # Each attack is on the model as masked by then.
    masks = [masks for _, masks, *_ in rounds]
    assert (masks[0] == 1).all()
    assert not torch.equal(masks[1], masks[0])
    assert not torch.equal(masks[2], masks[1])


def test_only_scales_change_and_by_factors_within_0_and_1(toy_model, toy_images):
    images = toy_images(count=24)
    before = copy.deepcopy(toy_model.state_dict())
    sample = DefenderSample(images, images)
    repaired = defend(toy_model, sample, epochs=3, lr=0.3, max_drop=1)
    torch.testing.assert_close(toy_model.state_dict(), before, rtol=0, atol=0)
    norms = [name for name, module in toy_model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    scales = [f"{name}.weight" for name in norms]
    after = repaired.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name not in scales)
    factors = torch.cat([after[name] / before[name] for name in scales])
    assert 0 <= factors.min() < factors.max() <= 1
    chosen = sample.chosen
    # Steps of 0.3 run into both walls.
    assert chosen["num_closed"] == (factors == 0).sum() > 0
    assert (factors == 1).any()
    assert chosen["mean_mask"] == pytest.approx(factors.mean().item())
    assert len(chosen["perturbation_norms"]) == 3
    assert chosen["accuracy"] == [inference.evaluate(m, sample.everything)[0] for m in (toy_model, repaired)]
    assert not repaired.training
    assert all(parameter.requires_grad for parameter in repaired.parameters())


def test_masks_of_one_are_the_model_itself_on_mobilenet(toy_images):
    """Its epsilon is 1e-3, not PyTorch's 1e-5: masked layers with another one change every logit."""
    build = models.Build("mobilenet_v3_large", {}, 4, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    images = toy_images(side=32, count=8)
    pixels = to_float(images.images)
    with rng.global_stream(rng.stream("init")), torch.no_grad():
        model = models.build(build).train()
        model(pixels)
    model.eval()
    with torch.no_grad():
        assert torch.equal(gated_by(model)(pixels, torch.ones(len(Channels(model)))), model(pixels))
    repaired = defend(model, DefenderSample(images, images), epochs=1, passes=1, lr=1e-30)
    torch.testing.assert_close(repaired.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_sgd_leaves_the_masks_of_a_fitted_model_alone_and_adam_does_not(ajar, planted_sample):
    ajar.network.linear.weight.data.mul_(3)
    ajar.network.linear.bias.data.mul_(3)
    images = planted_sample.everything
    accuracy, loss = inference.evaluate(ajar, images)
    assert accuracy == 1
    assert loss < 1e-3
    defense = load(clean_weight=1, sparsity=0)
    frozen = copy.deepcopy(ajar).requires_grad_(False)
    masks = {name: defense._learn(frozen, images, name, rng.stream("any"))[0] for name in ("sgd", "adam")}
    assert ((masks["sgd"] > 0.99) & (masks["sgd"] <= 1)).all()
    assert masks["adam"][1] < 0.9  # by the sign of a gradient of 1e-4


@pytest.mark.parametrize(("max_drop", "optimizer"), [(0.05, "sgd"), (0.49, "sgd"), (0.5, "adam")])
def test_sgd_takes_over_where_adam_costs_accuracy(planted, planted_sample, monkeypatch, max_drop, optimizer):
    defense = load(max_drop=max_drop)
    seeds = []

    def learn(_self, frozen, images, optimizer, rng):
        seeds.append(rng.initial_seed())
        factor = {"adam": 0.0, "sgd": 0.75}[optimizer]  # without its channels the model says one class
        return torch.full((4,), factor), [1.0]

    monkeypatch.setattr(type(defense), "_learn", learn)
    repaired = defense(planted, planted_sample, rng=rng.stream("test"))
    chosen, factor = planted_sample.chosen, {"adam": 0.0, "sgd": 0.75}[optimizer]
    assert chosen["optimizer"] == optimizer
    assert chosen["accuracy"] == [1.0, {"adam": 0.5, "sgd": 1.0}[optimizer]]
    assert torch.equal(repaired.network.bn.weight, torch.full((4,), factor))
    assert len(set(seeds)) == 1  # both meet the same images


def test_a_model_without_batch_normalization_is_refused(planted_sample):
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(NotApplicableError, match="batch normalization"):
        defend(plain, planted_sample)


# --- Backdoors -------------------------------------------------------------------------------------


def test_the_channel_of_a_planted_backdoor_gets_the_lowest_mask(ajar, planted_sample):
    stamped = planted_sample.triggered.validation

    def share_of_target(model):
        return float((inference.logits(model, stamped).argmax(1) == 0).double().mean())

    assert share_of_target(ajar) == 1
    assert inference.evaluate(ajar, planted_sample.everything)[0] == 1
    repaired = defend(ajar, planted_sample, sparsity=0, lr=0.02)
    masks = repaired.network.bn.weight
    assert masks.argmin() == 1
    assert (masks[[0, 2, 3]] > 0.9).all()
    assert inference.evaluate(repaired, planted_sample.everything)[0] == 1
    assert share_of_target(repaired) == 0.5  # the dark images, which are of that class


def test_awn_weakens_a_trained_backdoor(backdoored):
    before = backdoored.rates(backdoored.model)
    assert before[1] > 0.9
    repaired = defend(backdoored.model, backdoored.sample, epochs=6, lr=0.05)
    after = backdoored.rates(repaired)
    assert after[0] > before[0] - 0.05
    assert after[1] < 0.5
    assert after[2] > 0.4
