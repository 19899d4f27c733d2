"""Which label the attacker wants an image to get: a pure function of its true label."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from detrojan.cells import label_of

Kind = Literal["all_to_one", "all_to_all"]
ALL_TO_ONE: Literal["all_to_one"] = "all_to_one"


class LabelMap(NamedTuple):
    """What a backdoored model should say of a triggered image.

    Attributes:
        target: the one label that all images should get; ``all_to_all`` does not use it.
        kind: ``all_to_one``, or ``all_to_all``: each class becomes the next, the last one the first
            (Gu et al., arXiv 1708.06733, Sec. 4.2).
    """

    target: int = 0
    kind: Kind = ALL_TO_ONE

    @classmethod
    def of(cls, classes: Sequence[str], *, target: int | str, kind: Kind) -> "LabelMap":
        """Return the map of a study, whose ``target`` may be the name of one of ``classes``.

        Raises:
            ValueError: it is none of them.
        """
        return cls(label_of(target, classes), kind)

    @property
    def single_target(self) -> int | None:
        """The label that all triggered images should get; None if there is not one for all."""
        return self.target if self.kind == ALL_TO_ONE else None

    def attacked(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return the labels that the attacker wants for images of true ``labels``, int64 (N,)."""
        if self.kind == ALL_TO_ONE:
            return torch.full_like(labels, self.target)
        return (labels + 1) % num_classes

    def counts(self, labels: Tensor, num_classes: int) -> Tensor:
        """Return which images count for ASR and RA, bool (N,): those whose label the attacker changes."""
        return self.attacked(labels, num_classes) != labels
