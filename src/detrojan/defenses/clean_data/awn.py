"""AWN: adversarial neuron masking, soft masks on channels against a universal perturbation.

Source: Chai, Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022
(arXiv 2207.04497), with one mask a channel of batch normalization where the paper has one a weight of
a convolution: that is what the survey's benchmark (arXiv 2411.11200) runs under this name.
Departures from that benchmark: images, perturbation and clipping are in pixels (there normalized images
are clipped to [0, 1], which destroys them); each half of a round passes over the images 5 times and the
masks follow Adam, both as in the authors' code (there once, and SGD, which moves a mask by some percent
where a pass is one batch); the masked layers keep their own epsilon (there MobileNet's 1e-3 becomes
1e-5). The rate falls by a tenth a round, as in that benchmark; the authors' is constant. So where a
pass is one batch (up to 256 images) no mask falls much below 0.56, and the method is weaker than with
more steps; a constant rate removes more there, but with more batches it costs accuracy.

Adam moves masks by the sign of even tiny gradients. So if the accuracy on the defender's images, not
augmented, ends more than ``max_drop`` below the untouched model's, the masks are learned again with SGD
at the same rate, and these are kept. For the same reason the L1 term is not negligible as it is under
SGD: it shrinks the channels on which neither loss depends.

What the perturbation is: images that the model is sure of have tiny gradients, so a first step of rate
10 is small: an L1 norm of 0.3 on a model whose cross-entropy is 2e-5, of 100 where it is 0.03. But the
ascent grows exponentially. Before the masks have learned anything, 2 to 5 steps leave the flat region and
overshoot to norms of 2,000 to 20,000 (at 32×32), with values far beyond the range of pixels. Then
``bound`` decides its size and the ascent only its direction; what still leaves the range is clipped. As
the masks learn, the norms fall. With the benchmark's one step a round, at small samples, it is next to
nothing. ``perturbation_norms`` among the choices has each round's norm before the bound. At 32×32 the
bound is a third of the range for each value, at 64×64 a twelfth, and at 18×18 or less it is none.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts.channels import Channels
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import Batch, DefenderSample, ImageSet, Loader
from detrojan.learning import inference, training
from detrojan.learning.training import Part

Gated = Callable[[Tensor, Tensor], Tensor]  # images and masks to logits

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}  # in the order that they are tried


class AWN(Defense):
    """Shrink the channels that a universal perturbation works through."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1, "passes": 1}

    epochs: int = Field(20, ge=1, description="rounds, each a perturbation and then the masks against it")
    passes: int = Field(5, ge=1, description="passes over the images in each half of a round")
    batch_size: int = Field(256, ge=1, description="images a step")
    lr: float = Field(0.01, gt=0, description="learning rate of the masks in the first round")
    lr_decay: float = Field(0.9, gt=0, le=1, description="factor of that rate from one round to the next")
    perturbation_lr: float = Field(10, gt=0, description="rate of the gradient ascent, pixels in [0, 1]")
    bound: float = Field(1000, gt=0, description="largest L1 norm of the perturbation, pixels in [0, 1]")
    clean_weight: float = Field(
        0.9, ge=0, le=1, description="of the clean loss; the perturbed one has the rest"
    )
    sparsity: float = Field(1e-7, ge=0, description="weight of the sum of the masks in the loss")
    max_drop: float = Field(
        0.05, ge=0, le=1, description="drop of accuracy on the images from which SGD takes Adam's place"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with each normalization's scale multiplied by its channels' masks."""
        images = clean.everything
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        before, _ = inference.evaluate(frozen, images)
        for optimizer in OPTIMIZERS:
            masks, norms = self._learn(frozen, images, optimizer, rng)
            repaired = copy.deepcopy(model).eval()
            Channels(repaired).multiply(masks)
            after, _ = inference.evaluate(repaired, images)
            # Shares of a few images: the small term keeps 1.0 - 0.95 a drop of 0.05 and not of more.
            if before - after <= self.max_drop + 1e-9:
                break
        clean.chosen.update(
            {
                "optimizer": optimizer,
                "accuracy": [before, after],
                "mean_mask": float(masks.mean()),
                "num_closed": int((masks == 0).sum()),
                "perturbation_norms": norms,
            }
        )
        return repaired

    def _learn(
        self, frozen: nn.Module, images: ImageSet, optimizer: str, rng: torch.Generator
    ) -> tuple[Tensor, list[float]]:
        """Return masks (channels,) in [0, 1], and the norm of each round's perturbation before it is bounded.

        ``frozen`` is in eval mode throughout: no statistic moves, and no layer draws.
        """
        channels = Channels(frozen)
        gated = functools.partial(channels.logits, frozen)
        masks = nn.Parameter(torch.ones(len(channels), device=images.device))
        stepper = OPTIMIZERS[optimizer]([masks], lr=self.lr)
        loader = Loader(images, self.batch_size, images.info.augmentation)
        start = torch.zeros(1, 3, images.info.height, images.info.width, device=images.device)
        norms = []
        for epoch in range(self.epochs):
            ascent = streams.child(rng, "ascent", epoch)
            perturbation, norm = self._perturb(gated, masks.detach(), start, loader, ascent)
            norms.append(norm)
            rate = self.lr * self.lr_decay**epoch
            training.descend(
                {"masks": Part(nn.ParameterList([masks]), stepper, functools.partial(_constant, rate))},
                images,
                functools.partial(self._objective, gated, masks, perturbation),
                epochs=self.passes,
                batch_size=self.batch_size,
                rng=streams.child(rng, "descent", epoch),
                augmentation=images.info.augmentation,
                after_step=functools.partial(_clamp, masks),
            )
        return masks.detach(), norms

    def _perturb(
        self, gated: Gated, masks: Tensor, start: Tensor, loader: Loader, rng: torch.Generator
    ) -> tuple[Tensor, float]:
        """Return a universal perturbation (1, 3, H, W) within the bound, and its L1 norm before bounding.

        From ``start``, gradient ascent, a step a batch, on the cross-entropy of the moved images against
        what the gated model says of them unmoved.
        """
        perturbation = start
        for number in range(self.passes):
            for batch in loader.epoch(streams.child(rng, number)):
                with torch.no_grad():
                    labels = gated(batch.images, masks).argmax(1)
                moving = perturbation.clone().requires_grad_()
                loss = F.cross_entropy(gated(batch.images + moving, masks), labels)
                (gradient,) = torch.autograd.grad(loss, moving)
                perturbation = perturbation + self.perturbation_lr * gradient
        norm = float(perturbation.abs().sum())
        if not math.isfinite(norm):
            raise DivergedError(
                f"the perturbation's norm is {norm}: lower perturbation_lr ({self.perturbation_lr:g})"
            )
        return perturbation * min(1.0, self.bound / norm) if norm else perturbation, norm

    def _objective(
        self, gated: Gated, masks: Tensor, perturbation: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return the masks' loss and how many unmoved images are classified right."""
        moved = (batch.images + perturbation).clamp(0, 1)
        # One doubled batch: in eval mode an image's logits don't depend on its neighbours.
        logits, perturbed = gated(torch.cat([batch.images, moved]), masks).chunk(2)
        clean_loss, perturbed_loss = (F.cross_entropy(some, batch.labels) for some in (logits, perturbed))
        weight = self.clean_weight
        loss = weight * clean_loss + (1 - weight) * perturbed_loss + self.sparsity * masks.abs().sum()
        return loss, (logits.detach().argmax(1) == batch.labels).sum()


def _constant(rate: float, _epoch: int) -> float:
    return rate


@torch.no_grad()
def _clamp(masks: Tensor) -> None:
    masks.clamp_(0, 1)
