"""Tells a setting that a defense has repaired from one that it has harmed, and both from noise.

What counts is ``net``, the attack success removed minus the accuracy lost. DER clips both, so noise makes its
mean larger or smaller than 0.5 without cause.
"""

import math

import numpy as np
import numpy.typing as npt

from detrojan.analysis.statistics.crossed import Array, mean_of, quantile

LEAST = 0.01  # a point: less is neither harm nor repair
SEVERAL = 3  # cells of a setting, from which on they tell themselves how much they vary
VERDICTS = HARMFUL, UNCHANGED, REPAIRED = ("harmful", "unchanged", "repaired")

Verdicts = npt.NDArray[np.object_]


def noise(net: Array, *shares: tuple[Array, Array, Array]) -> Array:
    """Return how far ``net`` of a setting may be from 0 by chance, (settings,); 0 where nothing tells.

    Of three cells or more it is the half width of Student's interval; of fewer, twice the standard error of
    the shares of test images, as if those of before and after were of different images, an upper bound.

    Args:
        net: (settings, cells), NaN where there is none.
        shares: for each share that ``net`` is made of, its values, how much they lie above those of the
            untouched model, and the number of images behind them, all (settings, cells).
    """
    counts = (~np.isnan(net)).sum(1)
    squares = np.nansum((net - mean_of(net, 1)[:, None]) ** 2, 1)
    deviation = np.sqrt(squares / np.maximum(counts - 1, 1))
    student = quantile(np.maximum(counts - 1.0, 1.0)) * deviation / np.sqrt(np.maximum(counts, 1))
    variance = np.zeros(len(net))
    for values, above, images in shares:
        after = mean_of(values, 1)
        before = after - mean_of(above, 1)
        number = np.fmax.reduce(images, axis=1, initial=0)
        spread = after * (1 - after) + before * (1 - before)
        variance += np.divide(spread, number, out=np.zeros_like(variance), where=(number > 0) & (spread > 0))
    return np.where(counts >= SEVERAL, student, 2 * np.sqrt(variance))


def verdicts(net: Array, noises: Array) -> Verdicts:
    """Return for each setting ``harmful``, ``unchanged`` or ``repaired``; None where ``net`` is NaN."""
    margin = np.maximum(LEAST, noises)
    found = np.full(len(net), None, object)
    found[~np.isnan(net)] = UNCHANGED
    # A point exactly, but for rounding, is not more than a point.
    found[np.round(net + margin, 9) < 0] = HARMFUL
    found[np.round(net - margin, 9) > 0] = REPAIRED
    return found


def share(found: Verdicts, verdict: str) -> float:
    """Return the share of the settings with a verdict that have this one; NaN without any."""
    known = [each for each in found if each is not None]
    return known.count(verdict) / len(known) if known else math.nan
