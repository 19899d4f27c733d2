"""``detrojan rounds``: how a study is split, what is said after each, and that no defense is dropped."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml

from detrojan.analysis.statistics.collect import CELLS
from detrojan.commands import rounds
from detrojan.storage import records
from detrojan.study import grid
from detrojan.study.files import load_study
from detrojan.workflow.job_costs import Costs
from tests.command import exit_code
from tests.unit.tables import cell, of_rows, untouched
from tests.unit.test_plan import TABLE
from tests.unit.test_schema import minimal

ACC = {"ft": 0.9, "fp": 0.9, "anp": 0.5}


def raw(**more):
    axes = {"seeds": [0, 1, 2], "draws": ["0-1", "2-3"], "spc": [10], "attacks": ["badnets", "blended"]}
    return minimal(**{"defenses": ["ft", "fp", "anp"]} | axes | more)


def measured(study):
    """Return the cells of a study: ANP far behind, FT and FP alike, with noise of a point."""
    noise, rows = np.random.default_rng(0), []
    for shard in grid.shards(study):
        axes = {axis: value for axis, value in shard.axes.items() if axis != "defense"}
        if shard.defense == "none":
            rows.append(untouched(0.95, 0.99, 0.01, **axes))
            continue
        for draw in shard.draws.numbers():
            acc, asr = ACC[shard.defense] + noise.normal(0, 0.01), 0.2 + noise.normal(0, 0.01)
            rows.append(cell(shard.defense, acc, asr, **axes, draw=draw))
    return of_rows(*rows)


@pytest.fixture
def costs(tmp_path):
    path = tmp_path / "costs.csv"
    path.write_text(TABLE)
    return path


def test_rounds_are_nested_and_the_last_is_the_study():
    study = load_study(raw())
    parts = rounds.nested(study)
    assert [(part.grid.seeds, list(map(str, part.grid.draws))) for part in parts] == [
        ([0], ["0-1"]),
        ([0, 1], ["0-1", "2-3"]),
        ([0, 1, 2], ["0-1", "2-3"]),
    ]
    keys = [rounds.keys(part) for part in parts]
    assert keys[0] < keys[1] < keys[2] == rounds.keys(study)
    # Two attacked models and the clean one, three defenses; none is dropped.
    assert list(map(len, keys)) == [3 * 3 * 2, 2 * 3 * 3 * 4, 3 * 3 * 3 * 4]


def test_each_round_is_a_study_that_costs_more_than_the_one_before(costs):
    study = load_study(raw())
    found = rounds.rounds(study, Costs.load(costs), CELLS.empty_table())
    assert [part.done for part in found] == [0, 0, 0]
    hours = [part.hours for part in found]
    assert hours == sorted(hours)
    assert hours[0] > 0
    assert found[1].command == "--config 'grid={seeds: [0, 1], draws: [0-1, 2-3]}'"
    given = yaml.safe_load(found[1].command.partition("grid=")[2].rstrip("'"))
    assert load_study(raw(**given)).grid == found[1].study.grid


def test_only_what_a_whole_round_has_measured_decides(costs):
    study = load_study(raw())
    everything = measured(study)
    first_two = rounds.nested(study)[1]
    # The third round has begun: its rows must not be looked at before they are all there.
    some = pa.concat_tables([measured(first_two), everything.filter(pc.equal(everything["seed"], 2))[:9]])
    found = rounds.rounds(study, Costs.load(costs), some)
    assert [part.is_done for part in found] == [True, True, False]
    assert set(rounds.of_round(some, found[1])["seed"].to_pylist()) == {0, 1}
    lines = " ".join(rounds.report(found, some, "der", every=False))
    assert "After round 2 of 3, protocol survey, by DER" in lines
    assert "of 3 pairs of defenses 2 are told apart" in lines
    assert "Round 3 costs" in lines
    assert "seeds: [0, 1, 2]" in lines


def test_the_command_reads_a_study_and_its_tables(tmp_path, costs, capsys):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw()))
    asked = ("rounds", "--configfile", tmp_path / "study.yaml", "--results", tmp_path, "--table", costs)
    assert exit_code(*asked) == 0
    assert "No round is finished" in capsys.readouterr().out
    records.write_table(measured(load_study(raw())), tmp_path / "tables" / "cells.parquet", CELLS)
    assert exit_code(*asked, "--measure", "asr", "--all") == 0
    said = capsys.readouterr().out
    assert "After round 3 of 3, protocol survey, by ASR" in said
    assert "Round 4" not in said
    assert "fp – ft" in said or "ties" in said
