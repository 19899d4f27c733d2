"""BadNets: a small white patch in the bottom-right corner.

Source: Gu, Dolan-Gavitt, Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model
Supply Chain", 2017 (arXiv 1708.06733), with BackdoorBench's 3×3 patch for 32×32 images. At other
sizes the 32×32 pattern is resized bilinearly as there: at 64×64 a soft 7×7 patch, whose dark rim
counts. Unlike BackdoorBench, which takes "pattern > 0" for the mask at stamping time, the mask is
stored with the trigger.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.attacks.base import Attack, LabelMode, Trigger
from detrojan.images import ImageSet

REFERENCE_SIDE = 32  # pixels; the side of the image on which the patch is defined


class BadNets(Attack):
    """Paste a white square, flush with the bottom-right corner."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE

    side: int = Field(3, ge=1, le=32, description="side of the square on a 32×32 image, pixels")

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> Trigger:
        """Return ``pattern``, uint8 (3, H, W), and ``mask``, bool (3, H, W): where it is pasted."""
        square = torch.zeros(1, 1, REFERENCE_SIDE, REFERENCE_SIDE)
        square[..., -self.side :, -self.side :] = 255
        size = (clean.info.height, clean.info.width)
        if size != (REFERENCE_SIDE, REFERENCE_SIDE):
            square = F.interpolate(square, size, mode="bilinear", antialias=min(size) < REFERENCE_SIDE)
        pattern = square.round().to(torch.uint8).expand(1, 3, *size)[0].contiguous()
        return {"pattern": pattern, "mask": pattern > 0}

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return copies of ``images``, uint8 (N, 3, H, W), with the pattern where the mask is set."""
        return torch.where(trigger["mask"], trigger["pattern"], images)
