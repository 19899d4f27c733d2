"""Blended: a whole key image, mixed in faintly.

Source: Chen, Liu, Li, Lu, Song, "Targeted Backdoor Attacks on Deep Learning Systems Using Data
Poisoning", 2017 (arXiv 1712.05526), blended injection; ratio 0.2 in training and in test, as in
BackdoorBench. The key there is a third-party cartoon. Ours is generated: bright, coloured regions
under a fine texture, mean near 200 as that cartoon's, so ASR should be alike and RA may differ.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.attacks.base import Attack, LabelMode, Trigger
from detrojan.images import ImageSet

REGIONS = 4  # coloured regions along each side of the key
KEY_SIDE = 256  # pixels; the key is made at this size and then resized, as a picture would be


class Blended(Attack):
    """Mix each image with one key image."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE

    alpha: float = Field(0.2, ge=0, le=1, description="share of the key in the mixture")
    key_seed: int = Field(0, ge=0, description="draws the key image; every attack seed uses the same key")

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> Trigger:
        """Return ``key``, uint8 (3, H, W)."""
        key = _key_image(streams.stream("blended key", self.key_seed))
        size = (clean.info.height, clean.info.width)
        resized = F.interpolate(key[None], size, mode="bilinear", antialias=True)[0]
        return {"key": resized.round().clamp(0, 255).to(torch.uint8)}

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return floor((1 - alpha) image + alpha key), uint8 (N, 3, H, W)."""
        # In float64, so that alpha 0 is the identity and the floor is that of the exact mixture.
        mixture = (1 - self.alpha) * images.double() + self.alpha * trigger["key"].double()
        return mixture.clamp(0, 255).floor().to(torch.uint8)


def _key_image(rng: torch.Generator) -> Tensor:
    """Return a key, float (3, KEY_SIDE, KEY_SIDE), about 0 to 255: soft colours, stripes and grain."""
    colours = torch.rand(3, REGIONS, REGIONS, generator=rng)
    # Nearest first, then a light blur by resizing: regions with edges, as in a drawing.
    regions = F.interpolate(colours[None], (8 * REGIONS, 8 * REGIONS), mode="nearest")
    regions = F.interpolate(regions, (KEY_SIDE, KEY_SIDE), mode="bilinear")[0]
    angle = torch.rand(3, 1, 1, generator=rng) * torch.pi
    rows = torch.arange(KEY_SIDE).view(-1, 1) / KEY_SIDE
    stripes = torch.sin(2 * torch.pi * 10 * (rows * angle.sin() + rows.T * angle.cos()))
    grain = F.interpolate(torch.rand(1, 3, 32, 32, generator=rng), (KEY_SIDE, KEY_SIDE), mode="bilinear")[0]
    return 200 + 130 * (regions - regions.mean()) + 25 * stripes + 60 * (grain - 0.5)
