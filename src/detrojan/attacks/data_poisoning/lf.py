"""LF: one smooth pattern, learned against a clean model and added to every image.

Source: Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective",
ICCV 2021 (arXiv 2104.03413): a universal perturbation (Moosavi-Dezfooli et al., CVPR 2017, arXiv
1610.08401) from targeted DeepFool steps (Moosavi-Dezfooli et al., CVPR 2016, arXiv 1511.04599), each
smoothed by a Gaussian. Settings are those of BackdoorBench's port, our reference, from which we depart:

- The pattern is stored as grey levels, and one without a nonzero level is an error. Some of the
  reference's published patterns hold levels / 255: added to 8-bit images they change nothing, and
  the attack is label noise.
- Levels are rounded. The reference truncates, which darkens the pattern by half a level on average.
- The pattern is added to pixels in [0, 1], and the model normalizes the sum. The reference shows the
  model pixels that are not normalized while learning, and adds the pattern to normalized ones to judge it.
- It is judged on the stamped images themselves, rounded and clipped, so that the rate which ends the
  learning is that of the finished trigger.
- It is judged on ``eval_per_class`` training images of each class that took no part in the learning. The
  reference means to use test images, which an attacker should not have, and by a slip uses one alone.
- The pattern stays as it is when an image needs no step. The reference smooths it once more, and
  divides by zero if that happens to the first image of all.
- Each DeepFool step is away from the class that leads there. The reference stays with the first leader:
  once a third class leads, its steps shrink to nothing where target and first leader meet, then double
  without end. On trained CIFAR-10 models ours took a median of 4 steps rather than 12 and lost as few
  images; on untrained models of 43 and 200 classes the reference's seldom arrives.
- The target is a number. The reference compares a target from the command line as text, which equals
  no class, and so every DeepFool run takes all its steps.
"""

import dataclasses
import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.attacks.base import Attack, LabelMode, LearnedTrigger, Trigger
from detrojan.images import ImageSet, to_float
from detrojan.learning import inference

logger = logging.getLogger(__name__)

TAPS = 30  # length of the Gaussian, pixels; the same for every image size, as in the reference
SETTLED_PASSES, SETTLED_SPAN = 5, 0.01  # learning ends when so many passes' fooling rates lie this close


class Lf(Attack):
    """Add a low-frequency pattern that only brightens, the same for every image."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE
    against_model: ClassVar[bool] = True
    # So many steps because an untrained model of 200 classes needs up to 320 to reach a given one.
    smoke: ClassVar[dict[str, object]] = {
        "num_images": 2,
        "max_passes": 1,
        "max_steps": 400,
        "eval_per_class": 1,
    }

    num_images: int = Field(100, ge=1, description="training images that the pattern is learned from")
    magnitude: float = Field(
        0.2, ge=0.004, le=1, description="largest value of the pattern, share of the full range"
    )
    fooling_rate: float = Field(
        0.2, gt=0, le=1, description="share of the clean model's predictions that must change"
    )
    max_passes: int = Field(50, ge=1, description="most passes over the images")
    max_steps: int = Field(200, ge=3, description="most DeepFool iterations for an image")
    overshoot: float = Field(0.02, ge=0, description="how far DeepFool goes beyond a boundary, relative")
    eval_per_class: int = Field(
        10, ge=1, description="training images per class that the pattern is judged on"
    )
    sigma: float = Field(6.0, gt=0, description="of the Gaussian, pixels")

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> LearnedTrigger:
        """Return ``pattern``, uint8 (3, H, W): what is added to each image, grey levels from 0.

        The history has the fooling rate after each pass. Findings are that of the finished pattern,
        the share of images of other classes that it takes to ``target``, and its L2 norm in [0, 1]
        pixels.

        Raises:
            ValueError: there is no model, no image is left to judge the pattern on, or no image
                gives a step towards the target, so that there is no pattern.
        """
        if model is None:
            raise ValueError("lf learns its pattern against a clean model, and was given none: hand one in")
        sample, judged = self._draw(clean, streams.child(rng, "images"))
        images, before = to_float(sample.images), _predict(model, sample).tolist()
        judged_before = _predict(model, judged)
        smooth = torch.zeros_like(images[0])
        history: list[dict[str, float]] = []
        for number in range(1, self.max_passes + 1):
            order = torch.randperm(len(images), generator=streams.child(rng, "pass", number))
            for row in order.tolist():
                smooth = self._improved(smooth, model, images[row], before[row], target)
            if not smooth.any():  # then the next pass would find none either
                raise ValueError(
                    f"no pattern: of {len(images)} images the model calls {before.count(target)} class "
                    f"{target} already, and none of the others gets there in fewer than {self.max_steps - 1} "
                    "DeepFool steps: choose another target, allow more steps or train the model longer"
                )
            pattern = smooth.mul(255).round().to(torch.uint8)
            stamped = dataclasses.replace(judged, images=self.apply(judged.images, {"pattern": pattern}))
            after = _predict(model, stamped)
            rate = float((after != judged_before).double().mean())
            history.append({"pass": number, "fooling_rate": rate})
            logger.info("pass %d/%d: %.1f %% of predictions change", number, self.max_passes, 100 * rate)
            if rate >= self.fooling_rate or _settled([row["fooling_rate"] for row in history]):
                break
        others = judged.labels != target
        findings = {
            "fooling_rate": rate,
            "fooling_rate_target": float((after[others] == target).double().mean()),
            "norm": float(pattern.double().div(255).norm()),
        }
        return LearnedTrigger(
            {"pattern": pattern}, history=history, findings=findings, weakness=self._weakness(rate)
        )

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return images plus pattern, uint8 (N, 3, H, W), clipped at 255."""
        return (images.int() + trigger["pattern"].int()).clamp(0, 255).to(torch.uint8)

    def _draw(self, clean: ImageSet, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        """Return images to learn from, of any class, and others to judge by, alike from each class."""
        order = torch.randperm(len(clean), generator=rng).to(clean.device)
        learn, rest = order[: self.num_images], order[self.num_images :]
        labels = clean.labels[rest]
        judge = [rest[labels == label][: self.eval_per_class] for label in range(clean.num_classes)]
        if not len(rest):
            raise ValueError(
                f"all {len(clean)} training images are learned from, and none is left to judge the "
                f"pattern on: lower num_images, which is {self.num_images}"
            )
        return clean[learn], clean[torch.cat(judge)]

    def _improved(self, smooth: Tensor, model: nn.Module, image: Tensor, before: int, target: int) -> Tensor:
        """Return the pattern, float (3, H, W), changed to take one image towards ``target`` if it must be.

        Args:
            smooth: the pattern so far.
            model: the clean model.
            image: float (3, H, W) in [0, 1], without the pattern.
            before: what the model calls it.
            target: what the attacker wants it called.
        """
        start = image + smooth
        with torch.no_grad():
            fooled = int(model(start[None]).argmax()) != before
        if fooled:
            return smooth
        step, num_steps = _deepfool(model, start, target, self.max_steps, self.overshoot)
        # The upper bound is the reference's: one that took the last two steps may not have arrived.
        if not 0 < num_steps < self.max_steps - 1:
            return smooth
        return _rescale(_blur(smooth + _blur(step, self.sigma), self.sigma), self.magnitude)

    def _weakness(self, rate: float) -> str | None:
        if rate >= self.fooling_rate:
            return None
        return (
            f"the pattern changes {100 * rate:.1f} % of the clean model's predictions, at least "
            f"{100 * self.fooling_rate:.1f} % were wanted: allow more passes, more images or a larger "
            "magnitude"
        )


def _predict(model: nn.Module, images: ImageSet) -> Tensor:
    """Return the class that the model gives each image, int64 (N,)."""
    return inference.logits(model, images).argmax(1)


def _settled(rates: list[float]) -> bool:
    """Return whether the last fooling rates hardly differ."""
    last = rates[-SETTLED_PASSES:]
    return len(last) == SETTLED_PASSES and max(last) - min(last) < SETTLED_SPAN


def _deepfool(
    model: nn.Module, image: Tensor, target: int, max_steps: int, overshoot: float
) -> tuple[Tensor, int]:
    """Return what takes ``image`` to the class ``target``, float (3, H, W), and the number of steps.

    Each step goes to where the target would overtake the class that leads, were the model linear.
    ``max_steps`` steps mean that the target was not reached.
    """
    moved = torch.zeros_like(image)
    for num_steps in range(max_steps):
        point = (image + (1 + overshoot) * moved).requires_grad_()
        logits = model(point[None])[0]
        leader = int(logits.argmax())
        if leader == target:
            return (1 + overshoot) * moved, num_steps
        gap = logits[leader] - logits[target]
        # Of the image alone: backward() would leave gradients in the model.
        (uphill,) = torch.autograd.grad(gap, point)
        step = -gap.detach() / uphill.square().sum() * uphill
        if not step.isfinite().all():  # the gradient vanishes here, and so in every step to come
            break
        moved += step
    return (1 + overshoot) * moved, max_steps


def _blur(pattern: Tensor, sigma: float) -> Tensor:
    """Return ``pattern``, float (3, H, W), under a Gaussian, each channel by itself.

    Beyond the edge is 0. The Gaussian has an even length: its middle is half a pixel below and to the
    right of the pixel that gets the mean.
    """
    distances = torch.arange(TAPS, device=pattern.device) - (TAPS - 1) / 2
    taps = torch.exp(-0.5 * (distances / sigma) ** 2)
    taps = taps / taps.sum()
    before, after = (TAPS - 1) // 2, TAPS // 2
    padded = F.pad(pattern, (before, after, before, after))
    return F.conv2d(padded[:, None], torch.outer(taps, taps)[None, None])[:, 0]


def _rescale(pattern: Tensor, magnitude: float) -> Tensor:
    """Return ``pattern``, float (3, H, W), stretched to run from 0 to ``magnitude`` over all channels.

    A constant one becomes 0.
    """
    low, high = pattern.min(), pattern.max()
    if low == high:
        return torch.zeros_like(pattern)
    return magnitude * ((pattern - low) / (high - low))
