"""RNP: Reconstructive Neuron Pruning, unlearn clean images, recover by masks, prune what stays masked.

Source: Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023
(arXiv 2305.14876), and its authors' code; hyperparameters and choice of the threshold by accuracy of the
survey's benchmark (arXiv 2411.11200). The authors fix the threshold at 0.7 instead. A neuron is a channel
of a batch normalization.
Departures from that benchmark, whose code has slips: gradients are clipped after they are computed (there,
as in the authors' code, before, which does nothing); the network that unlearns has no masks yet and each
mask starts at 1 (there masks are trained and decayed with the weights, and recovery goes on from there);
accuracies are taken on plain images in eval mode (there on augmented ones, anew at every threshold); each
layer keeps its own epsilon (there MobileNet's 1e-3 becomes 1e-5). Ascent that diverges starts again with a
tenth of the rate, as there.
"""

import copy
import logging
import math
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts.channels import Channels, pruned_accuracies
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import Batch, DefenderSample, ImageSet
from detrojan.learning import training
from detrojan.settings import Optimization
from detrojan.storage import artifacts

logger = logging.getLogger(__name__)


class RNP(Defense):
    """Prune the neurons that recovery switches off after clean images were unlearned."""

    smoke: ClassVar[dict[str, object]] = {
        "unlearning_epochs": 1,
        "recovery_epochs": 1,
        "threshold_step": 0.5,
    }

    batch_size: int = Field(256, ge=2, description="images a step, in unlearning and recovery")
    unlearning_epochs: int = Field(20, ge=1, description="passes of gradient ascent at most; cosine to zero")
    # The benchmark's rate and decay; the authors' code has 0.01 and 5e-4. Measured in 12 runs on narrow
    # PreAct-ResNet-18s (GTSRB's ten largest classes, digits; BadNets, Blended; SPC 10 and 100): with 0.001
    # an epoch's accuracy stays above 0.8, yet all runs prune, and ASR of BadNets on GTSRB falls from 0.99
    # to 0.03. With 0.01 the loss reaches 1 to 60, recovery may then switch many masks off at once, and in
    # 4 runs, both at SPC 100 among them, the first threshold already costs too much: no pruning.
    unlearning_lr: float = Field(1e-3, gt=0, description="learning rate of the ascent's first epoch")
    unlearning_momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov")
    unlearning_weight_decay: float = Field(0.05, ge=0, description="on all parameters")
    max_gradient_norm: float = Field(20.0, gt=0, description="L2 norm to which the ascent clips gradients")
    stop_accuracy: float = Field(0.2, ge=0, le=1, description="running accuracy that ends the ascent")
    max_retries: int = Field(
        10, ge=0, description="new starts of a diverged ascent, each at a tenth the rate"
    )
    recovery_epochs: int = Field(20, ge=1, description="passes over the images that learn the masks")
    recovery_lr: float = Field(0.2, gt=0, description="learning rate of the masks, constant")
    recovery_momentum: float = Field(0.9, ge=0, lt=1, description="of the masks' SGD, without Nesterov")
    alpha: float = Field(1.0, gt=0, description="factor of the recovery's loss; the authors' code has 0.2")
    threshold_step: float = Field(0.02, gt=0, le=1, description="from one threshold, 0 first, to the next")
    max_drop: float = Field(0.02, ge=0, lt=1, description="largest drop of accuracy on the images")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with the scale of pruned neurons at zero; nothing else in it differs."""
        repaired = copy.deepcopy(model).eval()
        images = clean.everything
        unlearned = self.unlearn(model, images, rng=streams.child(rng, "unlearn"))
        masks, recovered = self.recover(unlearned.model, images, rng=streams.child(rng, "recover"))
        threshold, accuracies = self.choose(repaired, masks, images)
        pruned = masks < threshold
        Channels(repaired).prune(pruned, shift=False)
        clean.chosen.update(
            {
                "unlearning_lr": unlearned.lr,
                "unlearning_epochs": unlearned.last.epoch,
                "unlearned_accuracy": unlearned.last.accuracy,
                "recovered_accuracy": recovered.accuracy,
                "threshold": threshold,
                "num_pruned": int(pruned.sum()),
                "num_channels": len(pruned),
                "accuracy": accuracies,
            }
        )
        return repaired

    def unlearn(self, model: nn.Module, images: ImageSet, *, rng: torch.Generator) -> "Unlearned":
        """Return a copy of ``model`` that has unlearned ``images``.

        Raises:
            DivergedError: the ascent diverged, at the smallest rate too.
        """
        for attempt in range(self.max_retries + 1):
            lr = self.unlearning_lr / 10**attempt
            try:
                return self._ascend(copy.deepcopy(model), images, lr, rng)
            except DivergedError as error:
                if attempt == self.max_retries:
                    raise
                logger.warning("unlearning diverged at learning rate %.1g: %s", lr, error)
        raise AssertionError("the last attempt returns or raises")

    def _ascend(self, model: nn.Module, images: ImageSet, lr: float, rng: torch.Generator) -> "Unlearned":
        parameters = list(model.parameters())
        schedule = Optimization(epochs=self.unlearning_epochs, lr=lr)
        optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=self.unlearning_momentum, weight_decay=self.unlearning_weight_decay
        )

        def clip(*_: object) -> None:
            nn.utils.clip_grad_norm_(parameters, self.max_gradient_norm)

        optimizer.register_step_pre_hook(clip)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            loss, logits = training.cross_entropy(model, batch)
            return -loss, (logits.detach().argmax(1) == batch.labels).sum()

        def is_unlearned(epoch: training.Epoch) -> bool:
            # The loss is of the weights before the step, which may have been one too far.
            artifacts.check_finite(model, "unlearning")
            return epoch.accuracy <= self.stop_accuracy

        history = training.descend(
            {"model": training.Part(model, optimizer, schedule.lr_at)},
            images,
            objective,
            epochs=self.unlearning_epochs,
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
            after_epoch=is_unlearned,
        )
        return Unlearned(model, lr, history[-1])

    def recover(
        self, unlearned: nn.Module, images: ImageSet, *, rng: torch.Generator
    ) -> tuple[Tensor, training.Epoch]:
        """Return the masks that let ``unlearned`` fit ``images``, (neurons,) in [0, 1], and the last epoch.

        Of ``unlearned`` only the running statistics change; its weights end frozen.

        Raises:
            DivergedError: a loss is not finite.
        """
        unlearned.requires_grad_(False)
        channels = Channels(unlearned)
        masks = torch.ones(len(channels), device=images.device, requires_grad=True)
        optimizer = torch.optim.SGD([masks], lr=self.recovery_lr, momentum=self.recovery_momentum)

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            logits = channels.logits(unlearned, batch.images, masks)
            loss = self.alpha * F.cross_entropy(logits, batch.labels)
            return loss, (logits.detach().argmax(1) == batch.labels).sum()

        @torch.no_grad()
        def clamp() -> None:
            masks.clamp_(0, 1)

        history = training.descend(
            {"masks": training.Part(unlearned, optimizer, lambda _epoch: self.recovery_lr)},
            images,
            objective,
            epochs=self.recovery_epochs,
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
            after_step=clamp,
        )
        return masks.detach(), history[-1]

    def choose(self, model: nn.Module, masks: Tensor, images: ImageSet) -> tuple[float, list[float]]:
        """Return the threshold below which masks are pruned, and the accuracy on ``images`` before and after.

        It is the last before the accuracy first falls by more than ``max_drop``. At a threshold that
        prunes no further mask nothing is run.
        """
        count = math.ceil(1 / self.threshold_step - 1e-9)
        thresholds = [round(k * self.threshold_step, 9) for k in range(count)]
        sweep = zip(
            thresholds,
            pruned_accuracies(model, (masks < threshold for threshold in thresholds), images),
            strict=True,
        )
        accepted, before = next(sweep)  # at 0 nothing is pruned
        after = before
        for threshold, accuracy in sweep:
            # Shares of a few images: the small term makes 1.0 - 0.98 a drop of 0.02 and not of more.
            if accuracy < before - self.max_drop - 1e-9:
                break
            accepted, after = threshold, accuracy
        return accepted, [before, after]


class Unlearned(NamedTuple):
    """A model after the ascent, the learning rate at which it did not diverge, and its last epoch."""

    model: nn.Module
    lr: float
    last: training.Epoch
