"""Reads a study's tables as tidy pandas frames: ``detrojan.read_cells("results")``.

A frame has a row an observation and the columns that ``docs/tables.md`` explains. Keys and other words
out of a few are categories, those of the rows that are there, in order, with the controls (``none``)
first; truth values and whole numbers stay what they are where some are missing (pandas' ``boolean`` and
``Int32``); a missing measure is NaN.
"""

import difflib
import functools
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa

from detrojan import registry
from detrojan.analysis.tables.base import load
from detrojan.cells import NO_METHOD
from detrojan.storage import paths, records
from detrojan.storage.columns import OK

FilePath = str | os.PathLike[str]

# The modules of analysis/statistics/ that make `registry.GATHERED`; each has the schema by the table's name.
MAKERS = {"cells": "collect", "models": "collect", "measures": "predictions"}
# Columns whose values are a few words, in whatever table; a table of analysis/tables/ names its own.
CATEGORIES = (
    *("dataset", "architecture", "attack", "defense", "threat_model", "status", "device"),
    *("label_map", "measure"),
)
TEXT = {pa.string(): pd.StringDtype()}
# Of their own, pandas makes objects or floats of these.
WITH_NULLS = {
    pa.bool_(): pd.BooleanDtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
}
FIRST = (NO_METHOD, OK)  # among the categories of a column


class Reader(Protocol):
    """What reads a table."""

    def __call__(self, path: FilePath = "results", columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return the table as a frame; see :func:`reader`."""


def names() -> list[str]:
    """Return the names of the tables that can be read."""
    return [*registry.GATHERED, *registry.names(registry.TABLES)]


@functools.cache
def reader(name: str) -> Reader:
    """Return what reads the table of this name, one of :func:`names`."""

    def read(path: FilePath = "results", columns: Sequence[str] | None = None) -> pd.DataFrame:
        return _read(name, path, columns)

    read.__name__ = read.__qualname__ = f"read_{name}"
    read.__doc__ = DOCUMENTED.format(row=ROWS.get(name) or load(name).table.row)
    return read


# What has a row, of the tables of `MAKERS`.
ROWS = {
    "cells": "a cell: one model, one defense, one SPC, one draw",
    "models": "a model: how it was poisoned and trained",
    "measures": "a cell, measure and class, of stored predictions",
}
DOCUMENTED = """Return a row {row}.

    Args:
        path: a folder of results, one of tables, or the Parquet file itself.
        columns: those to read, in this order; else all of them. docs/tables.md explains them.

    Raises:
        ValueError: there is no such table, it is broken or of another version, or it lacks a column.
    """


def schema(name: str) -> pa.Schema:
    """Return the declared columns of a table, one of :func:`names`."""
    if name not in MAKERS:
        return load(name).schema
    module = importlib.import_module(f"detrojan.analysis.statistics.{MAKERS[name]}")
    declared: pa.Schema = getattr(module, name.upper())
    return declared


def _categories(name: str) -> frozenset[str]:
    """Return the columns of a table that become categories."""
    return frozenset(CATEGORIES) | (frozenset() if name in MAKERS else load(name).table.words)


def _read(name: str, path: FilePath, columns: Sequence[str] | None) -> pd.DataFrame:
    file = _find(name, Path(path))
    declared = schema(name)
    wanted = declared.names if columns is None else list(columns)
    for column in wanted:
        if column not in declared.names:
            close = difflib.get_close_matches(column, declared.names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(declared.names)}"
            raise ValueError(f"{name}: no column {column!r}; {hint}")
    coded = [column for column in wanted if column in _categories(name)]
    with records.readable(file, "Parquet table"):
        opened = records.open_table(file, read_dictionary=coded)
        # Of the file's own types: the opened one calls dictionaries what is read as such.
        _check(file, opened.schema.to_arrow_schema(), declared)
        table = opened.read(columns=wanted)
    return pd.DataFrame({column: _series(table[column], declared.field(column)) for column in wanted})


def _find(name: str, path: Path) -> Path:
    """Return the file of a table, given it or a folder above it."""
    for file in (path, paths.table(path, name), path / f"{name}.parquet"):
        if file.is_file():
            return file
    folder = path.parent if path.suffix == ".parquet" else path
    near = (folder, folder / paths.TABLES)
    there = sorted(str(file) for each in near for file in each.glob("*.parquet"))
    found = f"tables there: {', '.join(there)}" if there else "no tables there"
    made = "detrojan measure" if name == "measures" else "snakemake --profile local"
    raise ValueError(
        f"{path}: no {name}.parquet ({found}); make it with `{made}`, or name its folder of results"
    )


def _check(file: Path, found: pa.Schema, declared: pa.Schema) -> None:
    """Refuse a table of other columns, or other types; which of them may be null is no matter."""
    kinds = {field.name: field.type for field in found}
    wrong = [f"no {field.name}" for field in declared if field.name not in kinds]
    wrong += [f"unknown {name}" for name in kinds if name not in declared.names]
    wrong += [
        f"{field.name} is {kinds[field.name]} and not {field.type}"
        for field in declared
        if kinds.get(field.name, field.type) != field.type
    ]
    if wrong:
        raise ValueError(
            f"{file}: not this version's columns ({', '.join(wrong)}); run what made it again, or read it "
            "with pandas.read_parquet"
        )


def _series(column: pa.ChunkedArray, field: pa.Field) -> "pd.Series[Any]":
    """Return a column in pandas' type for it."""
    series: pd.Series[Any]
    if pa.types.is_dictionary(column.type):
        series = column.unify_dictionaries().to_pandas()
        words = sorted(series.cat.categories, key=lambda word: (word not in FIRST, word))
        return series.cat.reorder_categories(words)
    types = TEXT | (WITH_NULLS if field.nullable else {})
    series = column.to_pandas(types_mapper=types.get)
    return series
