"""What every table keeps, beyond the values that its own test holds."""

import re

import pyarrow as pa
import pytest

from detrojan import registry
from detrojan.analysis import derived
from detrojan.analysis.statistics import gate
from detrojan.analysis.statistics.collect import CELLS
from detrojan.settings import Gate
from detrojan.workflow import graph
from tests.unit import pages
from tests.unit import tables as made


@pytest.fixture(scope="module")
def given():
    """The cells and models of a small study with clean models, failures and ties."""
    rows = made.random_study(attacks=("badnets", "sig"), ratios=(0.1,)).to_pylist()
    survey = [row for row in rows if row["protocol"] == "survey"]
    rows += [row | {"protocol": "paper"} for row in survey]
    of_trials = [row for row in survey if row["defense"] == "ft"]
    rows += [row | {"protocol": name} for name in ("trial-00", "trial-02") for row in of_trials]
    cells = pages.of_rows(*rows)
    models = pages.models_of(cells)
    return {"cells": cells, "models": models, "gate": gate.table(models.to_pylist(), Gate())}


@pytest.fixture(scope="module")
def tables(given):
    return derived.make(given)


@pytest.mark.parametrize("name", registry.names(registry.TABLES))
def test_table_has_the_columns_that_it_declares(name, tables):
    """A table that is missing here needs one that nothing makes, or itself."""
    declared = derived.TABLES[name].schema
    assert len(set(declared.names)) == len(declared.names)
    assert tables[name].select(declared.names).cast(declared).num_rows > 0
    for field in declared:
        assert field.nullable or not tables[name][field.name].null_count, field.name


@pytest.mark.parametrize("name", registry.names(registry.TABLES))
def test_table_explains_every_column(name):
    table = derived.TABLES[name].table
    assert table.row.startswith("a")
    assert table.holds
    for each in table.columns:
        assert each.meaning, each.fields
        assert not re.search(r"[|\n]", each.meaning), "it is a line of a page's table"


@pytest.mark.parametrize("name", registry.names(registry.TABLES))
def test_table_changes_nothing_that_it_is_given_and_is_the_same_again(name, given, tables):
    before = {need: table.slice(0) for need, table in given.items()}
    again = derived.make(given)
    assert again[name].equals(tables[name])
    assert all(table.equals(before[need]) for need, table in given.items())


@pytest.mark.parametrize("name", registry.names(registry.TABLES))
def test_table_of_few_cells(name):
    """A study may have no attack, or nothing at all that ended well."""
    clean = pages.of_rows(made.untouched(attack="none"))
    failed = pages.of_rows(made.untouched(status="diverged"), made.cell(status="diverged"))
    for cells in (clean, failed, CELLS.empty_table()):
        models = pages.models_of(cells)
        given = {"cells": cells, "models": models, "gate": gate.table(models.to_pylist(), Gate())}
        found = derived.make(given)[name]
        assert isinstance(found.select(derived.TABLES[name].schema.names), pa.Table)


@pytest.mark.parametrize("name", registry.names(registry.TABLES))
def test_table_has_a_name_of_its_own(name):
    assert name not in (*registry.GATHERED, "made")


def test_tables_and_figures_count_as_code_of_the_rules_that_make_them(monkeypatch):
    """They are found by their files, so no import tells of them."""
    monkeypatch.setattr(graph.provenance, "code_digest", lambda *files: set(files))
    tables = {registry.path(registry.TABLES, name) for name in registry.names(registry.TABLES)}
    figures = {registry.path(registry.FIGURES, name) for name in registry.names(registry.FIGURES)}
    assert tables <= graph.code_digest("aggregate", {})
    assert figures <= graph.code_digest("report", {})
    assert not (tables | figures) & graph.code_digest("defend", {"defense": "ft"})
