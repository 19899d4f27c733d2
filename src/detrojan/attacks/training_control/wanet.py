"""WaNet: a smooth, hardly visible warp of the image.

Source: Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021 (arXiv
2102.10369), with the settings of the paper and of BackdoorBench. Noise images, warped by the field
plus noise of their own, keep their labels, so that only the exact field is the trigger (Sec. 3.4).

Departures from BackdoorBench's port: the field has a random stream of its own, so all architectures
meet the same one; triggered images are rounded to 8 bits in training as they are in the test set; the
number of images of a batch is drawn where it is fractional, not floored; each image has draws of
augmentation of its own.
"""

import dataclasses
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.attacks.base import LabelMode, Trigger
from detrojan.attacks.training_control.base import SelfAugmenting
from detrojan.images import Batch, ImageSet, to_device, to_float, to_uint8
from detrojan.labels import LabelMap
from detrojan.learning.on_the_fly import Poisoner, drawn

CHUNK = 1024  # images that are warped at a time; bounds the memory


class WaNet(SelfAugmenting):
    """Warp images by one random smooth field."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE

    strength: float = Field(
        0.5, ge=0, description="mean shift of the control points along each axis, half pixels (s)"
    )
    control_points: int = Field(4, ge=2, description="along each side of the field (k)")
    noise_ratio: float = Field(2.0, ge=0, description="noise images to each triggered one")

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> Trigger:
        """Return ``grid``, float32 (H, W, 2): where each pixel is taken from, x and y in [-1, 1]."""
        height, width = clean.info.height, clean.info.width
        control = 2 * torch.rand(1, 2, self.control_points, self.control_points, generator=rng) - 1
        control /= control.abs().mean()
        smooth = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
        down, along = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        identity = torch.stack(torch.meshgrid(along, down, indexing="xy"), dim=-1)
        grid = (identity + self.strength * smooth[0].permute(1, 2, 0) / height).clamp(-1, 1)
        return {"grid": grid.to(clean.device)}

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return warped copies of ``images``, uint8 (N, 3, H, W), rounded."""
        chunks = torch.split(images, CHUNK)
        return torch.cat([to_uint8(_warp(to_float(chunk), trigger["grid"])) for chunk in chunks])

    def poisoner(
        self, trigger: Trigger, images: ImageSet, labels: LabelMap, *, rng: torch.Generator
    ) -> "Warper":
        """Return the attack at work; nothing learns with the classifier."""
        return Warper(self, trigger, images, labels)


class Warper(Poisoner):
    """Composes batches of triggered, noise and clean images, then augments them."""

    def __init__(self, attack: WaNet, trigger: Trigger, images: ImageSet, labels: LabelMap) -> None:
        self._attack = attack
        self._grid = trigger["grid"].to(images.device)
        self._info = images.info
        self._fill = torch.tensor(images.info.mean, device=images.device)
        self._labels = labels

    def poison(self, batch: Batch, count: int, *, rng: torch.Generator) -> Batch:
        """Return the batch: ``count`` warped images, noise images, clean ones; all augmented."""
        noisy = min(drawn(self._attack.noise_ratio * count, rng), len(batch.rows) - count)
        shape = (noisy, self._info.height, self._info.width, 2)
        noise = to_device(2 * torch.rand(shape, generator=rng) - 1, batch.images.device)
        noise_grids = (self._grid + noise / self._info.height).clamp(-1, 1)
        end = count + noisy
        changed = [_warp(batch.images[:count], self._grid), _warp(batch.images[count:end], noise_grids)]
        images = torch.cat([to_float(to_uint8(torch.cat(changed))), batch.images[end:]])
        labels = batch.labels.clone()
        labels[:count] = self._labels.attacked(labels[:count], len(self._info.classes))
        images = self._attack.augment(images, self._fill, flip=self._info.augmentation.flip, rng=rng)
        return dataclasses.replace(batch, images=images, labels=labels, num_poisoned=count)

    def trigger(self) -> Trigger:
        """Return the field, which training does not change."""
        return {"grid": self._grid.cpu()}


def _warp(images: Tensor, grids: Tensor) -> Tensor:
    """Return float images (N, 3, H, W) sampled at ``grids``, (N, H, W, 2), or one for all, (H, W, 2)."""
    grids = grids.expand(len(images), *grids.shape[-3:])
    if not len(images):
        return images
    return F.grid_sample(images, grids, mode="bilinear", padding_mode="zeros", align_corners=True)
