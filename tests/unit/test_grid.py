"""Axes, filters and shards: which cells a study has."""

from pathlib import Path

import pytest
import yaml

from detrojan import registry
from detrojan.cells import NO_METHOD, ONE_DRAW, Draws, Model, ratio_text, untouched
from detrojan.study.files import load_study
from detrojan.study.grid import models, shards
from tests.unit.test_schema import minimal

ROOT = Path(__file__).parents[2]


def study(**grid):
    two = {
        "attacks": [NO_METHOD, "badnets", "sig"],
        "ratios": [0.05, 0.1],
        "seeds": [0, 1],
        "defenses": [NO_METHOD, "ft", "fp", "clp"],
        "spc": [2, 10],
        "draws": ["0-1", "2-4"],
    }
    return load_study(minimal(**two | grid))


def planned(**grid):
    """Return the shards of a study with one data set, architecture and seed, in short."""
    one = study(**{"seeds": [0]} | grid)
    return {(s.model.attack, s.model.ratio, s.defense, s.spc, str(s.draws)) for s in shards(one)}


# --- without filters -------------------------------------------------------------------------------


def test_models_are_the_product_and_a_clean_one_beside_each():
    found = models(study())
    assert len(found) == len(set(found)) == 2 * (1 + 2 * 2)
    assert found[:3] == [
        Model("digits", "preactresnet18", NO_METHOD, 0.0, 0),
        Model("digits", "preactresnet18", "badnets", 0.05, 0),
        Model("digits", "preactresnet18", "badnets", 0.1, 0),
    ]


def test_the_clean_model_needs_no_mention():
    assert models(study(attacks=["badnets", "sig"])) == models(study())


def test_a_study_may_have_clean_models_only():
    assert [m.attack for m in models(study(attacks=[NO_METHOD]))] == [NO_METHOD] * 2
    # One for each seed, so that a filter can still drop some.
    assert [m.seed for m in models(study(attacks=[NO_METHOD], exclude=[{"seed": 0}]))] == [1]


def test_shards_are_the_product_of_defenses_spc_and_ranges():
    one = study(seeds=[0], attacks=["badnets"], ratios=[0.1])
    found = [(s.defense, s.spc, s.draws) for s in shards(one) if s.model.attack == "badnets"]
    ranges = [(spc, draws) for spc in (2, 10) for draws in (Draws(0, 1), Draws(2, 4))]
    assert found == [
        (NO_METHOD, 0, ONE_DRAW),
        *[("ft", *rest) for rest in ranges],
        *[("fp", *rest) for rest in ranges],
        ("clp", 0, ONE_DRAW),  # is given no data: SPC and draw can't change what it does
    ]


def test_every_model_has_its_untouched_shard_first():
    one = study(defenses=["ft", "fp"], exclude=[{"defense": ["ft", "fp"], "attack": "sig"}])
    found = list(shards(one))
    for model in models(one):
        assert next(s for s in found if s.model == model) == untouched(model)


# --- filters ---------------------------------------------------------------------------------------


def test_no_sig_above_a_ratio():
    found = planned(exclude=[{"attack": "sig", "ratio": "> 0.05"}])
    assert found == {cell for cell in planned() if cell[:2] != ("sig", 0.1)}


def test_exclude_defense_and_spc():
    found = planned(exclude=[{"defense": "ft", "spc": "> 5"}, {"defense": "fp", "spc": 2}])
    assert found == {cell for cell in planned() if (cell[2], cell[3]) not in {("ft", 10), ("fp", 2)}}


def test_exclude_by_ratio_or_spc_spares_what_has_none():
    # A clean model is written with ratio 0 and a data-free method with SPC 0: neither is a small value.
    found = planned(exclude=[{"ratio": "< 0.07"}, {"spc": "< 5"}])
    assert found == {
        cell for cell in planned() if cell[1] in (0, 0.1) and (cell[3] == 10 or cell[2] in (NO_METHOD, "clp"))
    }
    assert (NO_METHOD, 0.0, "ft", 10, "0-1") in found
    assert ("sig", 0.1, "clp", 0, "0-0") in found


def test_include_keeps_the_controls_of_what_it_names():
    found = planned(include=[{"attack": "sig", "ratio": 0.1, "spc": 2}])
    assert found == {
        cell
        for cell in planned()
        if cell[:2] in ((NO_METHOD, 0), ("sig", 0.1)) and (cell[3] == 2 or cell[2] in (NO_METHOD, "clp"))
    }


def test_include_of_a_part_of_a_model_keeps_the_model():
    found = planned(include=[{"attack": "badnets"}, {"attack": "sig", "defense": "ft"}])
    assert {cell[2] for cell in found if cell[0] == "sig"} == {NO_METHOD, "ft"}
    assert {cell[2] for cell in found if cell[0] == "badnets"} == {NO_METHOD, "ft", "fp", "clp"}


def test_exclude_wins_over_include():
    found = planned(include=[{"attack": "sig"}], exclude=[{"attack": "sig", "defense": ["ft", "fp", "clp"]}])
    assert {cell[2] for cell in found if cell[0] == "sig"} == {NO_METHOD}


def test_clean_models_can_be_left_undefended():
    found = planned(exclude=[{"attack": NO_METHOD}])
    assert {cell for cell in found if cell[0] == NO_METHOD} == {(NO_METHOD, 0, NO_METHOD, 0, "0-0")}
    assert len(found) == len(planned()) - 9


def test_clean_models_go_with_their_attacked_ones():
    found = models(study(exclude=[{"seed": 1}]))
    assert {model.seed for model in found} == {0}
    assert models(study(exclude=[{"attack": ["badnets", "sig"]}])) == []


def test_adding_a_value_only_adds_shards():
    before = set(shards(study()))
    for more in (
        {"ratios": [0.01, 0.05, 0.1]},
        {"seeds": [0, 1, 7]},
        {"spc": [1, 2, 10]},
        {"draws": ["0-1", "2-4", "5-9"]},
        {"attacks": [NO_METHOD, "blended", "badnets", "sig"]},
        {"defenses": [NO_METHOD, "grad_prune", "ft", "fp", "clp"]},
    ):
        assert before < set(shards(study(**more)))


# --- how cells are written -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "text"), [(0.1, "0.1"), (0.0, "0"), (1e-5, "0.00001"), (0.005, "0.005"), (0.25, "0.25")]
)
def test_ratio_in_paths(ratio, text):
    assert ratio_text(ratio) == text
    assert float(text) == ratio


@pytest.mark.parametrize(("text", "draws"), [("0-9", (0, 9)), ("4", (4, 4)), (" 03-7 ", (3, 7))])
def test_draws(text, draws):
    assert Draws.parse(text) == draws
    assert Draws.parse(str(Draws.parse(text))) == draws


@pytest.mark.parametrize("text", ["5-2", "a-b", "", "-3", "1-", "1-2-3", "1.5", "0..4"])
def test_wrong_draws(text):
    with pytest.raises(ValueError, match=r"ends before it starts|is no range of draws"):
        Draws.parse(text)


def test_data_free_is_told_by_the_folder():
    assert registry.threat_model("defenses", "clp") == "data_free"


def test_the_survey_is_the_paper_s_grid():
    study = load_study(yaml.safe_load((ROOT / "config" / "survey.yaml").read_text()))
    found = models(study)
    attacked = [model for model in found if model.attack != NO_METHOD]
    # 8 attacks x 3 data sets x 4 architectures x 3 ratios, less SIG where its class is too small.
    assert len(attacked) == 288 - 2 * 4 * 3
    assert len(found) - len(attacked) == 3 * 4
    assert {m.attack for m in attacked} == {"badnets", "blended", "sig", "lf", "ssba", "iab", "wanet", "bpp"}
    assert {m.architecture for m in attacked} == {
        "preactresnet18",
        "vgg19_bn",
        "efficientnet_b3",
        "mobilenet_v3_large",
    }
    assert {m.dataset for m in attacked if m.attack == "sig"} == {"cifar10"}
    (exclusion,) = study.grid.exclude
    assert exclusion.why


def test_the_survey_s_schedules():
    study = load_study(yaml.safe_load((ROOT / "config" / "survey.yaml").read_text()))
    for model in models(study):
        training = study.optimization(model._asdict())
        assert (training["batch_size"], training["lr"], training["weight_decay"]) == (128, 0.01, 5e-4)
        controls = model.attack != NO_METHOD and registry.trigger_owner(model.attack) == "model"
        assert training["schedule"] == ("constant" if controls else "cosine")
        assert training["epochs"] == (75 if model.attack == "iab" else 100)
    assert study.method("attacks", "iab", {})["mask_epochs"] == 25
