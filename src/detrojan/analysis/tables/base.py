"""What a table says of itself: to the file, to who reads it, and to ``docs/tables.md``.

A table is a file in this folder, whose name is the table's. It has ``TABLE``, a :class:`Table`, and a
function ``make``. The names of its arguments are those of the tables that it is made of: ``cells``,
``models``, or another one of this folder. It returns a table of the schema ``TABLE.schema``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa

from detrojan import registry
from detrojan.analysis import protocols
from detrojan.analysis.statistics.collect import CELLS

AS_ABOVE = "as above"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns that one sentence explains: a line of ``docs/tables.md``.

    Attributes:
        fields: their names and types.
        meaning: what a value is, with its unit and range, as Markdown.
        kind: of the values, as the page names it.
        words: whether a value is one of a few words: pandas gets a category.
    """

    fields: tuple[pa.Field, ...]
    meaning: str
    kind: str
    words: bool


def columns(*names: str, kind: pa.DataType, meaning: str, null: bool = False, words: bool = False) -> Columns:
    """Return columns of these names.

    Args:
        names: one, or several that belong together.
        kind: the type of their values.
        meaning: what a value is, with its unit and range, as Markdown; of the several, all at once.
        null: whether a value may be missing.
        words: whether a value is one of a few words.
    """
    fields = tuple(pa.field(name, kind, nullable=null) for name in names)
    return Columns(fields, meaning, f"{kind}, null" if null else str(kind), words)


def as_in_cells(*names: str, meaning: str) -> Columns:
    """Return columns that the table of cells has too, with its types."""
    return Columns(tuple(CELLS.field(name) for name in names), meaning, AS_ABOVE, words=False)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, but for how it is made.

    Attributes:
        row: what has a row: ``a setting and defense``.
        holds: what its numbers are, in a few words, for lists of tables.
        columns: in their order.
        about: what a reader must know before the columns, as Markdown.
        across: whether it is made of all protocols at once, which it sets side by side. Any other is made of
            each protocol for itself, and its file has a column more, the first.
    """

    row: str
    holds: str
    columns: Sequence[Columns]
    about: str = ""
    across: bool = False

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """The columns as ``make`` returns them."""
        return pa.schema([field for each in self.columns for field in each.fields])

    @property
    def file_schema(self) -> pa.Schema:
        """The columns that the file has."""
        return self.schema if self.across else self.schema.insert(0, protocols.COLUMN)

    @property
    def words(self) -> frozenset[str]:
        """The columns whose values are a few words."""
        return frozenset(field.name for each in self.columns if each.words for field in each.fields)

    def section(self, name: str) -> str:
        """Return what ``docs/tables.md`` says of it, as Markdown; ``name`` is the table's."""
        head = f"## `results/tables/{name}.parquet`: a row {self.row}"
        rows = [] if self.across else ["| `protocol` | string | of the defenses of this row |"]
        rows += [
            f"| {', '.join(f'`{field.name}`' for field in each.fields)} | {each.kind} | {each.meaning} |"
            for each in self.columns
        ]
        listed = "\n".join(["| column | type | meaning |", "| --- | --- | --- |", *rows])
        return "\n\n".join(filter(None, (head, self.about, listed))) + "\n"


class Derived(NamedTuple):
    """How a table is made, of which others, and what it says of itself."""

    make: Callable[..., pa.Table]
    table: Table

    @property
    def schema(self) -> pa.Schema:
        """The columns that its file has."""
        return self.table.file_schema

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the tables that it is made of."""
        return tuple(inspect.signature(self.make).parameters)


@functools.cache
def load(name: str) -> Derived:
    """Return a table of ``analysis/tables/`` by its name."""
    module = registry.imported(registry.TABLES, name)
    return Derived(module.make, module.TABLE)
