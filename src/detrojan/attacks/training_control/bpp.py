"""BppAttack: fewer grey levels, which the eye hardly sees.

Source: Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks
via Image Quantization and Contrastive Adversarial Learning", CVPR 2022 (arXiv 2205.13383), with the
settings of BackdoorBench: 8 levels, no dithering, and in place of contrastive adversarial training
negative images, which carry the quantization error of another image and keep their labels.

Departures from BackdoorBench's port: errors are computed in memory and not from truncated files;
negatives have the same sign everywhere and are clipped; triggered images are rounded to 8 bits, in
training as in the test set, and not truncated; the number of images of a batch is drawn where it is
fractional, not floored; each image has draws of augmentation of its own.
"""

import dataclasses
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan.attacks.base import LabelMode, Trigger
from detrojan.attacks.training_control.base import SelfAugmenting
from detrojan.images import Batch, ImageSet, to_device, to_float, to_uint8
from detrojan.labels import LabelMap
from detrojan.learning.on_the_fly import Poisoner, drawn

CHUNK = 1024  # images that are quantized at a time; bounds the memory
# Shares of a pixel's error that its neighbours get, by row and column (Floyd, Steinberg, 1976).
DIFFUSION = (((0, 1), 7 / 16), ((1, -1), 3 / 16), ((1, 0), 5 / 16), ((1, 1), 1 / 16))


class Bpp(SelfAugmenting):
    """Quantize the grey levels of each channel."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE

    levels: int = Field(8, ge=2, le=255, description="grey levels that are left of 256")
    dithering: bool = Field(False, description="diffuse the error to neighbours, as the paper does")
    negative_ratio: float = Field(
        0.1, ge=0, le=1, description="share of each batch with another image's error, whatever the ratio"
    )

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> Trigger:
        """Return an empty trigger: the levels say all."""
        return {}

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return copies of ``images``, uint8 (N, 3, H, W), with the nearest levels, rounded to 8 bits."""
        quantize = self._dither if self.dithering else self._nearest
        chunks = [quantize(chunk.float()) for chunk in torch.split(images, CHUNK)]
        return torch.cat(chunks).round().clamp(0, 255).to(torch.uint8)

    def _nearest(self, images: Tensor) -> Tensor:
        """Return the nearest level of each value, float, 0 to 255."""
        steps = self.levels - 1
        return (images / 255 * steps).round() / steps * 255

    def _dither(self, images: Tensor) -> Tensor:
        """Return levels whose local mean is that of ``images``: each pixel's error moves on to the next."""
        # A border, cut off in the end, takes what leaves the image.
        padded = nn.functional.pad(images, (1, 1, 0, 1))
        for row in range(images.shape[2]):
            for column in range(1, images.shape[3] + 1):
                wanted = padded[:, :, row, column].clone()
                padded[:, :, row, column] = self._nearest(wanted)
                error = wanted - padded[:, :, row, column]
                for (down, along), share in DIFFUSION:
                    padded[:, :, row + down, column + along] += share * error
        return padded[:, :, :-1, 1:-1]

    def poisoner(
        self, trigger: Trigger, images: ImageSet, labels: LabelMap, *, rng: torch.Generator
    ) -> "Quantizer":
        """Return the attack at work; nothing learns with the classifier."""
        return Quantizer(self, images, labels)


class Quantizer(Poisoner):
    """Composes batches of triggered, negative and clean images, then augments them."""

    def __init__(self, attack: Bpp, images: ImageSet, labels: LabelMap) -> None:
        self._attack = attack
        self._images = images
        self._fill = torch.tensor(images.info.mean, device=images.device)
        self._labels = labels

    def poison(self, batch: Batch, count: int, *, rng: torch.Generator) -> Batch:
        """Return the batch: ``count`` quantized images, negative images, clean ones; all augmented.

        Without a quantized image there are no negatives either, as in BackdoorBench.
        """
        size, info = len(batch.rows), self._images.info
        negatives = min(drawn(self._attack.negative_ratio * size, rng), size - count) if count else 0
        donors = to_device(torch.randint(len(self._images), (negatives,), generator=rng), self._fill.device)
        others, end = self._images.images[donors], count + negatives
        quantized = self._attack.apply(torch.cat([to_uint8(batch.images[:count]), others]), {})
        errors = to_float(quantized[count:]) - to_float(others)
        negative = (batch.images[count:end] + errors).clamp(0, 1)
        images = torch.cat([to_float(quantized[:count]), negative, batch.images[end:]])
        labels = batch.labels.clone()
        labels[:count] = self._labels.attacked(labels[:count], self._images.num_classes)
        images = self._attack.augment(images, self._fill, flip=info.augmentation.flip, rng=rng)
        return dataclasses.replace(batch, images=images, labels=labels, num_poisoned=count)

    def trigger(self) -> Trigger:
        """Return an empty trigger."""
        return {}
