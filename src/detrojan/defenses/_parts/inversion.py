"""Trigger inversion: for each class, a small mask and a pattern that send clean images to it.

Source: Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao, "Neural Cleanse: Identifying and Mitigating
Backdoor Attacks in Neural Networks", IEEE S&P 2019, Sec. IV and V, and its authors' code; settings of
the survey's benchmark (arXiv 2411.11200). A class whose mask is far smaller than the others' is
likely a backdoor's target.

All classes are searched at once, stacked in one batch: Adam works element by element, so one
optimizer over the stack equals one a class, and everything else that a class's search decides is
an element of a vector. A class that is done leaves the stack.

Departures from the benchmark:

- An epoch has as many steps as are needed for ``min_steps`` in all, going over the images more than
  once where they are few. There it takes one step, and 80 steps leave the masks large.
- The sample is cut to ``max_images``, balanced over the classes, and the epochs to ``max_steps``.
- Images aren't augmented, as in the paper. With few of them, a mask would count as good because one
  draw of crops was easy.
- An epoch's hit rate is the share of its images, not the mean over batches of different size.
- The trigger that is kept is the one that the last step of an epoch measured, and on that step's
  images too it must reach the hit rate. There it is the one after that step, a little smaller, which
  nobody has measured.
- A class that never reaches the hit rate keeps its last mask, as in the authors' code (the benchmark
  keeps the first), and is not flagged: what does not reach the class is no trigger of it.
- The median of an even number of norms is the mean of the middle two.
"""

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.defenses._parts.subsets import stratified
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError
from detrojan.images import (
    Batch,
    DatasetInfo,
    ImageSet,
    Loader,
    num_batches,
    to_device,
    to_float,
    to_uint8,
)
from detrojan.learning.meter import count_step
from detrojan.settings import NO_AUGMENTATION

# How many stamped images pass the network at once bounds the memory alone; sums over them round by it.
PIXELS = 2**19  # of images in a pass, at least: 512 of 32×32, 2 GiB in PreAct-ResNet-18
GPU_SHARE = 0.25  # of a GPU's memory that the maps of a pass may take: four jobs may share it
STAMPED_AT_ONCE = 512  # images, likewise
BETAS = (0.5, 0.9)  # of Adam, as the authors' code
RAISE, LOWER = 2.0, 2.0**1.5  # factors of the mask's weight, likewise
STALLED = 0.99  # a norm above this share of the best so far is no progress, likewise
CONSISTENCY = 1.4826  # makes the median absolute deviation of normal values their standard deviation


class TriggerInversion(Defense):
    """Hyperparameters of the search, as in the benchmark but for the bounds on steps and images."""

    inversion_epochs: int = Field(80, ge=1, description="epochs of the search for triggers, at most")
    inversion_batch_size: int = Field(256, ge=2, description="images a step of the search, for each class")
    inversion_lr: float = Field(0.1, gt=0, description="learning rate of the search's Adam")
    hit_rate: float = Field(0.98, ge=0, le=1, description="share of stamped images that should get the class")
    mask_weight: float = Field(1e-3, gt=0, description="weight of the mask's L1 norm in the loss, at first")
    weight_patience: int = Field(
        5, ge=1, description="epochs in a row at or below the hit rate that change the weight"
    )
    stop_patience: int = Field(
        25, ge=1, description="epochs without a clearly smaller mask that end a search"
    )
    # As many as 1,000 images, CIFAR-10's at SPC 100, get in 80 epochs. Measured on a narrow PreAct-ResNet-18
    # with BadNets (GTSRB's ten largest classes, SPC 2): the target's anomaly index is 1.9 after 80 steps,
    # 2.7 after 320 and 2.7 after 640, its mask 1.7, 0.7 and 0.7 pixels.
    min_steps: int = Field(320, ge=1, description="steps of a search that runs all epochs, at least")
    max_steps: int = Field(2000, ge=1, description="steps of a search, at most")
    max_images: int = Field(1000, ge=1, description="clean images that the search uses, at most")
    anomaly_threshold: float = Field(
        2.0, gt=0, description="anomaly index above which a class with a small mask is flagged"
    )

    def invert(self, model: nn.Module, images: ImageSet, *, rng: torch.Generator) -> "Triggers":
        """Return the trigger of every class of ``model`` that clean ``images`` give away."""
        return search(model, images, torch.arange(images.num_classes), self, rng=rng)


@dataclasses.dataclass(frozen=True)
class Triggers:
    """One trigger a class, all that a search found.

    Attributes:
        masks: float (C, 1, H, W) in [0, 1], how far a pixel is replaced.
        patterns: float (C, 3, H, W) in [0, 1], by what.
        norms: of the masks, L1, pixels, float64 (C,) on the CPU.
        hit_rates: share of the images searched with that get the class once they are stamped, in 8
            bits, likewise.
        reached: whether the search reached its hit rate at all, bool (C,), on the CPU.
        num_images: how many images were searched with.
        num_steps: how many steps the longest search took.
        capped: whether a bound on images or steps cut the search short.
    """

    masks: Tensor
    patterns: Tensor
    norms: Tensor
    hit_rates: Tensor
    reached: Tensor
    num_images: int
    num_steps: int
    capped: bool

    def stamp(self, images: ImageSet, label: int) -> ImageSet:
        """Return ``images`` with the trigger of class ``label``; their labels stay."""
        return stamp(images, self.masks, self.patterns, torch.full_like(images.labels, label))

    def flagged(self, threshold: float) -> list[int]:
        """Return the classes whose mask is abnormally small, the smallest first."""
        small = (self.norms <= self.norms.quantile(0.5)) & (anomaly_index(self.norms) > threshold)
        return [label for label in self.norms.argsort().tolist() if small[label] and self.reached[label]]

    def smallest(self) -> int:
        """Return the class with the smallest mask among those that reached the hit rate, if any did."""
        among = self.reached if self.reached.any() else torch.ones_like(self.reached)
        return int(self.norms.where(among, torch.tensor(math.inf)).argmin())

    def summary(self, threshold: float) -> dict[str, object]:
        """Return what a record of choices should hold, as plain values; lists are by class."""
        return {
            "flagged": self.flagged(threshold),
            "anomaly_index": _rounded(anomaly_index(self.norms)),
            "mask_norm": _rounded(self.norms),
            "hit_rate": _rounded(self.hit_rates),
            "search_reached": self.reached.tolist(),
            "search_images": self.num_images,
            "search_steps": self.num_steps,
            "search_capped": self.capped,
        }


def stamp(images: ImageSet, masks: Tensor, patterns: Tensor, members: Tensor) -> ImageSet:
    """Return ``images`` with triggers, rounded to 8 bits as any image is; their labels stay.

    Args:
        images: to stamp copies of.
        masks: float (K, 1, H, W) in [0, 1].
        patterns: float (K, 3, H, W) in [0, 1].
        members: which of the K triggers each image gets, int64 (N,).
    """
    batches = (torch.split(part, STAMPED_AT_ONCE) for part in (images.images, members))
    stamped = [
        to_uint8(_blend(to_float(batch), masks[chosen], patterns[chosen]))
        for batch, chosen in zip(*batches, strict=True)
    ]
    return dataclasses.replace(images, images=torch.cat(stamped))


def anomaly_index(norms: Tensor) -> Tensor:
    """Return how many deviations each of ``norms``, (C,), lies off their median, on either side.

    The deviation is the median absolute one, scaled to that of a normal distribution. Where it is 0,
    more than half of the norms being equal, so is every index: there is nothing to measure by.
    """
    distance = (norms - norms.quantile(0.5)).abs()
    deviation = CONSISTENCY * distance.quantile(0.5)
    return torch.where(deviation > 0, distance / deviation, torch.zeros_like(distance))


def search(
    model: nn.Module, images: ImageSet, classes: Tensor, settings: TriggerInversion, *, rng: torch.Generator
) -> Triggers:
    """Return the triggers of ``classes``, int64 (C,), in their order; ``model`` stays as it was.

    Each minimizes the cross-entropy of stamped images against its class, plus the L1 norm of its mask
    times a weight that follows the hit rate (:class:`Schedule`). Equal generators give a class equal
    batches whatever classes are searched beside it.

    Raises:
        DivergedError: a loss is not finite.
    """
    used = images
    if len(images) > settings.max_images:
        used = images[stratified(images.labels, settings.max_images, streams.child(rng, "images"))]
    steps, total = _length(len(used), settings)
    loader = Loader(used, settings.inversion_batch_size, NO_AUGMENTATION)
    stack = _Stack(model, classes.to(images.device), images.info, settings.inversion_lr)
    schedule = Schedule(len(classes), settings, images.device)
    best_masks, best_patterns = stack.triggers()
    running, num_epochs, num_steps = torch.arange(len(classes), device=images.device), 0, 0
    while len(running) and num_steps < total:
        totals = torch.zeros(3, len(classes), device=images.device)  # hits, norms, losses
        count = 0
        left = min(steps, total - num_steps)
        for batch in itertools.islice(_endless(loader, streams.child(rng, "epoch", num_epochs)), left):
            masks, patterns = stack.triggers()
            hits, losses = stack.step(batch.images, running, schedule.weight)
            totals += torch.stack([hits, masks.sum((1, 2, 3)), losses])
            count += len(batch.rows)
        last_rates = hits / len(batch.rows)
        improved = schedule.update(totals[0] / count, totals[1] / left, last_rates=last_rates)
        num_epochs, num_steps = num_epochs + 1, num_steps + left
        kept = (improved | schedule.best.isinf()).view(-1, 1, 1, 1)
        best_masks = torch.where(kept, masks, best_masks)
        best_patterns = torch.where(kept, patterns, best_patterns)
        # The one look at the device an epoch. What a finished class still does in the optimizer is
        # kept no more and costs no pass.
        finished, finite = torch.stack([schedule.finished, totals[2].isfinite()]).cpu()
        if not finite.all():
            raise DivergedError(
                "a loss of the search for triggers is not finite: the model's logits overflow"
            )
        running = to_device((~finished).nonzero()[:, 0], images.device)
    return Triggers(
        best_masks,
        best_patterns,
        norms=best_masks.double().sum((1, 2, 3)).cpu(),
        hit_rates=stack.hit_rates(used, best_masks, best_patterns).cpu(),
        reached=schedule.best.isfinite().cpu(),
        num_images=len(used),
        num_steps=num_steps,
        capped=total < steps * settings.inversion_epochs or len(used) < len(images),
    )


def _length(num_images: int, settings: TriggerInversion) -> tuple[int, int]:
    """Return how many steps an epoch has, and how many a search has at most, in all its epochs.

    Where the cap cuts an epoch, the last one is shorter.
    """
    one_pass = num_batches(num_images, settings.inversion_batch_size)
    steps = max(one_pass, math.ceil(settings.min_steps / settings.inversion_epochs))
    return steps, min(steps * settings.inversion_epochs, settings.max_steps)


class _Stack:
    """The triggers of several classes, descended together on one frozen copy of a model."""

    def __init__(self, model: nn.Module, classes: Tensor, info: DatasetInfo, lr: float) -> None:
        self._model = copy.deepcopy(model).eval().requires_grad_(False)  # gradients reach the triggers alone
        self._classes = classes
        shape, device = (info.height, info.width), classes.device
        self._masks = torch.ones(len(classes), 1, *shape, device=device, requires_grad=True)
        self._patterns = torch.ones(len(classes), 3, *shape, device=device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self._masks, self._patterns], lr=lr, betas=BETAS)
        self._at_once = images_at_once(self._model, shape, device)

    def triggers(self) -> tuple[Tensor, Tensor]:
        """Return the masks (C, 1, H, W) and patterns (C, 3, H, W) as they are, in [0, 1], detached."""
        return _squash(self._masks.detach()), _squash(self._patterns.detach())

    def step(self, images: Tensor, running: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step; return hits and losses before it, (C,), those not running having 0.

        A hit is an image that got the class.

        Args:
            images: float (N, 3, H, W) in [0, 1].
            running: places of the classes that still descend, int64.
            weight: of each mask's norm, (C,).
        """
        hits, losses = torch.zeros(2, len(self._classes), device=images.device)
        self._optimizer.zero_grad(set_to_none=True)
        for some, part in _parts(running, images, self._at_once):
            masks, patterns = _squash(self._masks[some]), _squash(self._patterns[some])
            wanted = self._classes[some].repeat_interleave(len(part))
            logits = self._model(_blend(part, masks[:, None], patterns[:, None]).flatten(0, 1))
            entropies = F.cross_entropy(logits, wanted, reduction="none").view(len(some), -1).sum(1)
            # The norm belongs to a step once, in however many parts its images come.
            penalties = weight[some] * masks.sum((1, 2, 3)) * len(part)
            loss = (entropies + penalties) / len(images)
            loss.sum().backward()  # type: ignore[no-untyped-call]
            losses[some] += loss.detach()
            hits[some] += (logits.detach().argmax(1) == wanted).view(len(some), -1).sum(1)
        self._optimizer.step()
        count_step(len(images))
        return hits, losses

    @torch.inference_mode()
    def hit_rates(self, images: ImageSet, masks: Tensor, patterns: Tensor) -> Tensor:
        """Return the share of ``images`` that get each class once stamped, in 8 bits, float64 (C,)."""
        hits = torch.zeros(len(self._classes), dtype=torch.float64, device=images.device)
        classes = torch.arange(len(hits), device=images.device)
        for some, part in _parts(classes, images.images, self._at_once):
            stamped = _blend(to_float(part), masks[some, None], patterns[some, None]).flatten(0, 1)
            logits = self._model(to_float(to_uint8(stamped)))
            hits[some] += (logits.argmax(1).view(len(some), -1) == self._classes[some, None]).sum(1)
        return hits / len(images)


class Schedule:
    """What each class's search decides after an epoch, all classes at once.

    The weight of the mask's norm doubles after ``weight_patience`` epochs in a row at the hit rate
    and falls by 2^1.5 after as many below it. A search ends once ``stop_patience`` epochs in a row
    brought no clearly smaller mask and the weight has gone both ways.

    Attributes:
        weight: of the mask's norm in the loss, (C,).
        best: the smallest mean norm of an epoch at the hit rate, (C,); infinite before the first.
        finished: bool (C,).
    """

    def __init__(self, count: int, settings: TriggerInversion, device: torch.device) -> None:
        self._settings = settings
        self.weight = torch.full((count,), settings.mask_weight, device=device)
        self.best = torch.full_like(self.weight, math.inf)
        self.finished = torch.zeros(count, dtype=torch.bool, device=device)
        self._raised, self._lowered = torch.zeros_like(self.finished), torch.zeros_like(self.finished)
        self._above, self._below, self._stalled = torch.zeros(3, count, dtype=torch.int64, device=device)

    def update(self, rates: Tensor, norms: Tensor, *, last_rates: Tensor) -> Tensor:
        """Take in an epoch; return where its last trigger is a new best one.

        Args:
            rates: share of the epoch's images that got the class, (C,).
            norms: mean norm of the masks over the epoch's steps, (C,).
            last_rates: share of the last step's images that got the class, (C,).
        """
        settings = self._settings
        enough = rates >= settings.hit_rate
        improved = enough & (last_rates >= settings.hit_rate) & (norms < self.best)
        before, self.best = self.best, torch.where(improved, norms, self.best)
        stands_still = self.best.isfinite() & (self.best >= STALLED * before)
        self._stalled = (self._stalled + 1) * stands_still
        self.finished = self.finished | (
            (self._stalled >= settings.stop_patience) & self._raised & self._lowered
        )
        self._above, self._below = (self._above + 1) * enough, (self._below + 1) * ~enough
        raising, lowering = (streak >= settings.weight_patience for streak in (self._above, self._below))
        self.weight = torch.where(raising, self.weight * RAISE, self.weight)
        self.weight = torch.where(lowering, self.weight / LOWER, self.weight)
        self._above, self._below = self._above * ~raising, self._below * ~lowering
        self._raised, self._lowered = self._raised | raising, self._lowered | lowering
        return improved


def _squash(free: Tensor) -> Tensor:
    """Return values in (0, 1) of unbounded ones; a start of 1 becomes 0.88."""
    return free.tanh() / (2 + 1e-7) + 0.5


def _blend(images: Tensor, masks: Tensor, patterns: Tensor) -> Tensor:
    return (1 - masks) * images + masks * patterns


def _endless(loader: Loader, rng: torch.Generator) -> Iterator[Batch]:
    """Yield the batches of one pass after another."""
    while True:
        yield from loader.epoch(rng)


def images_at_once(model: nn.Module, shape: tuple[int, int], device: torch.device) -> int:
    """Return how many stamped images of ``shape`` pass a model together.

    A GPU with few images waits for launched kernels, so there as many as a share of its memory holds. That
    is the memory that it has, not what is free: the bits would depend on what else runs there.
    """
    least = max(1, PIXELS // math.prod(shape))
    if device.type != "cuda":
        return least
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(least, int(GPU_SHARE * memory / map_bytes(model, shape, device)))


@torch.no_grad()
def map_bytes(model: nn.Module, shape: tuple[int, int], device: torch.device) -> int:
    """Return the size of all that the layers of a model make of one image of ``shape``, bytes."""
    sizes: list[int] = []

    def count(_layer: nn.Module, _inputs: object, output: object) -> None:
        sizes.extend(
            part.numel() * part.element_size()
            for part in (output if isinstance(output, (list, tuple)) else [output])
            if isinstance(part, Tensor)
        )

    layers = [layer for layer in model.modules() if not list(layer.children())]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        model(torch.zeros(1, 3, *shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, sum(sizes))


def _parts(classes: Tensor, images: Tensor, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each pair of a class and an image once, in groups of some classes and some images."""
    for part in torch.split(images, at_once):
        for some in torch.split(classes, max(1, at_once // len(part))):
            yield some, part


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
