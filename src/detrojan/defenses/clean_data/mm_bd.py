"""MM-BD: bound each channel's activation, as low as the clean images let it.

Source: the mitigation of Wang, Xiang, Miller, Kesidis, "MM-BD: Post-Training Detection of Backdoor
Attacks with Arbitrary Backdoor Pattern Types Using a Maximum Margin Statistic", IEEE S&P 2024
(arXiv 2205.06900): a trigger shows as activations larger than any that a clean image causes. As in the
survey's benchmark (arXiv 2411.11200), detection is left out and every model is mitigated. There the
bounds are taken off again before they are learned, so that its results are those of the untouched
model; here they act while they are learned, and stay.

The benchmark bounds every activation of the trunk, from each one's largest value on the clean images, and
moves a bound by at most 0.001 a step. With 200 images or fewer, that is 50 steps and a fall of 0.05: next
to nothing, which is that benchmark's choice. The authors' script bounds the trunk itself in three early
places, behind the stem and behind the first two stages, so that no shortcut goes round a bound; it starts
at 8, moves by 0.1, and uses the images that the model has right. A start of 8 is above all activations of
some networks; the bounds then fall, each by as much a step, until they meet the images.

Departures from both: bounds stay at 0 or above; accuracy is that on the images as they are, in eval mode,
and a loss of exactly ``max_drop`` is accepted, in whole images. Where all images are right at first, that
is the authors' rule that 95 % be right. Both return the last bounds, which may have cost accuracy, as the
norms' share of the loss can end in bounds of 0; ``keep_last_good`` returns the last that kept it. In gated
networks only activations of the trunk can be bounded; SiLU, GELU and hard-swish are bounded from above alone.
In transformers these are the activations of the multilayer perceptrons, where a channel is a hidden unit,
with one bound for all tokens. Where no sites are named, ``site_choice: early`` takes three early activations
in place of the authors' places; where blocks have shortcuts, these go round the last two.
"""

import copy
import functools
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan.defenses._parts import choices
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import Batch, DefenderSample, ImageSet, num_batches, passes
from detrojan.learning import inference, training
from detrojan.learning.training import Epoch, Part
from detrojan.models import Classifier
from detrojan.models._parts import places, structure
from detrojan.models._parts.insertions import Ceiling, TokenCeiling
from detrojan.settings import NO_AUGMENTATION


class MMBD(Defense):
    """Lower the bounds of activations while logits of clean images stay."""

    smoke: ClassVar[dict[str, object]] = {"epochs": 2}

    sites: list[str] = Field(
        [], description="names of the layers whose output is bounded; none: as site_choice says"
    )
    site_choice: Literal["every", "early"] = Field(
        "every",
        description="where no sites are named: every activation of the trunk, or three early ones",
    )
    start: float = Field(
        0, ge=0, description="first bounds; 0: the largest value of each site over the images"
    )
    epochs: int = Field(50, ge=1, description="passes over the clean images")
    min_steps: int = Field(
        0, ge=0, description="fewest optimizer steps; passes are added until they are taken; 0: none"
    )
    batch_size: int = Field(256, ge=2, description="images a step")
    augment: bool = Field(True, description="vary the images as training does")
    only_right: bool = Field(False, description="use only images that the model as it came has right")
    lr: float = Field(1e-3, gt=0, description="learning rate of Adam, constant, in units of activations")
    norm_weight: float = Field(0.5, gt=0, description="of the bounds' norms at first (paper: lambda)")
    norm_factor: float = Field(1.2, ge=1, description="raises that weight, or lowers it")
    adjust_at: list[float] = Field(
        [0.2, 0.4, 0.6, 0.8], description="shares of the run, after which that weight is changed"
    )
    max_drop: float = Field(
        0.05, ge=0, lt=1, description="largest drop of accuracy on the images at which it is raised"
    )
    keep_last_good: bool = Field(
        False, description="return the last bounds that kept the accuracy, not the last ones"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with bounded activations; its own tensors are as they were.

        Raises:
            NotApplicableError: as of :func:`insert_ceilings`, or no image may be learned from.
        """
        repaired, original = (copy.deepcopy(model).eval().requires_grad_(False) for _ in range(2))
        assert isinstance(repaired, Classifier)
        images = _right(original, clean.everything) if self.only_right else clean.everything
        sites = self.sites or self._find(repaired.network, images)
        ceilings, wanted = insert_ceilings(repaired, sites, images, self.start)
        initial = [float(bound.detach().max()) for bound in ceilings.parameters()]
        run = _Descent(self, repaired, ceilings, images, wanted, original if self.augment else None)
        run.descend(rng)
        if any(isinstance(ceiling, TokenCeiling) for ceiling in ceilings):
            clean.chosen["adapted"] = True  # neither paper nor benchmark has tokens
        clean.chosen.update(
            {
                "sites": sites,
                "epoch": run.returned,
                "num_judged": len(images),
                "allowed_errors": run.allowed,
                "train_accuracy": [run.right_before / len(images), run.right / len(images)],
                "norm_weight": run.weight,
                "initial_bounds": initial,
                "mean_bounds": [float(bound.detach().mean()) for bound in ceilings.parameters()],
            }
        )
        return repaired.requires_grad_(True)

    def _find(self, network: nn.Module, images: ImageSet) -> list[str]:
        find = places.early_activations if self.site_choice == "early" else structure.activations
        return [site.host for site in find(network, images.images)]


class _Descent:
    """The descent of the bounds.

    Attributes:
        weight: of the bounds' norms in the loss.
        right_before, right: images that are right without bounds, and with those that are returned.
        allowed: how many fewer may be right.
        returned: the pass whose bounds are returned, 0 being before the first.
    """

    def __init__(
        self,
        settings: MMBD,
        model: nn.Module,
        ceilings: nn.ModuleList,
        images: ImageSet,
        wanted: Tensor,
        original: nn.Module | None,
    ) -> None:
        """Take the model with ``ceilings`` in place.

        Args:
            settings: of the method.
            model: with the ceilings.
            ceilings: to lower.
            images: to learn and judge on.
            wanted: logits of ``images`` without bounds, (N, num_classes).
            original: gives such logits of images that were varied; None if they are not.
        """
        self.settings, self.model, self.ceilings, self.images = settings, model, ceilings, images
        self.bounds = list(ceilings.parameters())
        self.wanted, self.original = wanted, original
        self.weight = settings.norm_weight
        self.right_before = self.right = int((wanted.argmax(1) == images.labels).sum())
        self.allowed = choices.allowed_errors(settings.max_drop, len(images))
        batches = num_batches(len(images), settings.batch_size)
        self.epochs = passes(settings.epochs, settings.min_steps, batches)
        self.adjusting = {round(share * self.epochs) for share in settings.adjust_at}
        self.returned = 0

    def descend(self, rng: torch.Generator) -> None:
        """Lower the bounds, and leave those that are returned."""
        kept = self._values()

        def judge(epoch: Epoch) -> bool:
            nonlocal kept
            if self.settings.keep_last_good or epoch.epoch in self.adjusting:
                right = inference.num_right(self.model, self.images)
                good = choices.accepted(right, self.right_before, self.allowed)
                if epoch.epoch in self.adjusting:
                    self.weight *= self.settings.norm_factor if good else 1 / self.settings.norm_factor
                if self.settings.keep_last_good and good:
                    kept, self.returned, self.right = self._values(), epoch.epoch, right
            return False

        lr = self.settings.lr
        training.descend(
            {"ceilings": Part(self.ceilings, torch.optim.Adam(self.bounds, lr=lr), lambda _: lr)},
            self.images,
            self._objective,
            epochs=self.epochs,
            batch_size=self.settings.batch_size,
            rng=rng,
            augmentation=self.images.info.augmentation if self.original else NO_AUGMENTATION,
            after_step=self._keep_above_zero,
            after_epoch=judge,
        )
        if self.settings.keep_last_good:
            with torch.no_grad():
                for bound, value in zip(self.bounds, kept, strict=True):
                    bound.copy_(value)
        else:
            self.returned = self.epochs
            self.right = inference.num_right(self.model, self.images)

    def _objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.images)
        norms = torch.stack([torch.linalg.vector_norm(bound) for bound in self.bounds]).sum()
        loss = F.mse_loss(logits, self._wanted(batch)) + self.weight * norms
        return loss, (logits.detach().argmax(1) == batch.labels).sum()

    @torch.no_grad()
    def _wanted(self, batch: Batch) -> Tensor:
        """Return a batch's logits without bounds."""
        if self.original is None:
            return self.wanted[batch.rows]
        logits: Tensor = self.original(batch.images)
        return logits

    @torch.no_grad()
    def _keep_above_zero(self) -> None:
        for bound in self.bounds:
            bound.clamp_(min=0)

    def _values(self) -> list[Tensor]:
        return [bound.detach().clone() for bound in self.bounds]


def _right(model: nn.Module, images: ImageSet) -> ImageSet:
    """Return those of ``images`` that ``model`` has right.

    Raises:
        NotApplicableError: there are none.
    """
    right = inference.logits(model, images).argmax(1) == images.labels
    if not bool(right.any()):
        raise NotApplicableError("MM-BD learns from images that the model has right, and there are none")
    return images[right.nonzero()[:, 0]]


@torch.no_grad()
def insert_ceilings(
    model: Classifier, sites: list[str], images: ImageSet, start: float = 0
) -> tuple[nn.ModuleList, Tensor]:
    """Insert a ceiling behind each layer of ``sites``; return them, in that order, and logits without them.

    All channels of a site start at ``start``, or at 0 at the site's largest value over ``images``, so that
    the logits of these, (N, num_classes), are as before. One pass over the images yields both. Where that
    value is negative, behind a normalization say whose ReLU lets nothing through, they start at 0.

    Raises:
        NotApplicableError: ``sites`` is empty, or ``model`` lacks one; or puts out neither maps nor tokens
            there, or several.
    """
    modules = {name: module for name, module in model.network.named_modules() if name}
    # A container of layers in sequence would take its ceiling for one more of them.
    known = [site for site in sites if site in modules and not isinstance(modules[site], nn.Sequential)]
    if not sites or known != sites:
        what = ", ".join(site for site in sites if site not in known) or "activation that a layer alone feeds"
        raise NotApplicableError(
            f"MM-BD bounds maps behind single layers, but {model.build.architecture} has no {what}: name "
            "some of its layers in the setting sites of mm_bd"
        )
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}
    dimensions = structure.channel_dimensions(model.network, images.images)
    fresh: dict[str, tuple[type[Ceiling], int]] = {}

    def measure(site: str, _module: nn.Module, _inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        tokens = dimensions.get(site) == 2
        if not isinstance(maps, Tensor) or maps.dim() != (3 if tokens else 4):
            raise NotApplicableError(f"MM-BD bounds maps and tokens, and the layer {site} puts out none")
        dimension = dimensions.get(site, 1)  # of one that runs twice, which is refused, it isn't known
        fresh[site] = (Ceiling if dimension == 1 else TokenCeiling, maps.shape[dimension])
        seen[site].append(maps.max())

    hooks = [modules[site].register_forward_hook(functools.partial(measure, site)) for site in sites]
    try:
        logits = inference.logits(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    num_passes = math.ceil(len(images) / inference.BATCH_SIZE)
    ceilings = []
    for site in sites:
        if len(seen[site]) != num_passes:
            raise NotApplicableError(f"MM-BD bounds layers that run once, and {site} doesn't")
        kind, channels = fresh[site]
        ceiling = kind(channels).to(images.device)
        ceiling.bound.fill_(start or torch.stack(seen[site]).max().clamp(min=0))
        model.insert(site, ceiling)
        ceilings.append(ceiling)
    return nn.ModuleList(ceilings), logits
