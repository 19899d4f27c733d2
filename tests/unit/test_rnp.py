"""RNP, against a network whose backdoored channel is known and against steps worked out another way."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detrojan import registry, rng
from detrojan.defenses._parts.channels import Channels
from detrojan.errors import DivergedError
from detrojan.images import to_float
from detrojan.learning import inference
from detrojan.learning.meter import meter
from tests.unit.conftest import share

SIDE = 8
# Two classes: half of the images right is as bad as guessing.
DEEP = {"unlearning_lr": 0.01, "unlearning_weight_decay": 0, "stop_accuracy": 0.6}


@pytest.fixture
def sensitive(red_or_green):
    """Return a model that is right on clean images, and the more for class 0 the larger its channel 1 is."""
    return red_or_green(red=12.0, green=10.0, bias=2.0)


def load(**settings):
    return registry.load("defenses", "rnp", settings)


def test_the_planted_neuron_ends_with_the_lowest_mask_and_is_pruned_alone(sensitive, red_sample):
    stamped = red_sample.validation.images[red_sample.validation.labels == 1].clone()
    stamped[:, 1, -3:, -3:] = 255
    assert share(sensitive, stamped, 0) == 1  # the backdoor works
    defense = load(**DEEP)
    unlearned = defense.unlearn(sensitive, red_sample.everything, rng=rng.stream("unlearn"))
    masks, recovered = defense.recover(unlearned.model, red_sample.everything, rng=rng.stream("recover"))
    assert masks[1] < 0.05
    assert (masks[[0, 2, 3]] > 0.95).all()
    assert recovered.accuracy == 1
    repaired = defense(sensitive, red_sample, rng=rng.stream("test"))
    assert (repaired.network.bn.weight == 0).tolist() == [False, True, False, False]
    assert share(repaired, stamped, 1) == 1
    assert inference.evaluate(repaired, red_sample.everything)[0] == 1
    assert red_sample.chosen["unlearned_accuracy"] <= 0.6
    assert red_sample.chosen["recovered_accuracy"] == 1


def test_without_unlearning_recovery_leaves_the_planted_neuron_on(sensitive, red_sample):
    masks, _ = load().recover(copy.deepcopy(sensitive), red_sample.everything, rng=rng.stream("recover"))
    assert (masks > 0.8).all()


def test_unlearning_raises_the_loss_until_the_accuracy_is_low(sensitive, red_sample):
    before = copy.deepcopy(sensitive.state_dict())
    unlearned = load(**DEEP).unlearn(sensitive, red_sample.everything, rng=rng.stream("unlearn"))
    assert unlearned.lr == 0.01
    assert unlearned.last.accuracy <= 0.6
    assert 1 < unlearned.last.epoch < 20
    short = load(**DEEP, unlearning_epochs=1)
    assert short.unlearn(sensitive, red_sample.everything, rng=rng.stream("unlearn")).last.accuracy > 0.6
    _, loss = inference.evaluate(unlearned.model, red_sample.everything)
    assert loss > inference.evaluate(sensitive, red_sample.everything)[1] + 0.5
    never = load(**DEEP | {"stop_accuracy": 0})
    assert never.unlearn(sensitive, red_sample.everything, rng=rng.stream("unlearn")).last.epoch == 20
    torch.testing.assert_close(sensitive.state_dict(), before, rtol=0, atol=0)
    assert not sensitive.training


@pytest.mark.parametrize("limit", [0.01, 1e6])
def test_one_step_climbs_the_loss_no_further_than_the_clipped_gradient(toy_model, toy_images, limit):
    images = toy_images()
    defense = load(
        unlearning_epochs=1,
        unlearning_lr=0.5,
        unlearning_momentum=0,
        unlearning_weight_decay=0,
        max_gradient_norm=limit,
    )
    unlearned = defense.unlearn(toy_model, images, rng=rng.stream("unlearn")).model
    reference = copy.deepcopy(toy_model).train()
    F.cross_entropy(reference(to_float(images.images)), images.labels).backward()
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert 0.05 < gradient.norm() < 1e6
    before, after = (nn.utils.parameters_to_vector(m.parameters()) for m in (toy_model, unlearned))
    expected = 0.5 * gradient * min(1, limit / gradient.norm())
    torch.testing.assert_close(after - before, expected, rtol=1e-3, atol=1e-6)


def test_an_ascent_that_diverges_starts_again_with_a_tenth_of_the_rate(toy_model, toy_images):
    images = toy_images()
    settings = {"unlearning_epochs": 3, "stop_accuracy": 0, "unlearning_weight_decay": 0}
    with pytest.raises(DivergedError):
        load(unlearning_lr=1e38, max_retries=2, **settings).unlearn(toy_model, images, rng=rng.stream("x"))
    unlearned = load(unlearning_lr=1e38, max_retries=40, **settings).unlearn(
        toy_model, images, rng=rng.stream("x")
    )
    retries = round(math.log10(1e38 / unlearned.lr))
    assert 2 < retries < 40
    assert unlearned.lr == 1e38 / 10**retries
    at_once = load(unlearning_lr=unlearned.lr, max_retries=0, **settings).unlearn(
        toy_model, images, rng=rng.stream("x")
    )
    torch.testing.assert_close(at_once.model.state_dict(), unlearned.model.state_dict(), rtol=0, atol=0)


def test_recovery_takes_the_step_of_sgd_from_masks_of_one(toy_model, toy_images):
    images = toy_images()
    reference = copy.deepcopy(toy_model).train()
    F.cross_entropy(reference(to_float(images.images)), images.labels).backward()
    norms = [m for m in reference.modules() if isinstance(m, nn.BatchNorm2d)]
    gradient = torch.cat([norm.weight * norm.weight.grad for norm in norms]).detach()
    defense = load(recovery_epochs=1, recovery_lr=0.1, alpha=0.5)
    masks, _ = defense.recover(toy_model, images, rng=rng.stream("recover"))
    assert gradient.max() > 1e-3  # this test sees something
    torch.testing.assert_close(masks, (1 - 0.05 * gradient).clamp(0, 1), rtol=0, atol=1e-5)


def test_recovery_changes_only_masks_and_keeps_them_in_bounds(toy_model, toy_images):
    before = copy.deepcopy(dict(toy_model.named_parameters()))
    defense = load(recovery_epochs=10, recovery_lr=20)
    masks, _ = defense.recover(toy_model, toy_images(), rng=rng.stream("recover"))
    assert masks.min() == 0
    assert masks.max() == 1
    for name, parameter in toy_model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


def choose_with(monkeypatch, model, masks, right, **settings):
    """Return what is chosen of 100 images where the distinct pruned sets have ``right``, and those sets."""
    seen, rest = [], list(right)

    def num_right(trial, _images):
        assert not trial.training
        seen.append(torch.cat([n.weight for n in Channels(trial).norms]) == 0)
        return rest.pop(0)

    monkeypatch.setattr(inference, "num_right", num_right)
    return *load(**settings).choose(model, masks, range(100)), seen


@pytest.mark.parametrize("thresholding", ["sweep", "one_by_one"])
@pytest.mark.parametrize(
    ("right", "threshold", "num_pruned"),
    [
        ([100, 100, 98, 97], 0.5, 2),  # a drop of exactly 0.02 is allowed
        ([100, 97], 0.1, 0),  # the first set already costs too much
        ([50, 90, 49, 48], 0.98, 3),  # a gain stops nothing, nor moves what drops count from
        ([90, 95, 87], 0.3, 1),
    ],
)
def test_the_last_set_before_accuracy_falls_is_taken(
    sensitive, monkeypatch, right, threshold, num_pruned, thresholding
):
    masks = torch.tensor([0.51, 0.105, 1.0, 0.31])
    pruned, chosen, seen = choose_with(monkeypatch, sensitive, masks, right, thresholding=thresholding)
    assert torch.equal(pruned, masks < masks.sort().values[num_pruned])
    # One by one there is no threshold: it is the last mask that is pruned.
    last = threshold if thresholding == "sweep" else [0.0, *masks.sort().values.tolist()][num_pruned]
    assert chosen["threshold"] == pytest.approx(last)
    assert chosen["accuracy"] == [right[0] / 100, right[num_pruned] / 100]
    assert (chosen["num_judged"], chosen["allowed_errors"]) == (100, 2)
    # One pass for each distinct set, each set within the next, and none after the first that fails.
    assert len(seen) == len(right)
    assert not seen[0].any()
    assert [int(tried.sum()) for tried in seen] == list(range(len(right)))
    assert all((later | ~earlier).all() for earlier, later in itertools.pairwise(seen))


def test_one_by_one_tells_apart_masks_of_one_value_and_leaves_those_of_one(sensitive, monkeypatch):
    masks = torch.tensor([0.0, 0.0, 1.0, 0.0])
    pruned, chosen, seen = choose_with(
        monkeypatch, sensitive, masks, [100, 100, 97, 97], thresholding="one_by_one"
    )
    assert pruned.tolist() == [True, False, False, False]
    assert chosen["threshold"] == 0
    pruned, _, seen = choose_with(monkeypatch, sensitive, masks, [100] * 4, thresholding="one_by_one")
    assert pruned.tolist() == [True, True, False, True]
    assert len(seen) == 4
    # A sweep takes all of them or none.
    pruned, *_ = choose_with(monkeypatch, sensitive, masks, [100, 97])
    assert not pruned.any()


def test_choosing_equals_pruning_at_each_threshold_alone(sensitive, red_images):
    sample = red_images(64, "sample")
    sample = dataclasses.replace(
        sample, images=sample.images[torch.randperm(64, generator=rng.stream("mix"))]
    )
    masks = torch.tensor([0.63, 0.2, 0.4, 0.41])
    expected = 0.0
    first = inference.num_right(sensitive, sample)
    for step in range(50):
        pruned = copy.deepcopy(sensitive)
        Channels(pruned).prune(masks < step * 0.02, shift=False)
        if first - inference.num_right(pruned, sample) > 1:  # of 64 images 0.02 are one
            break
        expected = step * 0.02
    assert load().choose(sensitive, masks, sample)[1]["threshold"] == pytest.approx(expected)


def test_the_ascents_rate_falls_at_its_shares_of_the_run():
    authors = load(unlearning_schedule="steps", unlearning_lr=0.01)
    rates = [round(authors._lr_at(0.01, 21, epoch), 9) for epoch in range(21)]
    assert rates == [0.01] * 10 + [0.001] * 10 + [0.0001]
    rates = [round(authors._lr_at(0.01, 84, epoch), 9) for epoch in range(84)]
    assert rates == [0.01] * 40 + [0.001] * 40 + [0.0001] * 4
    cosine = load()
    assert cosine._lr_at(0.01, 80, 0) == 0.01
    assert cosine._lr_at(0.01, 80, 79) == pytest.approx(0.005 * (1 + math.cos(math.pi * 79 / 80)))


def test_vanishing_rates_prune_nothing(sensitive, red_sample):
    defense = load(unlearning_lr=1e-12, recovery_lr=1e-12)
    repaired = defense(sensitive, red_sample, rng=rng.stream("test"))
    torch.testing.assert_close(repaired.state_dict(), sensitive.state_dict(), rtol=0, atol=0)
    assert red_sample.chosen["num_pruned"] == 0
    assert red_sample.chosen["unlearning_epochs"] == 20


def test_pruning_zeroes_scales_and_touches_nothing_else(sensitive, red_sample):
    sensitive.network.bn.bias.data.fill_(0.25)
    before = copy.deepcopy(sensitive.state_dict())
    repaired = load(**DEEP, max_drop=0.6)(sensitive, red_sample, rng=rng.stream("test"))
    assert red_sample.chosen["num_pruned"] > 0
    after = repaired.state_dict()
    pruned = after["network.bn.weight"] == 0
    assert int(pruned.sum()) == red_sample.chosen["num_pruned"]
    assert torch.equal(after["network.bn.weight"][~pruned], before["network.bn.weight"][~pruned])
    for name in set(before) - {"network.bn.weight"}:
        assert torch.equal(after[name], before[name]), name
    torch.testing.assert_close(sensitive.state_dict(), before, rtol=0, atol=0)
    assert all(p.requires_grad and p.grad is None for p in sensitive.parameters())


def test_an_epoch_costs_a_pass_each_way(sensitive, red_sample):
    count = len(red_sample.everything)
    defense = load(unlearning_epochs=2, stop_accuracy=0, recovery_epochs=3)
    with meter(torch.device("cpu")) as spent:
        unlearned = defense.unlearn(sensitive, red_sample.everything, rng=rng.stream("x"))
        defense.recover(unlearned.model, red_sample.everything, rng=rng.stream("x"))
    assert (spent.forward_passes, spent.backward_passes) == (5 * count, 5 * count)


def test_a_patch_backdoor_is_weakened(backdoored):
    before = backdoored.rates(backdoored.model)
    after = backdoored.rates(load()(backdoored.model, backdoored.sample, rng=rng.stream("test")))
    assert 0 < backdoored.sample.chosen["num_pruned"] < 30
    assert after[1] < 0.3 < 0.9 < before[1]
    assert after[0] > before[0] - 0.05
    assert after[2] > 0.6
