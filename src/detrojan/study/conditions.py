"""What ``KEY=VALUE`` texts ask of the cells of a study: the one grammar that all commands share.

A key is an axis of a cell. A value is one value (``attack=badnets``), several with commas between
(``defense=ft,fp``), a range of whole numbers (``draw=0-4``), or of a number a comparison, in quotes for
the shell (``spc=">=10"``). Free of torch.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from detrojan.cells import CELL_AXES, MODEL_AXES, Draws, Shard, ratio_text
from detrojan.study import grid
from detrojan.study.schema import COMPARISONS, NAMED_AXES, Axis, Study, split_comparison

MOST_SHOWN = 20  # values that a message lists


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on one axis.

    Attributes:
        axis: of a cell.
        value: as it was written.
        allowed: the values that meet it, of a range all its numbers; nothing for a comparison.
        sign: of a comparison; empty if it is none.
        bound: what a comparison compares with.
    """

    axis: str
    value: str
    allowed: Sequence[Sequence[Axis]] = ()
    sign: str = ""
    bound: float = 0.0

    def __str__(self) -> str:
        return f"{self.axis}={self.value}"

    @property
    def num_values(self) -> int:
        """How many values it lists; 0 for a comparison."""
        return sum(map(len, self.allowed))

    def admits(self, value: Axis) -> bool:
        """Return whether a value of the axis meets it.

        A clean model lacks a ratio and a data-free method an SPC: tables write these as 0, which a list
        can name, but which is no small value to compare.
        """
        if not self.sign:
            return any(value in part for part in self.allowed)
        lacks = self.axis in ("ratio", "spc") and value == 0
        return not lacks and bool(COMPARISONS[self.sign](value, self.bound))

    def holds(self, shard: Shard) -> bool:
        """Return whether a cell of ``shard`` meets it."""
        return any(map(self.admits, _values(shard, self.axis)))

    def only(self) -> Axis:
        """Return its one value.

        Raises:
            ValueError: it has others too.
        """
        if self.num_values != 1:
            first = f"{self.bound:g}" if self.sign else self.allowed[0][0]
            raise ValueError(
                f"{str(self)!r} can mean several cells, and this needs exactly one: write one value, as "
                f"{self.axis}={first}"
            )
        return self.allowed[0][0]


def parse(texts: Iterable[str]) -> list[Condition]:
    """Return the conditions that ``KEY=VALUE`` texts write.

    Raises:
        ValueError: a text is not of this form, its key is no axis of a cell, or its value none of that axis.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> Condition:
    axis, sign, value = text.partition("=")
    if not (sign and value.strip()):
        raise ValueError(f"{text!r} should be KEY=VALUE, such as spc=10")
    if axis not in CELL_AXES:
        close = difflib.get_close_matches(axis, CELL_AXES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(CELL_AXES)}"
        raise ValueError(f"{text!r}: unknown key {axis!r}; {hint}")
    if axis in NAMED_AXES:
        return Condition(axis, value, [value.split(",")])
    comparison, bound = split_comparison(value)
    read = _ratio if axis == "ratio" else _range
    try:
        if comparison:
            return Condition(axis, value, sign=comparison, bound=_number(bound))
        return Condition(axis, value, [read(part) for part in value.split(",")])
    except ValueError:
        one, way = ("a number", "") if axis == "ratio" else ("a whole number", " or a range, as 0-4")
        raise ValueError(
            f'{text!r}: {axis} should be {one}{way}, several with commas between, or a comparison, as ">=10"'
        ) from None


def _ratio(text: str) -> Sequence[Axis]:
    return [_number(text)]


def _range(text: str) -> Sequence[Axis]:
    return Draws.parse(text).numbers()


def _number(text: str) -> float:
    number = float(text)
    if math.isnan(number):
        raise ValueError
    return number


# --- what meets them -------------------------------------------------------------------------------


def shards(study: Study, conditions: Sequence[Condition]) -> list[Shard]:
    """Return the shards of the study that have cells which meet all conditions.

    Raises:
        ValueError: there are none; the message says what there is.
    """
    planned = list(grid.shards(study))
    selected = [shard for shard in planned if _meets(shard, conditions)]
    if not selected:
        for condition in conditions:
            if not any(map(condition.holds, planned)):
                raise ValueError(_matches_nothing(condition, planned))
        raise ValueError("each condition matches some of the study, but nothing meets all of them")
    return selected


def _meets(shard: Shard, conditions: Sequence[Condition]) -> bool:
    """Return whether one cell of ``shard`` meets all conditions, those on draws together."""
    of_draws = [condition for condition in conditions if condition.axis == "draw"]
    return all(condition.holds(shard) for condition in conditions) and any(
        all(condition.admits(draw) for condition in of_draws) for draw in shard.draws.numbers()
    )


def _values(shard: Shard, axis: str) -> Sequence[Any]:
    if axis == "draw":
        return shard.draws.numbers()
    return [getattr(shard.model if axis in MODEL_AXES else shard, axis)]


def _matches_nothing(condition: Condition, planned: Iterable[Shard]) -> str:
    axis = condition.axis
    # Draws as the ranges that paths name.
    found = sorted({shard.draws if axis == "draw" else _values(shard, axis)[0] for shard in planned})
    there = [ratio_text(value) if isinstance(value, float) else str(value) for value in found]
    more = f" and {len(there) - MOST_SHOWN} more" if len(there) > MOST_SHOWN else ""
    return f"no cell of the study has {condition}; there are {', '.join(there[:MOST_SHOWN])}{more}"
