"""Where things stand in the figures that Vega can't lay out, and what is marked in them. Free of Vega."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]

LINE = 7.0  # points, of a name
LETTER = 3.9  # points, of one in a name
MARK = 3.0  # points, from the middle of a mark to its edge


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points no other beats: none costs at most as much and scores at least as well.

    Args:
        points: cost, of which less is better, and score, of which more is. Equal ones beat none.
    """
    return [
        not any(x <= cost and y >= score and (x, y) != (cost, score) for x, y in points)
        for cost, score in points
    ]


class Axis(NamedTuple):
    """An axis of a panel: the values at its two ends, and its length in points."""

    low: float
    high: float
    length: float

    def at(self, value: float) -> float:
        """Return where a value stands, points."""
        return (value - self.low) / (self.high - self.low) * self.length

    def value(self, place: float) -> float:
        """Return the value that stands at a place."""
        return self.low + place / self.length * (self.high - self.low)


def around(values: Sequence[float], share: float) -> tuple[float, float]:
    """Return the ends of an axis that leaves a share of its length free on both sides of ``values``."""
    low, high = min(values), max(values)
    room = share * (high - low) or 0.5
    return low - room, high + room


def decimal_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two logarithms; the powers alone if these are many."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


class _Box(NamedTuple):
    """What is taken: from left to right, points, and the height of its middle."""

    left: float
    right: float
    height: float

    def meets(self, other: "_Box") -> bool:
        apart = abs(self.height - other.height)
        return self.left < other.right and other.left < self.right and apart < LINE


def named(rows: Sequence[Mapping[str, Any]], x: Axis, y: Axis) -> list[Row]:
    """Return rows with the place of their name: its height (``label``) and its side (``align``).

    Names cover neither marks nor each other, where there is room.

    Args:
        rows: with ``seconds``, ``mean``, ``defense`` and, where the name stands above the mark, ``above``.
        x: of the logarithms of seconds.
        y: of the means.
    """
    taken = []
    for row in rows:
        place = x.at(math.log10(row["seconds"]))
        taken.append(_Box(place - MARK, place + MARK, y.at(row["mean"])))
    placed = []
    for row, mark in zip(rows, list(taken), strict=True):
        length = LETTER * len(row["defense"]) + MARK
        ends = {"left": (mark.right, mark.right + length), "right": (mark.left - length, mark.left)}
        wanted = LINE if row.get("above") else 0.0
        ways = [
            (abs(shift - wanted), align, _Box(left, right, mark.height + shift))
            for align, (left, right) in ends.items()
            for shift in range(-12, 13, 3)
            if left >= 0 and right <= x.length
        ]
        free = [way for way in sorted(ways) if not any(way[2].meets(other) for other in taken)]
        _, align, box = (free or ways)[0]
        taken.append(box)
        placed.append({**row, "align": align, "label": y.value(box.height)})
    return placed
