"""Mean ranks from pairs of defenses, so that a hole in one's results takes away no setting of the others.

``P(k, l)`` is the share of the settings that both were planned in, in which ``k`` is better, ties half. The
mean rank of ``k`` is 1 + the sum of 1 - P(k, l) over all others. Where nothing is missing this is the classic
mean rank. No result loses to a result, and ties with none; what was not planned, or not published, makes no
pair.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detrojan.analysis.statistics.arrays import LEAST_SHARE, ROUNDED, Flags, Study
from detrojan.analysis.statistics.crossed import Array, Crossed, mean_of
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER

# Methods that know the trigger are not ranked, since no defender in the field does; nor, in tables of
# others, those that are given the poisoned training set.
RANKED = ("data_free", "clean_data")
LEAST_SHARED = 5  # settings that two ranked defenses must both be planned in; all, where there are fewer
LEAST_OF_BEST = 0.5  # of the settings of the best-covered one


class Scores(NamedTuple):
    """What a defense is judged by: arrays of (settings, seeds, budgets) or (settings, budgets).

    Attributes:
        value: the higher the better; minus infinity without a result, NaN where it was not planned.
        lacking: where it was planned and has no result.
    """

    value: Array
    lacking: Flags


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The ranking by a measure at a budget.

    Attributes:
        study: the cells.
        names: the defenses that are ranked, by name.
        why_not: of those that are not, why.
        planned: by defense, ranked or not, in which of the usable settings it was planned.
        without: likewise, in which of these it has no result at some budget.
        wins: (defenses, defenses, settings), P of each setting; NaN without a pair.
        of_models: the same of (defenses, defenses, settings, seeds).
    """

    study: Study
    names: list[str]
    why_not: dict[str, str]
    planned: dict[str, Flags]
    without: dict[str, Flags]
    wins: Array
    of_models: Array

    @functools.cached_property
    def win_shares(self) -> Array:
        """P of each two defenses, (defenses, defenses); NaN without a pair."""
        shares: Array = mean_of(self.wins, 2)
        return shares

    @functools.cached_property
    def shared(self) -> Array:
        """In how many settings both were planned, (defenses, defenses)."""
        return np.asarray((~np.isnan(self.wins)).sum(2))

    def mean_rank(self, place: int) -> float:
        """Return the mean rank of a defense by its place in ``names``."""
        others = np.delete(self.win_shares[place], place)
        return float(1 + (1 - others).sum())

    @property
    def by_rank(self) -> list[tuple[str, float]]:
        """The defenses with their mean ranks, the best first; without those that lack a pair with another."""
        ranks = [(name, self.mean_rank(place)) for place, name in enumerate(self.names)]
        known = [(name, mean_rank) for name, mean_rank in ranks if not math.isnan(mean_rank)]
        # Rounding makes no leader.
        return sorted(known, key=lambda found: (round(found[1], ROUNDED), found[0]))

    def of_settings(self, settings: Flags) -> "Ranking":
        """Return the ranking of the same defenses by some of the settings."""
        wins, of_models = (
            np.where(settings, self.wins, np.nan),
            np.where(settings[:, None], self.of_models, np.nan),
        )
        return dataclasses.replace(self, wins=wins, of_models=of_models)

    def crossed(self, place: int) -> Crossed:
        """Return how a mean rank varies: a study whose mean is 0 and whose spread is that of the rank."""
        others = np.arange(len(self.names)) != place
        lost = 1 - self.win_shares[place][others, None, None]
        per_model = 1 - self.of_models[place][others] - lost
        weights = 1 / np.maximum(self.shared[place][others], 1)[:, None, None]
        there = ~np.isnan(per_model).all(0)
        scores = np.where(there, np.nansum(per_model * weights, 0), np.nan)
        # Each setting weighs as its pairs do, so the mean over settings is scaled to their sum.
        number = (~np.isnan(scores).all(1)).sum()
        return Crossed(self.study.design, number * scores[:, :, None, None])


def of_study(study: Study, measure: str, budget: int | None) -> Ranking | None:
    """Return the ranking by a measure, at a budget or pooled; None without two that can be ranked."""
    at = study.at(budget)
    candidates = [name for name, runs in study.runs.items() if runs.threat_model in RANKED]
    by_model = {name: _scores(study, name, measure, at, by_setting=False) for name in candidates}
    by_setting = {name: _scores(study, name, measure, at, by_setting=True) for name in candidates}
    if not candidates:
        return None
    # Where no defense has a result there is nothing to rank.
    usable = np.any([np.isfinite(scores.value) for scores in by_setting.values()], axis=0)
    values = {name: np.where(usable, scores.value, np.nan) for name, scores in by_setting.items()}
    planned = {name: np.asarray(~np.isnan(value).all(1)) for name, value in values.items()}
    without = {name: np.asarray((scores.lacking & usable).any(1)) for name, scores in by_setting.items()}
    names, why_not = _who(planned)
    if len(names) < 2:
        return None
    wins = _wins([values[name] for name in names])
    of_models = _wins([np.where(usable[:, None], by_model[name].value, np.nan) for name in names])
    return Ranking(study, names, why_not, planned, without, wins, of_models)


def _scores(study: Study, defense: str, measure: str, at: slice, *, by_setting: bool) -> Scores:
    """Return what a defense is judged by in each setting and budget, or in each model and budget."""
    runs = study.runs[defense]
    values = mean_of(runs.values(measure)[:, :, at], 3)
    planned, ended = (flags[:, :, at].sum(3) for flags in (runs.planned, runs.ok))
    if by_setting:
        values, planned, ended = mean_of(values, 1), planned.sum(1), ended.sum(1)
    lacking = (planned > 0) & (ended < LEAST_SHARE * planned)
    oriented = np.round(-values if measure in LOWER_IS_BETTER else values, ROUNDED)
    return Scores(np.where(lacking, -np.inf, oriented), lacking)


def _who(planned: dict[str, Flags]) -> tuple[list[str], dict[str, str]]:
    """Return who is ranked, and why the others are not."""
    covered = {name: int(flags.sum()) for name, flags in planned.items()}
    usable = int(np.any(list(planned.values()), axis=0).sum())
    best, least = max(covered.values()), min(LEAST_SHARED, usable)
    why_not = {
        name: f"planned in {number:,} of {usable:,} settings, fewer than half of the {best:,} of another"
        for name, number in covered.items()
        if number < LEAST_OF_BEST * best or not number
    }
    names = [name for name in planned if name not in why_not]
    while apart := [
        pair
        for pair in itertools.combinations(names, 2)
        if (planned[pair[0]] & planned[pair[1]]).sum() < least
    ]:
        worst = min({name for pair in apart for name in pair}, key=lambda name: (covered[name], name))
        why_not[worst] = f"fewer than {least} settings in common with another that is ranked"
        names.remove(worst)
    return names, why_not


def _wins(values: Sequence[Array]) -> Array:
    """Return who is better: (defenses, defenses, ...), over budgets by their mean; NaN without a pair.

    Args:
        values: of each defense, (..., budgets), the higher the better.
    """
    number = len(values)
    found = np.full((number, number, *values[0].shape[:-1]), np.nan)
    for one, other in itertools.combinations(range(number), 2):
        both = ~np.isnan(values[one]) & ~np.isnan(values[other])
        won = np.where(values[one] == values[other], 0.5, (values[one] > values[other]).astype(float))
        found[one, other] = mean_of(np.where(both, won, np.nan), won.ndim - 1)
        found[other, one] = 1 - found[one, other]
    return found
