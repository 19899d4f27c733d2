"""The cost that the benchmark predicts for each defense, against numbers worked out by hand."""

import dataclasses
import math

import pytest
import torch

import defenses as benchmark
from detrojan import registry, rng
from detrojan.defenses.base import Defense
from detrojan.stages import poisoning, sampling
from detrojan.workflow import image_passes
from scenes import Scene

CPU = torch.device("cpu")
# The sixteen methods of the survey (arXiv 2411.11200), Grad-Prune with its variant, and later ones.
METHODS = (
    *("ft", "fp", "nad", "anp", "awn", "bnp", "clp", "fst", "ft_sam"),
    *("ibau", "nc", "npd", "pbe", "rnp", "sau", "mm_bd"),
    *("grad_prune", "grad_prune_inverted"),
    "nft",
)
BOUNDS = {"rnp", "sau", "npd", "nc", "grad_prune", "grad_prune_inverted"}  # the run decides
CIFAR10_SPC_10, CIFAR10_SPC_100, GTSRB_SPC_100 = (90, 10, 10), (900, 100, 10), (3870, 430, 43)


AWN_PAPER = {"passes": 5, "min_steps": 15, "replacement": True, "batch_size": 128, "optimizer": "adam"}


def predict(name, sizes, chosen=None, **settings):
    return benchmark.prediction(
        name, benchmark.Sizes(*sizes), registry.load("defenses", name, settings), chosen
    )


def test_every_method_has_a_formula():
    assert set(image_passes.FORMULAS) == set(METHODS)
    for name in set(METHODS) & set(registry.names("defenses")):
        passes = predict(name, CIFAR10_SPC_10)
        assert all(math.isfinite(count) and count >= 0 for count in passes[:2]), name
        assert (passes.forward == 0) == (registry.threat_model("defenses", name) == "data_free"), name


@pytest.mark.parametrize(
    ("name", "sizes", "settings", "chosen", "total"),
    [
        ("ft", CIFAR10_SPC_10, {}, {}, 100 * 100 * 3),
        ("ft", GTSRB_SPC_100, {}, {}, 1_290_000),
        ("fp", CIFAR10_SPC_10, {}, {}, 100 + 100 * 90 * 3),
        ("fp", GTSRB_SPC_100, {}, {}, 1_165_300),
        ("nad", CIFAR10_SPC_10, {}, {}, 10 * 100 * 3 + 10 * 100 * 4),
        # Independent of the number of images, but for the validation images of the 19 thresholds.
        ("anp", CIFAR10_SPC_10, {}, {}, 2000 * 256 * 9 + 19 * 10),
        ("anp", GTSRB_SPC_100, {}, {}, 2000 * 256 * 9 + 19 * 430),
        ("awn", CIFAR10_SPC_10, {}, {"optimizer": "sgd"}, 20 * 100 * 10),
        ("awn", CIFAR10_SPC_10, AWN_PAPER, {"optimizer": "adam"}, 20 * 15 * 128 * 10),
        ("awn", CIFAR10_SPC_10, AWN_PAPER, {"optimizer": "sgd"}, 2 * 20 * 15 * 128 * 10),
        ("awn", CIFAR10_SPC_10, AWN_PAPER | {"small_sample": 101}, {}, 20 * 15 * 32 * 10),
        ("fp", CIFAR10_SPC_10, {"judge_on": "all", "min_steps": 1000}, {}, 90 + 100 + 1000 * 90 * 3),
        ("anp", CIFAR10_SPC_10, {"thresholding": "fixed"}, {}, 2000 * 256 * 9 + 2 * 100),
        (
            *("rnp", CIFAR10_SPC_10, {"unlearning_min_steps": 84, "recovery_min_steps": 80}),
            {},
            164 * 100 * 3 + 50 * 100,
        ),
        (
            *("rnp", CIFAR10_SPC_10, {"thresholding": "one_by_one"}),
            {"num_pruned": 7},
            40 * 100 * 3 + 9 * 100,
        ),
        ("bnp", GTSRB_SPC_100, {}, {}, 4300),
        ("clp", GTSRB_SPC_100, {}, {}, 0),
        ("fst", CIFAR10_SPC_10, {"epochs": 15}, {}, 15 * 100 * 3),
        ("ft_sam", CIFAR10_SPC_10, {}, {}, 100 * 100 * 6),
        ("nft", CIFAR10_SPC_10, {}, {}, 100 * 100 * 3),
        ("nft", CIFAR10_SPC_100, {"epochs": 5, "min_steps": 1000, "batch_size": 128}, {}, 125 * 1000 * 3),
        ("pbe", CIFAR10_SPC_100, {}, {}, 180 * 1000 * 3),
        ("rnp", CIFAR10_SPC_100, {}, {}, 40 * 1000 * 3 + 50 * 1000),
        ("rnp", CIFAR10_SPC_100, {}, {"unlearning_epochs": 3}, 23 * 1000 * 3 + 50 * 1000),
        ("sau", CIFAR10_SPC_100, {}, {}, 1000 + 100 * 1000 * (14 + 2 * 12)),
        # Varied images: the original's logits too; five looks at the accuracy.
        ("mm_bd", CIFAR10_SPC_100, {}, {}, 1000 + 50 * 1000 * 4 + 5 * 1000),
        (
            *("mm_bd", CIFAR10_SPC_10, {"augment": False, "min_steps": 150, "keep_last_good": True}),
            {},
            100 + 150 * 100 * 4,
        ),
        ("npd", CIFAR10_SPC_100, {}, {}, 1000 + 50 * 1000 * (7 + 2 * 4)),
        # 80 epochs of each class over the images and a last look; 200 of 1,000 images stamped for one class.
        ("nc", CIFAR10_SPC_100, {"min_steps": 1}, {}, 10_000 * (80 * 3 + 1) + 100 * 1000 * 3),
        ("nc", CIFAR10_SPC_100, {"min_steps": 1}, {"flagged": []}, 10_000 * (80 * 3 + 1)),
        # 8 steps are 2 passes over the images of a class; two classes make 1,200 images of 1,000.
        (
            *("nc", CIFAR10_SPC_100, {}, {"flagged": [0, 3], "search_steps": 8}),
            10_000 * (2 * 3 + 1) + 100 * 1200 * 3,
        ),
        # 13 images in batches of 4, 4 and 5; an epoch takes four steps, so 17 of them.
        (
            *("nc", CIFAR10_SPC_10, {"max_images": 13, "inversion_batch_size": 4}),
            *({"flagged": []}, 10 * (80 * 17 * 3 + 13)),
        ),
        # For 500 steps an epoch has 7, all images in each.
        ("nc", CIFAR10_SPC_10, {"min_steps": 500}, {"flagged": []}, 1000 * (80 * 7 * 3 + 1)),
        # 40 rounds and 50 epochs.
        (
            *("grad_prune", CIFAR10_SPC_100, {}, {"num_pruned": 30, "tuning_epoch": 40}),
            40 * (900 * 3 + 2 * 100) + 50 * (900 * 6 + 100),
        ),
        ("grad_prune", CIFAR10_SPC_100, {}, {}, 500 * (900 * 3 + 2 * 100) + 200 * (900 * 6 + 100)),
        # 300 images score the filters.
        (
            *("grad_prune", CIFAR10_SPC_100, {"score_images": 300}),
            *({"num_pruned": 30, "tuning_epoch": 40}, 40 * (300 * 3 + 2 * 100) + 50 * (900 * 6 + 100)),
        ),
        # All 1,000 images are judged, and an epoch looks at both validation sets.
        (
            *("grad_prune", CIFAR10_SPC_100, {"accuracy_images": "all", "criterion": "joint"}),
            *({"num_pruned": 30, "tuning_epoch": 40}, 40 * (900 * 3 + 1100) + 50 * (900 * 6 + 200)),
        ),
        # 3 searches on 90 training images; 2 turns: 12 and 11 rounds, 15 and 10 epochs.
        (
            *("grad_prune_inverted", CIFAR10_SPC_10, {}),
            {"search_steps": [5, 6, 7], "num_pruned": [2, 3], "tuning_epoch": [5, 0]},
            900 * (18 * 3 + 3) + 23 * (90 * 3 + 2 * 10) + 25 * (90 * 6 + 10),
        ),
        # 5 rounds: 4 batches, the first of 256 images, and 6 products.
        ("ibau", CIFAR10_SPC_100, {}, {}, 5 * (3000 + 4 * 256 + 2 * (2000 + 4 * 256 * 7))),
        # One batch ten times over in each round.
        (
            *("ibau", CIFAR10_SPC_10, {"min_steps": 10, "batch_size": 100}, {}),
            50 * (300 + 100 + 2 * (200 + 100 * 7)),
        ),
    ],
)
def test_costs_by_hand(name, sizes, settings, chosen, total):
    if name not in registry.names("defenses"):
        pytest.skip(f"{name} is not there yet")
    passes = predict(name, sizes, chosen, **settings)
    # A backward pass costs as much as two forward passes.
    assert passes.forward + 2 * passes.backward == pytest.approx(total)
    assert passes.bound == (name in BOUNDS)


def test_a_method_without_a_formula_has_none():
    assert benchmark.prediction("my_method", benchmark.Sizes(90, 10, 10), Defense()) is None
    cost = benchmark.Cost(1.0, 2**20, 7, 3)
    assert benchmark._row(cost, None).split() == ["1.0", "1", "7", "n/a", "n/a", "3", "n/a", "n/a"]


@pytest.mark.parametrize(
    ("passes", "predicted", "text"), [(5, 10, "0.50"), (0, 0, "1.00"), (3, 0, "inf"), (3, None, "n/a")]
)
def test_ratios(passes, predicted, text):
    assert benchmark._ratio(passes, predicted) == text


def test_bounds_are_marked():
    cost = benchmark.Cost(2.0, 3 * 2**20, 40, 20)
    row = benchmark._row(cost, benchmark.Passes(80, 20, bound=True))
    assert row.split() == ["2.0", "3", "40", "<=", "80", "0.50", "20", "<=", "20", "1.00"]


# Settings with which a method takes a second or two, and its work outweighs a few passes over the sample.
SHORT = {
    "ft": {"epochs": 20},
    "fp": {"epochs": 20},
    "anp": {"iterations": 20, "batch_size": 16},
    "awn": {"epochs": 4},
    "ft_sam": {"epochs": 10},
    "nc": {"inversion_epochs": 5, "min_steps": 5, "epochs": 10},
    "npd": {"epochs": 10},
    "pbe": {"epochs": 4},
    "rnp": {"unlearning_epochs": 10, "recovery_epochs": 10},
    "sau": {"epochs": 5},
    "mm_bd": {"epochs": 20},
    "grad_prune": {"max_rounds": 20, "max_epochs": 20},
    "grad_prune_inverted": {
        "max_inversions": 2,
        "inversion_epochs": 3,
        "min_steps": 3,
        "max_rounds": 20,
        "max_epochs": 20,
    },
}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_meter_finds_what_is_predicted(name, toy_model, toy_images):
    """Within a fifth, but for passes over the sample that show what the model is before and after."""
    if name not in registry.names("defenses"):
        pytest.skip(f"{name} is not there yet")
    samples = sampling.draw_samples(toy_images(side=16, count=48), "toy", 10, [0])
    attack = registry.load("attacks", "badnets")
    trigger = attack.learn_trigger(samples[0].train, rng=rng.stream("trigger"))
    sample = dataclasses.replace(samples[0], triggered=poisoning.stamp(attack, trigger, samples)[0])
    given = Scene(toy_model, sample, acc=1.0, asr=1.0).given(name)
    defense = registry.load("defenses", name, SHORT.get(name, {}))
    with benchmark.meter(CPU) as cost:
        assert benchmark._run(defense, toy_model, given) == ""
    sizes = benchmark.Sizes(len(sample.train), len(sample.validation), 4)
    expected = benchmark.prediction(name, sizes, defense, given.chosen)
    for found, predicted in (
        (cost.forward_passes, expected.forward),
        (cost.backward_passes, expected.backward),
    ):
        assert found <= 1.2 * predicted + 4 * sizes.all
        assert found >= 0.8 * predicted or expected.bound
