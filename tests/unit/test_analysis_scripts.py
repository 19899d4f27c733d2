"""The analysis scripts of docs/ find in a table what was planted there."""

import itertools
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from detrojan.analysis.statistics import collect
from detrojan.analysis.statistics.relative import RELATIVE, relative
from detrojan.analysis.tables import consistency
from detrojan.storage import records
from tests.unit.test_show import cell

DOCS = Path(__file__).parents[2] / "docs"
AXES = {
    "dataset": ["a", "b"],
    "architecture": ["m", "n"],
    "attack": ["blended", "sig", "wanet"],
    "ratio": [0.05, 0.1],
}
# DER, as a difference from fine-tuning; CLP is given no data.
PLANTED = {"ft": 0.0, "fp": -0.04, "anp": 0.1, "clp": -0.06}
BASE, OF_SIG, OF_BUDGET_2 = 0.72, 0.03, -0.03
ACC, ACC_LOST, ASR, RA = 0.95, 0.02, 0.98, 0.01
# Standard deviations of DER: of settings, of models in one, of a defense from setting to setting, of draws.
SPREAD = {"setting": 0.03, "model": 0.015, "defense in setting": 0.02, "draw": 0.015}


def row(model, defense, spc, draw, **values):
    threat_model = {"none": "none", "clp": "data_free"}.get(defense, "clean_data")
    return cell("", defense, draw, spc=spc, threat_model=threat_model) | model | values


def planted(num_seeds=2, axes=AXES, **spreads):
    """Return a table of ``CELLS`` whose defenses differ as planted."""
    spread = SPREAD | spreads
    rng = np.random.default_rng(0)
    rows = [row({"attack": "none", "ratio": 0.0}, "none", 0, 0, acc=0.96)]
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        of_setting = rng.normal(0, spread["setting"])
        of_defenses = dict(
            zip(PLANTED, rng.normal(0, spread["defense in setting"], len(PLANTED)), strict=True)
        )
        for seed in range(num_seeds):
            model = setting | {"seed": seed, "attack_took": setting["attack"] != "wanet" or seed == 0}
            of_model = rng.normal(0, spread["model"])
            rows.append(row(model, "none", 0, 0, acc=ACC, asr=ASR, ra=RA))
            for defense, effect in PLANTED.items():
                for spc, draw in [(0, 0)] if defense == "clp" else itertools.product((2, 10), range(3)):
                    der = BASE + effect + of_setting + of_model + of_defenses[defense]
                    der += OF_SIG * (setting["attack"] == "sig") + OF_BUDGET_2 * (spc == 2)
                    der += rng.normal(0, spread["draw"])
                    asr = ASR - (2 * der - 1 + ACC_LOST)
                    assert 0 < asr < ASR
                    rows.append(
                        row(model, defense, spc, draw, acc=ACC - ACC_LOST, asr=asr, ra=0.9 * (1 - asr))
                    )
    rows.append(row(model, "anp", 10, 3, status="diverged", reason="a loss is nan"))
    for one in rows:
        one["num_triggered"] = 900
    frame = pd.DataFrame(rows)
    frame[list(RELATIVE)] = relative(frame)
    return pa.Table.from_pandas(frame, collect.CELLS, preserve_index=False)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs a script on a table; it returns the script's names and what it printed."""

    def run(script, cells):
        records.write_table(cells, tmp_path / "it's here/tables/cells.parquet", collect.CELLS)
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path / "it's here")])
        names = runpy.run_path(str(DOCS / script))
        return names, capsys.readouterr().out

    with pd.option_context("display.width", 80):  # which the scripts change
        yield run


def test_pandas(run):
    cells = planted()
    names, out = run("analysis_pandas.py", cells)
    frame = cells.to_pandas()
    assert f"{len(frame):,} cells" in out
    kept = frame[(frame["attack_took"] == True) & (frame["status"] == "ok") & (frame["defense"] != "none")]  # noqa: E712
    assert len(names["ok"]) == len(kept)
    for _, found in names["means"].iterrows():
        by_model = {}
        for one in kept[(kept["defense"] == found["defense"]) & (kept["spc"] == found["spc"])].to_dict(
            "records"
        ):
            setting = tuple(one[axis] for axis in AXES)
            by_model.setdefault(setting, {}).setdefault(one["seed"], []).append(one["asr"])
        settings = [[math.fsum(d) / len(d) for d in models.values()] for models in by_model.values()]
        settings = [math.fsum(models) / len(models) for models in settings]
        assert found["asr"] == pytest.approx(math.fsum(settings) / len(settings))
    # WaNet took in one model of two, so its settings weigh less in a plain mean of rows.
    assert not np.allclose(names["means"]["asr"], names["means"]["asr_of_rows"], atol=1e-4)


def test_pandas_finds_what_was_planted(run):
    names, out = run("analysis_pandas.py", planted())
    means = names["means"].set_index(["defense", "spc"])["der"]
    for defense, effect in PLANTED.items():
        budgets = [(0, 0.0)] if defense == "clp" else [(2, OF_BUDGET_2), (10, 0.0)]
        for spc, of_budget in budgets:
            expected = BASE + effect + of_budget + OF_SIG / 3
            assert means[defense, spc] == pytest.approx(expected, abs=0.02), (defense, spc)
    asr = names["asr"]
    assert list(asr.columns) == ["blended", "sig", "wanet"]
    assert (asr["blended"] - asr["sig"]).mean() == pytest.approx(2 * OF_SIG, abs=0.04)
    assert names["worst"].index[0] == "anp"
    assert "an upper bound: none" in out


def test_pandas_and_the_workflow_agree_on_the_worst_tenth(run):
    cells = planted()
    names, _ = run("analysis_pandas.py", cells)
    expected = consistency.make(cells).to_pandas()
    expected = expected[(expected["spc"] == 10) & (expected["defense"] != "none")].set_index("defense")
    found = names["worst"]
    assert found["size"].eq(24).all()
    for ours, theirs in (("mean", "der_mean"), ("worst_tenth", "der_worst_tenth")):
        assert found[ours].to_dict() == pytest.approx(expected[theirs].to_dict())


def test_duckdb(run):
    cells = planted()
    names, out = run("analysis_duckdb.py", cells)
    by_pandas, _ = run("analysis_pandas.py", cells)
    assert "7 rows of means are the same in pandas." in out
    expected = by_pandas["asr"]
    found = names["asr"].df().set_index("defense")
    np.testing.assert_allclose(found.loc[expected.index.astype(str), expected.columns], expected)
    worst = names["worst"].df().set_index("defense")["worst_tenth"]
    expected = by_pandas["worst"]["worst_tenth"]
    assert worst.to_dict() == pytest.approx(expected.to_dict())
    pairs = names["pairs"].df().set_index("defense")
    assert list(pairs.index) == ["anp", "fp"]
    # All draws of both budgets, of the models that have a backdoor: 8 of 24 settings have but one.
    assert pairs["pairs"].tolist() == [(16 * 2 + 8) * 6] * 2
    for defense in pairs.index:
        assert pairs.loc[defense, "difference"] == pytest.approx(PLANTED[defense], abs=0.02)
        assert (pairs.loc[defense, "won"] > 0.5) == (PLANTED[defense] > 0)


def test_mixed_model(run):
    names, out = run("analysis_mixed_model.py", planted())
    effects = names["der_effects"]
    assert set(effects.index) == set(PLANTED) - {"ft"}
    for defense, found in effects.iterrows():
        reach = (found["high"] - found["low"]) / 2
        assert found["effect"] == pytest.approx(PLANTED[defense], abs=1.5 * reach)
        # A defense varies from setting to setting, and so does fine-tuning; there are 24.
        assert reach == pytest.approx(2.07 * math.sqrt(2 / 24) * SPREAD["defense in setting"], rel=0.3)
        assert (names["logit_effects"].loc[defense, "effect"] < 0) == (PLANTED[defense] > 0)
    spreads = names["der_spreads"]
    for name in ("setting", "model", "defense in setting"):
        assert spreads[name] == pytest.approx(SPREAD[name], rel=0.5), name
    assert spreads["rest"] == pytest.approx(SPREAD["draw"] / math.sqrt(3), rel=0.5)
    assert "0 of 160 values are missing" in out
    assert "Fitted DER beyond 0 or 1: 0 of 160" in out


def test_mixed_model_of_one_model_a_setting(run):
    """In a complete table the effects are mean differences, and the intervals are over settings."""
    names, out = run("analysis_mixed_model.py", planted(num_seeds=1))
    assert "singular" not in out
    assert set(names["der_spreads"]) == {"setting", "rest"}
    paired = names["paired"]
    for defense, found in names["der_effects"].iterrows():
        assert found["effect"] == pytest.approx(paired[defense].mean(), abs=1e-6)
        assert found["low"] < PLANTED[defense] < found["high"]


FEW = {"dataset": ["a"], "architecture": ["m"], "attack": ["blended", "sig"], "ratio": [0.1]}


def test_mixed_model_of_two_settings(run):
    """As in the quickstart: no more is claimed than two settings tell."""
    names, _ = run("analysis_mixed_model.py", planted(num_seeds=1, axes=FEW))
    effects = names["der_effects"]
    assert effects["effect"].to_dict() == pytest.approx(names["paired"].mean().to_dict(), abs=1e-6)
    assert ((effects["low"] < 0) & (effects["high"] > 0)).all()


def test_mixed_model_of_settings_that_agree(run):
    """No spread at all: the fit is at its boundary, or singular, and the effects are right all the same."""
    none = dict.fromkeys(SPREAD, 0.0)
    names, _ = run(
        "analysis_mixed_model.py", planted(num_seeds=1, axes=FEW | {"attack": ["blended", "wanet"]}, **none)
    )
    assert names["der_effects"]["effect"].to_dict() == pytest.approx(
        {defense: effect for defense, effect in PLANTED.items() if defense != "ft"}, abs=1e-6
    )


def test_mixed_model_of_one_model(run):
    names, out = run("analysis_mixed_model.py", planted(num_seeds=1, axes=FEW | {"attack": ["sig"]}))
    assert "One model only." in out
    effects = names["der_effects"]
    assert effects["effect"].to_dict() == pytest.approx(names["paired"].mean().to_dict())
    assert effects[["low", "high"]].isna().all(axis=None)


def test_mixed_model_of_models_of_one_setting(run):
    names, _ = run("analysis_mixed_model.py", planted(num_seeds=4, axes=FEW | {"attack": ["sig"]}))
    assert set(names["der_spreads"]) == {"model", "rest"}
    assert names["num_units"] == 4


@pytest.mark.parametrize("script", sorted(DOCS.glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_notebooks(script):
    """Cells of text have nothing but text, so that they open as such."""
    cells = script.read_text().split("# %%")
    assert not cells[0]
    for text in cells[1:]:
        first, *lines = text.splitlines()
        assert first in ("", " [markdown]")
        assert first == "" or all(line.startswith("#") for line in lines if line), lines
