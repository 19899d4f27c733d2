"""The tables that follow from the cells alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from detrojan.analysis.statistics.comparisons import COMPARISONS, compare
from detrojan.analysis.statistics.consistency import CONSISTENCY, consistency
from detrojan.analysis.statistics.outcomes import OUTCOMES, outcomes
from detrojan.analysis.statistics.ranks import RANKS, rank
from detrojan.analysis.statistics.summary import SUMMARY, summarize
from detrojan.storage import records


class Derived(NamedTuple):
    """How a table is made of the cells, and its schema."""

    make: Callable[[pa.Table], pa.Table]
    schema: pa.Schema


TABLES = {
    "summary": Derived(summarize, SUMMARY),
    "ranks": Derived(rank, RANKS),
    "comparisons": Derived(compare, COMPARISONS),
    "consistency": Derived(consistency, CONSISTENCY),
    "outcomes": Derived(outcomes, OUTCOMES),
}


def write(cells: pa.Table, paths: Mapping[str, str | Path]) -> None:
    """Write each of ``TABLES`` to the path of its name.

    Args:
        cells: of the schema ``CELLS``.
        paths: by name; others than those of ``TABLES`` don't matter.
    """
    for name, derived in TABLES.items():
        records.write_table(derived.make(cells), paths[name], derived.schema)
