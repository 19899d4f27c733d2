"""Makes the tables that follow from the cells and models: all those in ``analysis/tables/``.

Each is made of the cells of one protocol, with the untouched models beside them, and then of the next: no
mean and no rank runs over protocols. A table that compares them says so of itself. Trials are no protocol
that counts: ``cells`` has none of their rows, and the tables of the search ask for ``trials``.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from detrojan import registry
from detrojan.analysis import protocols
from detrojan.analysis.tables.base import load
from detrojan.storage import records

TABLES = {name: load(name) for name in registry.names(registry.TABLES)}


def make(given: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Return ``TABLES`` by name, without those that need a table that is not there.

    Args:
        given: what they are made of: ``cells``, of the schema ``CELLS``, and ``models``, of the schema
            ``MODELS``. Other people's results have no models. Of ``cells``, the rows of trials become a
            table of their own, ``trials``.
    """
    whole = given["cells"]
    given = {**given, "cells": protocols.without_trials(whole), "trials": protocols.of_trials(whole)}
    parts: dict[str, list[pa.Table]] = {}
    for protocol in protocols.of(given["cells"]):
        own = dict(given) | {"cells": protocols.only(given["cells"], protocol)}
        for name, table in _make(own, across=False).items():
            named = pa.array([protocol] * len(table), protocols.COLUMN.type)
            parts.setdefault(name, []).append(table.add_column(0, protocols.COLUMN, named))
    found = {name: pa.concat_tables(tables) for name, tables in parts.items()}
    found |= _make(dict(given) | found, across=True)
    return {name: found[name] for name in TABLES if name in found}


def _make(given: Mapping[str, pa.Table], *, across: bool) -> dict[str, pa.Table]:
    """Return the tables that are made of all protocols at once, or of one."""
    found = dict(given)
    waiting = {name: table for name, table in TABLES.items() if table.table.across == across}
    while ready := [name for name, derived in waiting.items() if found.keys() >= set(derived.needs)]:
        for name in ready:
            derived = waiting.pop(name)
            found[name] = derived.make(**{need: found[need] for need in derived.needs})
    return {name: table for name, table in found.items() if name not in given}


def write(given: Mapping[str, pa.Table], paths: Mapping[str, str | Path]) -> dict[str, pa.Table]:
    """Write what :func:`make` makes, each table to the path of its name; return the tables.

    Args:
        given: what they are made of.
        paths: by name; others than those of ``TABLES`` don't matter.
    """
    made = make(given)
    for name, table in made.items():
        records.write_table(table, paths[name], TABLES[name].schema)
    return made
