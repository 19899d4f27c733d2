"""Gradient-based pruning with the trigger known, on a network whose every filter is known."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from detrojan import registry, rng
from detrojan.defenses._parts.gradient_pruning import Filters
from detrojan.images import TriggeredSample, to_float
from detrojan.learning import inference
from detrojan.models._parts import structure
from tests.unit.conftest import share


def load(name, **settings):
    return registry.load("defenses", name, settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def test_removes_the_planted_filter_and_nothing_else(planted, planted_sample):
    validation, stamped = planted_sample.validation, planted_sample.triggered.validation
    assert share(planted, validation.images, validation.labels) == 1
    assert share(planted, stamped.images, torch.zeros(8)) == 1  # the backdoor works
    filters = Filters(pruned := copy.deepcopy(planted))
    filters.remove(filters.scores(pruned, planted_sample.triggered.train))
    assert filters.removed_names() == ["conv:1"]
    assert share(pruned, stamped.images, stamped.labels) == 1
    before, after = planted.network.state_dict(), pruned.network.state_dict()
    for name in ("conv.weight", "conv.bias", "bn.weight", "bn.bias"):
        assert (after[name][1] == 0).all(), name
        kept = [0, 2, 3]
        assert torch.equal(after[name][kept], before[name][kept]), name
    for name in ("linear.weight", "linear.bias", "bn.running_mean", "bn.running_var"):
        assert torch.equal(after[name], before[name]), name


def test_repairs_the_planted_model(planted, planted_sample):
    repaired = defend(load("grad_prune", max_epochs=5), planted, planted_sample)
    assert planted_sample.chosen["pruned"] == ["conv:1"]
    assert (repaired.network.conv.weight[1] == 0).all()  # tuning did not let it grow back
    assert (repaired.network.bn.weight[1] == 0).all()
    stamped = planted_sample.triggered.validation
    assert share(repaired, stamped.images, stamped.labels) == 1


def test_scores_equal_a_loop_over_filters(toy_model, sample):
    filters = Filters(toy_model)
    scores = filters.scores(toy_model, sample.train)
    logits = toy_model(to_float(sample.train.images))
    loss = F.cross_entropy(logits, sample.train.labels)
    gradients = torch.autograd.grad(loss, [layer.weight for layer in filters.layers])
    slow = [gradient[k].abs().mean() for gradient in gradients for k in range(len(gradient))]
    assert len(slow) == len(filters)
    torch.testing.assert_close(scores, torch.stack(slow), rtol=1e-5, atol=1e-8)


def test_never_picks_a_filter_twice(toy_model, sample):
    filters = Filters(model := copy.deepcopy(toy_model))
    for _ in range(30):
        filters.remove(filters.scores(model, sample.train))
    assert len(set(filters.removed)) == 30


def test_candidates_and_their_norms_follow_the_data_flow(toy_model):
    pairs = structure.convolution_norms(toy_model.network)
    assert pairs["layer2.0.conv1"] == "layer2.0.bn2"
    assert pairs["layer2.0.conv2"] is pairs["layer2.0.shortcut"] is pairs["conv1"] is None
    assert len(pairs) == 20


def test_leaves_a_model_alone_that_has_nothing_to_unlearn(toy_model, sample):
    fitted = defend(load("ft", epochs=80, lr=0.05), toy_model, sample)
    same = dataclasses.replace(sample, triggered=TriggeredSample(sample.train, sample.validation), chosen={})
    before, _ = inference.evaluate(fitted, sample.validation)
    repaired = defend(load("grad_prune", max_rounds=5, max_epochs=1), fitted, same)
    after, _ = inference.evaluate(repaired, sample.validation)
    assert after > before - 0.1


def test_stops_on_a_gradient_that_is_not_finite(toy_model, sample):
    broken = copy.deepcopy(toy_model)
    broken.network.linear.bias.data[0] = math.inf
    clean = dataclasses.replace(sample, triggered=TriggeredSample(sample.train, sample.validation))
    with pytest.raises(ArithmeticError, match="not finite"):
        defend(load("grad_prune"), broken, clean)


@pytest.mark.parametrize("criterion", ["clean", "joint"])
def test_criterion_decides_which_loss_picks_the_epoch(planted, planted_sample, criterion):
    defense = load("grad_prune", criterion=criterion)
    clean_loss = inference.evaluate(planted, planted_sample.validation)[1]
    unlearning = inference.evaluate(planted, planted_sample.triggered.validation)[1]
    expected = clean_loss + (unlearning if criterion == "joint" else 0)
    assert defense.tuning_loss(planted, planted_sample, planted_sample.triggered) == pytest.approx(expected)


def test_another_round_keeps_what_was_removed(planted, planted_sample):
    # Nothing is left to unlearn, so the second round takes back its own removals and no others.
    model = copy.deepcopy(planted)
    filters, defense = Filters(model), load("grad_prune", patience=2)
    for _ in range(2):
        defense.prune(model, filters, planted_sample, planted_sample.triggered, accuracy=1.0)
        assert filters.removed_names() == ["conv:1"]
        assert (model.network.conv.weight[1] == 0).all()
        assert (model.network.conv.weight[[0, 2, 3]] != 0).any(1).all()


def test_drop_of_accuracy_counts_from_what_the_caller_says(planted, planted_sample):
    model = copy.deepcopy(planted)
    filters = Filters(model)
    # As if the model had come with more accuracy than there is: no removal is within the drop.
    load("grad_prune").prune(model, filters, planted_sample, planted_sample.triggered, accuracy=1.2)
    assert not filters.removed
    torch.testing.assert_close(model.state_dict(), planted.state_dict(), rtol=0, atol=0)


# --- when pruning and tuning end -------------------------------------------------------------------


@pytest.fixture
def known(sample):
    """Return the sample with other images for triggered copies, so that no two of its sets are alike."""
    train, validation = (
        dataclasses.replace(split, images=255 - split.images) for split in (sample.train, sample.validation)
    )
    return dataclasses.replace(sample, triggered=TriggeredSample(train, validation), chosen={})


@pytest.mark.parametrize(
    ("accuracies", "losses", "removed", "rounds"),
    [
        # The third is the best; two rounds without a better one end it, and are taken back.
        ([1.0] * 5, [2.0, 1.8, 1.9, 1.7, 1.7, 1.9], 3, 5),
        # A drop of exactly a tenth is one too many, whatever the loss, and ends it at once.
        ([1.0, 0.91, 0.9], [2.0, 1.8, 1.7, 1.6], 2, 3),
        ([1.0] * 2, [2.0, 2.0, 2.1], 0, 2),  # no better loss at all: the model as it came
        ([1.0] * 7, [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3], 7, 7),  # the cap on rounds
    ],
)
def test_pruning_ends_as_the_rules_say_and_keeps_the_best(
    toy_model, known, monkeypatch, accuracies, losses, removed, rounds
):
    accuracies_left, losses_left = list(accuracies), list(losses)

    def evaluate(model, images):
        assert not model.training
        if images is known.validation:
            return accuracies_left.pop(0), math.nan
        assert images is known.triggered.validation
        return math.nan, losses_left.pop(0)

    expected = copy.deepcopy(toy_model)
    reference = Filters(expected)
    for _ in range(removed):
        reference.remove(reference.scores(expected, known.triggered.train))
    monkeypatch.setattr(inference, "evaluate", evaluate)
    filters = Filters(model := copy.deepcopy(toy_model))
    defense = load("grad_prune", patience=2, max_rounds=7)
    defense.prune(model, filters, known, known.triggered, accuracy=1.0)
    assert len(accuracies) - len(accuracies_left) == len(losses) - len(losses_left) - 1 == rounds
    assert filters.removed == reference.removed
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_step_of_tuning_sees_a_clean_and_then_a_triggered_batch(toy_model, known, monkeypatch):
    defense = load("grad_prune", max_epochs=1, lr=0.1, weight_decay=0.01)
    falling = iter([1.0, 0.9])
    monkeypatch.setattr(type(defense), "tuning_loss", lambda *_: next(falling))
    filters = Filters(model := copy.deepcopy(toy_model))
    filters.remove(filters.scores(model, known.triggered.train))
    expected = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, weight_decay=0.01)
    for images in (known.train, known.triggered.train):
        F.cross_entropy(expected(to_float(images.images)), images.labels).backward()
    optimizer.step()
    for tensor in Filters(expected)._parameters(filters.removed[0].layer):
        tensor.data[filters.removed[0].channel] = 0
    assert defense.tune(model, filters, known, known.triggered, rng=rng.stream("tune")) == 1
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("losses", "best", "epochs"),
    [([2.0, 1.9, 1.95, 1.8, 1.8, 1.9, 1.0], 3, 5), ([2.0, 2.0, 2.1], 0, 2)],
)
def test_tuning_ends_as_the_rules_say_and_keeps_the_best(toy_model, known, monkeypatch, losses, best, epochs):
    def tuned(values, **settings):
        defense, left = load("grad_prune", lr=0.05, batch_size=16, **settings), list(values)
        monkeypatch.setattr(type(defense), "tuning_loss", lambda *_: left.pop(0))
        model = copy.deepcopy(toy_model)
        epoch = defense.tune(model, Filters(model), known, known.triggered, rng=rng.stream("tune"))
        return model.state_dict(), epoch, len(values) - len(left) - 1

    state, epoch, num_epochs = tuned(losses, tuning_patience=2)
    assert (epoch, num_epochs) == (best, epochs)
    expected = (
        tuned([2.0 - n for n in range(best + 1)], max_epochs=best)[0] if best else toy_model.state_dict()
    )
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


# --- a trained backdoor ----------------------------------------------------------------------------


def test_removes_a_patch(backdoored):
    accuracy, asr, _ = backdoored.rates(backdoored.model)
    assert asr > 0.9
    repaired = defend(load("grad_prune"), backdoored.model, backdoored.sample)
    repaired_accuracy, repaired_asr, recovered = backdoored.rates(repaired)
    assert repaired_asr < 0.05
    assert recovered > 0.9
    assert repaired_accuracy > accuracy - 0.03
