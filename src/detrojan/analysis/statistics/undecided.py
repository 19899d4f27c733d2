"""Tells which pairs of defenses a study has decided, when it is looked at after each of its rounds.

Whoever looks often and stops at the first difference finds one sooner or later. So the error of 5 % is
shared out evenly over the looks that are planned (Bonferroni), and at each look over the pairs (Holm, 1979).
A pair is told apart where its difference is more than a point and no chance; it is a tie where the
difference is surely within a point, by two one-sided tests (Schuirmann, J. Pharmacokinet. Biopharm. 15,
1987).
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import pyarrow as pa
from scipy import special

from detrojan.analysis.statistics import arrays, ranking, scores
from detrojan.analysis.statistics.crossed import Spread, holm
from detrojan.analysis.statistics.frames import frame_of

ALPHA = 0.05

State = Literal["apart", "tied", "undecided"]


class Pair(NamedTuple):
    """Two defenses by name, and what is known of the first one's value minus the other's.

    Attributes:
        difference: the mean, on this grid.
        low, high: of its 95 % interval; NaN where there is no spread to judge by.
        state: whether more seeds and draws are needed to tell.
    """

    defense: str
    other: str
    difference: float
    low: float
    high: float
    state: State


def p_tied(mean: float, spread: Spread, band: float) -> float:
    """Return the p of a true mean beyond ``band``, on the side that is nearer; NaN without a spread."""
    if not spread.variance > 0:
        return math.nan
    return float(special.stdtr(spread.df, -(band - abs(mean)) / math.sqrt(spread.variance)))


def judged(found: Sequence[tuple[float, Spread]], band: float, looks: int) -> list[State]:
    """Return the state of each difference of a family at one look.

    Args:
        found: means with their spreads.
        band: within which a difference is none, as the mean.
        looks: how often the family is looked at in all, at least 1.
    """
    alpha = ALPHA / looks
    apart = holm([spread.p_value(mean) for mean, spread in found])
    tied = holm([p_tied(mean, spread, band) for mean, spread in found])
    return [
        "apart"
        if p_apart < alpha and abs(mean) > band
        else "tied"
        if p_same < alpha and abs(mean) < band
        else "undecided"
        for (mean, _), p_apart, p_same in zip(found, apart, tied, strict=True)
    ]


def pairs(cells: pa.Table, measure: str, band: float, looks: int) -> list[Pair]:
    """Return each two of the ranked defenses, over all budgets, on this grid with other seeds and draws.

    Args:
        cells: of one protocol, with the columns of ``CELLS``.
        measure: ``acc``, ``asr``, ``ra`` or ``der``.
        band: of the measure, within which a difference is none.
        looks: how often the study is looked at in all.
    """
    study = arrays.of_cells(scores.attacked(frame_of(cells)))
    found = ranking.of_study(study, measure, None)
    if found is None:
        return []
    names = list(itertools.combinations(found.names, 2))
    at = study.at(None)
    crossed = [study.pairs(*pair, measure).crossed(study.design, at) for pair in names]
    states = judged([(pair.mean, pair.grid) for pair in crossed], band, looks)
    return [
        Pair(defense, other, pair.mean, *pair.grid.interval(pair.mean), state)
        for (defense, other), pair, state in zip(names, crossed, states, strict=True)
    ]
