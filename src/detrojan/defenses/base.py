"""What a defense is, and the fine-tuning that several of them share."""

from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from detrojan.images import DefenderSample, num_batches, passes
from detrojan.settings import Optimization


class Defense(BaseModel):
    """A backdoor mitigation; its fields are its hyperparameters.

    Class variables:
        min_spc: the fewest clean samples per class that it can work with; with less, a cell ends as
            a row ``not_applicable``. A method that chooses on validation images needs 2.
        smoke: settings for tests and for studies that say ``smoke: true``, about a second's work.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_spc: ClassVar[int] = 1
    smoke: ClassVar[dict[str, object]] = {}

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a repaired copy of ``model``, in eval mode; ``model`` stays as it was.

        Args:
            model: maps float images (N, 3, H, W) in [0, 1] to logits (N, num_classes).
            clean: all that the defender holds, uint8; empty for ``data_free`` methods. What the
                method chose goes to ``clean.chosen``.
            rng: the only source of randomness.

        Raises:
            NotApplicableError: the method can't work on this model or with this sample.
            DivergedError: a loss is not finite.
        """
        raise NotImplementedError


class Tuning(Defense):
    """How a method trains the weights on, after whatever else it does.

    The values are those of the survey's benchmark (arXiv 2411.11200) for all data sets and
    architectures: SGD 0.01, momentum 0.9, weight decay 5e-4 on all parameters, cosine to zero.
    """

    epochs: int = Field(100, ge=1, description="passes over the defender's images")
    batch_size: int = Field(256, ge=2, description="images a step")
    lr: float = Field(0.01, gt=0, description="learning rate of the first epoch, cosine to zero")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")

    @property
    def optimization(self) -> Optimization:
        """The settings of the training loop, without a floor of steps."""
        return Optimization(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

    def in_steps(self, count: int, min_steps: int) -> Optimization:
        """Return the settings of a loop over ``count`` images that takes ``min_steps`` steps at least.

        The cosine falls over all of its passes.
        """
        epochs = passes(self.epochs, min_steps, num_batches(count, self.batch_size))
        return self.optimization.model_copy(update={"epochs": epochs})


class FineTuning(Tuning):
    """Hyperparameters of the fine-tuning that FT is and that others end with.

    With few images an epoch is a step or two, and a number of epochs says little of how far the weights get.
    ``min_steps`` carries over what their authors took with more images.
    """

    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )

    def tuning(self, count: int) -> Optimization:
        """Return the settings of the training loop over ``count`` images."""
        return self.in_steps(count, self.min_steps)
