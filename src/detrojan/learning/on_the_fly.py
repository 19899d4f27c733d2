"""What training knows of an attack that poisons its batches on the fly."""

import abc
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detrojan.images import Batch, ImageSet
from detrojan.learning.training import Part
from detrojan.settings import NO_AUGMENTATION, Augmentation


class Poisoner(abc.ABC):
    """An attack at work inside one training run.

    Attributes:
        parts: networks that learn with the classifier; none unless the attack has some.
        augmentation: what is done to a batch before it is poisoned.
    """

    parts: Mapping[str, Part] = {}
    augmentation: Augmentation = NO_AUGMENTATION

    @abc.abstractmethod
    def poison(self, batch: Batch, count: int, *, rng: torch.Generator) -> Batch:
        """Return ``batch`` with its first ``count`` images triggered, labelled as the attacker wants.

        Shuffled as it is, the first images are any images. More images may change, with their
        labels as they were; ``num_poisoned`` counts the triggered ones only.
        """

    @abc.abstractmethod
    def trigger(self) -> dict[str, Tensor]:
        """Return the trigger as training has left it, on the CPU."""


class Control(NamedTuple):
    """An attack before it begins.

    Attributes:
        begin: returns the attack at work on a training set on the device; the generator initializes
            what learns with the classifier.
        decides: all that decides what it does, as plain values.
    """

    begin: Callable[[ImageSet, torch.Generator], Poisoner]
    decides: dict[str, Any]


def drawn(expected: float, rng: torch.Generator) -> int:
    """Return ``expected``, at least 0, rounded up or down at random, so that it is right in the mean."""
    whole = math.floor(expected)
    return whole + int(torch.rand((), generator=rng, dtype=torch.float64) < expected - whole)
