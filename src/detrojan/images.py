"""Images on the device: sets, the defender's sample, and augmented batches.

A whole data set lies on the device as one uint8 tensor. Batches are indexed, augmented and made
float there, all images of a batch at once and each with randomness of its own.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from detrojan.settings import Augmentation


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What belongs to a data set as a whole.

    Attributes:
        height, width: of each image, pixels.
        classes: the name of each label, in order.
        mean, std: per channel (RGB), of training pixels in [0, 1]; the model's first layer uses them.
        augmentation: what training on this data set, in attacks and defenses alike, applies.
        digest: of the source's pixels and labels.
    """

    height: int
    width: int
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        images: uint8 (N, 3, H, W), 0 to 255.
        labels: int64 (N,), what a classifier should learn or an attacker wants to see.
        index: int64 (N,), the image's row in the data set that it comes from.
        info: the data set as a whole.
        true_labels: int64 (N,), what the image really shows; equal to ``labels`` unless poisoned.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    info: DatasetInfo
    true_labels: Tensor

    def __post_init__(self) -> None:
        count, shape = len(self.images), (3, self.info.height, self.info.width)
        if self.images.dtype != torch.uint8 or tuple(self.images.shape[1:]) != shape:
            raise ValueError(
                f"images are {self.images.dtype} of shape {tuple(self.images.shape)}: "
                f"expected torch.uint8 of shape (N, {shape[0]}, {shape[1]}, {shape[2]})"
            )
        for name in ("labels", "index", "true_labels"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{count} images, but {len(getattr(self, name))} {name}")
        for name in ("labels", "true_labels"):
            values = getattr(self, name)
            if count and not 0 <= int(values.min()) <= int(values.max()) < self.num_classes:
                raise ValueError(
                    f"{name} run from {int(values.min())} to {int(values.max())}, but the "
                    f"{self.num_classes} classes are 0 to {self.num_classes - 1}"
                )

    @classmethod
    def clean(cls, images: Tensor, labels: Tensor, index: Tensor, info: DatasetInfo) -> "ImageSet":
        """Return a set whose labels are the true ones."""
        return cls(images, labels, index, info, labels)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """How many classes the data set has, whether or not this set shows them all."""
        return len(self.info.classes)

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.images.device

    def __getitem__(self, rows: Tensor) -> "ImageSet":
        """Return the images at ``rows``, positions in this set (or a mask over it)."""
        return dataclasses.replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            index=self.index[rows],
            true_labels=self.true_labels[rows],
        )

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the set with its tensors on ``device``."""
        return dataclasses.replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            index=self.index.to(device),
            true_labels=self.true_labels.to(device),
        )

    def replaced(self, rows: "ImageSet") -> "ImageSet":
        """Return the set with ``rows`` in place of the images of the same index.

        Raises:
            ValueError: an index of ``rows`` is not in this set, or twice in ``rows``.
        """
        order = torch.argsort(self.index)
        found = torch.searchsorted(self.index[order], rows.index).clamp(max=max(len(self) - 1, 0))
        places = order[found]
        if not torch.equal(self.index[places], rows.index) or torch.bincount(places).gt(1).any():
            raise ValueError(
                "poisoned rows don't match the training set: an index is missing there or comes twice; "
                "delete both files and run again"
            )
        images, labels, true_labels = self.images.clone(), self.labels.clone(), self.true_labels.clone()
        images[places], labels[places] = rows.images, rows.labels
        true_labels[places] = rows.true_labels
        return dataclasses.replace(self, images=images, labels=labels, true_labels=true_labels)


def concatenate(first: ImageSet, second: ImageSet) -> ImageSet:
    """Return the images of both sets, those of ``first`` first."""
    return dataclasses.replace(
        first,
        images=torch.cat([first.images, second.images]),
        labels=torch.cat([first.labels, second.labels]),
        index=torch.cat([first.index, second.index]),
        true_labels=torch.cat([first.true_labels, second.true_labels]),
    )


@dataclasses.dataclass(frozen=True)
class TriggeredSample:
    """Triggered copies of a defender's own images, row by row, with their true labels."""

    train: ImageSet
    validation: ImageSet


@dataclasses.dataclass(frozen=True)
class DefenderSample:
    """All that a defender holds: SPC clean images per class, split into training and validation.

    Attributes:
        train: what the method may fit to.
        validation: what it may choose by; at least one image per class once SPC is 2 or more.
        triggered: copies with the real trigger; None but for methods in ``known_trigger/``.
        chosen: the method notes here what it chose (a threshold, pruned channels, an epoch); the
            stage writes it to ``runs.parquet``. Values are numbers, texts or lists of them.
    """

    train: ImageSet
    validation: ImageSet
    triggered: TriggeredSample | None = None
    chosen: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def everything(self) -> ImageSet:
        """Training and validation images together, for methods that choose nothing."""
        return concatenate(self.train, self.validation)

    def to(self, device: torch.device | str) -> "DefenderSample":
        """Return the sample with its tensors on ``device``."""
        triggered = self.triggered and TriggeredSample(
            self.triggered.train.to(device), self.triggered.validation.to(device)
        )
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            triggered=triggered,
        )


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images (N, C, H, W), 0 to 255, as float32 in [0, 1], in the same memory order."""
    return images.float().div_(255)


def to_uint8(images: Tensor) -> Tensor:
    """Return float images (N, C, H, W) as uint8, 0 to 255: rounded, and clipped where they leave [0, 1]."""
    return images.mul(255).round().clamp(0, 255).to(torch.uint8)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on ``device``, without making the program wait for the GPU."""
    # From ordinary memory a copy to the GPU waits for the steps queued before it.
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's images.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1], augmented.
        labels: int64 (B,).
        rows: int64 (B,), positions in the set that the batch is drawn from.
        num_poisoned: how many images an attack has triggered since.
        penalty: a scalar for the loss, from what an attack learns itself.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    num_poisoned: int = 0
    penalty: Tensor | None = None


def num_batches(count: int, batch_size: int) -> int:
    """Return how many batches :class:`Loader` makes of ``count`` images in an epoch."""
    return len(_starts(count, batch_size))


def passes(epochs: int, min_steps: int, batches: int) -> int:
    """Return how often to go over the images: ``epochs`` times, or until ``min_steps`` steps are taken.

    Args:
        epochs: passes at least.
        min_steps: optimizer steps at least, one a batch; 0: no such floor.
        batches: of a pass, at least one.
    """
    return max(epochs, math.ceil(min_steps / batches))


def _starts(count: int, batch_size: int) -> list[int]:
    """Return where each batch of an epoch begins.

    A last batch of a single image joins the one before it: batch normalization over 1×1 maps has no
    statistics of one value.
    """
    starts = list(range(0, count, batch_size))
    return starts[:-1] if len(starts) > 1 and count - starts[-1] == 1 else starts


class Loader:
    """Draws augmented batches of an image set, every image once an epoch.

    All of an epoch's random numbers are drawn on the CPU at its start and sent in one piece, so a
    step waits for nothing; equal generators give equal batches on any device.
    """

    def __init__(self, images: ImageSet, batch_size: int, augmentation: Augmentation) -> None:
        self._set = images
        self._batch_size = batch_size
        self._augmentation = augmentation
        # Height, width, channels: the crop below then gathers whole pixels, and its result is
        # the order that convolutions on a GPU want. The border is no part of it: around images of 224
        # pixels it would take half as much memory again.
        self._pixels = images.images.permute(0, 2, 3, 1).contiguous()

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return num_batches(len(self._set), self._batch_size)

    def epoch(self, rng: torch.Generator) -> Iterator[Batch]:
        """Yield shuffled batches, :attr:`num_batches` of them; ``rng`` is consumed."""
        count = len(self._set)
        order = to_device(torch.randperm(count, generator=rng), self._set.device)
        offsets, flips = self._draw(count, rng)
        starts = _starts(count, self._batch_size)
        for start, end in zip(starts, [*starts[1:], count], strict=True):
            yield self._batch(order[start:end], offsets[start:end], flips[start:end])

    def any(self, count: int, rng: torch.Generator) -> Batch:
        """Return ``count`` augmented images drawn at random, each independently of the others."""
        rows = to_device(torch.randint(len(self._set), (count,), generator=rng), self._set.device)
        return self._batch(rows, *self._draw(count, rng))

    def _batch(self, rows: Tensor, offsets: Tensor, flips: Tensor) -> Batch:
        return Batch(to_float(self._crop(rows, offsets, flips)), self._set.labels[rows], rows)

    def _draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return crop offsets (N, 2), row then column, and flips (N,), on the device."""
        reach = 2 * self._augmentation.crop_padding + 1
        offsets = torch.randint(reach, (count, 2), generator=rng)
        flips = torch.rand(count, generator=rng) < 0.5 * self._augmentation.flip
        return to_device(offsets, self._set.device), to_device(flips, self._set.device)

    def _crop(self, rows: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        """Return crops of the images at ``rows``, uint8 (B, 3, H, W)."""
        if not self._augmentation.crop_padding and not self._augmentation.flip:
            return self._pixels[rows].permute(0, 3, 1, 2)
        height, width, device = self._set.info.height, self._set.info.width, rows.device
        offsets = offsets - self._augmentation.crop_padding
        down = torch.arange(height, device=device) + offsets[:, :1]
        along = torch.arange(width, device=device).expand(len(rows), width)
        along = torch.where(flips[:, None], along.flip(1), along) + offsets[:, 1:]
        inside = _within(down, height)[:, :, None] & _within(along, width)[:, None, :]
        down, along = down.clamp(0, height - 1), along.clamp(0, width - 1)
        crops = self._pixels[rows[:, None, None], down[:, :, None], along[:, None, :]]
        return crops.masked_fill_(~inside[..., None], 0).permute(0, 3, 1, 2)


def _within(places: Tensor, size: int) -> Tensor:
    return (places >= 0) & (places < size)


def empty(num_classes: int) -> ImageSet:
    """Return a set of no images, 0×0 pixels."""
    info = DatasetInfo(0, 0, tuple(map(str, range(num_classes))), (0.0,) * 3, (1.0,) * 3)
    nothing = torch.empty(0, dtype=torch.int64)
    return ImageSet.clean(torch.empty(0, 3, 0, 0, dtype=torch.uint8), nothing, nothing, info)
