"""RNP: Reconstructive Neuron Pruning, unlearn clean images, recover by masks, prune what stays masked.

Source: Li, Lyu, Ma, Koren, Lyu, Li, Jiang, "Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023
(arXiv 2305.14876), and its authors' code; hyperparameters and choice of the threshold by accuracy of the
survey's benchmark (arXiv 2411.11200). A neuron is a channel of a batch normalization.
The authors fix no threshold: their code prints a sweep with accuracies and success rates on test images,
which a defender has not. Under `paper` the neurons go one by one, as in their option `number`, and the
accuracy on the clean images says how many. Expect it to look weaker here than in its paper. Its ascent and
recovery end with many masks at exactly 0, a seventh of all in one narrow network: among them nothing but
their place in the network decides who goes first, each costs clean images too, and a tolerance of a fiftieth
stops after one or two. There the next one would have been that of the trigger.
Departures from that benchmark, whose code has slips: gradients are clipped after they are computed (there,
as in the authors' code, before, which does nothing); the network that unlearns has no masks yet and each
mask starts at 1 (there masks are trained and decayed with the weights, and recovery goes on from there);
accuracies are taken on plain images in eval mode (there on augmented ones, anew at every threshold), and a
loss of exactly ``max_drop`` is accepted, in whole images; each layer keeps its own epsilon (there
MobileNet's 1e-3 becomes 1e-5). Ascent that diverges starts again with a tenth of the rate, as there.
"""

import copy
import functools
import itertools
import logging
import math
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts import choices
from detrojan.defenses._parts.channels import Channels, pruned_right
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import Batch, DefenderSample, ImageSet, num_batches, passes
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
    unlearning_epochs: int = Field(20, ge=1, description="passes of gradient ascent at most")
    unlearning_min_steps: int = Field(
        0, ge=0, description="optimizer steps for which that maximum is raised, if it allows fewer; 0: none"
    )
    # The benchmark's rate and decay. At the authors' the ascent goes ten times as far a step: the accuracy is
    # low within a few, and recovery then switches many masks off at once.
    unlearning_lr: float = Field(1e-3, gt=0, description="learning rate of the ascent's first epoch")
    unlearning_schedule: Literal["cosine", "steps"] = Field(
        "cosine", description="to zero; or to a tenth after 10/21 of the passes and again after 20/21"
    )
    unlearning_momentum: float = Field(0.9, ge=0, lt=1, description="of SGD, without Nesterov")
    unlearning_weight_decay: float = Field(0.05, ge=0, description="on all parameters")
    max_gradient_norm: float = Field(20.0, gt=0, description="L2 norm to which the ascent clips gradients")
    stop_accuracy: float = Field(0.2, ge=0, le=1, description="running accuracy that ends the ascent")
    max_retries: int = Field(
        10, ge=0, description="new starts of a diverged ascent, each at a tenth the rate"
    )
    recovery_epochs: int = Field(20, ge=1, description="passes over the images that learn the masks")
    recovery_min_steps: int = Field(
        0, ge=0, description="fewest steps of the masks; passes are added until they are taken; 0: none"
    )
    recovery_lr: float = Field(0.2, gt=0, description="learning rate of the masks, constant")
    recovery_momentum: float = Field(0.9, ge=0, lt=1, description="of the masks' SGD, without Nesterov")
    alpha: float = Field(1.0, gt=0, description="factor of the recovery's loss")
    thresholding: Literal["sweep", "one_by_one"] = Field(
        "sweep", description="prune by rising thresholds, or one neuron after another by rising mask"
    )
    threshold_step: float = Field(
        0.02, gt=0, le=1, description="of a sweep, from one threshold, 0 first, to the next"
    )
    max_drop: float = Field(0.02, ge=0, lt=1, description="largest drop of accuracy on the images")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with the scale of pruned neurons at zero; nothing else in it differs."""
        repaired = copy.deepcopy(model).eval()
        images = clean.everything
        unlearned = self.unlearn(model, images, rng=streams.child(rng, "unlearn"))
        masks, recovered = self.recover(unlearned.model, images, rng=streams.child(rng, "recover"))
        pruned, chosen = self.choose(repaired, masks, images)
        channels = Channels(repaired)
        channels.prune(pruned, shift=False)
        clean.chosen.update(
            {
                "norms": channels.kind,
                **channels.adapted,
                "unlearning_lr": unlearned.lr,
                "unlearning_epochs": unlearned.last.epoch,
                "unlearned_accuracy": unlearned.last.accuracy,
                "recovered_accuracy": recovered.accuracy,
                "num_pruned": int(pruned.sum()),
                "num_channels": len(pruned),
                **chosen,
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
        epochs = self._passes(self.unlearning_epochs, self.unlearning_min_steps, images)
        schedule = functools.partial(self._lr_at, lr, epochs)
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
            {"model": training.Part(model, optimizer, schedule)},
            images,
            objective,
            epochs=epochs,
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
            after_epoch=is_unlearned,
        )
        return Unlearned(model, lr, history[-1])

    def _passes(self, epochs: int, min_steps: int, images: ImageSet) -> int:
        return passes(epochs, min_steps, num_batches(len(images), self.batch_size))

    def _lr_at(self, lr: float, epochs: int, epoch: int) -> float:
        """Return the learning rate of a pass of the ascent, the first being 0, of ``epochs`` in all."""
        if self.unlearning_schedule == "cosine":
            return Optimization(epochs=epochs, lr=lr).lr_at(epoch)
        # In the authors' code after the 10th and the 20th of 21 passes.
        num_falls = sum(21 * epoch >= share * epochs for share in (10, 20))
        return lr / float(10**num_falls)

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
            epochs=self._passes(self.recovery_epochs, self.recovery_min_steps, images),
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
            after_step=clamp,
        )
        return masks.detach(), history[-1]

    def choose(self, model: nn.Module, masks: Tensor, images: ImageSet) -> tuple[Tensor, dict[str, object]]:
        """Return the neurons to prune, bool (neurons,), and what there is to note of the choice.

        They are the last set before the accuracy on ``images`` first falls by more than ``max_drop``. Sets
        are tried in order, and a set that is no larger than the one before without a pass.
        """
        allowed = choices.allowed_errors(self.max_drop, len(images))
        tried = pruned_right(model, (pruned for _, pruned in self._sets(masks)), images)
        right = list(choices.before_refusal(tried, allowed))
        limit, pruned = next(itertools.islice(self._sets(masks), len(right) - 1, None))
        return pruned, {
            "threshold": limit,
            "num_judged": len(images),
            "allowed_errors": allowed,
            "accuracy": [right[0] / len(images), right[-1] / len(images)],
        }

    def _sets(self, masks: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield sets of neurons, bool (neurons,), from none on, each within the next, and where they end.

        That is the threshold below which their masks lie; one by one, the mask of the last. Neurons with a
        mask of 1 are in none: recovery has nothing against them.
        """
        if self.thresholding == "sweep":
            count = math.ceil(1 / self.threshold_step - 1e-9)
            for threshold in (round(k * self.threshold_step, 9) for k in range(count)):
                yield threshold, masks < threshold
            return
        pruned = torch.zeros_like(masks, dtype=torch.bool)
        yield 0.0, pruned
        values = masks.tolist()
        for neuron in masks.argsort(stable=True).tolist():
            if values[neuron] < 1:
                pruned = pruned.clone()
                pruned[neuron] = True
                yield values[neuron], pruned


class Unlearned(NamedTuple):
    """A model after the ascent, the learning rate at which it did not diverge, and its last epoch."""

    model: nn.Module
    lr: float
    last: training.Epoch
