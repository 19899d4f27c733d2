"""Makes the tables that follow from the cells and models: all those in ``analysis/tables/``."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from detrojan import registry
from detrojan.analysis.tables.base import load
from detrojan.storage import records

TABLES = {name: load(name) for name in registry.names(registry.TABLES)}


def make(given: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Return ``TABLES`` by name, without those that need a table that is not there.

    Args:
        given: what they are made of: ``cells``, of the schema ``CELLS``, and ``models``, of the schema
            ``MODELS``. Other people's results have no models.
    """
    found, waiting = dict(given), dict(TABLES)
    while ready := [name for name, derived in waiting.items() if found.keys() >= set(derived.needs)]:
        for name in ready:
            derived = waiting.pop(name)
            found[name] = derived.make(**{need: found[need] for need in derived.needs})
    return {name: found[name] for name in TABLES if name in found}


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
