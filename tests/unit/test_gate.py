"""The gate's verdict, worked out by hand, and how it and the cards come to stand in the tables."""

import json
import math

import pyarrow as pa
import pytest

from detrojan.analysis.statistics import collect, gate
from detrojan.cells import Draws
from detrojan.settings import Gate
from detrojan.storage import records
from detrojan.storage.columns import METRICS

GATE = Gate(min_asr=0.8, max_acc_loss=0.1)


# --- the verdict -----------------------------------------------------------------------------------


def test_an_attack_that_took():
    verdict = gate.verdict(0.875, 0.96, 0.9375, GATE)
    assert verdict == (0.0625, True, None, None, False)


def test_a_clean_model_has_no_verdict():
    assert gate.verdict(0.9, None, 0.9, GATE) == (None,) * 5


@pytest.mark.parametrize(
    ("acc", "asr", "reason"),
    [
        (0.9, 0.412, "ASR 41.2 % is below 80 %"),
        (0.777, 0.9, "ACC 12.3 points below the clean model's, more than 10"),
        (
            0.5,
            0.0,
            "ASR 0.0 % is below 80 % and ACC 40.0 points below the clean model's, more than 10",
        ),
    ],
)
def test_the_reason_names_what_failed(acc, asr, reason):
    verdict = gate.verdict(acc, asr, 0.9, GATE)
    assert (verdict.attack_took, verdict.gate_reason) == (False, reason)


def test_limits_themselves_pass_whatever_floating_point_makes_of_them():
    assert 0.8 - 0.7 > 0.1 > 0.9 - 0.8  # the one difference that is too large, and one that is not
    assert gate.verdict(0.7, 0.8, 0.8, GATE).attack_took
    assert gate.verdict(0.8, 0.8, 0.9, GATE).attack_took
    assert gate.verdict(0.9, math.nextafter(0.8, 0), 0.9, GATE).attack_took


def test_one_image_in_a_million_too_few_fails_and_shows_in_the_reason():
    asr = gate.verdict(0.9, 0.799999, 0.9, GATE)
    assert (asr.attack_took, asr.gate_reason) == (False, "ASR 79.9999 % is below 80 %")
    acc = gate.verdict(0.899999 - 0.1, 0.9, 0.9, GATE)
    assert acc.gate_reason == "ACC 10.0001 points below the clean model's, more than 10"


def test_without_a_clean_model_the_asr_alone_decides():
    assert gate.verdict(0.1, 0.9, None, GATE)[:3] == (None, True, None)
    assert gate.verdict(0.1, 0.7, None, GATE)[:3] == (None, False, "ASR 70.0 % is below 80 %")


def test_a_model_may_beat_the_clean_one():
    verdict = gate.verdict(0.9375, 0.9, 0.875, GATE)
    assert (verdict.acc_loss, verdict.attack_took) == (-0.0625, True)


def test_other_limits():
    strict = Gate(min_asr=0.995, max_acc_loss=0.005)
    assert gate.verdict(0.9, 0.99, 0.9, strict).gate_reason == "ASR 99.0 % is below 99.5 %"
    assert "at least 99.5 % and its ACC at most 0.5 points" in gate.describe(strict)


def test_a_clean_label_attack_may_cost_the_target_class():
    of_cifar10 = gate.allowance("sig", 10_000, 9_000)
    assert of_cifar10 == pytest.approx(0.1)
    assert gate.verdict(0.75, 0.9, 0.9, GATE, allowance=of_cifar10).attack_took
    failed = gate.verdict(0.65, 0.9, 0.9, GATE, allowance=of_cifar10)
    said = "ACC 25.0 points below the clean model's, more than 20 (10 and 10 for the target class)"
    assert (failed.attack_took, failed.gate_reason) == (False, said)
    assert gate.allowance("sig", 12_630, 12_570) == pytest.approx(60 / 12_630)


@pytest.mark.parametrize(
    ("attack", "num_test", "num_triggered"),
    [("badnets", 10_000, 9_000), ("sig", 0, 0), ("sig", 10_000, 0), ("theirs", 10_000, 9_000)],
)
def test_no_other_attack_may_cost_more(attack, num_test, num_triggered):
    assert gate.allowance(attack, num_test, num_triggered) == 0


def test_all_to_all_is_judged_by_what_the_clean_model_recognizes():
    took = gate.verdict(0.52, 0.5, 0.55, GATE, all_to_all=True)
    assert (took.attack_took, took.asr_relative) == (True, pytest.approx(0.5 / 0.55))
    assert not gate.verdict(0.52, 0.5, 0.55, GATE).attack_took
    # Without a clean model it is held against what the model itself recognizes.
    failed = gate.verdict(0.8, 0.56, None, GATE, all_to_all=True)
    assert failed.gate_reason == "ASR is 56.0 %, as a share of ACC 70.0 % is below 80 %"
    assert gate.verdict(0.0, 0.9, 0.0, GATE, all_to_all=True).asr_relative is None


def test_a_trigger_that_fools_a_clean_model_too_is_no_backdoor():
    failed = gate.verdict(0.9, 0.95, 0.9, GATE, clean_asr=0.6)
    said = "the trigger fools a clean model too: ASR 60.0 %"
    assert (failed.attack_took, failed.gate_reason) == (False, said)
    assert gate.verdict(0.9, 0.95, 0.9, GATE, clean_asr=0.45).attack_took
    assert gate.verdict(0.9, 0.95, 0.9, Gate(min_asr_gain=-1), clean_asr=1.0).attack_took
    # Of an all-to-all attack both are shares of what the clean model recognizes: 0.9 and 0.3 of 0.5.
    assert gate.verdict(0.5, 0.45, 0.5, GATE, all_to_all=True, clean_asr=0.15).attack_took
    assert not gate.verdict(0.5, 0.45, 0.5, GATE, all_to_all=True, clean_asr=0.25).attack_took


@pytest.mark.parametrize(("asr", "near"), [(0.77, True), (0.76, False), (0.83, True), (0.84, False)])
def test_what_another_seed_may_decide_otherwise(asr, near):
    assert gate.verdict(0.9, asr, 0.9, GATE).near_gate is near


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("ASR 41.2 % is below 80 %", "more epochs, a larger ratio or a wider model"),
        ("ACC 12.3 points below the clean model's, more than 10", "a smaller ratio"),
        ("the trigger fools a clean model too: ASR 60.0 %", "a weaker trigger"),
        ("something else", ""),
    ],
)
def test_a_failed_gate_has_advice(reason, said):
    assert said in gate.advice(reason)


def test_how_near_each_model_came():
    rows = [
        model("none") | {"acc": 0.9, "asr": None, "acc_loss": None},
        model("badnets") | {"acc": 0.85, "asr": 0.6, "acc_loss": 0.05},
        model("blended") | {"acc": 0.7, "asr": 0.9, "acc_loss": 0.2},
        model("sig") | {"acc": 0.75, "asr": 0.9, "acc_loss": 0.15, "acc_allowance": 0.1},
        model("lf") | {"acc": 0.5, "asr": 0.5, "acc_loss": 0.05, "label_map": "all_to_all"},
    ]
    found = {row["attack"]: row for row in gate.table(rows, GATE).cast(gate.GATE).to_pylist()}
    assert list(found) == ["badnets", "blended", "sig", "lf"]
    passing = {"badnets": True, "blended": False, "sig": True, "lf": True}
    assert {name: row["passes_otherwise"] for name, row in found.items()} == passing
    assert found["lf"]["asr_judged"] == pytest.approx(0.5 / 0.55)
    assert {row["min_asr"] for row in found.values()} == {0.8}


# --- cards and tables ------------------------------------------------------------------------------

PLAIN = {pa.string(): "x", pa.float64(): 0.5, pa.int32(): 0, pa.int64(): 1, pa.bool_(): False}
TRAINED = {
    "num_train": 100,
    "num_parameters": 7,
    "architecture_settings": {"width": 4},
    "optimization": {"epochs": 1},
    "epochs": 1,
    "train_loss": 0.1,
    "train_accuracy": 0.9,
    "seconds": 1.0,
    "images_per_second": 100.0,
    "peak_memory_bytes": 1,
    "device": "cpu",
    "code": "c0de",
    "versions": "{}",
    "git_commit": "abc",
}
POISON = {"num_train": 100, "num_poisoned": 5, "num_relabelled": 4, "effective_ratio": 0.05}
QUALITY = {"psnr": 21.5, "ssim": 0.9, "linf": 51}
ONE_TARGET = {"label_map": "all_to_one", "target": 3, "num_triggered": 9}
TRIGGER = {"history": [], "findings": {}, "weakness": None}


def model(attack, architecture="net", seed=0):
    ratio = 0.0 if attack == "none" else 0.05
    return {"dataset": "d", "architecture": architecture, "attack": attack, "ratio": ratio, "seed": seed}


def untouched(axes, acc, asr):
    row = {field.name: PLAIN[field.type] for field in collect.GATHERED}
    return row | axes | {"defense": "none", "acc": acc, "asr": asr, "ra": None}


def without(axes, *names):
    return {axis: value for axis, value in axes.items() if axis not in names}


@pytest.fixture
def cards(tmp_path):
    """Return a function that writes cards and returns their paths."""

    def write(kind, *contents):
        paths = {tmp_path / kind / f"{number}.json": content for number, content in enumerate(contents)}
        for path, content in paths.items():
            records.write_card(content, path)
        return {path: {} for path in paths}

    return write


def gathered(cards, measures, trigger=(), poison=(), triggered=(), checks=(), own=None):
    """Return the two tables of models with these axes, ACC and ASR, by attack and architecture."""
    cells = pa.Table.from_pylist([untouched(*row) for row in measures], collect.GATHERED)
    paths = cards(
        "models", *(TRAINED | axes | (own or {}).get(axes["attack"], {}) for axes, _, _ in measures)
    )
    contents = (trigger, poison, triggered, checks)
    beside = {kind: cards(kind, *own) for kind, own in zip(collect.BESIDE_MODELS, contents, strict=True)}
    models = collect.models(cells, paths, beside, GATE)
    return collect.completed(cells, models), models.cast(collect.MODELS)


def test_a_shared_card_fits_all_architectures_and_an_own_card_its_model_only(cards):
    badnets = [model("badnets"), model("badnets", "wide")]
    lf = [model("lf"), model("lf", "wide")]
    _, models = gathered(
        cards,
        [(axes, 0.9, 0.9) for axes in (*badnets, *lf)],
        trigger=[
            without(badnets[0], "architecture", "ratio") | TRIGGER,
            without(lf[0], "ratio") | TRIGGER,
            without(lf[1], "ratio") | TRIGGER | {"weakness": "fools nobody"},
        ],
        poison=[
            without(badnets[0], "architecture") | POISON,
            lf[0] | POISON | {"num_poisoned": 6},
            lf[1] | POISON | {"num_poisoned": 7},
        ],
        triggered=[
            without(badnets[0], "architecture", "ratio")
            | ONE_TARGET
            | QUALITY
            | {"hyperparameters": {"b": 1}},
            lf[0] | ONE_TARGET | QUALITY | {"hyperparameters": {}, "linf": 8},
            lf[1] | ONE_TARGET | QUALITY | {"hyperparameters": {}, "linf": 9},
        ],
    )
    found = {(row["attack"], row["architecture"]): row for row in models.to_pylist()}
    assert {key: row["linf"] for key, row in found.items()} == {
        ("badnets", "net"): 51,
        ("badnets", "wide"): 51,
        ("lf", "net"): 8,
        ("lf", "wide"): 9,
    }
    assert [found["lf", name]["num_poisoned"] for name in ("net", "wide")] == [6, 7]
    assert [found["lf", name]["trigger_weakness"] for name in ("net", "wide")] == [None, "fools nobody"]
    shared = found["badnets", "wide"]
    assert (shared["label_map"], shared["target"], shared["psnr"]) == ("all_to_one", 3, 21.5)
    assert json.loads(shared["attack_hyperparameters"]) == {"b": 1}


def test_clean_models_have_nulls_and_are_what_the_others_are_held_against(cards):
    measures = [
        (model("none"), 0.9, None),
        (model("none", seed=1), 0.7, None),
        (model("sig"), 0.75, 0.9),
        (model("sig", seed=1), 0.75, 0.9),
    ]
    shared = [without(model("sig", seed=seed), "architecture", "ratio") for seed in (0, 1)]
    cells, models = gathered(
        cards,
        measures,
        poison=[axes | {"ratio": 0.05} | POISON for axes in shared],
        triggered=[axes | ONE_TARGET | QUALITY | {"hyperparameters": {}} for axes in shared],
    )
    clean, _, failed, took = models.to_pylist()
    assert (clean["num_poisoned"], clean["effective_ratio"]) == (0, 0.0)
    nothing = ("acc_loss", "attack_took", "gate_reason", "trigger_weakness", "target", "label_map", "psnr")
    assert {name: clean[name] for name in nothing} == dict.fromkeys(nothing)
    assert (took["attack_took"], took["acc_loss"]) == (True, pytest.approx(-0.05))
    assert failed["gate_reason"] == "ACC 15.0 points below the clean model's, more than 10"
    assert cells.schema.equals(collect.CELLS)
    flags = {(row["attack"], row["seed"]): row["attack_took"] for row in cells.to_pylist()}
    assert flags == {("none", 0): None, ("none", 1): None, ("sig", 0): False, ("sig", 1): True}


def test_an_attack_that_controls_training_counts_what_it_poisons_itself(cards):
    axes = model("wanet")
    _, models = gathered(
        cards,
        [(axes, 0.9, 0.9)],
        trigger=[without(axes, "architecture", "ratio") | TRIGGER],
        triggered=[axes | QUALITY | {"label_map": "all_to_all", "target": None, "hyperparameters": {}}],
        own={"wanet": {"num_poisoned": 4987, "effective_ratio": 0.0499}},
    )
    (row,) = models.to_pylist()
    assert (row["num_poisoned"], row["effective_ratio"]) == (4987, 0.0499)
    assert (row["label_map"], row["target"]) == ("all_to_all", None)
    assert (row["acc_loss"], row["attack_took"]) == (None, True)  # the study has no clean model


def test_the_clean_model_may_have_been_trained_otherwise(cards):
    measures = [(model("none"), 0.9, None), (model("badnets"), 0.9, 0.9), (model("sig"), 0.9, 0.9)]
    shared = {"ratio": 0.05} | POISON
    _, models = gathered(
        cards,
        measures,
        poison=[without(model(name), "architecture") | shared for name in ("badnets", "sig")],
        own={"sig": {"optimization": {"epochs": 1, "schedule": "constant"}}},
    )
    found = {row["attack"]: row["clean_matched"] for row in models.to_pylist()}
    assert found == {"none": None, "badnets": True, "sig": False}


@pytest.mark.parametrize(
    ("attack", "psnr", "weakness", "said"),
    [
        ("ssba", 24.9, None, "PSNR 24.9 dB, below 25"),
        ("ssba", 24.9, "unread bits", "unread bits; PSNR 24.9 dB"),
        ("ssba", 25.0, None, None),
        ("badnets", 20.0, None, None),
    ],
)
def test_redrawn_images_may_be_blurred(cards, attack, psnr, weakness, said):
    axes = without(model(attack), "architecture", "ratio")
    _, models = gathered(
        cards,
        [(model(attack), 0.9, 0.9)],
        trigger=[axes | TRIGGER | {"weakness": weakness}],
        poison=[axes | {"ratio": 0.05} | POISON],
        triggered=[axes | ONE_TARGET | QUALITY | {"psnr": psnr, "hyperparameters": {}}],
    )
    (found,) = models["trigger_weakness"].to_pylist()
    assert found is None if said is None else said in found


@pytest.mark.parametrize(
    ("asr", "decoy", "said"),
    [
        (0.95, 0.10, None),
        (0.95, 0.84, None),
        (0.95, 0.86, "the secret hardly matters: ASR 95.0 % with it, 86.0 % with another"),
        (0.95, None, None),
    ],
)
def test_a_secret_that_another_replaces_is_named_weak(cards, asr, decoy, said):
    axes = model("ssba")
    shared = without(axes, "architecture", "ratio")
    _, models = gathered(
        cards,
        [(axes, 0.9, asr)],
        trigger=[shared | TRIGGER],
        poison=[without(axes, "architecture") | POISON],
        triggered=[shared | ONE_TARGET | QUALITY | {"psnr": 30.0, "hyperparameters": {}}],
        checks=[axes | {"clean_asr": 0.11, "clean_ra": 0.7, "decoy_asr": decoy}],
    )
    (row,) = models.to_pylist()
    assert row["trigger_weakness"] == said if said is None else said in row["trigger_weakness"]
    assert (row["clean_asr"], row["clean_ra"], row["decoy_asr"]) == (0.11, 0.7, decoy)
    assert row["attack_took"]


def test_a_trigger_that_fools_the_clean_model_is_no_backdoor(cards):
    axes = model("blended")
    shared = without(axes, "architecture", "ratio")
    _, models = gathered(
        cards,
        [(axes, 0.9, 0.95)],
        trigger=[shared | TRIGGER],
        poison=[without(axes, "architecture") | POISON],
        triggered=[shared | ONE_TARGET | QUALITY | {"hyperparameters": {}}],
        checks=[axes | {"clean_asr": 0.6, "clean_ra": 0.1, "decoy_asr": None}],
    )
    assert models["attack_took"].to_pylist() == [False]
    assert "fools a clean model" in models["gate_reason"][0].as_py()


def test_poisoned_images_that_nobody_counted_are_no_zero(cards):
    with pytest.raises(ValueError, match="num_poisoned"):
        gathered(cards, [(model("sig"), 0.9, 0.9)])


# --- what lies in another's place ------------------------------------------------------------------


def test_a_card_that_was_copied_over_anothers_is_refused(cards):
    mine, other = model("badnets"), model("badnets", "wide")
    (path,) = cards("models", TRAINED | other)
    nothing = ({}, GATE)
    cells = pa.Table.from_pylist([untouched(axes, 0.9, 0.9) for axes in (mine, other)], collect.GATHERED)
    assert collect.models(cells, {path: other}, *nothing).num_rows == 1
    with pytest.raises(ValueError, match=r"0\.json: another's \(.*architecture=wide.* that of .*=net"):
        collect.models(cells, {path: mine}, *nothing)
    (shared,) = cards("triggers", TRIGGER | without(other, "architecture", "ratio"))
    with pytest.raises(ValueError, match=r"another's \(seed=0\), and should be that of seed=1"):
        collect.models(cells, {path: other}, {"triggers": {shared: {"seed": 1}}}, GATE)


@pytest.mark.parametrize(
    ("draws", "said"),
    [
        ([0, 1], None),
        ([0], "draw=0"),
        ([0, 0], "draw=0, 0"),
        ([0, 1, 2], "draw=2"),
    ],
)
def test_a_table_of_metrics_has_the_rows_of_its_place(tmp_path, draws, said):
    path = tmp_path / "metrics.parquet"
    axes = model("badnets") | {"defense": "ft", "protocol": "survey", "spc": 2}
    blank = untouched(axes, 0.9, 0.9) | {"defense": "ft", "protocol": "survey", "spc": 2}
    blank = {name: blank[name] for name in METRICS.names if name in blank}
    records.write_rows([blank | {"draw": draw} for draw in draws], path, METRICS)
    place = axes | {"draws": Draws(0, 1)}
    if said is None:
        assert collect.cells({path: place}).num_rows == 2
        with pytest.raises(ValueError, match=r"metrics\.parquet: another's \(.*spc=2 draw=0\).*spc=5"):
            collect.cells({path: place | {"spc": 5}})
    else:
        with pytest.raises(ValueError, match=rf"another's \(.*{said}\), and should be that of .*draws=0-1"):
            collect.cells({path: place})
