"""What an attack is: a trigger, and how images get it."""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from detrojan.images import ImageSet

Trigger = dict[str, Tensor]


class LearnedTrigger(Trigger):
    """A trigger that was optimized, with what is worth knowing of how that went.

    Attributes:
        history: a row an epoch or a pass, each with the same keys.
        findings: measures of the finished trigger.
        weakness: why the trigger should not be expected to work, in words; None if it should.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        history: Sequence[Mapping[str, float]],
        findings: Mapping[str, float],
        weakness: str | None = None,
    ) -> None:
        super().__init__(tensors)
        self.history = [dict(row) for row in history]
        self.findings = dict(findings)
        self.weakness = weakness


class LabelMode(enum.Enum):
    """Which images an attack poisons, and the labels that they get."""

    ALL_TO_ONE = "any image, relabelled as the study's label map says"
    CLEAN_LABEL = "images of the target class only, labels untouched"


class Attack(BaseModel):
    """An attack; its fields are its hyperparameters.

    One that is no more than this poisons data: the poisoning stage picks the images and sets the
    labels, for every attack alike.

    Class variables:
        label_mode: which images it poisons.
        against_model: whether its trigger is learned against a clean model, and so belongs to an
            architecture too.
        side_multiple: the images' sides must be multiples of this, pixels.
        smoke: settings for tests and for studies that say ``smoke: true``, about a second's work.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label_mode: ClassVar[LabelMode]
    against_model: ClassVar[bool] = False
    side_multiple: ClassVar[int] = 1
    smoke: ClassVar[dict[str, object]] = {}

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> Trigger:
        """Return the trigger for images of the size and kind of ``clean``, on their device.

        Args:
            clean: the clean training set.
            model: a classifier trained on it, in eval mode, for attacks that learn against one.
            target: the label that the attacker wants, for attacks whose trigger depends on it.
            rng: the only source of randomness.
        """
        raise NotImplementedError

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return stamped copies of ``images``, uint8 (N, 3, H, W), same shape, dtype and device."""
        raise NotImplementedError

    def decoy(self, images: Tensor, trigger: Trigger) -> Tensor | None:
        """Return ``images`` changed as by ``apply`` but for the secret in it; None if there is no secret.

        A model that takes a decoy for the trigger has learned what comes with the secret, not the secret.
        Shapes and types as for :meth:`apply`.
        """
        return None


def restored(make: Callable[[], nn.Module], trigger: Trigger, name: str) -> nn.Module:
    """Return the network whose tensors a trigger holds as ``name.*``, frozen and in eval mode."""
    # Without storage nothing is drawn, so torch's global generator stays as it is.
    with torch.device("meta"):
        network = make()
    prefix = f"{name}."
    own = {key.removeprefix(prefix): value for key, value in trigger.items() if key.startswith(prefix)}
    network.load_state_dict(own, assign=True)
    return network.eval().requires_grad_(False)


IN_BATCH = 64


@torch.no_grad()
def in_batches(change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return what ``change`` makes of ``images``, (N, 3, H, W), in batches that bound its memory.

    All batches have one size, the last filled up with zeros: convolutions sum in an order that
    depends on it, and what becomes of an image must not depend on how many others come along.
    """
    changed = []
    for batch in torch.split(images, IN_BATCH):
        missing = IN_BATCH - len(batch)
        filled = torch.cat([batch, batch.new_zeros(missing, *batch.shape[1:])]) if missing else batch
        changed.append(change(filled)[: len(batch)])
    return torch.cat(changed)
