"""ANP: Adversarial Neuron Pruning, drop the neurons that a small perturbation turns against clean images.

Source: Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021
(arXiv 2110.14430), and its authors' code; hyperparameters and choice of the threshold by accuracy of the
survey's benchmark (arXiv 2411.11200). A neuron is a channel of a batch normalization.
As the authors' code, and unlike the paper, the noise is not projected: after a step of size eps from a
random start within eps, it reaches up to 2 eps.
The paper fixes the threshold at 0.2; its code prints a sweep with accuracies on test images, and picks
none. So under `paper` nothing is held back and all clean images teach the masks.
Departures from that benchmark: validation accuracies are compared with the validation accuracy of the
model as it came (there with its *test* accuracy, which needs the test images and, where the model knows
its training images by heart, refuses light pruning and accepts ruin); a loss of exactly the tolerance is
accepted, in whole images; a gain is no reason to refuse a threshold; nothing after the first refusal
counts, but ``chosen`` names the last threshold that would pass alone; validation images are not
augmented; each layer keeps its own epsilon (there MobileNet's 1e-3 becomes 1e-5). What remains of masks
between 0 and 1 is dropped, as in the paper: a neuron stays or goes.
"""

import copy
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts import adversarial, choices
from detrojan.defenses._parts.channels import Channels, pruned_right, step_masks
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import Batch, DefenderSample, ImageSet, Loader, to_device

DECIMALS = 4  # masks and thresholds are compared after rounding, as the authors' code does


class ANP(Defense):
    """Learn a mask per neuron while an adversary perturbs them all; prune where the mask is low."""

    min_spc: ClassVar[int] = 2
    smoke: ClassVar[dict[str, object]] = {"iterations": 2, "batch_size": 16}

    iterations: int = Field(2000, ge=1, description="steps of the masks")
    batch_size: int = Field(256, ge=2, description="images a step, drawn with replacement")
    # With few images 2,000 steps are many passes, and either rate closes the lowest masks. At 0.2, the
    # authors', masks keep jumping between 0 and 1 to the end, so more is pruned, and it costs more accuracy.
    lr: float = Field(0.01, gt=0, description="learning rate of the masks, constant")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the masks' SGD, without Nesterov")
    eps: float = Field(0.4, ge=0, description="noise budget, shares of a neuron's scale and shift")
    steps: int = Field(1, ge=1, description="of the adversary, each of size eps / steps")
    alpha: float = Field(0.2, ge=0, le=1, description="weight of the clean loss; the noisy one has the rest")
    learn_on: Literal["train", "all"] = Field("train", description="the clean images that teach the masks")
    thresholding: Literal["sweep", "fixed"] = Field(
        "sweep",
        description="the last threshold that validation images accept, or fixed_threshold",
    )
    threshold_step: float = Field(0.05, ge=1e-4, le=1, description="of a sweep, from point to point")
    max_threshold: float = Field(0.9, ge=0, lt=1, description="largest threshold of a sweep; 0 is its first")
    tolerance: float = Field(
        0.1, ge=0, lt=1, description="largest relative drop of validation accuracy in a sweep"
    )
    fixed_threshold: float = Field(0.2, ge=0, lt=1, description="threshold where there is no sweep")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with the scale of pruned neurons at zero; nothing else in it differs."""
        repaired = copy.deepcopy(model).eval()
        images = clean.everything if self.learn_on == "all" else clean.train
        masks = self.learn_masks(model, images, rng=rng)
        choose = self._sweep if self.thresholding == "sweep" else self._fixed
        threshold, chosen = choose(repaired, masks, clean)
        pruned = at_most(masks, threshold)
        channels = Channels(repaired)
        channels.prune(pruned, shift=False)
        clean.chosen.update(
            {
                "norms": channels.kind,
                "threshold": threshold,
                "num_pruned": int(pruned.sum()),
                "num_channels": len(pruned),
                "lowest_mask": float(masks.min()),
                **chosen,
            }
        )
        return repaired

    def _sweep(
        self, model: nn.Module, masks: Tensor, clean: DefenderSample
    ) -> tuple[float, dict[str, object]]:
        """Return the last threshold that is accepted, and what there is to note of the choice."""
        thresholds, judges = self.thresholds, clean.validation
        right = sweep(model, masks, thresholds, judges)
        allowed = choices.allowed_errors(self.tolerance, right[0])
        last = choices.last_accepted(right, allowed)
        # Each threshold judged on its own against the untouched model.
        passing = [choices.last_accepted([right[0], one], allowed) for one in right[1:]]
        return thresholds[last], {
            "last_passing_threshold": thresholds[max(k * i for i, k in enumerate(passing, 1))],
            "num_judged": len(judges),
            "allowed_errors": allowed,
            "validation_accuracy": [right[0] / len(judges), right[last] / len(judges)],
        }

    def _fixed(
        self, model: nn.Module, masks: Tensor, clean: DefenderSample
    ) -> tuple[float, dict[str, object]]:
        """Return the fixed threshold, and what it costs; nothing is judged."""
        images = clean.everything
        right = sweep(model, masks, [-1.0, self.fixed_threshold], images)
        return self.fixed_threshold, {"accuracy": [count / len(images) for count in right]}

    @property
    def thresholds(self) -> list[float]:
        """The points of the sweep: -1, at which no mask is pruned, then 0 to ``max_threshold``."""
        count = math.floor(self.max_threshold / self.threshold_step + 1e-9) + 1
        return [-1.0, *(round(self.threshold_step * k, DECIMALS) for k in range(count))]

    def learn_masks(self, model: nn.Module, images: ImageSet, *, rng: torch.Generator) -> Tensor:
        """Return the masks of all neurons of ``model``, (neurons,) in [0, 1]; ``model`` stays as it was.

        Raises:
            DivergedError: a loss is not finite.
        """
        # In training mode, as the authors have it: batch statistics, and running ones that go astray.
        scratch = copy.deepcopy(model).train().requires_grad_(False)
        channels = Channels(scratch)
        masks = torch.ones(len(channels), device=images.device, requires_grad=True)
        optimizer = torch.optim.SGD([masks], lr=self.lr, momentum=self.momentum)
        loader = Loader(images, self.batch_size, images.info.augmentation)
        draws, noise = streams.child(rng, "images"), streams.child(rng, "noise")
        total = torch.zeros((), device=images.device)
        with streams.global_stream(streams.child(rng, "layers")):
            for _ in range(self.iterations):
                batch = loader.any(self.batch_size, draws)
                perturbation = self.perturb(scratch, channels, masks.detach(), batch, rng=noise)
                clean = F.cross_entropy(channels.logits(scratch, batch.images, masks), batch.labels)
                perturbed = perturbed_loss(scratch, channels, masks, perturbation, batch)
                loss = self.alpha * clean + (1 - self.alpha) * perturbed
                step_masks(loss, masks, optimizer, len(batch.rows))
                total += loss.detach()
        if not bool(total.isfinite()):
            raise DivergedError(
                f"a loss of the masks is not finite: lower their learning rate ({self.lr:.3g})"
            )
        return masks.detach()

    def perturb(
        self, model: nn.Module, channels: Channels, masks: Tensor, batch: Batch, *, rng: torch.Generator
    ) -> Tensor:
        """Return the adversary's noise on the neurons' scales and shifts, (2, neurons).

        It starts uniformly in ±eps and ends eps away in the direction of a larger loss.
        """
        start = (2 * torch.rand(2, len(channels), generator=rng) - 1) * self.eps
        return adversarial.ascend(
            lambda noise: perturbed_loss(model, channels, masks, noise, batch),
            to_device(start, masks.device),
            steps=self.steps,
            step=self.eps / self.steps,
            project=lambda noise: noise,
        )


def perturbed_loss(
    model: nn.Module, channels: Channels, masks: Tensor, perturbation: Tensor, batch: Batch
) -> Tensor:
    """Return the mean cross-entropy with scales times ``masks + noise`` and shifts times ``1 + noise``."""
    scale, shift = perturbation
    return F.cross_entropy(channels.logits(model, batch.images, masks + scale, 1 + shift), batch.labels)


def at_most(masks: Tensor, threshold: float) -> Tensor:
    """Return where ``masks`` are at or below ``threshold``, bool, both rounded to four decimals."""
    unit = 10.0**-DECIMALS
    return (masks.double() / unit).round() <= round(threshold / unit)


def sweep(model: nn.Module, masks: Tensor, thresholds: list[float], images: ImageSet) -> list[int]:
    """Return how many of ``images`` ``model`` has right, pruned at each of ``thresholds``, which rise.

    A threshold at which no further mask lies costs no pass.
    """
    return list(pruned_right(model, (at_most(masks, threshold) for threshold in thresholds), images))
