"""Makes a source's images the data set that every stage works on (rule ``dataset``)."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from detrojan import rng as streams
from detrojan.datasets.base import (
    SPLITS,
    BrokenImageError,
    Labels,
    Pixels,
    RawImages,
    Source,
    Split,
    count,
    listed,
    of_one_colour,
    refuse_missing_classes,
    selected,
    split_counts,
)
from detrojan.images import DatasetInfo, ImageSet
from detrojan.settings import Augmentation
from detrojan.stages import data_card

logger = logging.getLogger(__name__)

Mask = npt.NDArray[np.bool_]
RGB = tuple[float, float, float]
SHOWN = 3  # pairs of equal images that a message names
NARROW = 64  # grey levels: all of a data set's pixels within so few have lost most of theirs
SMALLEST_STD = 1 / 255  # a channel of one value would be divided by zero


def build(source: Source, **options: Any) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Return the training images, the defender's pool and the test images; see :func:`build_with_card`."""
    return build_with_card(source, **options)[0]


def build_with_card(
    source: Source,
    *,
    name: str,
    side: int,
    held_out: float,
    classes: Sequence[int | str] | None,
    per_class: int | None,
    augmentation: Augmentation,
    mean: RGB | None,
    std: RGB | None,
    overlap: float | Literal["allowed"] = 0.0,
) -> tuple[tuple[ImageSet, ImageSet, ImageSet], dict[str, Any]]:
    """Return the training images, the defender's pool and the test images; and what was read.

    Training and pool are parts of the source's training split: an image's ``index`` is its row there
    (its row in the test split, for test images), after the limits of ``classes``
    and ``per_class``. No image of the pool is, pixel for pixel, a training image: those that the
    training split holds several times stay in training.

    Args:
        source: gives both splits.
        name: of the data set; decides, with the class, which images the pool gets.
        side: of the images, pixels.
        held_out: share of each class's training images for the pool, see ``split_counts``.
        classes: the labels to keep, by number or name, numbered anew in this order; None for all as they are.
        per_class: how many images of each class to keep in each split, the first ones; None for all.
        augmentation: what training on this data set applies.
        mean: per channel, of pixels in [0, 1]; None to measure it on the training images.
        std: likewise; the population's where measured, and at least 1/255.
        overlap: largest share of the test images that may stand in the training split too, pixel for
            pixel, and of the pool in training; "allowed" for any.

    Raises:
        ValueError: the source's data are missing or broken, a class has no training image left, or more
            images than ``overlap`` allows are shared.
    """
    source.check_classes(classes)
    train, test = (_limited(_selected(raw, classes), per_class) for raw in _both(source, name, side))
    if train.classes != test.classes:
        raise ValueError(
            f"data set {name}: the classes of train ({_numbered(train.classes)}) are not those of test "
            f"({_numbered(test.classes)}): both splits need the same ones"
        )
    refuse_missing_classes(count(train.labels), train.classes, f"data set {name}")
    for raw, split in ((train, "train"), (test, "test")):
        _check_levels(name, raw, split)
    equal = _equal(train, test)
    _warn_of_repeats(name, train, equal.train, "train")
    _warn_of_repeats(name, test, equal.test, "test")
    _refuse_overlap(name, train, test, equal, overlap)
    is_held_out = _held_out(train, equal.train, name, held_out, overlap)
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
    sets = (
        _image_set(train, np.flatnonzero(~is_held_out), info),
        _image_set(train, np.flatnonzero(is_held_out), info),
        _image_set(test, everything, info),
    )
    images = {
        "train": count(train.labels[~is_held_out]),
        "held_out": count(train.labels[is_held_out]),
        "test": count(test.labels),
    }
    card = data_card.describe(source, {"train": train, "test": test}, images)
    return sets, card | {"equal": _counted(equal, is_held_out)}


def _both(source: Source, name: str, side: int) -> list[RawImages]:
    """Return both splits; what is broken in either is one error."""
    read, broken = [], []
    for split in SPLITS:
        try:
            read.append(_checked(source, name, split, side))
        except BrokenImageError as error:
            broken += error.lines
    if broken:
        raise BrokenImageError.of(broken)
    return read


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
    # What a message calls an image, whatever rows are left of the split by then.
    return dataclasses.replace(raw, names=raw.names or tuple(f"row {row}" for row in range(len(raw.labels))))


def _selected(raw: RawImages, classes: Sequence[int | str] | None) -> RawImages:
    """Return the images of ``classes`` in their order, labels numbered by their place there."""
    if classes is None:
        return raw
    wanted = selected(raw.classes, classes)
    place = np.full(len(raw.classes), -1)
    place[wanted] = np.arange(len(wanted))
    labels = place[raw.labels]
    kept = dataclasses.replace(raw, labels=labels, classes=tuple(raw.classes[label] for label in wanted))
    return kept[labels >= 0]


def _limited(raw: RawImages, per_class: int | None) -> RawImages:
    """Return the first ``per_class`` images of each class, in their order."""
    if per_class is None:
        return raw
    firsts = [np.flatnonzero(raw.labels == label)[:per_class] for label in range(len(raw.classes))]
    rows = np.sort(np.concatenate(firsts))
    return raw[rows]


def _check_levels(name: str, raw: RawImages, split: str) -> None:
    """Refuse a split, or a class of it, that is of one colour; warn of single images and of narrow ranges.

    Decoders turn levels that they do not expect into black or white: then nothing is left to learn.
    """
    is_flat, colours = of_one_colour(raw.images), raw.images[:, 0, 0]
    why = (
        "nothing in them can be learned; if the files show more, their grey levels may lie outside of 0 to "
        "255, or they are white on transparent: save them with 8 bits, on a background"
    )
    for label, of_class in enumerate(raw.classes):
        rows = np.flatnonzero(raw.labels == label)
        if len(rows) > 1 and is_flat[rows].all() and len(np.unique(colours[rows], axis=0)) == 1:
            colour = tuple(colours[rows[0]].tolist())
            raise ValueError(
                f"data set {name}: all {len(rows)} images of class {label} ({of_class}) in split {split} are "
                f"of one colour, {colour}, as {raw.names[rows[0]]}: {why}"
            )
    if len(raw.labels) > 1 and is_flat.all() and len(np.unique(colours, axis=0)) == 1:
        raise ValueError(f"data set {name}: all images of split {split} are of one colour: {why}")
    flat = np.flatnonzero(is_flat)
    if len(flat):
        logger.warning(
            "data set %s: %d of %d images of split %s are of one colour each: %s",
            *(name, len(flat), len(raw.labels), split, listed([raw.names[row] for row in flat])),
        )
    lowest, highest = int(raw.images.min()), int(raw.images.max())
    if highest - lowest < NARROW:
        logger.warning(
            "data set %s: all pixels of split %s have levels from %d to %d, of 0 to 255: %s",
            *(name, split, lowest, highest, "grey of 10 to 14 bits saved as 16 looks so"),
        )


class _Equal(NamedTuple):
    """A number for each image of a split, int64 (N,): equal where, and only where, all pixels are."""

    train: Labels
    test: Labels


def _equal(train: RawImages, test: RawImages) -> _Equal:
    seen: dict[bytes, int] = {}
    numbers = (
        # A copy of a million images is not kept, their digests are.
        [seen.setdefault(hashlib.blake2b(image, digest_size=16).digest(), len(seen)) for image in raw.images]
        for raw in (train, test)
    )
    return _Equal(*(np.array(split, np.int64) for split in numbers))


def _counted(equal: _Equal, is_held_out: Mask) -> dict[str, int]:
    """Return how many images stand several times, and where."""
    return {
        "in_train": len(equal.train) - len(np.unique(equal.train)),
        "in_test": len(equal.test) - len(np.unique(equal.test)),
        "test_in_train": int(np.isin(equal.test, equal.train).sum()),
        "pool_in_train": int(np.isin(equal.train[is_held_out], equal.train[~is_held_out]).sum()),
    }


def _repeated(numbers: Labels) -> Mask:
    """Return which images the split holds more than once."""
    return np.bincount(numbers)[numbers] > 1


def _pairs(first: tuple[RawImages, Labels], second: tuple[RawImages, Labels]) -> str:
    """Return the first few pairs of equal images of two sets, by name and class."""
    raw, numbers = first
    earliest = {number: row for row, number in reversed(list(enumerate(second[1].tolist())))}
    shared = [(row, earliest[number]) for row, number in enumerate(numbers.tolist()) if number in earliest]
    shown = [
        f"{raw.names[row]} ({_class(raw, row)}) = {second[0].names[other]} ({_class(second[0], other)})"
        for row, other in shared[: SHOWN + 1]
    ]
    return listed(shown, SHOWN)


def _class(raw: RawImages, row: int) -> str:
    return raw.classes[int(raw.labels[row])]


def _warn_of_repeats(name: str, raw: RawImages, numbers: Labels, split: Split) -> None:
    """Warn of images that a split holds several times, and of equal ones with different labels."""
    _, first, sizes = np.unique(numbers, return_index=True, return_counts=True)
    if not (sizes > 1).any():
        return
    is_first = np.zeros(len(numbers), np.bool_)
    is_first[first[sizes > 1]] = True
    again = np.zeros(len(numbers), np.bool_)
    again[_repeated(numbers)] = True
    again &= ~is_first
    labels = np.unique(np.stack([numbers, raw.labels], axis=1), axis=0)
    unclear = int((np.bincount(labels[:, 0]) > 1).sum())
    logger.warning(
        "data set %s: %d of %d images of split %s are, pixel for pixel, others of it: %s%s",
        *(name, again.sum(), len(numbers), split),
        _pairs((raw[again], numbers[again]), (raw[is_first], numbers[is_first])),
        f"; of several labels: {unclear}" if unclear else "",
    )


def _refuse_overlap(
    name: str, train: RawImages, test: RawImages, equal: _Equal, overlap: float | Literal["allowed"]
) -> None:
    """Refuse a test set of which more than a share ``overlap`` is in the training split; warn of the rest."""
    shared = np.isin(equal.test, equal.train)
    count, total = int(shared.sum()), len(shared)
    if not count:
        return
    pairs = _pairs((test[shared], equal.test[shared]), (train, equal.train))
    said = f"data set {name}: {count} of {total} test images are, pixel for pixel, training images: {pairs}"
    if overlap != "allowed" and count > overlap * total:
        raise ValueError(
            f"{said}; a model knows them already, so remove them from one split, or, where the data set was "
            f"published so, say in the study datasets.{name}.overlap: {_share(count, total)} (or allowed)"
        )
    logger.warning("%s; the study allows it (overlap: %s)", said, overlap)


def _share(count: int, total: int) -> str:
    """Return a share of at least ``count`` / ``total``, with few digits."""
    digits = 10**4
    return f"{-(-count * digits // total) / digits:g}"


def _held_out(
    train: RawImages, numbers: Labels, name: str, share: float, overlap: float | Literal["allowed"]
) -> Mask:
    """Return a mask of the images for the defender's pool: the head of a permutation of each class.

    Images that stand in the split several times are passed over: one half of a pair in the pool, and the
    other in training, and the defender's images were none that the model has never seen.
    """
    is_held_out = np.zeros(len(train.labels), np.bool_)
    repeated = _repeated(numbers)
    # Limited already, so per_class limits no more: the planner's numbers for limited counts are equal.
    _, reserved = split_counts(count(train.labels), share, None)
    for label in range(len(train.classes)):
        members = np.flatnonzero(train.labels == label)
        order = torch.randperm(len(members), generator=streams.stream("held out", name, label)).numpy()
        single = order[~repeated[members[order]]]
        wanted = reserved[label]
        if len(single) < wanted and overlap != "allowed":
            raise ValueError(
                f"data set {name}: the pool needs {wanted} images of class {label} ({train.classes[label]}), "
                f"but only {len(single)} of its {len(members)} training images are there once: the others "
                "are, pixel for pixel, training images too; remove the repeats, lower held_out, or say "
                f"datasets.{name}.overlap: allowed"
            )
        is_held_out[members[(single if len(single) >= wanted else order)[:wanted]]] = True
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


def _numbered(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {listed(classes)}"
