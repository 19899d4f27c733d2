"""Means and their intervals where draws are nested in models, and models in settings.

A mean gives every setting the same weight, in it every model, in that every draw. Its interval comes from
a cluster bootstrap: the units of the highest level of which a group has two or more are drawn with
replacement, and each brings along all that is nested in it. To draw again within a unit would count the
lower levels' spread twice, since the units' means have it already (Davison and Hinkley, "Bootstrap
Methods and their Application", 1997, Sec. 3.8; Ren, Lai, Tong et al., "Nonparametric bootstrapping for
hierarchical data", J. Applied Statistics 2010).

The percentiles of a bootstrap are too narrow where units are few: with three, 95 % intervals hold the
truth three times in four. So their distances from the mean are stretched, both by the same factor, until the
interval is as wide as Student's (Hesterberg, "What Teachers Should Know About the Bootstrap", The American
Statistician 2015, Sec. 5.2, widens percentiles to the same end). It keeps the skewness of what was
measured, which Student's has not: where one unit in ten is a failure, it reaches further to that side.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from detrojan import rng

CONFIDENCE = 0.95
RESAMPLES = 2000
MOST_AT_ONCE = 4_000_000  # resampled means; bounds the memory to some 100 MB

GROUP = "number of the group"

Array = npt.NDArray[np.float64]


def intervals(
    frame: pd.DataFrame, by: Sequence[str], measures: Sequence[str], levels: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Return mean and interval of each measure in each group: a row a group, in their order.

    The columns are ``by``; for each measure ``{measure}_mean``, ``{measure}_low``, ``{measure}_high``
    (missing where the mean rests on a single unit) and ``{measure}_over``, the level that was
    resampled or None.

    Args:
        frame: rows of one draw each, or of several, whose mean then counts. Missing values don't count.
        by: the columns that make the groups; a missing value is a group's as well.
        measures: columns of numbers.
        levels: from the highest to the lowest, the columns that tell its units apart within the level
            above: ``{"settings": [...], "models": ["seed"], "draws": ["draw"]}``.
    """
    group = frame.groupby(list(by), sort=True, dropna=False, observed=True).ngroup().to_numpy()
    names, first = np.unique(group, return_index=True)
    # From here on a group goes by its number, for a key may have missing values.
    means = frame[[*(column for columns in levels.values() for column in columns), *measures]]
    means = means.assign(**{GROUP: group})
    keys = list(itertools.accumulate(map(list, levels.values()), initial=[GROUP]))
    units: dict[str, pd.DataFrame] = {}
    for level, key in zip(reversed([*levels]), reversed(keys[1:]), strict=True):
        means = units[level] = _means(means, key, measures)
    means = _means(means, keys[0], measures)
    result = frame[list(by)].iloc[first].reset_index(drop=True)
    for measure in measures:
        low, high = np.full((2, len(names)), np.nan)
        over = np.full(len(names), None, object)
        for level in levels:
            numbers, values = units[level][GROUP].to_numpy(), units[level][measure].to_numpy(float)
            # A group with two units at a higher level needs no lower one.
            needed = pd.isna(over)[numbers] & ~np.isnan(values)
            for several, of_several in _by_size(numbers[needed], values[needed]):
                low[several], high[several] = bounds(of_several)
                over[several] = level
        parts = {"mean": means[measure].to_numpy(float), "low": low, "high": high, "over": over}
        result = result.assign(**{f"{measure}_{part}": column for part, column in parts.items()})
    return result


def _means(frame: pd.DataFrame, key: list[str], measures: Sequence[str]) -> pd.DataFrame:
    grouped = frame.groupby(key, sort=True, dropna=False, observed=True)
    return grouped[list(measures)].mean().reset_index()


def _by_size(groups: npt.NDArray[np.intp], values: Array) -> Iterator[tuple[npt.NDArray[np.intp], Array]]:
    """Yield the groups of each size of two or more, and their values: (groups, size)."""
    order = np.argsort(groups, kind="stable")
    names, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    for size in np.unique(sizes[sizes > 1]):
        chosen = sizes == size
        places = starts[chosen, None] + np.arange(size)
        yield names[chosen], values[order][places]


def bounds(units: Array) -> tuple[Array, Array]:
    """Return the lower and the upper end of the interval of each row's mean.

    Args:
        units: the means of the units, (groups, units); at least two units.
    """
    number = units.shape[1]
    weights = _weights(number)
    tail = (1 - CONFIDENCE) / 2
    means = units.mean(1)
    parts = np.array_split(units - means[:, None], math.ceil(len(units) * RESAMPLES / MOST_AT_ONCE))
    quantiles = [np.quantile(part @ weights, [tail, 1 - tail], axis=1) for part in parts]
    below, above = np.concatenate(quantiles, axis=1)
    student = stats.t.ppf(1 - tail, number - 1) * units.std(1, ddof=1) / math.sqrt(number)
    width = above - below
    # Units that are all alike have no width to be stretched, but for rounding.
    alike = np.ptp(units, axis=1) == 0
    stretch = np.divide(2 * student, width, out=np.zeros_like(width), where=~alike & (width > 0))
    return means + stretch * below, means + stretch * above


@functools.cache
def _weights(number: int) -> Array:
    """Return how often each unit is in each resample, over their number: (units, ``RESAMPLES``).

    Resamples are balanced: all together hold every unit equally often, so their mean is the sample's.
    All groups of a size share them, which makes a group's interval the same whoever stands beside it.
    """
    generator = np.random.default_rng(rng.seed("bootstrap", number))
    drawn = generator.permutation(np.tile(np.arange(number), RESAMPLES)).reshape(RESAMPLES, number)
    counts = np.zeros((number, RESAMPLES))
    np.add.at(counts, (drawn, np.arange(RESAMPLES)[:, None]), 1.0)
    return counts / number
