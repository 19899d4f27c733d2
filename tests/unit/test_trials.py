"""Trials: what they draw, what a study with them may be, and that each defense can be searched."""

import subprocess
import sys

import pytest
from scipy.stats import qmc

from detrojan import registry
from detrojan.study import files, grid, schema, trials
from detrojan.study.files import load_study
from tests.unit.test_schema import minimal, mistakes

OF_TUNING = {"seeds": [100], "draws": ["100-101"]}
DIGITS = {"dataset": "digits", "attack": "badnets", "spc": 2}


def of_trials(**more):
    return minimal(protocols=["trials"], **OF_TUNING) | more


# --- what they draw --------------------------------------------------------------------------------


def test_the_sequence_is_sobols():
    points = qmc.Sobol(trials.MOST_SEARCHED, scramble=False).random(32)
    for dimension in range(trials.MOST_SEARCHED):
        assert trials.sobol(dimension, 32) == points[:, dimension].tolist()


def test_sixteen_trials_have_a_point_in_each_sixteenth_of_every_setting():
    search = {f"setting{number}": trials.Range(among=tuple(range(16))) for number in range(6)}
    first = [trials.drawn("ft", search, (), number) for number in range(2, 18)]
    for setting in search:
        assert sorted(values[setting] for values in first) == list(range(16))
    assert len({tuple(values.values()) for values in first}) == 16


def test_a_scrambling_is_a_methods_own_and_stays():
    """Pinned: what was chosen once would mean another setting if this changed."""
    search = {"lr": trials.Range(low=1e-3, high=0.1, scale="log"), "epochs": trials.Range(low=5, high=100)}
    ft, fp = (trials.drawn(name, search, ("epochs",), 2) for name in ("ft", "fp"))
    assert ft == {"lr": 0.091, "epochs": 73}
    assert fp == {"lr": 0.00529, "epochs": 66}


def test_values_of_a_range():
    low_to_high = trials.Range(low=0.001, high=0.1, scale="log")
    assert [low_to_high.at(share, whole=False) for share in (0, 0.5, 0.99999)] == [0.001, 0.01, 0.1]
    assert trials.Range(low=1, high=3).at(0.3, whole=True) == 2
    assert [trials.Range(among=(True, "x")).at(share, whole=False) for share in (0.4, 0.5)] == [True, "x"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs low and a larger high"),
        ({"low": 2, "high": 1}, "needs low and a larger high"),
        ({"low": 0, "high": 1, "scale": "log"}, "needs a low above 0"),
        ({"low": 0, "high": 1, "among": [1]}, "give low and high, or among"),
    ],
)
def test_a_range_that_is_none(given, said):
    with pytest.raises(ValueError, match=said):
        trials.Range(**given)


@pytest.mark.parametrize("name", registry.names("defenses"))
def test_each_defense_can_be_searched_around_its_protocols(name):
    declared = registry.declared("defenses", name).settings
    search = schema.shipped_file("defenses", name).search
    assert 1 <= len(search) <= trials.MOST_SEARCHED
    assert not any("batch_size" in setting or setting in ("layers", "sites", "host") for setting in search)
    for number in range(trials.NUM_TRIALS):
        base, drawn = schema.trial(name, number)
        declared(**schema.shipped("defenses", name, base).resolve({}) | drawn)
        assert set(drawn) == (set(search) if number > 1 else set())


def test_an_error_in_a_search_is_told_with_its_place(tmp_path, monkeypatch):
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses" / "clp.yaml").write_text(
        "search: {u: {low: 0, high: 1}, v: {low: 0, high: 1}}\n", encoding="utf-8"
    )
    monkeypatch.setattr(schema, "CONFIG", tmp_path)
    schema.shipped_file.cache_clear()
    found = [line for line in files.wrong_shipped("defenses", "clp") if ".search" in line]
    schema.shipped_file.cache_clear()
    assert found[0].startswith("config/defenses/clp.yaml.search.u: should be greater than 0")
    assert found[1].startswith("config/defenses/clp.yaml.search.v: unknown setting 'v'")


# --- in a study ------------------------------------------------------------------------------------


def test_trials_stand_for_all_of_them_or_the_first_few():
    assert load_study(of_trials()).grid.protocols == list(trials.NAMES)
    raw = of_trials()
    raw["grid"] |= {"trials": 3, "protocols": ["survey", "trials"]}
    assert load_study(raw).grid.protocols == ["survey", "trial-00", "trial-01", "trial-02"]
    assert {shard.protocol for shard in grid.shards(load_study(raw))} == {
        "none",
        *load_study(raw).grid.protocols,
    }


def test_the_first_trials_are_the_protocols_and_the_others_draw():
    study = load_study(of_trials())
    first, second, third = (DIGITS | {"protocol": trials.name(number)} for number in range(3))
    for trial, protocol in ((first, "survey"), (second, "paper")):
        own = DIGITS | {"protocol": protocol}
        assert study.method("defenses", "ft", trial) == study.method("defenses", "ft", own)
        assert study.sources("ft", trial) == study.sources("ft", own)
    drawn = schema.trial("ft", 2)[1]
    assert study.method("defenses", "ft", third) == study.method("defenses", "ft", first) | drawn
    said = study.sources("ft", third)
    assert {name for name, word in said.items() if word == "trial"} == set(drawn)
    assert said["batch_size"] == "survey"
    assert not study.deviates("ft", third)


def test_the_second_trial_of_a_method_without_paper_is_survey_again():
    assert schema.trial("grad_prune_inverted", 1) == ("survey", {})


def test_trials_have_seeds_and_draws_of_their_own():
    assert [line.split(":")[0] for line in mistakes(minimal(protocols=["trial-03"]))] == [
        "grid.seeds",
        "grid.draws",
    ]
    [line] = mistakes(minimal(protocols=["trials"], seeds=[100, 99], draws=["100-101"]))
    assert line.startswith("grid.seeds: trials run on seeds of their own, 100 and more")
    [line] = mistakes(minimal(protocols=["trials"], seeds=[100], draws=["99-101"]))
    assert line.startswith("grid.draws: ")


def test_a_study_of_trials_cannot_set_what_they_draw():
    raw = of_trials(
        defenses={"ft": {"batch_size": 32, "overrides": [{"when": {"spc": 2}, "set": {"lr": 0.1}}]}}
    )
    [line] = mistakes(raw)
    assert line.startswith("defenses.ft.overrides[0].set.lr: the trials draw it")


def test_a_defense_without_a_search_has_no_trials(monkeypatch):
    monkeypatch.setattr(schema, "shipped_file", lambda kind, name: schema.Shipped())
    study = load_study(of_trials())
    assert {shard.defense for shard in grid.shards(study)} == {"none"}
    assert grid.undeclared(study) == [
        "No trials and nothing tuned: no search in config/defenses/ for ft, fp."
    ]


def test_reading_trials_imports_no_torch_and_no_scipy():
    code = (
        "import sys; from detrojan.study import schema; schema.trial('ft', 5); "
        "sys.exit(bool({'torch', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
