"""SIG: vertical sinusoidal stripes on images of the target class, labels untouched.

Source: Barni, Kallas, Tondi, "A New Backdoor Attack in CNNs by Training Set Corruption Without
Label Poisoning", ICIP 2019 (arXiv 1902.11237), with BackdoorBench's amplitude 40 and 6 periods in
training and in test. BackdoorBench truncates to 8 bits, which shifts the columns where the sine is
zero by one level; we round.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan.attacks.base import Attack, LabelMode, Trigger
from detrojan.images import ImageSet


class Sig(Attack):
    """Add a horizontal sine wave, the same in every row and channel."""

    label_mode: ClassVar[LabelMode] = LabelMode.CLEAN_LABEL

    amplitude: float = Field(40, gt=0, le=255, description="of the sine, grey levels")
    frequency: float = Field(6, gt=0, description="periods across the image")

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> Trigger:
        """Return ``signal``, float32 (W,): what is added to each column, grey levels."""
        columns = torch.arange(clean.info.width, dtype=torch.float64)
        signal = self.amplitude * torch.sin(2 * torch.pi * self.frequency * columns / clean.info.width)
        return {"signal": signal.float()}

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return copies of ``images``, uint8 (N, 3, H, W), with the signal added, rounded and clipped."""
        return (images.float() + trigger["signal"]).round().clamp(0, 255).to(torch.uint8)
