"""How far to go, by accuracy on the defender's own validation images."""

from collections.abc import Sequence


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
