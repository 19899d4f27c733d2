"""Input-aware backdoor (IAB): a pattern and a place of its own for every image.

Source: Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020 (arXiv 2010.08138), with the
settings of the authors' release and of BackdoorBench. One generator says where an image is changed
(the mask), another to what (the pattern). Cross images, which carry the trigger of another image,
keep their labels, so that a trigger works on its own image only.

The mask is learned first, from the images alone: that is this attack's trigger stage, which all
architectures and ratios share. The pattern learns with the classifier. The classifier's epochs are
those of ``training``; the release counts its 25 of the mask among the 100 (``config/survey.yaml``
has 75).

Departures from BackdoorBench's port: tanh is applied once, so patterns reach black and white; the
pattern's gradients are cleared at each step (there, and in the release, Adam gets the sum of all
gradients so far); the number of images of a batch is drawn where it is fractional, not floored, and
the diversity term is left out of a batch without triggered images; an image's partner is drawn at
random and not from a second shuffled pass; triggered test images are rounded and not truncated. The
schedule of the mask keeps its milestones at 2/5 and 4/5 of the epochs.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from detrojan import rng as streams
from detrojan.attacks.base import LabelMode, LearnedTrigger, Trigger, in_batches, restored
from detrojan.attacks.training_control.base import TrainingControlledAttack
from detrojan.images import Batch, ImageSet, Loader, to_float, to_uint8
from detrojan.labels import LabelMap
from detrojan.learning.on_the_fly import Poisoner
from detrojan.learning.training import Part, descend
from detrojan.settings import Augmentation

EPSILON = 1e-7
WIDTHS = (32, 64, 128)  # channels of the generator's three scales
FAR_OFF = 4  # masks this many times sparser or denser than wanted are reported


class Iab(TrainingControlledAttack):
    """Change a few pixels of each image, where and how two generators say."""

    label_mode: ClassVar[LabelMode] = LabelMode.ALL_TO_ONE
    side_multiple: ClassVar[int] = 8  # the generators halve the maps three times
    smoke: ClassVar[dict[str, object]] = {"mask_epochs": 1, "mask_batch_size": 8, "max_images": 16}

    mask_epochs: int = Field(25, ge=1, description="passes over the images that train the mask")
    mask_batch_size: int = Field(128, ge=2, description="images a step of the mask")
    max_images: int | None = Field(None, ge=2, description="train the mask on at most so many images")
    lr: float = Field(0.01, gt=0, description="learning rate of Adam, for both generators")
    density: float = Field(0.032, gt=0, lt=1, description="share of the pixels that a mask may cover")
    density_weight: float = Field(100.0, ge=0, description="of what a mask covers beyond that")
    diversity_weight: float = Field(1.0, ge=0, description="of masks and patterns being alike")

    def learn_trigger(
        self, clean: ImageSet, model: nn.Module | None = None, *, target: int = 0, rng: torch.Generator
    ) -> LearnedTrigger:
        """Return the mask generator's tensors, ``mask.*``, and ``mean`` and ``std`` of its inputs."""
        info, device = clean.info, clean.device
        if self.max_images is not None:
            chosen = torch.randperm(len(clean), generator=streams.child(rng, "images"))
            clean = clean[chosen[: self.max_images].to(device)]
        mask = self._mask_generator(rng).to(device)
        scale = _Scale(info.mean, info.std, device)
        partners = Loader(clean, self.mask_batch_size, info.augmentation)
        pairs = streams.child(rng, "pairs")

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            first = scale(batch.images)
            second = scale(partners.any(len(batch.rows), pairs).images)
            masks, others = _threshold(mask(first)), _threshold(mask(second))
            excess = F.relu(masks - self.density).mean()
            value = self.density_weight * excess + self.diversity_weight * _alike(
                first, second, masks, others
            )
            return value, masks.mean((1, 2, 3)).sum()

        def lr_at(epoch: int) -> float:
            return self.lr * 0.1 ** sum(5 * epoch >= part * self.mask_epochs for part in (2, 4))

        epochs = descend(
            {"mask": Part(mask, self._adam(mask), lr_at)},
            clean,
            objective,
            epochs=self.mask_epochs,
            batch_size=self.mask_batch_size,
            rng=rng,
            augmentation=info.augmentation,
        )
        tensors = {f"mask.{name}": value for name, value in mask.state_dict().items()} | scale.tensors
        found = self._covered(clean, tensors)
        return LearnedTrigger(
            tensors,
            history=[{"epoch": e.epoch, "loss": e.loss, "density": e.accuracy} for e in epochs],
            findings={"density": found},
            weakness=self._weakness(found),
        )

    def _covered(self, images: ImageSet, trigger: Trigger) -> float:
        """Return the share of the pixels of some ``images`` that their masks cover."""
        some = images.images[:512]
        mask, scale = _restored(trigger, "mask", 1), _Scale.restored(trigger)

        def covered(part: Tensor) -> Tensor:
            return _threshold(mask(scale(to_float(part)))).mean((1, 2, 3))

        return float(in_batches(covered, some).mean())

    def _weakness(self, density: float) -> str | None:
        """Return what is wrong with masks that are all but empty, or far from sparse; None if nothing is."""
        if self.density / FAR_OFF <= density <= self.density * FAR_OFF:
            return None
        what, weight = ("hardly anything", "smaller") if density < self.density else ("too much", "larger")
        return (
            f"the masks cover {density:.2%} of the pixels, {what}, where {self.density:.2%} were wanted: "
            f"train them longer (mask_epochs) or with a {weight} density_weight"
        )

    def _mask_generator(self, rng: torch.Generator) -> "Generator":
        with streams.global_stream(streams.child(rng, "mask")):
            return Generator(1)

    def _adam(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.5, 0.9))

    def apply(self, images: Tensor, trigger: Trigger) -> Tensor:
        """Return copies of ``images``, uint8 (N, 3, H, W), each with the pattern of its own, rounded."""
        mask, pattern = _restored(trigger, "mask", 1), _restored(trigger, "pattern", 3)
        scale = _Scale.restored(trigger)

        def stamped(part: Tensor) -> Tensor:
            pixels = to_float(part)
            inputs = scale(pixels)
            return to_uint8(_blend(pixels, pattern(inputs), _threshold(mask(inputs))))

        return in_batches(stamped, images)

    def poisoner(
        self, trigger: Trigger, images: ImageSet, labels: LabelMap, *, rng: torch.Generator
    ) -> "Blender":
        """Return the attack at work; the pattern generator learns with the classifier."""
        with streams.global_stream(streams.child(rng, "pattern")):
            pattern = Generator(3).to(images.device)
        part = Part(pattern, self._adam(pattern), lambda epoch: self.lr)
        return Blender(self.diversity_weight, trigger, images, labels, part)


class Blender(Poisoner):
    """Composes batches of triggered, cross and clean images, all augmented before."""

    def __init__(
        self, diversity_weight: float, trigger: Trigger, images: ImageSet, labels: LabelMap, pattern: Part
    ) -> None:
        self.parts: Mapping[str, Part] = {"pattern": pattern}
        self.augmentation: Augmentation = images.info.augmentation
        self._diversity_weight = diversity_weight
        self._given = {name: value.to(images.device) for name, value in trigger.items()}
        self._mask = _restored(self._given, "mask", 1)
        self._pattern = pattern.network
        self._scale = _Scale.restored(self._given)
        self._others = Loader(images, 1, images.info.augmentation)
        self._labels = labels
        self._num_classes = images.num_classes

    def poison(self, batch: Batch, count: int, *, rng: torch.Generator) -> Batch:
        """Return the batch: ``count`` triggered images, as many cross images, and clean ones."""
        count = min(count, len(batch.rows) // 2)
        if not count:
            return batch
        triggered, crossed = batch.images[:count], batch.images[count : 2 * count]
        own = self._scale(triggered)
        foreign = self._scale(self._others.any(count, rng).images)
        patterns, others = self._pattern(own), self._pattern(foreign)
        with torch.no_grad():
            masks, other_masks = _threshold(self._mask(own)), _threshold(self._mask(foreign))
        changed = [_blend(triggered, patterns, masks), _blend(crossed, others, other_masks)]
        images = torch.cat([*changed, batch.images[2 * count :]])
        labels = batch.labels.clone()
        labels[:count] = self._labels.attacked(labels[:count], self._num_classes)
        alike = _alike(own, foreign, self._scale(patterns), self._scale(others))
        return dataclasses.replace(
            batch, images=images, labels=labels, num_poisoned=count, penalty=self._diversity_weight * alike
        )

    def trigger(self) -> Trigger:
        """Return both generators' tensors, ``mask.*`` and ``pattern.*``, and their inputs' scale."""
        learned = {f"pattern.{name}": value for name, value in self._pattern.state_dict().items()}
        return {name: value.detach().cpu().clone() for name, value in (self._given | learned).items()}


class Generator(nn.Module):
    """Maps normalized images (N, 3, H, W) to (N, channels, H, W) in [0, 1]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for wider in WIDTHS:
            layers += [*_block(width, wider), *_block(wider, wider), nn.MaxPool2d(2)]
            width = wider
        layers += _block(width, width)
        for narrower in (*reversed(WIDTHS[:-1]), channels):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(width, width)]
            layers += _block(width, narrower)
            width = narrower
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU after the last normalization

    def forward(self, images: Tensor) -> Tensor:
        """Return values in [0, 1]."""
        return _squash(self.layers(images))


def _block(channels_in: int, channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, 3, padding=1),
        nn.BatchNorm2d(channels, momentum=0.05),
        nn.ReLU(),
    ]


class _Scale:
    """Normalizes pixels in [0, 1] as the classifiers do; the generators' inputs."""

    def __init__(
        self, mean: tuple[float, ...] | Tensor, std: tuple[float, ...] | Tensor, device: torch.device
    ) -> None:
        self.tensors = {
            "mean": torch.as_tensor(mean, dtype=torch.float32, device=device),
            "std": torch.as_tensor(std, dtype=torch.float32, device=device),
        }

    @classmethod
    def restored(cls, trigger: Trigger) -> "_Scale":
        return cls(trigger["mean"], trigger["std"], trigger["mean"].device)

    def __call__(self, images: Tensor) -> Tensor:
        mean, std = (self.tensors[name].view(1, 3, 1, 1) for name in ("mean", "std"))
        # Batches come channels_last, which is not safe on a CPU: see detrojan.models.base.memory_format.
        return ((images - mean) / std).contiguous()


def _restored(trigger: Trigger, name: str, channels: int) -> nn.Module:
    """Return one of the two generators from the trigger's tensors."""
    return restored(lambda: Generator(channels), trigger, name)


def _squash(values: Tensor) -> Tensor:
    return values.tanh() / (2 + EPSILON) + 0.5


def _threshold(masks: Tensor) -> Tensor:
    """Return ``masks`` in [0, 1] driven to its ends: 0.3 to 3e-4, 0.7 to 0.9997."""
    return _squash(20 * masks - 10)


def _blend(images: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    """Return ``images`` in [0, 1] with ``patterns`` in their place where ``masks`` are 1."""
    return images + (patterns - images) * masks


def _alike(first: Tensor, second: Tensor, made: Tensor, other: Tensor) -> Tensor:
    """Return how much more alike what was made is than what it was made from, mean over the pairs.

    The diversity loss of the paper (Sec. 3.3): ratio of root mean square distances.
    """
    return (_distance(first, second) / (_distance(made, other) + EPSILON)).mean()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Return root mean square differences, (N,)."""
    # Two masks may be equal to the last bit, where the root has no derivative.
    return (first - second).square().mean((1, 2, 3)).clamp(min=EPSILON**2).sqrt()
