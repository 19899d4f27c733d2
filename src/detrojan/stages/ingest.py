"""Makes a source's images the data set that every stage works on (rule ``dataset``)."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from detrojan import rng as streams
from detrojan.datasets.base import (
    Labels,
    Pixels,
    RawImages,
    Source,
    Split,
    count,
    refuse_missing_classes,
    split_counts,
)
from detrojan.images import DatasetInfo, ImageSet
from detrojan.settings import Augmentation

Mask = npt.NDArray[np.bool_]
RGB = tuple[float, float, float]
SPLITS: tuple[Split, Split] = ("train", "test")
SMALLEST_STD = 1 / 255  # a channel of one value would be divided by zero


def build(
    source: Source,
    *,
    name: str,
    side: int,
    held_out: float,
    classes: Sequence[int] | None,
    per_class: int | None,
    augmentation: Augmentation,
    mean: RGB | None,
    std: RGB | None,
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return the training images, the defender's pool and the test images.

    Training and pool are parts of the source's training split: an image's ``index`` is its row there
    (its row in the test split, for test images), after the limits of ``classes``
    and ``per_class``.

    Args:
        source: gives both splits.
        name: of the data set; decides, with the class, which images the pool gets.
        side: of the images, pixels.
        held_out: share of each class's training images for the pool, see ``split_counts``.
        classes: the labels to keep, numbered anew in this order; None for all as they are.
        per_class: how many images of each class to keep in each split, the first ones; None for all.
        augmentation: what training on this data set applies.
        mean: per channel, of pixels in [0, 1]; None to measure it on the training images.
        std: likewise; the population's where measured, and at least 1/255.

    Raises:
        ValueError: the source's data are missing or broken, or a class has no training image left.
    """
    train, test = (
        _limited(_selected(_checked(source, name, split, side), classes), per_class) for split in SPLITS
    )
    if train.classes != test.classes:
        raise ValueError(
            f"data set {name}: the classes of train ({_listed(train.classes)}) are not those of test "
            f"({_listed(test.classes)}): both splits need the same ones"
        )
    refuse_missing_classes(train.labels, train.classes, f"data set {name}")
    is_held_out = _held_out(train, name, held_out)
    if mean is None or std is None:
        measured = _statistics(train.images, ~is_held_out)
        mean, std = mean or measured[0], std or measured[1]
    info = DatasetInfo(
        height=side,
        width=side,
        classes=train.classes,
        mean=mean,
        std=std,
        augmentation=augmentation,
        digest=_digest(train, test),
    )
    everything = np.arange(len(test.labels))
    return (
        _image_set(train, np.flatnonzero(~is_held_out), info),
        _image_set(train, np.flatnonzero(is_held_out), info),
        _image_set(test, everything, info),
    )


def _checked(source: Source, name: str, split: Split, side: int) -> RawImages:
    """Return a split of ``source``; a source that breaks its promise is our bug, an empty split is data."""
    raw = source.read(split, side)
    assert raw.images.dtype == np.uint8
    assert raw.images.shape == (len(raw.labels), side, side, 3)
    if not len(raw.labels):
        raise ValueError(
            f"data set {name}: split {split} has no images: add some, or check the source's path"
        )
    if not 0 <= raw.labels.min() <= raw.labels.max() < len(raw.classes):
        raise ValueError(
            f"data set {name}: labels of split {split} run from {raw.labels.min()} to {raw.labels.max()}, "
            f"but the {len(raw.classes)} classes are 0 to {len(raw.classes) - 1}: mend the labels"
        )
    return raw


def _selected(raw: RawImages, classes: Sequence[int] | None) -> RawImages:
    """Return the images of ``classes`` in their order, labels numbered by their place there."""
    if classes is None:
        return raw
    place = np.full(len(raw.classes), -1)
    place[classes] = np.arange(len(classes))
    labels = place[raw.labels]
    names = tuple(raw.classes[label] for label in classes)
    return RawImages(raw.images[labels >= 0], labels[labels >= 0], names)


def _limited(raw: RawImages, per_class: int | None) -> RawImages:
    """Return the first ``per_class`` images of each class, in their order."""
    if per_class is None:
        return raw
    firsts = [np.flatnonzero(raw.labels == label)[:per_class] for label in range(len(raw.classes))]
    rows = np.sort(np.concatenate(firsts))
    return RawImages(raw.images[rows], raw.labels[rows], raw.classes)


def _held_out(train: RawImages, name: str, share: float) -> Mask:
    """Return a mask of the images for the defender's pool: the head of a permutation of each class."""
    is_held_out = np.zeros(len(train.labels), np.bool_)
    # Limited already, so per_class limits no more: the planner's numbers for limited counts are equal.
    _, reserved = split_counts(count(train.labels), share, None)
    for label in range(len(train.classes)):
        members = np.flatnonzero(train.labels == label)
        order = torch.randperm(len(members), generator=streams.stream("held out", name, label))
        is_held_out[members[order[: reserved[label]].numpy()]] = True
    return is_held_out


def _statistics(images: Pixels, rows: Mask) -> tuple[RGB, RGB]:
    """Return mean and population standard deviation of each channel of the images at ``rows``, in [0, 1]."""
    levels = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        # Of counts of grey levels, which are exact: a float copy of the images would take eight
        # times their memory, and its sums would depend on the order of summation.
        share = np.bincount(images[rows, :, :, channel].reshape(-1), minlength=256).astype(np.float64)
        share /= share.sum()
        mean.append(float(share @ levels))
        std.append(max(float(np.sqrt(share @ (levels - mean[-1]) ** 2)), SMALLEST_STD))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _digest(train: RawImages, test: RawImages) -> str:
    """Return the SHA-256 of pixels, labels and classes of both splits."""
    digest = hashlib.sha256(json.dumps(train.classes).encode())
    for raw in (train, test):
        digest.update(json.dumps(raw.images.shape).encode())
        digest.update(np.ascontiguousarray(raw.images).reshape(-1).data)
        digest.update(np.ascontiguousarray(raw.labels, "<i8").data)
    return digest.hexdigest()


def _image_set(raw: RawImages, rows: Labels, info: DatasetInfo) -> ImageSet:
    images = torch.from_numpy(raw.images[rows]).permute(0, 3, 1, 2)
    return ImageSet.clean(images, torch.from_numpy(raw.labels[rows]), torch.from_numpy(rows), info)


def _listed(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''}"
