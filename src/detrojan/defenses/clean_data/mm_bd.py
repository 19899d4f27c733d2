"""MM-BD: bound each channel's activation, as low as the clean images let it.

Source: the mitigation of Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor
Attacks with Arbitrary Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024
(arXiv 2205.06900): a trigger shows as activations larger than any that a clean image causes. As in the
survey's benchmark (arXiv 2411.11200), detection is left out and every model is mitigated. There the
bounds are taken off again before they are learned, so that its results are those of the untouched
model; here they act while they are learned, and stay.

Where that benchmark and the authors' released script differ, sites and step are the script's: three
early activations, Adam at 0.1. The benchmark bounds all activations at 0.001, so bounds fall by 0.05
in the 50 steps that 200 images or fewer make: on GTSRB (PreAct-ResNet-18 of width 8, BadNets, 2 images
a class) ASR stayed at 96 %. With the script's step on all activations, 10 images a class brought ASR
from 98 % to 3 % and cost 4 points of ACC; on the three sites, to 0 %, and cost none. The first bounds
are the benchmark's, each layer's largest activation on the clean images: they change nothing on these,
however a network scales. The script's 8 is above some networks' activations: with 10 images a class of
CIFAR-10, ASR fell from 71 % to 32 % from there, and to 13 % from the maximum.

Departures from both: bounds stay at 0 or above, and those of the last epoch that keeps the accuracy on
the clean images are returned, not those of the last epoch: the norms' share of the loss may end in
bounds of 0. Images are not augmented, so that the untouched model's logits are computed once. In gated
networks only activations of the trunk can be bounded; SiLU and hard-swish are bounded from above alone.
"""

import copy
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet
from detrojan.learning import inference, training
from detrojan.learning.training import Epoch, Part
from detrojan.models import Classifier
from detrojan.models._parts.insertions import Ceiling
from detrojan.models._parts.structure import norm_activations


class MMBD(Defense):
    """Lower the bounds of activations while logits of clean images stay."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 2}

    sites: list[str] = Field(
        ["layer1.0.relu1", "layer2.0.relu1", "layer3.0.relu1"],
        min_length=1,
        description="names of the activations to bound, each behind a batch normalization",
    )
    epochs: int = Field(50, ge=1, description="passes over the clean images")
    batch_size: int = Field(200, ge=2, description="images a step")
    lr: float = Field(0.1, gt=0, description="learning rate of Adam, constant, in units of activations")
    norm_weight: float = Field(0.5, gt=0, description="of the bounds' norms at first (paper: lambda)")
    norm_factor: float = Field(1.2, ge=1, description="raises that weight, or lowers it")
    adjust_every: int = Field(10, ge=1, description="epochs from one such change to the next")
    max_drop: float = Field(
        0.05, ge=0, lt=1, description="drop of accuracy on the clean images that is too much"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with bounded activations; its own tensors are as they were."""
        repaired = copy.deepcopy(model).eval().requires_grad_(False)
        assert isinstance(repaired, Classifier)
        images = clean.everything
        ceilings, wanted = insert_ceilings(repaired, self.sites, images)
        initial = [float(bound.detach().max()) for bound in ceilings.parameters()]
        epoch, accuracies = self._lower(repaired, ceilings, images, wanted, rng)
        clean.chosen.update(
            {
                "epoch": epoch,
                "train_accuracy": accuracies,
                "initial_bounds": initial,
                "mean_bounds": [float(bound.detach().mean()) for bound in ceilings.parameters()],
            }
        )
        return repaired.requires_grad_(True)

    def _lower(
        self,
        model: nn.Module,
        ceilings: nn.ModuleList,
        images: ImageSet,
        wanted: Tensor,
        rng: torch.Generator,
    ) -> tuple[int, list[float]]:
        """Learn the bounds; leave the last ones that keep the accuracy.

        Returns their epoch, 0 being before the first, and the accuracy on ``images`` without bounds and
        with them. ``wanted`` are logits (N, num_classes) without bounds.
        """
        bounds = list(ceilings.parameters())
        weight = self.norm_weight
        first = _accuracy(wanted, images)
        kept, kept_epoch, kept_accuracy = _values(bounds), 0, first

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            logits = model(batch.images)
            norms = torch.stack([torch.linalg.vector_norm(bound) for bound in bounds]).sum()
            loss = F.mse_loss(logits, wanted[batch.rows]) + weight * norms
            return loss, (logits.detach().argmax(1) == batch.labels).sum()

        @torch.no_grad()
        def keep_above_zero() -> None:
            for bound in bounds:
                bound.clamp_(min=0)

        def judge(epoch: Epoch) -> bool:
            nonlocal weight, kept, kept_epoch, kept_accuracy
            accuracy = _accuracy(inference.logits(model, images), images)
            # Shares of a few images: the small term makes 1.0 - 0.95 a drop of 0.05 and not of more.
            good = accuracy >= first - self.max_drop - 1e-9
            if good:
                kept, kept_epoch, kept_accuracy = _values(bounds), epoch.epoch, accuracy
            if epoch.epoch % self.adjust_every == 0:
                weight = weight * self.norm_factor if good else weight / self.norm_factor
            return False

        training.descend(
            {"ceilings": Part(ceilings, torch.optim.Adam(bounds, lr=self.lr), lambda _: self.lr)},
            images,
            objective,
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=rng,
            after_step=keep_above_zero,
            after_epoch=judge,
        )
        with torch.no_grad():
            for bound, value in zip(bounds, kept, strict=True):
                bound.copy_(value)
        return kept_epoch, [first, kept_accuracy]


@torch.no_grad()
def insert_ceilings(model: Classifier, sites: list[str], images: ImageSet) -> tuple[nn.ModuleList, Tensor]:
    """Insert a ceiling behind each activation of ``sites``; return them, in that order, and the logits.

    All channels of a site start at the site's largest activation over ``images``, so the logits of
    these, (N, num_classes), are as before. One pass over the images yields both.

    Raises:
        NotApplicableError: ``model`` has no such activation behind a batch normalization.
    """
    norms = norm_activations(model.network)
    unknown = [site for site in sites if site not in norms]
    if unknown:
        raise NotApplicableError(
            f"MM-BD bounds activations that follow batch normalization, but {model.build.architecture} has "
            f"no {', '.join(unknown)} among its {len(norms)}: name some of them in the setting sites of mm_bd"
        )
    largest: dict[nn.Module, list[Tensor]] = {}

    def measure(ceiling: nn.Module, inputs: tuple[Tensor]) -> None:
        largest.setdefault(ceiling, []).append(inputs[0].max())

    ceilings, hooks = [], []
    for site in sites:
        norm = cast("nn.BatchNorm2d", model.network.get_submodule(norms[site]))
        ceiling = Ceiling(norm.num_features).to(images.device)
        model.insert(site, ceiling)
        ceilings.append(ceiling)
        hooks.append(ceiling.register_forward_pre_hook(measure))
    try:
        logits = inference.logits(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    for ceiling in ceilings:
        ceiling.bound.fill_(torch.stack(largest[ceiling]).max())
    return nn.ModuleList(ceilings), logits


def _accuracy(logits: Tensor, images: ImageSet) -> float:
    return float((logits.argmax(1) == images.labels).double().mean())


def _values(bounds: list[nn.Parameter]) -> list[Tensor]:
    return [bound.detach().clone() for bound in bounds]
