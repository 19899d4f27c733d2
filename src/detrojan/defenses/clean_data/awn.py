"""AWN: adversarial neuron masking, soft masks on channels against a universal perturbation.

Source: Chai, Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022
(arXiv 2207.04497), with one mask a channel of batch normalization where the paper has one a weight of
a convolution: that is what the survey's benchmark (arXiv 2411.11200) runs under this name. So no row of
this method is the paper's, whatever its settings.
The benchmark passes over the images once in each half of a round and its masks follow SGD, which moves a
mask by some percent where a pass is one batch. The authors take 15 steps a half or more, of images drawn
with replacement, their masks follow Adam at a constant rate, and below 100 images bound and batch are a
tenth and a quarter.
Departures from both: images, perturbation and clipping are in pixels (in the benchmark normalized images
are clipped to [0, 1], which destroys them); the masked layers keep their own epsilon (there MobileNet's
1e-3 becomes 1e-5).

Adam moves masks by the sign of even tiny gradients. So if the accuracy on the defender's images, not
augmented, ends more than ``max_drop`` below the untouched model's, the masks are learned again with SGD
at the same rate, and these are kept; a loss of exactly that much is accepted, in whole images. For the same
reason the L1 term is not negligible as it is under SGD: it shrinks the channels on which neither loss
depends.

What the perturbation is: images that the model is sure of have tiny gradients, so the first steps of rate
10 are small. But the ascent grows exponentially, and some steps later it leaves the flat region and
overshoots to values far beyond the range of pixels. Then ``bound`` decides its size and the ascent only its
direction; what still leaves the range is clipped. As the masks learn, the norms fall. With one step a
half-round, as the benchmark has at small samples, it is next to nothing. ``perturbation_norms`` among the
choices has each round's norm before the bound. At 32×32 a bound of 1,000 is a third of the range for each
value, at 64×64 a twelfth, and at 18×18 or less it is none.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts import choices
from detrojan.defenses._parts.channels import Channels, step_masks
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import Batch, DefenderSample, ImageSet, Loader, passes
from detrojan.learning import inference
from detrojan.settings import NO_AUGMENTATION

Gated = Callable[[Tensor, Tensor], Tensor]  # images and masks to logits

OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


class AWN(Defense):
    """Shrink the channels that a universal perturbation works through."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1}

    epochs: int = Field(20, ge=1, description="rounds, each a perturbation and then the masks against it")
    passes: int = Field(1, ge=1, description="passes over the images in each half of a round")
    min_steps: int = Field(
        0, ge=0, description="fewest steps of each half; passes are added until they are taken; 0: none"
    )
    replacement: bool = Field(
        False, description="draw each image of a step from all; a pass is then its whole batches"
    )
    augment: bool = Field(True, description="vary the images as training does")
    batch_size: int = Field(256, ge=1, description="images a step")
    optimizer: Literal["sgd", "adam"] = Field("sgd", description="what the masks follow")
    lr: float = Field(0.01, gt=0, description="learning rate of the masks in the first round")
    lr_decay: float = Field(0.9, gt=0, le=1, description="factor of that rate from one round to the next")
    perturbation_lr: float = Field(10, gt=0, description="rate of the gradient ascent, pixels in [0, 1]")
    bound: float = Field(1000, gt=0, description="largest L1 norm of the perturbation, pixels in [0, 1]")
    clean_weight: float = Field(
        0.9, ge=0, le=1, description="of the clean loss; the perturbed one has the rest"
    )
    sparsity: float = Field(1e-8, ge=0, description="weight of the sum of the masks in the loss")
    max_drop: float = Field(
        0.05, ge=0, le=1, description="drop of accuracy beyond which SGD takes Adam's place"
    )
    small_sample: int = Field(0, ge=0, description="with fewer images than this, the next two hold; 0: never")
    small_bound: float = Field(100, gt=0, description="bound in place of the other, with few images")
    small_batch_size: int = Field(32, ge=1, description="batch_size in place of the other, likewise")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with each normalization's scale multiplied by its channels' masks."""
        images = clean.everything
        if len(images) < self.small_sample:
            small = {"bound": self.small_bound, "batch_size": self.small_batch_size, "small_sample": 0}
            return self.model_copy(update=small)(model, clean, rng=rng)
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        before = inference.num_right(frozen, images)
        allowed = choices.allowed_errors(self.max_drop, len(images))
        for optimizer in dict.fromkeys([self.optimizer, "sgd"]):
            masks, norms = self._learn(frozen, images, optimizer, rng)
            repaired = copy.deepcopy(model).eval()
            channels = Channels(repaired)
            channels.multiply(masks)
            after = inference.num_right(repaired, images)
            if choices.accepted(after, before, allowed):
                break
        clean.chosen.update(
            {
                "optimizer": optimizer,
                "norms": channels.kind,
                **channels.adapted,
                "num_judged": len(images),
                "allowed_errors": allowed,
                "accuracy": [before / len(images), after / len(images)],
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
        loader = Loader(
            images, self.batch_size, images.info.augmentation if self.augment else NO_AUGMENTATION
        )
        start = torch.zeros(1, 3, images.info.height, images.info.width, device=images.device)
        norms = []
        for epoch in range(self.epochs):
            ascent = self._batches(loader, len(images), streams.child(rng, "ascent", epoch))
            perturbation, norm = self._perturb(gated, masks.detach(), start, ascent)
            norms.append(norm)
            stepper.param_groups[0]["lr"] = self.lr * self.lr_decay**epoch
            descent = self._batches(loader, len(images), streams.child(rng, "descent", epoch), "epoch")
            self._mask(gated, masks, stepper, perturbation, descent)
        return masks.detach(), norms

    def _batches(self, loader: Loader, count: int, rng: torch.Generator, *key: str) -> Iterator[Batch]:
        """Yield the batches of half a round, from ``count`` images; ``key`` names the streams of its passes.

        With replacement a pass is as many as are whole, as in the authors' code, which takes at least three.
        """
        if self.replacement:
            for _ in range(max(self.min_steps, self.passes * (count // self.batch_size))):
                yield loader.any(self.batch_size, rng)
        else:
            for number in range(passes(self.passes, self.min_steps, loader.num_batches)):
                yield from loader.epoch(streams.child(rng, *key, number))

    def _perturb(
        self, gated: Gated, masks: Tensor, start: Tensor, batches: Iterator[Batch]
    ) -> tuple[Tensor, float]:
        """Return a universal perturbation (1, 3, H, W) within the bound, and its L1 norm before bounding.

        From ``start``, gradient ascent, a step a batch, on the cross-entropy of the moved images against
        what the gated model says of them unmoved.
        """
        perturbation = start
        for batch in batches:
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

    def _mask(
        self,
        gated: Gated,
        masks: Tensor,
        optimizer: torch.optim.Optimizer,
        perturbation: Tensor,
        batches: Iterator[Batch],
    ) -> None:
        """Step ``masks``, which ``optimizer`` moves, against ``perturbation``; they stay in [0, 1].

        Raises:
            DivergedError: a loss is not finite.
        """
        total = torch.zeros((), device=masks.device)
        for batch in batches:
            loss = self._loss(gated, masks, perturbation, batch)
            step_masks(loss, masks, optimizer, len(batch.rows))
            total += loss.detach()
        if not bool(total.isfinite()):
            raise DivergedError(f"a loss of the masks is not finite: lower lr ({self.lr:g})")

    def _loss(self, gated: Gated, masks: Tensor, perturbation: Tensor, batch: Batch) -> Tensor:
        """Return the masks' loss on a batch, a scalar."""
        moved = (batch.images + perturbation).clamp(0, 1)
        # One doubled batch: in eval mode an image's logits don't depend on its neighbours.
        logits, perturbed = gated(torch.cat([batch.images, moved]), masks).chunk(2)
        clean_loss, perturbed_loss = (F.cross_entropy(some, batch.labels) for some in (logits, perturbed))
        weight = self.clean_weight
        return weight * clean_loss + (1 - weight) * perturbed_loss + self.sparsity * masks.abs().sum()
