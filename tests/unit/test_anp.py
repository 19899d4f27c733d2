"""ANP, against a network whose backdoored channel is known and against steps worked out another way."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import registry, rng
from detrojan.defenses._parts.channels import Channels
from detrojan.defenses.clean_data import anp as anp_module
from detrojan.images import Loader
from detrojan.learning import inference
from detrojan.learning.meter import meter
from detrojan.settings import NO_AUGMENTATION
from tests.unit.conftest import share

SIDE = 8
QUICK = {"iterations": 60, "batch_size": 128, "lr": 0.1}


@pytest.fixture
def sensitive(red_or_green):
    """Return a model that is right by a wide margin, until its channel 1 grows to 1.7 times its scale."""
    return red_or_green(red=100.0, green=120.0, bias=10.0)


def load(**settings):
    return registry.load("defenses", "anp", settings)


def test_the_planted_neuron_ends_with_the_lowest_mask_and_is_pruned_alone(sensitive, red_sample):
    stamped = red_sample.validation.images[red_sample.validation.labels == 1].clone()
    stamped[:, 1, -3:, -3:] = 255
    assert share(sensitive, stamped, 0) == 1  # the backdoor works
    masks = load(**QUICK).learn_masks(sensitive, red_sample.train, rng=rng.stream("test"))
    assert masks[1] < 0.1
    assert (masks[[0, 2, 3]] > 0.95).all()
    repaired = load(**QUICK)(sensitive, red_sample, rng=rng.stream("test"))
    assert (repaired.network.bn.weight == 0).tolist() == [False, True, False, False]
    assert share(repaired, stamped, 1) == 1
    assert inference.evaluate(repaired, red_sample.validation)[0] == 1


def test_only_perturbation_shows_the_planted_neuron(sensitive, red_sample):
    def learn(**settings):
        return load(**QUICK, **settings).learn_masks(sensitive, red_sample.train, rng=rng.stream("test"))

    without_noise = learn(eps=0)
    assert (without_noise > 0.9).all()
    assert torch.equal(learn(alpha=1, eps=0.4), learn(alpha=1, eps=0))  # nor does the clean loss alone
    torch.testing.assert_close(learn(alpha=1), without_noise)


def rebuilt(model, masks, noise):
    """Return a copy of ``model`` whose scales and shifts are those of the perturbed network."""
    copied = copy.deepcopy(model)
    scale, shift = noise
    start = 0
    for module in copied.modules():
        if isinstance(module, nn.BatchNorm2d):
            part = slice(start, start := start + module.num_features)
            module.weight.data = (masks[part] + scale[part]) * module.weight.data
            module.bias.data = (1 + shift[part]) * module.bias.data
    return copied


def test_perturbed_loss_equals_that_of_a_rebuilt_network(toy_model, toy_images):
    for norm in (m for m in toy_model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias, generator=rng.stream("shifts"))
    channels = Channels(toy_model.train())
    masks = torch.rand(len(channels), generator=rng.stream("masks"))
    noise = torch.rand(2, len(channels), generator=rng.stream("noise")) - 0.5
    images = toy_images()
    batch = Loader(images, 12, NO_AUGMENTATION).any(12, rng.stream("batch"))
    loss = anp_module.perturbed_loss(copy.deepcopy(toy_model), channels, masks, noise, batch)
    expected = F.cross_entropy(rebuilt(toy_model, masks, noise)(batch.images), batch.labels)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_noise_moves_by_the_budget_towards_a_larger_loss(toy_model, toy_images, steps):
    model = toy_model.train().requires_grad_(False)
    channels = Channels(model)
    masks = torch.ones(len(channels))
    batch = Loader(toy_images(), 12, NO_AUGMENTATION).any(12, rng.stream("batch"))
    defense = load(eps=0.4, steps=steps)
    noise = defense.perturb(model, channels, masks, batch, rng=rng.stream("noise"))
    start = (2 * torch.rand(2, len(channels), generator=rng.stream("noise")) - 1) * 0.4
    assert start.abs().max() <= 0.4
    moved = noise - start
    loss_before, loss_after = (
        anp_module.perturbed_loss(model, channels, masks, n, batch) for n in (start, noise)
    )
    assert loss_after > loss_before
    if steps == 1:
        # From a fresh PreAct-ResNet whose shifts are 0, only scales have a gradient.
        torch.testing.assert_close(moved[0].abs(), torch.full_like(moved[0], 0.4))
        moving = start.clone().requires_grad_()
        anp_module.perturbed_loss(model, channels, masks, moving, batch).backward()
        assert torch.equal(moved.sign(), moving.grad.sign())
        assert noise.abs().max() > 0.5  # not projected back to eps
    else:
        sizes = moved[0].abs()
        assert (
            torch.minimum(sizes, (sizes - 0.4).abs()).max() < 1e-6
        )  # two steps of 0.2: there and back, or on


def test_the_first_step_is_that_of_sgd_on_both_losses(sensitive, red_images):
    defense = load(iterations=1, batch_size=16, lr=0.05, alpha=0.3)
    train, stream = red_images(16, "train"), rng.stream("test")
    for parameter in sensitive.network.linear.parameters():
        parameter.data *= 0.05  # a loss that bends slowly
    masks = defense.learn_masks(sensitive, train, rng=stream)
    model = copy.deepcopy(sensitive).train()
    batch = Loader(train, 16, NO_AUGMENTATION).any(16, rng.child(stream, "images"))
    noise = defense.perturb(model, Channels(model), torch.ones(4), batch, rng=rng.child(stream, "noise"))

    def loss(masks):
        rows = [(rebuilt(sensitive, masks, n).train(), w) for n, w in ((0 * noise, 0.3), (noise, 0.7))]
        return sum(w * F.cross_entropy(m(batch.images), batch.labels).item() for m, w in rows)

    small = 1e-2
    gradient = torch.tensor(
        [(loss(1 + small * unit) - loss(1 - small * unit)) / (2 * small) for unit in torch.eye(4)]
    )
    assert gradient[1] > 0.1  # this test sees something
    torch.testing.assert_close(masks, (1 - 0.05 * gradient).clamp(0, 1), rtol=0, atol=1e-3)


def test_learning_leaves_the_model_alone_and_masks_in_bounds(toy_model, toy_images):
    before = copy.deepcopy(toy_model.state_dict())
    masks = load(iterations=5, batch_size=12, lr=2).learn_masks(toy_model, toy_images(), rng=rng.stream("x"))
    assert masks.min() == 0
    assert masks.max() == 1
    assert len(masks) == sum(m.num_features for m in toy_model.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(toy_model.state_dict(), before, rtol=0, atol=0)
    assert not toy_model.training
    assert all(p.requires_grad and p.grad is None for p in toy_model.parameters())


def test_each_step_costs_three_passes_each_way(sensitive, red_images):
    with meter(torch.device("cpu")) as spent:
        load(iterations=5, batch_size=16).learn_masks(sensitive, red_images(16, "train"), rng=rng.stream("x"))
    assert (spent.forward_passes, spent.backward_passes) == (5 * 16 * 3, 5 * 16 * 3)


def test_a_vanishing_rate_prunes_nothing(sensitive, red_sample):
    repaired = load(iterations=3, batch_size=16, lr=1e-9)(sensitive, red_sample, rng=rng.stream("test"))
    torch.testing.assert_close(repaired.state_dict(), sensitive.state_dict(), rtol=0, atol=0)
    assert red_sample.chosen["num_pruned"] == 0


def test_thresholds_and_rounding():
    defense = load()
    assert len(defense.thresholds) == 20
    assert defense.thresholds[:3] == [-1, 0, 0.05]
    assert defense.thresholds[-1] == 0.9
    masks = torch.tensor([0.0, 0.00004, 0.05, 0.05004, 0.05006, 0.3, 0.90001, 1.0])
    counts = [int(anp_module.at_most(masks, t).sum()) for t in (-1, 0, 0.05, 0.1, 0.3, 0.9)]
    assert counts == [0, 2, 4, 5, 6, 7]


def test_sets_are_nested_and_the_sweep_equals_pruning_one_by_one(toy_model, toy_images, monkeypatch):
    images, thresholds = toy_images(), load().thresholds
    masks = torch.rand(len(Channels(toy_model)), generator=rng.stream("masks"))
    masks[(masks > 0.12) & (masks < 0.73)] = 1.0  # so that no mask lies between some thresholds
    before = copy.deepcopy(toy_model.state_dict())
    calls = []

    def fingerprint(model, images):  # tells apart what accuracy on so few images does not
        calls.append(1)
        return float(inference.logits(model, images).square().sum())

    monkeypatch.setattr(inference, "num_right", fingerprint)
    expected, previous, num_sets = [], torch.zeros(len(masks), dtype=torch.bool), 1
    for threshold in thresholds:
        pruned = anp_module.at_most(masks, threshold)
        assert (pruned | ~previous).all()
        num_sets += not torch.equal(pruned, previous)
        previous = pruned
        alone = copy.deepcopy(toy_model)
        Channels(alone).prune(pruned, shift=False)
        expected.append(fingerprint(alone, images))
    assert 3 < num_sets == len(set(expected)) < len(thresholds)
    calls.clear()
    assert anp_module.sweep(toy_model, masks, thresholds, images) == expected
    assert len(calls) == num_sets
    torch.testing.assert_close(toy_model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("right", "threshold", "last_passing"),
    [
        # Of 16 images, with a tolerance of an eighth.
        ([16] + [16] * 4 + [13] + [15] * 2 + [8] * 12, 0.15, 0.3),
        ([16] + [14] * 19, 0.9, 0.9),  # a drop of exactly the tolerance is within it
        ([8] + [15] * 18 + [6], 0.85, 0.85),  # a gain refuses nothing; the drop is relative to 8
        ([0] + [0] * 19, -1, -1),  # nothing to lose: no pruning
    ],
)
def test_the_largest_threshold_before_the_first_refusal_is_taken(
    sensitive, red_sample, monkeypatch, right, threshold, last_passing
):
    masks = torch.tensor([0.95, 0.1, 0.88, 0.0])
    monkeypatch.setattr(type(load()), "learn_masks", lambda *_args, **_keywords: masks)
    monkeypatch.setattr(anp_module, "sweep", lambda *_args: right)
    repaired = load(tolerance=0.125)(sensitive, red_sample, rng=rng.stream("test"))
    chosen = red_sample.chosen
    assert chosen["threshold"] == threshold
    assert chosen["last_passing_threshold"] == last_passing
    assert (chosen["num_judged"], chosen["allowed_errors"]) == (16, right[0] // 8)
    assert torch.equal(repaired.network.bn.weight == 0, masks <= threshold)


def test_a_fixed_threshold_holds_nothing_back_and_judges_nothing(sensitive, red_sample, monkeypatch):
    taught = []

    def learn(_self, _model, images, *, rng):
        taught.append(len(images))
        return torch.tensor([0.21, 0.2, 0.0, 0.3])

    monkeypatch.setattr(type(load()), "learn_masks", learn)
    defense = load(thresholding="fixed", learn_on="all")
    repaired = defense(sensitive, red_sample, rng=rng.stream("test"))
    assert taught == [len(red_sample.everything)]
    assert torch.equal(repaired.network.bn.weight == 0, torch.tensor([False, True, True, False]))
    chosen = red_sample.chosen
    assert (chosen["threshold"], chosen["num_pruned"]) == (0.2, 2)
    assert chosen["accuracy"] == [
        inference.evaluate(m, red_sample.everything)[0] for m in (sensitive, repaired)
    ]
    assert not {"num_judged", "allowed_errors"} & set(chosen)


def test_pruning_zeroes_scales_and_touches_nothing_else(sensitive, red_sample):
    sensitive.network.bn.bias.data.fill_(0.25)
    repaired = load(**QUICK)(sensitive, red_sample, rng=rng.stream("test"))
    assert red_sample.chosen["num_pruned"] > 0
    before, after = sensitive.state_dict(), repaired.state_dict()
    pruned = after["network.bn.weight"] == 0
    assert int(pruned.sum()) == red_sample.chosen["num_pruned"]
    assert torch.equal(after["network.bn.weight"][~pruned], before["network.bn.weight"][~pruned])
    for name in set(before) - {"network.bn.weight"}:
        assert torch.equal(after[name], before[name]), name


def test_a_loss_that_is_not_finite_stops_it(sensitive, red_sample):
    sensitive.network.linear.bias.data[0] = math.inf
    with pytest.raises(ArithmeticError, match="not finite"):
        load(iterations=2, batch_size=16)(sensitive, red_sample, rng=rng.stream("test"))


def test_a_patch_backdoor_is_removed(backdoored):
    before = backdoored.rates(backdoored.model)
    # As far as 500 steps at the default rate, but in 50.
    defense = load(iterations=50, batch_size=32, lr=0.1)
    after = backdoored.rates(defense(backdoored.model, backdoored.sample, rng=rng.stream("test")))
    assert after[1] < 0.2 < 0.9 < before[1]
    assert after[0] > before[0] - 0.03
    assert after[2] > 0.8
