"""FT-SAM: fine-tuning with adaptive sharpness-aware minimisation.

Source: Zhu, Wei, Shen, Fan, Wu, "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
Minimization", ICCV 2023 (arXiv 2304.11823): a backdoor sits in weights of large norm, and these a
perturbation in proportion to the weights hits most. The step is that of adaptive SAM (Kwon, Kim, Park, Choi,
"ASAM", ICML 2021, arXiv 2102.11600); rho and label smoothing those that the survey's benchmark
(arXiv 2411.11200) ran with on all data sets. The smoothed share goes to the wrong classes alone.
The protocol ``paper`` has what the authors' port in BackdoorBench is configured with: four times the rho and
no smoothing above 10 classes, which that program's option defaults override unless they are given.

Departures from that benchmark. Its cosine runs over 100 *steps* and up again, so that it ends at the
highest rate where an epoch has an even number of steps; here one cosine falls to zero over all epochs,
set once an epoch. The weights are put back from a copy, not by subtracting what was added, so they are the
same bits. Running statistics are frozen in the second pass by not tracking them, which leaves their
momentum and their count of batches alone too. As there, dropout is drawn anew in the second pass, and
nothing runs in bfloat16: a typical weight moves by rho / sqrt(weights) of itself, less than a
thousandth, which its eight bits don't hold.
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.defenses._parts.normalization import frozen_statistics
from detrojan.defenses.base import FineTuning
from detrojan.images import Batch, DefenderSample
from detrojan.learning import training


class FTSAM(FineTuning):
    """Fine-tune with the gradient taken where the loss is worst nearby, relative to each weight's size."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1}

    rho: float = Field(2, ge=0, description="size of the perturbation, each weight measured by its own size")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the label for the wrong classes")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a fine-tuned copy of ``model``; it chooses nothing, so it trains on every image."""
        repaired = copy.deepcopy(model)
        images = clean.everything
        tuning = self.tuning(len(images))
        optimizer = AdaptiveSAM(
            [parameter for parameter in repaired.parameters() if parameter.requires_grad],
            rho=self.rho,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            logits = repaired(batch.images)
            optimizer.perturb(smoothed_loss(logits, batch.labels, self.label_smoothing))
            with frozen_statistics(repaired):
                perturbed = repaired(batch.images)
            value = smoothed_loss(perturbed, batch.labels, self.label_smoothing)
            return value, (logits.detach().argmax(1) == batch.labels).sum()

        training.descend(
            {"model": training.Part(repaired, optimizer, tuning.lr_at)},
            images,
            objective,
            epochs=tuning.epochs,
            batch_size=self.batch_size,
            rng=rng,
            augmentation=images.info.augmentation,
        )
        return repaired


class AdaptiveSAM(torch.optim.SGD):
    """SGD whose gradient is that at perturbed weights.

    A step is: :meth:`perturb` at the weights, ``backward`` of the loss at the perturbed ones, and
    :meth:`step`, which puts the weights back first. So weight decay is that of the weights themselves.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rho: float, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._rho = rho
        self._parameters: list[Tensor] = list(parameters)
        self._stored = [torch.empty_like(parameter) for parameter in parameters]

    def perturb(self, loss: Tensor) -> None:
        """Add ``rho * w**2 * g / n`` to the weights w, in place, and keep what they were.

        g is the gradient of ``loss`` and n the norm of ``|w| * g`` over all weights together. The graph
        of ``loss`` is freed; no gradient is filled in. Nothing waits for the device.
        """
        gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_copy_(self._stored, self._parameters)
            steps = torch._foreach_mul(gradients, self._stored)
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(steps)))
            torch._foreach_mul_(steps, self._stored)
            torch._foreach_mul_(steps, self._rho / (norm + 1e-12))
            torch._foreach_add_(self._parameters, steps)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
        """Put the weights back, bit for bit, and step with the gradients that were taken meanwhile."""
        torch._foreach_copy_(self._parameters, self._stored)
        super().step(closure)


def smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Return the mean divergence KL(target || softmax) of ``logits`` (N, K), a scalar, 0 at best.

    The target gives the label ``1 - smoothing`` and each other class ``smoothing / (K - 1)``.
    """
    num_classes = logits.shape[1]
    is_label = labels[:, None] == torch.arange(num_classes, device=labels.device)
    target = torch.where(is_label, 1 - smoothing, smoothing / (num_classes - 1))
    return F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean")
