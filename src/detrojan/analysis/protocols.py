"""The protocols that tables hold, kept apart: no mean and no rank runs over them.

Trials are none of them: what follows from cells is made without, but for the tables of the search itself.
"""

import pyarrow as pa
import pyarrow.compute as pc

from detrojan.cells import NO_METHOD
from detrojan.study import trials
from detrojan.study.schema import PROTOCOLS

COLUMN = pa.field("protocol", pa.string(), nullable=False)


def of(cells: pa.Table) -> list[str]:
    """Return the protocols of a table that has such a column, in their order; ``none`` if there are none.

    A study may have nothing but untouched models, or trials.
    """
    found = set(pc.unique(cells[COLUMN.name]).to_pylist()) - {NO_METHOD, *trials.NAMES}
    order = {name: place for place, name in enumerate((*PROTOCOLS, trials.TUNED))}
    return sorted(found, key=lambda name: (order.get(name, len(order)), name)) or [NO_METHOD]


def only(table: pa.Table, protocol: str) -> pa.Table:
    """Return the rows of one protocol and those of untouched models, of a table that has such a column."""
    return table.filter(pc.is_in(table[COLUMN.name], pa.array([protocol, NO_METHOD])))


def without_trials(table: pa.Table) -> pa.Table:
    """Return the rows that are of no trial, of a table that has such a column."""
    return table.filter(pc.invert(_of_trials(table)))


def of_trials(table: pa.Table) -> pa.Table:
    """Return the rows of trials, of a table that has such a column."""
    return table.filter(_of_trials(table))


def _of_trials(table: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(table[COLUMN.name], pa.array(trials.NAMES))
