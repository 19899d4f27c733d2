"""The tables and the report that are made of cells and models alone."""

import pytest

from detrojan.analysis import derived
from detrojan.analysis.statistics import collect
from detrojan.commands import tables
from detrojan.storage import records
from detrojan.study import files
from detrojan.workflow import graph
from tests.command import exit_code
from tests.unit import pages
from tests.unit.test_schema import minimal


@pytest.fixture
def copied(tmp_path):
    """A folder into which the two tables of a study were copied."""
    cells = pages.small()
    records.write_table(cells, tmp_path / "tables/cells.parquet", collect.CELLS)
    records.write_table(pages.models_of(cells), tmp_path / "tables/models.parquet", collect.MODELS)
    return tmp_path


def page(folder):
    return (folder / "report/index.html").read_text(encoding="utf-8").partition("<script")[0]


def test_all_that_follows_is_made(copied, capsys):
    assert exit_code("tables", "--results", copied) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{copied}: 7 cells of 2 models."
    # What another gate would change can't be told without knowing this one.
    assert {file.stem for file in (copied / "tables").iterdir()} == set(graph.TABLES) - {"gate_sensitivity"}
    cells = pages.small()
    expected = derived.make({"cells": cells, "models": pages.models_of(cells)})
    for name, table in expected.items():
        schema = derived.TABLES[name].schema
        assert records.read_table(copied / f"tables/{name}.parquet", schema).equals(table)
    assert (copied / "report/figures/ranking.svg").exists()
    assert (copied / "report/tables/models.csv").exists()
    html = page(copied)
    assert 'id="models"' in html
    # Nothing here tells the gate, nor does anything here explain a cell, or show a trigger.
    assert "by a gate that was not copied along" in html
    for absent in ("An attack took if", "detrojan reproduce", 'id="triggers"', "#triggers"):
        assert absent not in html
    assert exit_code("show", "--results", copied) == 0


def test_the_study_file_tells_the_gate_and_how_to_explain_a_cell(copied):
    files.keep(minimal(draws=["0-1", "2-4"]) | {"gate": {"min_asr": 0.625}}, copied)
    said = tables.about(pages.tables_of(pages.small()), tables.study_of(copied))
    assert "ASR is at least 62.5 %" in said.gate
    assert said.draws == ["0-1", "2-4"]
    assert exit_code("tables", "--results", copied) == 0
    table = records.read_table(copied / "tables/gate_sensitivity.parquet")
    own = {row["min_asr"] for row in table.to_pylist() if row["is_study"]}
    assert own == {0.625}


def test_what_can_not_be_made(copied, capsys):
    (copied / "metrics").mkdir()
    assert exit_code("tables", "--results", copied) == 1
    assert "a study's own results, whose tables the workflow makes" in capsys.readouterr().err
    (copied / "metrics").rmdir()
    (copied / "tables/models.parquet").write_bytes(b"PAR1")
    assert exit_code("tables", "--results", copied) == 1
    assert "models.parquet" in capsys.readouterr().err
    assert not (copied / "report").exists()
    assert {file.stem for file in (copied / "tables").iterdir()} == {"cells", "models"}
