"""BNP: drop the channels whose input on clean images is not what batch normalization remembers.

Source: Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022, and its
authors' code; u = 3, and 4 with 200 classes, as the survey's benchmark (arXiv 2411.11200) runs it. Running
statistics were gathered on the poisoned mixture, so a channel that the trigger moves remembers another mean
or variance than clean images show. The benchmark zeroes a pruned channel's scale and shift, so it puts out
nothing; the authors zero the scale alone, so it puts out its shift on every image.
Departures from that benchmark, each a slip there: the statistics pool all images (there each batch
overwrites the one before, so only the last counts); the logarithm of the divergence has its 1/2; the
norm's own epsilon is added to both variances, and divergences that are still not finite don't count, so
a dead channel (VGG) no longer disables its layer; the layers are the model's own, with their epsilon.

The images are augmented as in training, each once. That is what the running statistics saw: a black
border shifts every layer, and unaugmented images show that shift as divergence of all channels (on a
clean model trained with crops, twice the mean divergence at 10 images a class, half as much again at 2).
With few images one random crop each is still right: in expectation it is the augmented distribution,
and more crops of the same images would lower the crops' noise, not that of having few images.
What the rule can't see: where a map is 1×1 (the deep layers of EfficientNet and MobileNet at 32×32), N
images are N values, and an honest channel's divergence is about exponential with mean 1/N. Then u = 3
drops some 2 % of the channels by chance, whatever N is. With n channels no score lies more than
(n - 1) / sqrt(n) deviations above the mean, so u = 3 leaves layers of fewer than 11 alone, u = 4 those
of fewer than 18. Dead channels count, with divergence 0: where most of a layer is dead, the few that
live are its outliers.
"""

import copy
import functools
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan.defenses._parts.channels import Channels
from detrojan.defenses._parts.choices import outliers
from detrojan.defenses.base import Defense
from detrojan.images import DefenderSample, ImageSet, Loader

BATCH_SIZE = 512  # images a pass; it bounds the memory, not the result


class BNP(Defense):
    """Prune the channels whose divergence lies ``u`` standard deviations above their layer's mean."""

    smoke: ClassVar[dict[str, object]] = {}

    u: float = Field(3, gt=0, description="threshold above the mean, standard deviations of the layer")
    zero_shift: bool = Field(True, description="zero the shift of a pruned channel too, not its scale alone")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a pruned copy of ``model``: a pruned channel's normalization has no scale, maybe no shift.

        All layers are judged by the inputs that they have in the unpruned model.
        """
        repaired = copy.deepcopy(model).eval()
        channels = Channels(repaired, statistics=True)
        divergences = channel_divergences(repaired, channels.norms, clean.everything, rng)
        pruned = torch.cat([outliers(divergence, self.u) for divergence in divergences])
        channels.prune(pruned, shift=self.zero_shift)
        names = channels.named(pruned)
        clean.chosen.update({"num_pruned": len(names), "pruned": names})
        return repaired


def channel_divergences(
    model: nn.Module, norms: list[nn.BatchNorm2d], images: ImageSet, rng: torch.Generator
) -> list[Tensor]:
    """Return how far each channel's input lies from its running statistics, float64 (C,), a layer each.

    The Kullback-Leibler divergence KL(N(mean, variance) || N(running mean, running variance)), in nats
    (paper, Sec. 4.2), with the norm's epsilon added to both variances; 0 where they agree, NaN where a
    channel has no statistics.
    """
    moments = [_Moments(norm) for norm in norms]
    hooks = [
        norm.register_forward_pre_hook(functools.partial(_observe, seen))
        for norm, seen in zip(norms, moments, strict=True)
    ]
    try:
        with torch.inference_mode():
            for batch in Loader(images, BATCH_SIZE, images.info.augmentation).epoch(rng):
                model(batch.images)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen.divergence() for seen in moments]


class _Moments:
    """Count, sum and sum of squares of a norm's inputs, about its running mean.

    About the running mean nothing cancels, however large the mean is: the sums are float64, the
    values stay the float32 that they are.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.center = norm.running_mean
        self.spread = norm.running_var.double() + norm.eps
        self.eps = norm.eps
        self.count = 0
        self.total = self.squares = torch.zeros_like(self.spread)

    def add(self, values: Tensor) -> None:
        """Take in ``values`` (N, C, H, W)."""
        centered = values - self.center[:, None, None]
        self.count += values.numel() // len(self.center)
        self.total = self.total + centered.sum((0, 2, 3), dtype=torch.float64)
        self.squares = self.squares + centered.square().sum((0, 2, 3), dtype=torch.float64)

    def divergence(self) -> Tensor:
        """Return the divergence of each channel, float64 (C,)."""
        shift = self.total / self.count
        # Unbiased, as running variances are. Rounding can make the difference of a constant's negative.
        variance = (self.squares - self.total * shift).clamp(min=0) / (self.count - 1)
        excess = (variance + self.eps) / self.spread - 1
        # (r - 1 - ln r) / 2, in a form that stays exact where the variances agree.
        return (excess - excess.log1p()) / 2 + shift.square() / (2 * self.spread)


def _observe(seen: _Moments, _norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    seen.add(inputs[0])
