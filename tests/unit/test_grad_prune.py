"""Gradient-based pruning with the trigger known, on a network whose every filter is known."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from detrojan import models, registry, rng
from detrojan.defenses._parts import gradient_pruning as module
from detrojan.defenses._parts.gradient_pruning import Filters, Limit, NextTensorFilters, Tuned
from detrojan.errors import NotApplicableError
from detrojan.images import DatasetInfo, DefenderSample, ImageSet, TriggeredSample, to_float
from detrojan.learning import inference
from detrojan.models._parts import structure
from detrojan.settings import NO_AUGMENTATION
from detrojan.study import protocols
from tests.unit.conftest import share
from tests.unit.test_places import network_of


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


def test_some_triggered_images_score_the_filters_the_same_in_each_round(toy_model, sample, monkeypatch):
    seen = []

    def scores(self, model, images):
        seen.append(images.index.tolist())
        return torch.arange(len(self), dtype=torch.float32)

    monkeypatch.setattr(Filters, "scores", scores)
    given = dataclasses.replace(sample, triggered=TriggeredSample(sample.train, sample.validation))
    some = load("grad_prune", score_images=8, max_rounds=3, max_epochs=1, max_drop=1.0)
    defend(some, toy_model, given)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    rows = torch.isin(sample.train.index, torch.tensor(seen[0]))
    assert torch.bincount(sample.train.labels[rows]).tolist() == [2, 2, 2, 2]  # balanced
    # As many as there are, or more, is all.
    all_of_them = load("grad_prune", score_images=len(sample.train))
    assert all_of_them.scored_rows(sample.train, rng=rng.stream("test")) is None


def test_never_picks_a_filter_twice(toy_model, sample):
    filters = Filters(model := copy.deepcopy(toy_model))
    for _ in range(30):
        filters.remove(filters.without_removed(filters.scores(model, sample.train)))
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
    limit = defense.limit(model, planted_sample)
    for _ in range(2):
        defense.prune(model, filters, limit, planted_sample.triggered, rng=rng.stream("prune"))
        assert filters.removed_names() == ["conv:1"]
        assert (model.network.conv.weight[1] == 0).all()
        assert (model.network.conv.weight[[0, 2, 3]] != 0).any(1).all()


def test_drop_of_accuracy_counts_from_what_the_caller_says(planted, planted_sample):
    model = copy.deepcopy(planted)
    filters, defense = Filters(model), load("grad_prune")
    # As if the model had come with more accuracy than there is: no removal is within the drop.
    limit = defense.limit(model, planted_sample)._replace(right=10)
    defense.prune(model, filters, limit, planted_sample.triggered, rng=rng.stream("prune"))
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
    ("right", "losses", "removed", "rounds"),
    [
        # The third is the best; two rounds without a better one end it, and are taken back.
        ([20] * 5, [2.0, 1.8, 1.9, 1.7, 1.7, 1.9], 3, 5),
        # A drop of exactly the tolerance is tolerated; one image more ends it at once, whatever the loss.
        ([20, 18, 17], [2.0, 1.8, 1.7, 1.6], 2, 3),
        ([20] * 2, [2.0, 2.0, 2.1], 0, 2),  # no better loss at all: the model as it came
        ([20] * 7, [2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3], 7, 7),  # the cap on rounds
    ],
)
def test_pruning_ends_as_the_rules_say_and_keeps_the_best(
    toy_model, known, monkeypatch, right, losses, removed, rounds
):
    right_left, losses_left = list(right), list(losses)

    def num_right(model, images):
        assert not model.training
        assert images is known.validation
        return right_left.pop(0)

    def evaluate(model, images):
        assert not model.training
        assert images is known.triggered.validation
        return math.nan, losses_left.pop(0)

    expected = copy.deepcopy(toy_model)
    reference = Filters(expected)
    for _ in range(removed):
        scores = reference.scores(expected, known.triggered.train)
        reference.remove(reference.without_removed(scores))
    monkeypatch.setattr(module.inference, "num_right", num_right)
    monkeypatch.setattr(inference, "evaluate", evaluate)
    filters = Filters(model := copy.deepcopy(toy_model))
    defense = load("grad_prune", patience=2, max_rounds=7)
    limit = Limit(known.validation, right=20, allowed=2)
    defense.prune(model, filters, limit, known.triggered, rng=rng.stream("prune"))
    assert len(right) - len(right_left) == len(losses) - len(losses_left) - 1 == rounds
    assert filters.removed == reference.removed
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


# --- how much accuracy may be lost -----------------------------------------------------------------


def with_right(monkeypatch, right):
    monkeypatch.setattr(module.inference, "num_right", lambda model, images: right)


@pytest.mark.parametrize(
    ("ties", "right", "allowed"),
    [
        ("counted", 10, 1),
        ("counted", 9, 1),
        ("counted", 8, 1),
        # 1.0 - 0.9 and 0.9 - 0.8 come out below 0.1 in floating point, 0.8 - 0.7 does not.
        ("float", 10, 1),
        ("float", 9, 1),
        ("float", 8, 0),
    ],
)
def test_ties_are_counted_or_as_floating_point_has_them(
    toy_model, toy_images, monkeypatch, ties, right, allowed
):
    images = toy_images(count=10)
    with_right(monkeypatch, right)
    limit = load("grad_prune", ties=ties).limit(toy_model, DefenderSample(images, images))
    assert (limit.right, limit.allowed) == (right, allowed)


def test_a_tolerance_of_all_lets_all_be_lost(toy_model, toy_images, monkeypatch):
    images = toy_images(count=10)
    with_right(monkeypatch, 7)
    for ties, allowed in (("counted", 10), ("float", 7)):
        limit = load("grad_prune", ties=ties, max_drop=1.0).limit(toy_model, DefenderSample(images, images))
        assert limit.allowed == allowed


def test_limit_is_of_validation_images_or_of_all(toy_model, sample):
    for which, images in (("validation", sample.validation), ("all", sample.everything)):
        limit = load("grad_prune", accuracy_images=which).limit(toy_model, sample)
        assert torch.equal(limit.images.index, images.index)
        assert limit.right == round(inference.evaluate(toy_model, images)[0] * len(images))
        assert limit.allowed == len(images) // 10
        assert limit.allows(toy_model)
        assert not limit._replace(right=limit.right + limit.allowed + 1).allows(toy_model)


# --- tuning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["two_passes", "mixed"])
@pytest.mark.parametrize("regrow", [False, True])
def test_a_step_of_tuning_sees_clean_and_triggered_images(toy_model, known, monkeypatch, batch, regrow):
    defense = load("grad_prune", max_epochs=1, lr=0.1, weight_decay=0.01, tuning_batch=batch, regrow=regrow)
    falling = iter([1.0, 0.9])
    monkeypatch.setattr(type(defense), "tuning_loss", lambda *_: next(falling))
    filters = Filters(model := copy.deepcopy(toy_model))
    filters.remove(filters.scores(model, known.triggered.train))
    expected = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1, weight_decay=0.01)
    images = [to_float(part.images) for part in (known.train, known.triggered.train)]
    labels = known.train.labels
    if batch == "mixed":
        # The sum of both means is twice the mean over both.
        (2 * F.cross_entropy(expected(torch.cat(images)), torch.cat([labels, labels]))).backward()
    else:
        for part in images:
            F.cross_entropy(expected(part), labels).backward()
    optimizer.step()
    if not regrow:
        for tensor, row in Filters(expected).parts(filters.removed[0]):
            tensor.data[row] = 0
    tuned = defense.tune(model, filters, known, known.triggered, rng=rng.stream("tune"))
    assert tuned == Tuned(epoch=1, capped=True)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    zero = all((tensor[row] == 0).all() for tensor, row in filters.parts(filters.removed[0]))
    assert zero != regrow


@pytest.mark.parametrize(
    ("losses", "best", "epochs"),
    [([2.0, 1.9, 1.95, 1.8, 1.8, 1.9, 1.0], 3, 5), ([2.0, 2.0, 2.1], 0, 2)],
)
def test_tuning_ends_as_the_rules_say_and_keeps_the_best(toy_model, known, monkeypatch, losses, best, epochs):
    def tuned(values, **settings):
        defense, left = load("grad_prune", lr=0.05, batch_size=16, **settings), list(values)
        monkeypatch.setattr(type(defense), "tuning_loss", lambda *_: left.pop(0))
        model = copy.deepcopy(toy_model)
        end = defense.tune(model, Filters(model), known, known.triggered, rng=rng.stream("tune"))
        return model.state_dict(), end, len(values) - len(left) - 1

    state, end, num_epochs = tuned(losses, tuning_patience=2)
    assert (end, num_epochs) == (Tuned(best, capped=False), epochs)
    if best:
        # As long as the loss still falls, it is the cap that ends it.
        expected, end, _ = tuned([2.0 - n for n in range(best + 1)], max_epochs=best)
        assert end == Tuned(best, capped=True)
    else:
        expected = toy_model.state_dict()
    torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_patience_that_ends_at_the_cap_is_no_cap(toy_model, known, monkeypatch):
    losses = iter([2.0, 2.0, 2.0])
    defense = load("grad_prune", tuning_patience=2, max_epochs=2)
    monkeypatch.setattr(type(defense), "tuning_loss", lambda *_: next(losses))
    model = copy.deepcopy(toy_model)
    end = defense.tune(model, Filters(model), known, known.triggered, rng=rng.stream("tune"))
    assert end == Tuned(0, capped=False)


# --- a round as the authors' code has it, worked out by hand ---------------------------------------


class TwoConvolutions(torch.nn.Module):
    """Images of one pixel, of which red counts: two channels, then two again, and three classes."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 2, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(2, momentum=0.1)
        self.second = torch.nn.Conv2d(2, 2, 1, bias=False)
        self.linear = torch.nn.Linear(2, 1)  # fewer rows than there are filters before it

    def forward(self, images):
        logit = self.linear(self.second(self.norm(self.first(images))).flatten(1))
        return torch.cat([logit, torch.zeros_like(logit)], 1)


@pytest.fixture
def two_convolutions():
    """Return the model: filter 0 passes red on, filter 1 is idle; all sums are small numbers."""
    network = TwoConvolutions()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.first.weight[0, 0] = 2.0
        network.norm.weight.fill_(1.0)
        network.norm.bias[1] = 0.5
        network.second.weight[:, :, 0, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        network.linear.weight[0] = torch.tensor([3.0, 0.25])
    return models.Classifier(network, models.Build("two", {}, 2, (0.0,) * 3, (1.0,) * 3)).eval()


def one_pixel(reds, labels):
    pixels = torch.zeros(len(reds), 3, 1, 1, dtype=torch.uint8)
    pixels[:, 0, 0, 0] = torch.tensor(reds)
    info = DatasetInfo(1, 1, ("a", "b"), (0.0,) * 3, (1.0,) * 3, NO_AUGMENTATION)
    return ImageSet.clean(pixels, torch.tensor(labels), torch.arange(len(reds)), info)


AUTHORS = {"scores": "train", "reselect": True, "removal": "next_tensor", "ties": "float", "regrow": True}


def test_scores_of_the_authors_take_the_first_batch_in_training_mode(two_convolutions):
    """Of two batches of two images, the first is normalized by its own statistics, which then move.

    Red is 0 and 1 in either: the first convolution's channel 0 gives 0 and 2, mean 1 and variance 1, so the
    second one's inputs are -1 and 1. Moved by a tenth, the running mean is 0.1 and the running variance,
    which takes the unbiased 2, is 1.1: in the second batch the inputs are (0 - 0.1) / √1.1 and 1.9 / √1.1.
    """
    images = one_pixel([0, 255, 0, 255], [0, 1, 0, 1])
    filters = load("grad_prune", **AUTHORS).candidates(two_convolutions, images)
    scores = filters.training_scores(two_convolutions, images, 2)
    norm = two_convolutions.network.norm
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.1, 0.0]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.1, 0.9]))
    assert not two_convolutions.training

    def slopes(inputs):
        """Return the mean over a batch of d loss / d logit, times the input of channel 0; and without it."""
        errors = [1 / (1 + math.exp(-(3 * x + 0.125))) - y for x, y in zip(inputs, (1, 0), strict=True)]
        return sum(e * x for e, x in zip(errors, inputs, strict=True)) / 2, sum(errors) / 2

    batches = [(-1.0, 1.0), (-0.1 / 1.1**0.5, 1.9 / 1.1**0.5)]
    moving, idle = (sum(values) for values in zip(*map(slopes, batches), strict=True))
    # Channel 1 of the normalization always gives 0.5. A filter's score is the mean over its two inputs.
    expected = [3.0 * (abs(moving) + 0.5 * abs(idle)) / 2, 0.25 * (abs(moving) + 0.5 * abs(idle)) / 2]
    torch.testing.assert_close(scores[2:], torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_a_round_of_the_authors_zeroes_the_next_tensor_and_picks_the_same_filter_again(two_convolutions):
    images = one_pixel([0, 255, 0, 255], [0, 1, 0, 1])
    filters = load("grad_prune", **AUTHORS).candidates(two_convolutions, images)
    assert type(filters) is NextTensorFilters
    assert filters.names == ["first", "second"]
    network, before = two_convolutions.network, copy.deepcopy(two_convolutions.network.state_dict())

    def changed():
        after = network.state_dict()
        return {name for name in before if not torch.equal(after[name], before[name])}

    filters.remove(torch.tensor([2.0, 0.0, 1.0, 0.0]))  # the first convolution's 0: next is the norm's scale
    assert changed() == {"first.weight", "norm.weight"}
    assert network.norm.weight.tolist() == [0.0, 1.0]  # the shift stays
    filters.remove(torch.tensor([0.0, 0.0, 2.0, 0.0]))  # the second's 0: a whole row of the classifier
    assert network.linear.weight.tolist() == [[0.0, 0.0]]
    assert network.linear.bias.tolist() == [0.0]
    filters.remove(torch.tensor([0.0, 0.0, 0.0, 2.0]))  # the second's 1: no such row, left alone
    assert network.second.weight.count_nonzero() == 0
    assert changed() == {"first.weight", "norm.weight", "second.weight", "linear.weight"}
    # Nothing keeps a filter from being picked once more, and it is named once.
    defense = load("grad_prune", **AUTHORS, max_rounds=3)
    triggered = TriggeredSample(images, images)
    picked = []
    filters.remove = lambda scores: picked.append(len(scores)) or filters.removed.append(module.Filter(0, 0))
    defense.prune(two_convolutions, filters, Limit(images, 0, 4), triggered, rng=rng.stream("prune"))
    assert picked == [4, 4, 4]
    assert not any(
        score == -math.inf
        for score in defense._scores(two_convolutions, filters, images, rng.stream("scores")).tolist()
    )
    assert filters.removed_names() == ["first:0", "second:0", "second:1"]


def test_the_authors_candidates_are_all_convolutions_gates_too():
    with torch.device("meta"):
        network = registry.load("models", "mobilenet_v3_large").network(10)
    every = {name for name, layer in network.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    assert set(NextTensorFilters(network).names) == every
    assert set(Filters(network).names) < every


def test_a_hidden_unit_of_a_transformer_is_removed_as_if_its_activation_were_zero():
    network = copy.deepcopy(network_of("vit"))
    torch.nn.init.normal_(network.heads.head.weight, generator=rng.stream("head"))  # torchvision's is zero
    filters = Filters(network, torch.empty(1, 3, 32, 32))
    sizes = dict(zip(filters.names, filters.sizes, strict=True))
    assert sizes.pop("conv_proj") == 16
    assert sizes == {f"encoder.layers.encoder_layer_{block}.mlp.0": 32 for block in range(5)}
    images = torch.rand(3, 3, 32, 32, generator=rng.stream("images"))
    before = network(images)
    activation = network.encoder.layers.encoder_layer_3.mlp[1]
    hook = activation.register_forward_hook(lambda _, inputs, output: output * (torch.arange(32) != 7))
    expected = network(images)
    hook.remove()
    scores = torch.zeros(len(filters))
    scores[16 + 3 * 32 + 7] = 1  # filters of the patch embedding come first
    filters.remove(scores)
    assert filters.removed_names() == ["encoder.layers.encoder_layer_3.mlp.0:7"]
    assert torch.equal(network(images), expected)
    assert not torch.equal(before, expected)
    # Neither row, bias nor column grows back.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    filters.keeper()()
    first, second = (network.encoder.layers.encoder_layer_3.mlp[place] for place in (0, 3))
    for part in (first.weight[7], first.bias[7], second.weight[:, 7]):
        assert (part == 0).all()
    assert int((second.weight == 0).sum()) == 16


def test_the_patch_embedding_alone_is_no_choice():
    network = copy.deepcopy(network_of("vit"))
    with pytest.raises(NotApplicableError, match="conv_proj, which cuts images into patches"):
        NextTensorFilters(network)  # the authors' code knows convolutions alone
    two = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2, 2), torch.nn.Conv2d(4, 4, 1))
    assert NextTensorFilters(two).names == ["0", "1"]


def test_scoring_in_training_mode_draws_from_its_own_stream(two_convolutions):
    network = two_convolutions.network
    network.second = torch.nn.Sequential(network.second, torch.nn.Dropout(0.5))
    images = one_pixel([0, 255, 0, 255], [0, 1, 0, 1])
    defense, before = load("grad_prune", **AUTHORS), torch.get_rng_state()

    def scored(name):
        model = copy.deepcopy(two_convolutions)
        return defense._scores(model, defense.candidates(model, images), images, rng.stream(name))

    assert torch.equal(scored("a"), scored("a"))
    assert not torch.equal(scored("a"), scored("b"))
    assert torch.equal(torch.get_rng_state(), before)


# --- the declared variants -------------------------------------------------------------------------

FACTS = {"num_classes": 10, "image_size": 32, "architecture": "preactresnet18", "attack": "badnets"}
FACTS |= {"ratio": 0.1, "seed": 0, "spc": 10}
EVAL_SCORES = {"scores": "eval", "reselect": False, "removal": "filter", "regrow": False, "ties": "counted"}
EVAL_SCORES |= {"accuracy_images": "validation", "tuning_batch": "two_passes", "criterion": "clean"}
MIXED_JOINT = {"accuracy_images": "all", "tuning_batch": "mixed", "criterion": "joint"}


@pytest.mark.parametrize(
    ("name", "protocol", "variant"),
    [
        ("grad_prune", "survey", EVAL_SCORES),
        ("grad_prune", "paper", EVAL_SCORES | AUTHORS),
        ("grad_prune", "ours", EVAL_SCORES | MIXED_JOINT),
        ("grad_prune_inverted", "survey", EVAL_SCORES),
        ("grad_prune_inverted", "ours", EVAL_SCORES | MIXED_JOINT),
    ],
)
def test_protocols_are_the_three_variants(name, protocol, variant):
    settings = protocols.settings(name, protocol, FACTS)
    assert {key: settings[key] for key in variant} == variant
    caps = {"max_rounds": 500, "max_epochs": 200, "patience": 10, "tuning_patience": 10, "max_drop": 0.1}
    assert {key: settings[key] for key in caps} == caps


# --- a trained backdoor ----------------------------------------------------------------------------


def stamped_loss(defense, model, sample):
    """Return the loss of triggered images in a step of the tuning."""
    images = (to_float(part.train.images) for part in (sample, sample.triggered))
    with torch.no_grad():
        _, logits = defense.logits(copy.deepcopy(model).train(), *images)
    return float(F.cross_entropy(logits, sample.train.labels))


def test_a_triggered_batch_hides_from_the_tuning_what_a_mixed_one_shows(backdoored):
    model, sample = backdoored.model, backdoored.sample
    authors, ours = load("grad_prune"), load("grad_prune", **MIXED_JOINT)
    assert stamped_loss(authors, model, sample) < inference.evaluate(model, sample.triggered.train)[1] / 2
    assert stamped_loss(authors, model, sample) < stamped_loss(ours, model, sample) / 2
    # The first step of the tuning, behind the pruning.
    pruned = copy.deepcopy(model)
    limit = ours.limit(pruned, sample)
    ours.prune(
        pruned, ours.candidates(pruned, sample.train), limit, sample.triggered, rng=rng.stream("prune")
    )
    unlearning = inference.evaluate(pruned, sample.triggered.train)[1]
    assert stamped_loss(ours, pruned, sample) > max(unlearning / 2, 2 * stamped_loss(authors, pruned, sample))


def test_removes_a_patch(backdoored):
    accuracy, asr, _ = backdoored.rates(backdoored.model)
    assert asr > 0.9
    ours = load("grad_prune", **MIXED_JOINT, max_epochs=40)
    repaired = defend(ours, backdoored.model, backdoored.sample)
    repaired_accuracy, repaired_asr, recovered = backdoored.rates(repaired)
    assert repaired_asr < 0.1
    assert recovered > 0.85
    assert repaired_accuracy > accuracy - 0.05
    chosen = backdoored.sample.chosen
    assert (chosen["num_judged"], chosen["allowed_errors"]) == (100, 10)
    assert chosen["num_pruned"] == len(chosen["pruned"])
    assert chosen["tuning_capped"] == (chosen["tuning_epoch"] > 30)
