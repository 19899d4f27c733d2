"""Rules by which methods choose: how far to go, and what stands out."""

import itertools
import math
from collections.abc import Iterable, Iterator

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


def before_refusal(right: Iterable[int], allowed: int) -> Iterator[int]:
    """Yield the points of a sweep up to the last before the first that is not accepted.

    What comes after that point is not asked for.

    Args:
        right: images that each point has right, the first that of the model as it came; if that is 0,
            nothing is accepted but it.
        allowed: as :func:`allowed_errors` returns it.
    """
    points = iter(right)
    yield (first := next(points))
    yield from itertools.takewhile(lambda point: first > 0 and accepted(point, first, allowed), points)


def last_accepted(right: Iterable[int], allowed: int) -> int:
    """Return the last point of a sweep before the first that is not accepted, see :func:`before_refusal`."""
    return sum(1 for _ in before_refusal(right, allowed)) - 1


def outliers(scores: Tensor, u: float) -> Tensor:
    """Return which of a layer's ``scores``, (C,), lie more than ``u`` standard deviations above their mean.

    The deviation is the unbiased one. Scores that are not finite are none, and don't count.
    """
    finite = scores.isfinite()
    known = scores[finite]
    if len(known) < 2:
        return torch.zeros_like(finite)
    return finite & (scores > known.mean() + u * known.std())
