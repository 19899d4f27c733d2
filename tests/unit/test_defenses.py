"""The core step of each defense, against hand-made networks where the answer is known."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from detrojan import models, registry, rng
from detrojan.cells import Draws, Model, Shard
from detrojan.defenses.clean_data import fp as fp_module
from detrojan.defenses.data_free import clp as clp_module
from detrojan.images import DefenderSample, TriggeredSample, empty, to_float
from detrojan.stages import sampling
from detrojan.stages.defend import run_shard
from detrojan.storage.columns import NOT_APPLICABLE, OK


def load(name, **settings):
    return registry.load("defenses", name, settings)


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


# --- where a method can't work ---------------------------------------------------------------------


class Convolutions(nn.Module):
    """Two convolutions and a linear layer, without batch normalization."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.linear = nn.Linear(4, 4)

    def forward(self, images):
        return self.linear(self.conv2(self.conv1(images).relu()).relu().mean((2, 3)))


class Branching(nn.Module):
    """With normalization, and a branch that depends on the values: no graph holds both ways."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.linear = nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, images):
        maps = self.relu(self.bn1(self.conv1(images)))
        return self.linear((self.conv2(maps) if maps.sum() > 0 else maps).mean((2, 3)))


class Perceptron(nn.Sequential):
    """Linear layers alone."""

    def __init__(self):
        super().__init__()
        self.flatten, self.hidden, self.relu, self.linear = (
            *(nn.Flatten(), nn.Linear(192, 8), nn.ReLU()),
            nn.Linear(8, 4),
        )


NORMALIZATION = {"clp", "bnp", "anp", "awn", "nft", "rnp"}
ACTIVATION = {"mm_bd"}  # of maps or tokens
CONVOLUTION = {"fp", "nad", "npd", "grad_prune", "grad_prune_inverted"}
NEITHER = {"ft", "ft_sam", "fst", "ibau", "nc", "pbe", "sau"}
GRAPH = {"fp", "mm_bd", "nad", "grad_prune", "grad_prune_inverted"}
# What names layers is told which ones this network has.
LAYERS = {
    "fst": {"layers": ["linear"]},
    "nad": {"layers": ["conv1", "conv1", "conv2"]},
    "npd": {"host": "conv2"},
}


@pytest.mark.parametrize("name", sorted(NORMALIZATION | ACTIVATION | CONVOLUTION | NEITHER))
@pytest.mark.parametrize(
    ("network", "refusing"),
    [
        (Convolutions, NORMALIZATION),
        (Perceptron, NORMALIZATION | ACTIVATION | CONVOLUTION),
        (Branching, GRAPH),
    ],
)
def test_a_model_without_what_a_method_needs_is_a_row_with_the_reason(
    name, network, refusing, toy_images, tmp_path
):
    samples = sampling.draw_samples(toy_images(count=48), "toy", 3, [0])
    copies = TriggeredSample(samples[0].train, samples[0].validation)
    known = registry.threat_model("defenses", name) == "known_trigger"
    samples = {0: dataclasses.replace(samples[0], triggered=copies if known else None)}
    with rng.global_stream(rng.stream("init")):
        model = models.Classifier(network(), models.Build("odd", {}, 4, (0.5,) * 3, (0.25,) * 3)).eval()
    defense = registry.load("defenses", name, LAYERS.get(name, {}), smoke=True)
    shard = Shard(Model("toy", "odd", "badnets", 0.1, 0), name, 3, Draws(0, 0))
    (row,) = run_shard(defense, model, samples, shard, tmp_path, code="")
    assert row["status"] == (NOT_APPLICABLE if name in refusing else OK), row["reason"]
    # Not one that its batches or its images gave: what the model lacks.
    words = "normalization|convolution|layer|data flow"
    assert row["status"] == OK or re.search(words, row["reason"])


# --- what a method without a choice to make learns from ----------------------------------------------

# All but FP, ANP and Grad-Prune, which choose by validation images, and CLP, which has no images.
USING_ALL = {
    *("ft", "nad", "awn", "bnp", "rnp", "fst", "ft_sam", "ibau", "sau", "pbe", "npd", "mm_bd", "nc", "nft")
}
# Layers with maps on images this small; a margin and bounds so low that they matter.
TOY = {
    "nad": {"layers": ["layer1", "layer2", "layer3"]},
    "bnp": {"u": 1.0},
    "mm_bd": {"norm_weight": 1e-3, "lr": 0.5},
}


@pytest.mark.parametrize("name", sorted(USING_ALL))
def test_a_method_that_chooses_by_no_validation_image_uses_every_image(name, toy_model, sample):
    def outcome(train, validation):
        given = DefenderSample(train, validation)
        repaired = defend(registry.load("defenses", name, TOY.get(name, {}), smoke=True), toy_model, given)
        return [*repaired.state_dict().values()], given.chosen

    def same(first, second):
        equal = all(torch.equal(*pair) for pair in zip(first[0], second[0], strict=True))
        return equal and first[1] == second[1]

    none = sample.train[torch.arange(0)]
    split = outcome(sample.train, sample.validation)
    assert same(split, outcome(sample.everything, none))
    assert not same(split, outcome(sample.train, none))


# --- settings --------------------------------------------------------------------------------------

TUNING = {"epochs": 100, "batch_size": 256, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
INVERSION = {"inversion_epochs": 80, "inversion_batch_size": 256, "inversion_lr": 0.1, "hit_rate": 0.98}
INVERSION |= {"mask_weight": 1e-3, "weight_patience": 5, "stop_patience": 25, "anomaly_threshold": 2}
PRUNING = {"max_drop": 0.1, "patience": 10, "lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
PRUNING |= {"batch_size": 128, "tuning_patience": 10, "criterion": "clean"}
PRUNING |= {"scores": "eval", "tuning_batch": "two_passes", "accuracy_images": "validation"}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("ft", TUNING),
        ("fp", TUNING | {"step": 0.01, "tolerance": 0.1}),
        ("ft_sam", TUNING | {"rho": 2, "label_smoothing": 0.1}),
        ("nc", TUNING | INVERSION | {"stamped_share": 0.2}),
        ("nad", {"teacher_epochs": 10, "epochs": 10, "lr": 0.01, "beta1": 500, "beta2": 1000, "beta3": 1000}),
        ("nad", {"batch_size": 256, "momentum": 0.9, "weight_decay": 5e-4, "power": 2}),
        ("anp", {"iterations": 2000, "batch_size": 256, "lr": 0.01, "momentum": 0.9, "eps": 0.4, "steps": 1}),
        ("anp", {"alpha": 0.2, "threshold_step": 0.05, "max_threshold": 0.9, "tolerance": 0.1}),
        ("awn", {"epochs": 20, "batch_size": 256, "lr": 0.01, "lr_decay": 0.9, "perturbation_lr": 10}),
        ("awn", {"passes": 1, "bound": 1000, "clean_weight": 0.9, "sparsity": 1e-8, "optimizer": "sgd"}),
        ("bnp", {"u": 3}),
        ("clp", {"u": 3}),
        ("fst", {"epochs": 10, "batch_size": 256, "lr": 0.01, "momentum": 0.9, "alpha": 0.2}),
        ("ibau", {"rounds": 5, "iterations": 5, "batch_size": 256, "lr": 1e-4, "share": 0.01}),
        ("ibau", {"inner_lr": 10, "penalty": 0.001, "fixed_point_step": 0.1, "units": "normalized"}),
        (
            "npd",
            {"epochs": 50, "batch_size": 128, "lr": 0.01, "eps": 3, "attack_steps": 2, "attack_step": 0.1},
        ),
        ("npd", {"keep_weight": 0.4, "rival_weight": 0.4, "aim_weight": 0.4, "fooled": 0.6}),
        ("pbe", {"epochs": 20, "eps": 0.02, "step": 0.2, "steps": 7, "batch_size": 256, "lr": 0.01}),
        ("rnp", {"unlearning_epochs": 20, "unlearning_lr": 1e-3, "unlearning_weight_decay": 0.05}),
        (
            "rnp",
            {"unlearning_momentum": 0.9, "stop_accuracy": 0.2, "max_gradient_norm": 20, "batch_size": 256},
        ),
        ("rnp", {"recovery_epochs": 20, "recovery_lr": 0.2, "recovery_momentum": 0.9, "alpha": 1}),
        ("rnp", {"threshold_step": 0.02, "max_drop": 0.02, "max_retries": 10, "batch_size": 256}),
        ("sau", {"epochs": 100, "batch_size": 256, "lr": 1e-4, "eps": 0.2, "step": 0.2, "steps": 5}),
        ("sau", {"adversarial_weight": 0.01, "shared_weight": 1, "unlearning_weight": 1}),
        (
            "mm_bd",
            {"epochs": 50, "lr": 1e-3, "norm_weight": 0.5, "norm_factor": 1.2, "start": 0, "sites": []},
        ),
        ("mm_bd", {"batch_size": 256, "max_drop": 0.05, "keep_last_good": False}),
        ("grad_prune", PRUNING | {"max_rounds": 500, "max_epochs": 200}),
        ("grad_prune_inverted", PRUNING | INVERSION | {"max_inversions": 5}),
    ],
)
def test_defaults_are_the_published_ones(name, published):
    """Those that the survey's benchmark or the papers have; what departs is told where it stands."""
    settings = load(name).model_dump()
    assert {key: settings[key] for key in published} == published


# --- FT --------------------------------------------------------------------------------------------


def test_ft_fits_every_image_and_chooses_nothing(toy_model, sample):
    repaired = defend(load("ft", epochs=60, lr=0.05), toy_model, sample)
    everything = sample.everything
    with torch.inference_mode():
        predicted = repaired(to_float(everything.images)).argmax(1)
    assert (predicted == everything.labels).double().mean() > 0.95
    assert sample.chosen == {}


def test_ft_moves_nothing_but_statistics_at_a_vanishing_rate(toy_model, sample):
    repaired = defend(load("ft", epochs=1, lr=1e-12), toy_model, sample)
    for (name, before), after in zip(toy_model.named_parameters(), repaired.parameters(), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-9, msg=name)
    norm = repaired.network.layer1[0].bn1
    assert not torch.equal(norm.running_mean, toy_model.network.layer1[0].bn1.running_mean)


# --- FP --------------------------------------------------------------------------------------------


def test_fp_sweep_on_cached_features_equals_masking_the_model(toy_model, sample):
    head = toy_model.network.linear
    order = torch.randperm(head.in_features, generator=rng.stream("order"))
    found = fp_module._prunable(toy_model, sample.train)
    right = fp_module._sweep(toy_model, found, sample.validation, order, 3)
    assert len(right) == math.ceil(head.in_features / 3)
    for point in (0, 1, 4, 7, 10):
        masked = copy.deepcopy(toy_model)
        masked.network.linear.weight.data[:, order[: 3 * point]] = 0
        with torch.inference_mode():
            predicted = masked(to_float(sample.validation.images)).argmax(1)
        assert right[point] == (predicted == sample.validation.labels).sum(), point


def test_fp_prunes_idle_channels_and_keeps_them_at_zero(toy_model, sample):
    planted = copy.deepcopy(toy_model)
    # Feature 3 never moves and votes for class 0; every other feature is active on clean images.
    planted.network.layer4[1].conv2.weight.data[3] = 0
    planted.network.layer4[0].conv2.weight.data[3] = 0
    planted.network.layer4[0].shortcut.weight.data[3] = 0
    for block in planted.network.layer4:
        block.conv2.weight.data[:] = block.conv2.weight.abs() * (torch.arange(32) != 3).view(-1, 1, 1, 1)
    planted.network.layer4[0].shortcut.weight.data.abs_()
    planted.network.linear.weight.data[0, 3] = 50
    clean = dataclasses.replace(sample, chosen={})
    repaired = defend(load("fp", epochs=3, step=0.01), planted, clean)
    found = fp_module._prunable(planted, clean.train)
    activity = fp_module._features(planted, found, clean.train).mean(0)
    assert activity.argmin() == 3
    if clean.chosen["num_pruned"]:
        assert (repaired.network.linear.weight[:, 3] == 0).all()
    zero_columns = (repaired.network.linear.weight == 0).all(0).sum()
    assert zero_columns == clean.chosen["num_pruned"]


def test_fp_prunes_what_is_lowest_by_its_signed_mean_up_to_the_last_point_accepted(
    toy_model, sample, monkeypatch
):
    monkeypatch.setattr(fp_module, "_sweep", lambda *_: [4, 4, 3, 3, 2, 4])
    defense = load("fp", step=0.06, epochs=1, tolerance=0.25)  # two of 32 channels a point
    repaired = defend(defense, toy_model, sample)
    assert sample.chosen["num_pruned"] == 6
    assert (sample.chosen["num_judged"], sample.chosen["allowed_errors"]) == (4, 1)
    assert sample.chosen["accuracy"] == [1.0, 0.75]
    found = fp_module._prunable(toy_model, sample.train)
    activity = fp_module._features(toy_model, found, sample.train).mean(0)
    lowest = activity.argsort()[:6]
    # Busy channels may be lowest: features of this network have a sign.
    assert set(lowest.tolist()) != set(activity.abs().argsort()[:6].tolist())
    assert (repaired.network.linear.weight == 0).all(0).nonzero()[:, 0].tolist() == sorted(lowest.tolist())


def test_fp_is_judged_by_the_images_that_it_is_told(toy_model, sample, monkeypatch):
    judges = []

    def sweep(_model, _head, images, order, step):
        judges.append((len(images), step))
        return [len(images)]

    monkeypatch.setattr(fp_module, "_sweep", sweep)
    chosen = [
        (defend(load("fp", epochs=1, **settings), toy_model, sample), dict(sample.chosen))[1]
        for settings in ({}, {"judge_on": "all", "step": 0, "tolerance": 0.04})
    ]
    # A point is 1 of 32 channels either way here; a hundredth of 128 would be two.
    assert judges == [(len(sample.validation), 1), (len(sample.everything), 1)] == [(4, 1), (40, 1)]
    assert [(c["num_judged"], c["allowed_errors"]) for c in chosen] == [(4, 0), (40, 1)]
    assert (load("fp")._step(512), load("fp", step=0)._step(512)) == (6, 1)


def test_fp_prunes_whole_channels_of_vgg(toy_images):
    with torch.device("meta"):
        network = registry.load("models", "vgg19_bn").network(10)
    model = models.Classifier(network, models.Build("vgg19_bn", {}, 10, (0.0,) * 3, (1.0,) * 3))
    head = fp_module._prunable(model, toy_images(side=32))
    linear = fp_module._first(model, head)
    assert linear is network.classifier[0]
    assert (linear.in_features, head.channels) == (25088, 512)


# --- CLP -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 8], ids=["full", "depthwise"])
def test_clp_bounds_equal_one_svd_a_channel(groups):
    generator = torch.Generator().manual_seed(0)
    convolution, norm = nn.Conv2d(8, 16, 3, groups=groups), nn.BatchNorm2d(16)
    norm.weight.data.normal_(generator=generator)
    norm.running_var.uniform_(0.1, 2, generator=generator)
    bounds = clp_module.channel_bounds(convolution, norm)
    for channel in range(16):
        matrix = convolution.weight[channel].detach().double().flatten(1)
        largest = torch.linalg.svdvals(matrix)[0]
        scale = norm.weight[channel].double().abs() / (norm.running_var[channel].double() + norm.eps).sqrt()
        assert bounds[channel].item() == pytest.approx((largest * scale).item(), rel=1e-6)


def one_layer(channels=64):
    """Return one convolution with i.i.d. weights and its normalization."""
    layers = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels))
    layers[0].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return layers.eval()


def test_clp_prunes_the_planted_channel_alone():
    model = one_layer()
    model[0].weight.data[17] *= 100
    clean = DefenderSample(empty(2), empty(2))
    repaired = defend(load("clp", u=3), model, clean)
    assert clean.chosen == {"num_pruned": 1, "pruned": ["1:17"]}
    with torch.inference_mode():
        maps = repaired(torch.rand(2, 3, 8, 8))
    assert (maps[:, 17] == 0).all()
    assert (maps[:, :17] != 0).any()


def test_clp_names_layers_as_the_network_does():
    layers = one_layer()
    layers[0].weight.data[17] *= 100
    model = models.Classifier(layers, models.Build("planted", {}, 2, (0.5,) * 3, (0.25,) * 3)).eval()
    clean = DefenderSample(empty(2), empty(2))
    defend(load("clp", u=3), model, clean)
    assert clean.chosen["pruned"] == ["1:17"]  # not network.1, as no other method has it


def test_clp_cannot_reach_ten_deviations_with_few_channels():
    model = one_layer(101)  # (n - 1) / sqrt(n) < 10 up to 101 channels
    model[0].weight.data[0] *= 1e6
    repaired = defend(load("clp", u=10), model, DefenderSample(empty(2), empty(2)))
    torch.testing.assert_close(repaired.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_clp_ignores_bounds_that_are_not_finite():
    model = one_layer()
    model[0].weight.data[17] *= 100
    model[1].running_var[3] = -1  # no root: the bound of a channel that broke
    clean = DefenderSample(empty(2), empty(2))
    defend(load("clp", u=3), model, clean)
    assert clean.chosen["pruned"] == ["1:17"]
