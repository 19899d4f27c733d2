"""What an attack is: a trigger, and how images get it."""

import enum
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from detrojan.data import ImageSet

Trigger = dict[str, Tensor]


class LabelMode(enum.Enum):
    """Which images an attack poisons, and the labels that they get."""

    ALL_TO_ONE = "any image, relabelled as the target"
    CLEAN_LABEL = "images of the target class only, labels untouched"


class Attack(BaseModel):
    """A data-poisoning attack; its fields are its hyperparameters.

    The poisoning stage picks the images and sets the labels, for every attack alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label_mode: ClassVar[LabelMode]
    smoke: ClassVar[dict[str, object]] = {}

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, rng: torch.Generator
    ) -> Trigger:
        """Return the trigger for images of the size and kind of ``clean``.

        Args:
            clean: the clean training set.
            model: a classifier trained on it, for attacks that learn against one.
            rng: the only source of randomness.
        """
        raise NotImplementedError

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return stamped copies of ``images``, uint8 (N, 3, H, W), same shape and dtype."""
        raise NotImplementedError
