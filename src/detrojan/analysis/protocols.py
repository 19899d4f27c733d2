"""The protocols that tables hold, kept apart: no mean and no rank runs over them."""

import pyarrow as pa
import pyarrow.compute as pc

from detrojan.cells import NO_METHOD
from detrojan.study.schema import PROTOCOLS

COLUMN = pa.field("protocol", pa.string(), nullable=False)


def of(cells: pa.Table) -> list[str]:
    """Return the protocols of a table that has such a column, in their order; ``none`` if there are none.

    A study may have nothing but untouched models.
    """
    found = set(pc.unique(cells[COLUMN.name]).to_pylist()) - {NO_METHOD}
    order = {name: place for place, name in enumerate(PROTOCOLS)}
    return sorted(found, key=lambda name: (order.get(name, len(order)), name)) or [NO_METHOD]


def only(table: pa.Table, protocol: str) -> pa.Table:
    """Return the rows of one protocol and those of untouched models, of a table that has such a column."""
    return table.filter(pc.is_in(table[COLUMN.name], pa.array([protocol, NO_METHOD])))
