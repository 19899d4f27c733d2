"""Cells as dense arrays: what means, intervals and differences are worked out on, whole studies at once.

An array has the axes (settings, seeds, budgets, draws), NaN where there is no value. Settings, seeds and
draws are sorted, so the order of rows changes no digit.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from detrojan.analysis.statistics.crossed import FACTORS, Array, Codes, Crossed, Design, mean_of
from detrojan.analysis.statistics.frames import SETTING
from detrojan.analysis.statistics.relative import MEASURES, UNCHANGED
from detrojan.analysis.statistics.scores import BUDGET
from detrojan.cells import NO_METHOD
from detrojan.storage.columns import OK

Flags = npt.NDArray[np.bool_]
Places = tuple[npt.NDArray[np.integer[Any]], ...]
LEAST_SHARE = 0.5  # of planned cells that ended well, for a result
BESIDE = ("seconds", "num_test", "num_triggered")  # what is kept of cells beside their measures
DER_ALL = "der_all"
ROUNDED = 9  # decimals of differences; test sets are not that large


@dataclasses.dataclass(frozen=True)
class Runs:
    """The cells of one defense.

    Attributes:
        threat_model: its folder.
        planned: which cells there should be.
        ok: which of these ended well.
        once: (settings, seeds, budgets), whether one run stands there whatever the budget.
        columns: by name, ``MEASURES`` and ``BESIDE``.
    """

    threat_model: str
    planned: Flags
    ok: Flags
    once: Flags
    columns: Mapping[str, Array]

    def values(self, measure: str) -> Array:
        """Return a measure; of ``der_all`` a cell that gave no repaired model is an untouched one."""
        if measure == DER_ALL:
            return np.where(self.planned & ~self.ok, UNCHANGED, self.columns["der"])
        return self.columns[measure]

    def budgets_of(self, measure: str) -> Flags:
        """Return (settings, seeds, budgets), where a model should have a value.

        What ended well without this measure was not published in full: it is no failure.
        """
        unknown = self.ok & np.isnan(self.values(measure))
        return np.asarray((self.planned & ~unknown).any(3))

    def lacking(self, budget: slice) -> Flags:
        """Return (settings,), where fewer than half of the planned cells ended well, at some budget."""
        planned, ended = (flags[:, :, budget].sum((1, 3)) for flags in (self.planned, self.ok))
        return np.asarray(((planned > 0) & (ended < LEAST_SHARE * planned)).any(1))

    def only(self, models: Flags) -> "Runs":
        """Return the cells of some models, (settings, seeds); the others are as if never planned."""
        there = models[:, :, None, None]
        kept = {name: np.where(there, values, np.nan) for name, values in self.columns.items()}
        return dataclasses.replace(self, planned=self.planned & there, ok=self.ok & there, columns=kept)

    def single_of(self, budget: slice) -> Flags:
        """Return the cells at some budgets that ended well, a run of several budgets at the first alone."""
        planned, once = np.asarray(self.planned[:, :, budget].any(3)), self.once[:, :, budget]
        again = once & (np.cumsum(planned & once, axis=2) > 1)
        return np.asarray(self.ok[:, :, budget] & ~again[..., None])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A measure of one defense minus that of another, pair by pair.

    A run that stands at a place whatever the budget is beside every draw of the other.

    Attributes:
        planned: which pairs there should be.
        difference: NaN where one of the two has no result.
        budgets: (settings, seeds, budgets), where a model should have a difference.
    """

    planned: Flags
    difference: Array
    budgets: Flags

    def crossed(self, design: Design, at: slice) -> Crossed:
        """Return the mean difference over the settings of ``design``, at the budgets ``at``."""
        return Crossed(design, self.difference[:, :, at], self.budgets[:, :, at])

    @classmethod
    def of(cls, runs: Runs, other: Runs, measure: str) -> "Pairs":
        """Return the pairs of two defenses' runs."""
        most = max(runs.planned.shape[3], other.planned.shape[3])
        sides = []
        for own, alone in ((runs, runs.once & ~other.once), (other, other.once & ~runs.once)):
            everywhere, values = alone[..., None], own.values(measure)
            planned = np.where(
                everywhere, own.planned.any(3, keepdims=True), _padded(own.planned, most, False)
            )
            known = np.where(everywhere, mean_of(values, 3)[..., None], _padded(values, most, np.nan))
            sides.append((planned, known))
        (planned, values), (others_planned, others) = sides
        # Rounding makes no winner.
        difference = np.round(values - others, ROUNDED)
        budgets = runs.budgets_of(measure) & other.budgets_of(measure)
        return cls(planned & others_planned, difference, budgets)


@dataclasses.dataclass(frozen=True)
class Study:
    """The cells of a study that count, by defense.

    Attributes:
        settings: a row a setting, the columns ``SETTING``.
        budgets: sorted.
        runs: by defense, sorted.
        seeds: sorted.
    """

    settings: pd.DataFrame
    budgets: list[int]
    runs: Mapping[str, Runs]
    seeds: list[int]

    @functools.cached_property
    def design(self) -> Design:
        """The levels of the settings."""
        return Design(*(self.codes(factor) for factor in FACTORS))

    @functools.cached_property
    def _levels(self) -> dict[str, list[str]]:
        """The names of the levels of each factor, by their numbers."""
        return {factor: sorted(set(self.settings[factor])) for factor in FACTORS}

    def codes(self, axis: str) -> Codes:
        """Return the level of each setting on an axis, as a number from 0."""
        codes: Codes = np.unique(self.settings[axis].to_numpy(), return_inverse=True)[1]
        return codes

    def at(self, budget: int | None) -> slice:
        """Return the place of a budget; of all if it is None, of none if there is no such one."""
        if budget is None:
            return slice(None)
        place = self.budgets.index(budget) if budget in self.budgets else len(self.budgets)
        return slice(place, place + 1)

    def crossed(self, defense: str, measure: str, budget: int | None = None) -> Crossed:
        """Return a measure of a defense, at a budget or pooled over all."""
        runs, at = self.runs[defense], self.at(budget)
        return Crossed(self.design, runs.values(measure)[:, :, at], runs.budgets_of(measure)[:, :, at])

    def pairs(self, defense: str, other: str, measure: str) -> "Pairs":
        """Return a defense beside another: run by run of the same model, with the same sample."""
        return Pairs.of(self.runs[defense], self.runs[other], measure)

    def only(self, models: Flags) -> "Study":
        """Return the study of some models, (settings, seeds), with the same settings and axes."""
        runs = {name: runs.only(models) for name, runs in self.runs.items()}
        return dataclasses.replace(self, runs=runs)

    def levels_missing(self, settings: Flags) -> str | None:
        """Return the levels of the study that none of ``settings`` has, in words; None if it has all."""
        missing = [
            f"{factor} {levels[code]}"
            for (factor, levels), codes in zip(self._levels.items(), self.design, strict=True)
            for code in np.setdiff1d(np.arange(len(levels)), codes[settings])
        ]
        return ", ".join(missing) or None


def of_cells(frame: pd.DataFrame) -> Study:
    """Return cells as arrays.

    Args:
        frame: of :func:`~detrojan.analysis.statistics.scores.attacked` or ``clean``.
    """
    groups = frame.groupby(SETTING, sort=True, observed=True)
    settings = groups.size().reset_index()[SETTING]
    levels = {axis: np.unique(frame[axis].to_numpy()) for axis in ("seed", BUDGET, "draw")}
    places = [groups.ngroup().to_numpy()]
    places += [np.searchsorted(values, frame[axis].to_numpy()) for axis, values in levels.items()]
    columns = {name: frame[name].to_numpy(float) for name in (*MEASURES, *BESIDE)}
    ended = (frame["status"] == OK).to_numpy()
    repeated = (frame["spc"] != frame[BUDGET]).to_numpy() | (frame["defense"] == NO_METHOD).to_numpy()
    names, first, defense = np.unique(frame["defense"].to_numpy(str), return_index=True, return_inverse=True)
    runs = {}
    for number, name in enumerate(names):
        rows = np.flatnonzero(defense == number)
        own = tuple(place[rows] for place in places)
        # A method of one run needs no room for the draws of others.
        shape = (len(settings), *(len(levels[axis]) for axis in ("seed", BUDGET)), int(own[3].max()) + 1)
        filled = {
            column: _filled(shape, own, np.where(ended[rows], values[rows], np.nan))
            for column, values in columns.items()
        }
        planned = _flags(shape, own, np.ones(len(rows), bool))
        ok = _flags(shape, own, ended[rows])
        once = _flags(shape[:3], own[:3], repeated[rows])
        threat_model = str(frame["threat_model"].iloc[first[number]])
        runs[str(name)] = Runs(threat_model, planned, ok, once, filled)
    budgets, seeds = ([int(level) for level in levels[axis]] for axis in (BUDGET, "seed"))
    return Study(settings, budgets, runs, seeds)


def _padded(array: Any, draws: int, by: Any) -> Any:
    """Return an array with room for so many draws."""
    return np.pad(array, [(0, 0)] * 3 + [(0, draws - array.shape[3])], constant_values=by)


def _filled(shape: tuple[int, ...], at: Places, values: Array) -> Array:
    array = np.full(shape, np.nan)
    array[at] = values
    return array


def _flags(shape: tuple[int, ...], at: Places, values: Flags) -> Flags:
    array = np.zeros(shape, bool)
    array[at] = values
    return array
