"""What an attack that controls training is, and the augmentation that two of them bring along."""

import hashlib
import math

import torch
from pydantic import Field
from torch import Tensor

from detrojan.attacks.base import Attack, Trigger
from detrojan.images import ImageSet, to_device
from detrojan.labels import LabelMap
from detrojan.learning.on_the_fly import Control, Poisoner


class TrainingControlledAttack(Attack):
    """An attack that composes every batch of the training run.

    Its ratio is the share of each batch in expectation: another set of images is poisoned every
    epoch, so it can't be compared with that of data poisoning.
    """

    def poisoner(
        self, trigger: Trigger, images: ImageSet, labels: LabelMap, *, rng: torch.Generator
    ) -> Poisoner:
        """Return the attack at work on ``images``.

        Args:
            trigger: what :meth:`learn_trigger` returned.
            images: the training set, on the device.
            labels: which labels the attacker wants.
            rng: initializes what learns with the classifier.
        """
        raise NotImplementedError

    def control(self, trigger: Trigger, labels: LabelMap) -> Control:
        """Return the attack as training takes it."""
        digest = hashlib.sha256()
        for name, value in sorted(trigger.items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return Control(
            lambda images, rng: self.poisoner(trigger, images, labels, rng=rng),
            {"settings": self.model_dump(), "labels": labels, "trigger": digest.hexdigest()},
        )


class SelfAugmenting(TrainingControlledAttack):
    """An attack that triggers images first and then augments them in its own way.

    As WaNet and BppAttack do: a random crop, a rotation, and a flip where the data set has one. Each
    image has draws of its own, as in the original releases; BackdoorBench's port draws once a batch.
    """

    crop_padding: int = Field(5, ge=0, description="border before the random crop, pixels of the mean colour")
    crop_probability: float = Field(0.8, ge=0, le=1, description="share of images that are cropped")
    rotation: float = Field(10, ge=0, le=180, description="largest angle, degrees, either way")
    rotation_probability: float = Field(0.5, ge=0, le=1, description="share of images that are rotated")

    def augment(self, images: Tensor, fill: Tensor, *, flip: bool, rng: torch.Generator) -> Tensor:
        """Return ``images``, float (B, 3, H, W), cropped, then rotated (nearest pixel), then flipped.

        All three only move pixels, so they are one look-up; ``fill``, float (3,), is the colour of
        what comes from outside.
        """
        count, channels, height, width = images.shape
        draws = to_device(torch.rand(count, 6, generator=rng), images.device)
        is_cropped = draws[:, 0] < self.crop_probability
        reach = 2 * self.crop_padding + 1
        shifts = ((draws[:, 1:3] * reach).floor() - self.crop_padding) * is_cropped[:, None]
        is_rotated = draws[:, 3] < self.rotation_probability
        angles = (2 * draws[:, 4] - 1) * math.radians(self.rotation) * is_rotated
        mirror = torch.where(draws[:, 5] < 0.5 * flip, -1.0, 1.0)

        # Where each pixel comes from, walking back: flip and rotation about the centre, then the crop.
        middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
        down = (torch.arange(height, device=images.device) - middle_row).view(1, height, 1)
        along = (torch.arange(width, device=images.device) - middle_column).view(1, 1, width) * _each(mirror)
        cosine, sine = _each(angles.cos()), _each(angles.sin())
        rows = (cosine * down - sine * along + middle_row).round()
        columns = (sine * down + cosine * along + middle_column).round()
        inside = _within(rows, height) & _within(columns, width)
        rows, columns = rows + _each(shifts[:, 0]), columns + _each(shifts[:, 1])
        inside &= _within(rows, height) & _within(columns, width)
        source = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).long().flatten(1)
        moved = images.flatten(2).gather(2, source[:, None].expand(-1, channels, -1)).view(images.shape)
        return torch.where(inside[:, None], moved, fill.view(1, channels, 1, 1))


def _each(values: Tensor) -> Tensor:
    """Return one value an image, (B,), as (B, 1, 1)."""
    return values.view(-1, 1, 1)


def _within(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)
