"""Rules by which methods choose: how far to go, and what stands out."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def allowed_errors(tolerance: float, base: int) -> int:
    """Return how many images may be wrong that were right before, for a tolerated loss of accuracy.

    A loss of exactly the tolerance is tolerated; whole images say so without rounding.

    Args:
        tolerance: a share in [0, 1].
        base: the images judged on; or, for a loss relative to the accuracy before, those of them that
            were right before.
    """
    return math.floor(tolerance * base + 1e-9)


def accepted(right: int, right_before: int, allowed: int) -> bool:
    """Return whether a state is accepted that has ``right`` images right.

    Args:
        right: images that it has right.
        right_before: those that the model as it came has right, of the same images.
        allowed: as :func:`allowed_errors` returns it.
    """
    return right >= right_before - allowed


def last_accepted(accuracies: Sequence[float], tolerance: float) -> int:
    """Return the last point of a sweep before the accuracy first falls too far.

    Args:
        accuracies: of each point in [0, 1], the first that of the model as it came; if that is 0,
            nothing is accepted but it.
        tolerance: the first drop that is too large, a share of the first accuracy.
    """
    first = accuracies[0]
    if first == 0:
        return 0
    for point, accuracy in enumerate(accuracies):
        # Shares of a few images: the small term makes 1.0 - 0.9 a drop of 0.1 and not of less.
        if (first - accuracy) / first >= tolerance - 1e-9:
            return point - 1
    return len(accuracies) - 1


def outliers(scores: Tensor, u: float) -> Tensor:
    """Return which of a layer's ``scores``, (C,), lie more than ``u`` standard deviations above their mean.

    The deviation is the unbiased one. Scores that are not finite are none, and don't count.
    """
    finite = scores.isfinite()
    known = scores[finite]
    if len(known) < 2:
        return torch.zeros_like(finite)
    return finite & (scores > known.mean() + u * known.std())
