"""FP: Fine-Pruning, drop the channels that clean images leave most idle, then fine-tune.

Source: Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks", RAID 2018 (arXiv 1805.12185); steps, tolerance and fine-tuning of the survey's benchmark
(arXiv 2411.11200). The paper prunes one channel at a time and tolerates a drop of about 4 %.
Departures from that benchmark, whose sweep has slips: the last mask *within* the tolerance is kept,
not the first beyond it, and a loss of exactly the tolerance is within it, counted in whole images
(there shares of floating point decide, so a tie counts from some accuracies and not from others); at
step k, k features are masked, not k - 1; a gain in accuracy never stops the sweep; and images that judge
are not augmented, so the points of the sweep are comparable. As there, features are ranked by their
signed mean. Nothing is fitted to the labels before the sweep, so all clean images may judge it: ten
validation images say little of a loss of a twenty-fifth.

What it can't do: in narrow networks the trigger raises channels that clean images use too. Then the
accuracy is gone before the backdoor, however far pruning may go, and fine-tuning on clean images, which the
backdoor does not disturb, has no reason to undo it.
"""

import copy
import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from detrojan.defenses._parts import choices
from detrojan.defenses.base import FineTuning
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample, ImageSet
from detrojan.learning import inference, training
from detrojan.models import Classifier
from detrojan.models._parts import places

SWEEP_ELEMENTS = 2**24  # masked feature values held at once, which bounds the memory of the sweep


class FP(FineTuning):
    """Prune the channels that feed the head in order of rising mean activation, then fine-tune.

    They are the last convolution's, or, where a layer normalization stands behind the blocks as in
    transformers, what that puts out.
    """

    min_spc: ClassVar[int] = 2
    smoke: ClassVar[dict[str, object]] = {"epochs": 2}

    step: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of the channels pruned from point to point; 0: one channel",
    )
    tolerance: float = Field(
        0.1, ge=0, lt=1, description="largest relative drop of accuracy, on the images that judge"
    )
    judge_on: Literal["validation", "all"] = Field(
        "validation", description="the clean images that judge how far pruning may go"
    )

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a pruned and fine-tuned copy of ``model``; pruned columns stay exactly zero.

        Raises:
            NotApplicableError: there is no convolution, or no linear layer between features and logits.
        """
        repaired = copy.deepcopy(model).eval()
        head = _prunable(repaired, clean.train)
        linear, groups = _first(repaired, head), head.channels
        activity = _features(repaired, head, clean.train).mean(0).view(groups, -1).mean(1)
        order = activity.argsort(stable=True)
        judges = clean.everything if self.judge_on == "all" else clean.validation
        right = _sweep(repaired, head, judges, order, self._step(groups))
        allowed = choices.allowed_errors(self.tolerance, right[0])
        accepted = choices.last_accepted(right, allowed)
        num_pruned = min(accepted * self._step(groups), math.floor(0.99 * groups))
        clean.chosen.update(
            {
                "num_pruned": num_pruned,
                "num_channels": groups,
                "num_judged": len(judges),
                "allowed_errors": allowed,
                "accuracy": [right[0] / len(judges), right[accepted] / len(judges)],
            }
        )
        if _unfed(repaired):
            clean.chosen["unit"] = "feature"
        keep = torch.ones(groups, device=order.device)
        keep[order[:num_pruned]] = 0
        columns = keep.repeat_interleave(linear.in_features // groups)

        @torch.no_grad()
        def prune() -> None:
            linear.weight.mul_(columns)

        prune()
        training.fit(
            repaired,
            clean.train,
            self.tuning(len(clean.train)),
            rng=rng,
            augmentation=clean.train.info.augmentation,
            after_step=prune,
        )
        return repaired

    def _step(self, groups: int) -> int:
        return max(1, math.ceil(self.step * groups))


def _prunable(model: nn.Module, images: ImageSet) -> places.Head:
    """Return the head of ``model``, whose channels can be pruned.

    Where pooling keeps several positions (VGG: 7×7), a channel is that many neighbouring columns,
    and its activity their mean: a channel of the last convolution goes as a whole.
    """
    assert isinstance(model, Classifier)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise NotApplicableError("FP needs convolutions and a head with a linear layer")
    return places.head(model.network, images.images)


def _unfed(model: nn.Module) -> bool:
    """Return whether no convolution feeds the head, as in networks of layer normalization: features go."""
    kinds = {type(module) for module in model.modules()}
    return any(issubclass(k, nn.LayerNorm) for k in kinds) and not any(
        issubclass(k, nn.BatchNorm2d) for k in kinds
    )


def _first(model: nn.Module, head: places.Head) -> nn.Linear:
    """Return the layer of the head that reads the features."""
    assert isinstance(model, Classifier)
    linear = model.network.get_submodule(head.layers[0])
    assert isinstance(linear, nn.Linear)
    return linear


def _features(model: nn.Module, head: places.Head, images: ImageSet) -> Tensor:
    """Return what the first layer of ``head`` reads, (N, D); the mode of ``model`` is the caller's."""
    seen: list[Tensor] = []
    linear = _first(model, head)
    hook = linear.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        inference.logits(model, images)
    finally:
        hook.remove()
    return torch.cat(seen)


@torch.inference_mode()
def _sweep(model: nn.Module, head: places.Head, images: ImageSet, order: Tensor, step: int) -> list[int]:
    """Return how many ``images`` are right with the first 0, step, 2 step, ... channels of ``order`` masked.

    Setting input columns of the head's first layer to zero is setting those features to zero, so the
    backbone runs once and only the head sees each mask.
    """
    features = _features(model, head, images)
    groups = len(order)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(groups, device=order.device)
    column_rank = rank.repeat_interleave(features.shape[1] // groups)
    right: list[int] = []
    points = torch.arange(0, groups, step, device=order.device)
    for some in torch.split(points, max(1, SWEEP_ELEMENTS // features.numel())):
        masked = features * (column_rank >= some[:, None, None])
        predicted = head.logits(masked.flatten(0, 1)).argmax(1).view(len(some), -1)
        right += (predicted == images.labels).sum(1).tolist()
    return right
