"""NFT: neural mask fine-tuning, bounded masks on channels learned from mixed images.

Source: Karim, Al Arafat, Khalid, Guo, Rahnavard, "Augmented Neural Fine-Tuning for Efficient Backdoor
Purification", ECCV 2024 (arXiv 2407.10052); the implementation follows the survey's benchmark
(arXiv 2411.11200), since the authors' published script can't run: it adds to counters that are never set.

Each channel of a normalization has a mask that multiplies its scale. The masks learn from mixed images
(MixUp), which stand in for triggered ones, and a penalty holds them near 1. Mask l, counted from 1 in the
order of the layers, may not fall below ``alpha * exp(-beta * l)``: early layers keep what they see. The last
masks are the result.

Nothing else learns, but the running statistics follow the mixed images, and dropout draws, as in the
benchmark. The rate ends at ``min_lr``, and with a momentum of 0.95 masks jump between their bounds; that is
the method. The penalty is a sum over channels, so it weighs more in a network of many.
Departures: the masks are folded into the scales (the benchmark saves them beside these). The bounds go by
the order of registration, which is the benchmark's order of parameters.

In a network of 78 layers, as EfficientNet-B3, the bound is below 1e-6 from the 28th on, so that channels of
two thirds of the network may be switched off.
"""

import copy
import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts.channels import Channels
from detrojan.defenses.base import Defense
from detrojan.images import Batch, DefenderSample, num_batches, passes
from detrojan.learning import training


class NFT(Defense):
    """Learn bounded masks of channels on mixed clean images."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 2}

    epochs: int = Field(100, ge=1, description="passes over the images")
    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )
    batch_size: int = Field(256, ge=1, description="images a step")
    lr: float = Field(0.1, gt=0, description="learning rate of the masks in the first pass")
    min_lr: float = Field(0.02, ge=0, description="what it falls to, along a cosine")
    momentum: float = Field(0.95, ge=0, lt=1, description="of SGD")
    penalty: float = Field(
        1e-3, ge=0, description="weight of the sum of |1 - mask|, divided by the images a class"
    )
    alpha: float = Field(0.8, gt=0, le=1, description="lower bound of a mask before the first layer")
    beta: float = Field(0.5, ge=0, description="how fast the bound falls from layer to layer")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with each normalization's scale multiplied by its channels' masks.

        Raises:
            DivergedError: the mean loss of a pass is not finite.
            NotApplicableError: the model has no normalization with a scale of each channel.
        """
        images = clean.everything
        repaired = copy.deepcopy(model).requires_grad_(False)
        channels = Channels(repaired)
        bounds = self.bounds(channels.sizes).to(images.device)
        masks = torch.ones(len(channels), device=images.device, requires_grad=True)
        optimizer = torch.optim.SGD([masks], lr=self.lr, momentum=self.momentum)
        weight = self.penalty * images.num_classes / len(images)
        mixing = streams.child(rng, "mixing")

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            share, order = _drawn(len(batch.rows), mixing)
            order = order.to(batch.images.device)
            mixed = share * batch.images + (1 - share) * batch.images[order]
            logits = channels.logits(repaired, mixed, masks)
            loss = share * F.cross_entropy(logits, batch.labels)
            loss = loss + (1 - share) * F.cross_entropy(logits, batch.labels[order])
            loss = loss + weight * (1 - masks).abs().sum()
            return loss, (logits.detach().argmax(1) == batch.labels).sum()

        @torch.no_grad()
        def clamp() -> None:
            masks.copy_(torch.maximum(masks, bounds).clamp_(max=1))

        epochs = passes(self.epochs, self.min_steps, num_batches(len(images), self.batch_size))
        training.descend(
            {"masks": training.Part(repaired, optimizer, lambda epoch: self.lr_at(epoch, epochs))},
            images,
            objective,
            epochs=epochs,
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
            after_step=clamp,
        )
        found = masks.detach()
        channels.multiply(found)
        repaired.requires_grad_(True)
        clean.chosen.update(
            {
                "norms": channels.kind,
                "mean_mask": float(found.mean()),
                "num_at_bound": int((found <= bounds).sum()),
                "num_channels": len(found),
            }
        )
        return repaired

    def bounds(self, sizes: list[int]) -> Tensor:
        """Return the lower bound of each mask, float32 (channels,), of layers of so many channels."""
        return torch.cat(
            [
                torch.full((size,), self.alpha * math.exp(-self.beta * layer))
                for layer, size in enumerate(sizes, 1)
            ]
        )

    def lr_at(self, epoch: int, epochs: int) -> float:
        """Return the learning rate of a pass, the first being 0, of ``epochs`` in all."""
        share = (1 + math.cos(math.pi * epoch / epochs)) / 2
        return self.min_lr + (self.lr - self.min_lr) * share


def _drawn(count: int, rng: torch.Generator) -> tuple[float, Tensor]:
    """Return the share of each image in its mixture, uniform as Beta(1, 1), and whom it is mixed with."""
    return float(torch.rand((), generator=rng)), torch.randperm(count, generator=rng)
