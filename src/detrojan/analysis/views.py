"""What the terminal table and the report both show: groups, percents, failures, notes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from detrojan.cells import NO_METHOD, ratio_text
from detrojan.tables import OK

Row = dict[str, Any]

UNDEFINED = "–"
WEAK_ATTACK = 0.5  # below this ASR of the untouched model there is little for a defense to remove
NAMED_SETTINGS = 3  # of a failure; more are only counted


class Setting(NamedTuple):
    """What the rows of one small table share."""

    dataset: str
    architecture: str
    attack: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.dataset} · {self.architecture} · {attack_text(self.attack, self.ratio)}"


class Failure(NamedTuple):
    """Cells of one defense that ended with the same status and reason."""

    num_cells: int
    status: str
    reason: str
    defense: str
    settings: list[Setting]

    @property
    def where(self) -> str:
        """The settings, or how many there are."""
        few = len(self.settings) <= NAMED_SETTINGS
        return "; ".join(map(str, self.settings)) if few else f"{len(self.settings)} settings"


def attack_text(attack: str, ratio: float) -> str:
    """Return an attack with its poisoning ratio, or that there is none."""
    return "no attack" if attack == NO_METHOD else f"{attack}, ratio {ratio_text(ratio)}"


def defense_text(defense: str) -> str:
    """Return the name of a defense, or what the model without one is called."""
    return "untouched" if defense == NO_METHOD else defense


def groups(summary: pa.Table) -> dict[Setting, list[Row]]:
    """Return the rows of ``summary`` by setting: clean models first, the untouched model first in each."""
    found: dict[Setting, list[Row]] = {}
    rows = summary.to_pylist()
    for row in sorted(rows, key=lambda row: (row["defense"] != NO_METHOD, row["defense"], row["spc"])):
        found.setdefault(_setting(row), []).append(row)
    order = sorted(found, key=lambda s: (s.dataset, s.architecture, s.attack != NO_METHOD, s.attack, s.ratio))
    return {setting: found[setting] for setting in order}


def _setting(row: Row) -> Setting:
    return Setting(*(row[axis] for axis in Setting._fields))


def half_width(row: Row, measure: str) -> float | None:
    """Return half the width of the interval of a measure, a fraction; None where there is no interval.

    The table's ends are clipped to [0, 1], so it is that of the side that reaches further: too little
    only where both are clipped, and the interval says nothing.
    """
    mean, low, high = (row[f"{measure}_{part}"] for part in ("mean", "low", "high"))
    return None if low is None or high is None else max(mean - low, high - mean)


def percent(row: Row, measure: str) -> str:
    """Return the mean of a measure and its half-width in percent: ``97.5 ± 0.8``."""
    mean, reach = row[f"{measure}_mean"], half_width(row, measure)
    if mean is None:
        return UNDEFINED
    return share(mean) if reach is None else f"{share(mean)} ± {share(reach)}"


def share(value: float | None) -> str:
    """Return a fraction in percent, with one decimal."""
    return UNDEFINED if value is None else f"{100 * value:.1f}"


def seconds(value: float | None) -> str:
    """Return a time with as many decimals as it deserves."""
    if value is None:
        return UNDEFINED
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or not value else f"{value:.2f}"


def interval_note(summary: pa.Table) -> str:
    """Return the sentence that says what the intervals of ``summary`` are over."""
    over = set(summary["interval_over"].to_pylist()) - {None}
    meaning = {
        frozenset(): "No intervals: each setting has one cell.",
        frozenset({"draws"}): "± is half the 95 % interval of the mean over draws of one model; "
        "it says nothing of other models.",
        frozenset({"models"}): "± is half the 95 % interval of the mean over models.",
    }
    mixed = (
        "± is half the 95 % interval of the mean: over models where there are two or more, else over the "
        "draws of the one model, which says nothing of other models."
    )
    return meaning.get(frozenset(over), mixed)


def failures(cells: pa.Table) -> list[Failure]:
    """Return the cells that did not end well, counted by defense, status and reason, most frequent first."""
    found: dict[tuple[str, str, str], list[Setting]] = {}
    for row in cells.to_pylist():
        if row["status"] != OK:
            found.setdefault((row["status"], row["reason"] or "", row["defense"]), []).append(_setting(row))
    failures = [Failure(len(settings), *what, sorted(set(settings))) for what, settings in found.items()]
    return sorted(failures, key=lambda failure: (-failure.num_cells, *failure[1:]))


def weak_attacks(models: pa.Table) -> list[str]:
    """Return a line for each model whose attack hardly works even while nobody defends it."""
    return [
        f"{_setting(row)}, seed {row['seed']}: ASR {share(row['asr'])} %"
        for row in models.to_pylist()
        if row["asr"] is not None and row["asr"] < WEAK_ATTACK
    ]


def statuses(cells: pa.Table) -> dict[str, int]:
    """Return how many cells ended with each status, ``ok`` first."""
    counted = Counter(cells["status"].to_pylist())
    return dict(sorted(counted.items(), key=lambda item: (item[0] != OK, item[0])))


def values(table: pa.Table, column: str) -> Sequence[Any]:
    """Return the distinct values of a column, sorted, nulls left out."""
    return sorted(set(table[column].to_pylist()) - {None})
