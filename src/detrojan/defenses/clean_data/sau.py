"""SAU: Shared Adversarial Unlearning, forget the adversarial examples shared with the backdoored model.

Source: Wei, Zhang, Zha, Wu, "Shared Adversarial Unlearning: Backdoor Mitigation by Unlearning Shared
Adversarial Examples", NeurIPS 2023 (arXiv 2307.10562), and its authors' code, which the survey's
benchmark (arXiv 2411.11200) runs unchanged, with its settings. A perturbation is shared if it leads the
model under repair and the model as it came to one and the same wrong class. It may leave [0, 1], as there.
Departures from the code, none of which changes what it computes: gradients are taken of the
perturbation alone; what both models make of clean images is computed once and not once a step of the
attack; the loss on perturbed images with their labels is left out, as its weight there is 0; and of
two forms of log(1 - q) that it averages, equal but for rounding, the more exact one is kept. On a GPU,
passes run in bfloat16.

The authors' settings are the survey's; what the protocol ``paper`` adds are the steps that these take on
5 % of each data set.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.defenses._parts.adversarial import ascend
from detrojan.defenses.base import Defense
from detrojan.images import Batch, DefenderSample, num_batches, passes
from detrojan.learning import inference, training


class SAU(Defense):
    """Find examples that fool both models alike, then unlearn them."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 1, "steps": 1}

    epochs: int = Field(100, ge=1, description="passes over the defender's images")
    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )
    batch_size: int = Field(256, ge=2, description="images a step")
    lr: float = Field(1e-4, gt=0, description="learning rate of Adam (AMSGrad), constant")
    eps: float = Field(0.2, gt=0, le=1, description="bound of a perturbation, of pixels in [0, 1]")
    step: float = Field(0.2, gt=0, description="size of a step of the attack, likewise")
    steps: int = Field(5, ge=1, description="steps of the attack, fewer if all examples are shared before")
    adversarial_weight: float = Field(
        0.01, ge=0, description="of being misclassified, while an example is searched"
    )
    shared_weight: float = Field(1.0, ge=0, description="of being seen alike by both models, likewise")
    unlearning_weight: float = Field(
        1.0, gt=0, description="of unlearning shared examples, against 1 for clean images"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` that has unlearned; its running statistics stay as they were.

        How many images it unlearned, in the first epoch and in the last, is noted.
        """
        repaired = copy.deepcopy(model).eval()
        original = copy.deepcopy(model).eval().requires_grad_(False)
        images = clean.everything
        # Without augmentation, the original meets the same clean images in every epoch.
        original_classes = inference.logits(original, images).argmax(1)
        unlearned = torch.zeros((), dtype=torch.int64, device=images.device)
        counts: list[int] = []

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            # The loop sets training mode. In eval mode no image's logits depend on its neighbours,
            # and perturbed images leave no trace in the running statistics.
            repaired.eval()
            clean_classes = original_classes[batch.rows]
            attacked = batch.images + self.perturbation(repaired, original, batch, clean_classes)
            wrong = original(attacked).argmax(1)
            shared = (wrong != batch.labels) & (wrong != clean_classes)
            unlearned.add_(shared.sum())
            logits, attacked_logits = repaired(torch.cat([batch.images, attacked])).chunk(2)
            loss = F.cross_entropy(logits, batch.labels)
            loss = loss + self.unlearning_weight * unlearning_loss(attacked_logits, wrong, shared)
            return loss, (logits.detach().argmax(1) == batch.labels).sum()

        def count(_epoch: training.Epoch) -> bool:
            counts.append(int(unlearned))
            unlearned.zero_()
            return False

        adam = torch.optim.Adam(repaired.parameters(), lr=self.lr, amsgrad=True)
        training.descend(
            {"model": training.Part(repaired, adam, lambda epoch: self.lr)},
            images,
            objective,
            epochs=passes(self.epochs, self.min_steps, num_batches(len(images), self.batch_size)),
            batch_size=self.batch_size,
            rng=rng,
            after_epoch=count,
            bfloat16=True,
        )
        clean.chosen.update({"num_unlearned": [counts[0], counts[-1]], "num_images": len(images)})
        return repaired

    def perturbation(
        self, model: nn.Module, original: nn.Module, batch: Batch, original_classes: Tensor
    ) -> Tensor:
        """Return a shared perturbation of each image, float32 (B, 3, H, W), within ``eps``.

        Args:
            model: under repair, in eval mode.
            original: as it came, in eval mode.
            batch: images and their labels.
            original_classes: what ``original`` predicts for the clean images, int64 (B,).
        """
        with torch.no_grad():
            classes = model(batch.images).argmax(1)

        def value(moving: Tensor) -> Tensor | None:
            attacked = batch.images + moving
            return self.shared_value(
                model(attacked), original(attacked), batch.labels, classes, original_classes
            )

        return ascend(
            value,
            torch.full_like(batch.images, self.eps),
            steps=self.steps,
            step=self.step,
            project=lambda moved: moved.clamp(-self.eps, self.eps),
        )

    def shared_value(
        self, logits: Tensor, original: Tensor, labels: Tensor, classes: Tensor, original_classes: Tensor
    ) -> Tensor | None:
        """Return how near perturbed images are to being shared, a scalar to ascend; None if all are.

        A model that an image does not fool yet gains by its cross-entropy. Two models that see an
        image differently lose by the divergence of what they see.

        Args:
            logits: of perturbed images, by the model under repair, (B, num_classes).
            original: likewise, by the original.
            labels: of the images, int64 (B,).
            classes: what the model under repair predicts for the images without perturbation, likewise.
            original_classes: what the original predicts for them, likewise.
        """
        predicted, original_predicted = logits.argmax(1), original.argmax(1)
        fooled, original_fooled = predicted != classes, original_predicted != original_classes
        apart = ~(fooled & original_fooled & (predicted == original_predicted))
        # The loop waits here for the GPU, but a step that it spares costs two passes of two models.
        if not apart.any():
            return None
        resisted = ~fooled * F.cross_entropy(logits, labels, reduction="none")
        resisted = resisted + ~original_fooled * F.cross_entropy(original, labels, reduction="none")
        seen_apart = (apart * divergence(logits, original)).mean()
        return self.adversarial_weight * resisted.mean() / 2 - self.shared_weight * seen_apart


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of each row's two distributions, (B,), from 0 to log 2.

    Args:
        first: logits (B, num_classes).
        second: likewise.
    """
    p, q = (F.softmax(logits, 1).clamp(min=1e-8) for logits in (first, second))
    log_middle = ((p + q) / 2).log()
    return (p * (p.log() - log_middle) + q * (q.log() - log_middle)).sum(1) / 2


def unlearning_loss(logits: Tensor, classes: Tensor, shared: Tensor) -> Tensor:
    """Return the sum of -log(1 - q) over ``shared`` images, divided by the number of all, a scalar.

    q is the probability of the class that the original takes a perturbed image for. Below 0.001 it
    is low enough, and near 1 its gradient fades.

    Args:
        logits: of the model under repair, of perturbed images, (B, num_classes).
        classes: predicted by the original for the same images, int64 (B,).
        shared: which images count, bool (B,).
    """
    # As the sum of the other probabilities: 1 - q would be all rounding where q is near 1.
    others = F.softmax(logits, 1).scatter(1, classes[:, None], 0).sum(1)
    return -(shared * (others.clamp(max=0.999) + 1e-6).log()).mean()
