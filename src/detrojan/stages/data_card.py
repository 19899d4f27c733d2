"""What was read as a data set, for people: counts, classes, sizes, repeats, what was left out.

It stands beside the images as ``card.json``, in the log of their job, and ``detrojan data`` prints it.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from detrojan.datasets.base import SPLITS, RawImages, Source, of_one_colour

logger = logging.getLogger(__name__)

SIZES = 5  # of images, the most common ones, that a card names
FIRST = 10  # names of files that are left out
CLASSES = 20  # that the lines for people name


def describe(
    source: Source, raw: Mapping[str, RawImages], images: Mapping[str, Counter[int]]
) -> dict[str, Any]:
    """Return what a source's images are, as plain values.

    Args:
        source: where they come from; asked for what it leaves out.
        raw: the split ``train``, with the pool's images, and ``test``; after the study's choice of classes.
        images: how many images each label has in ``train``, ``held_out`` and ``test``.
    """
    classes = raw["train"].classes
    numbers = {name: [found[label] for label in range(len(classes))] for name, found in images.items()}
    try:
        left_out, remarks = source.left_out(), source.remarks()
    except NotImplementedError:  # a source that can't count gives images all the same
        left_out, remarks = {}, []
    return {
        "classes": list(classes),
        "images": numbers,
        "pixels": {split: _pixels(raw[split]) for split in SPLITS},
        "left_out": {why: {"number": len(names), "first": names[:FIRST]} for why, names in left_out.items()},
        "remarks": remarks,
    }


def _pixels(raw: RawImages) -> dict[str, Any]:
    """Return what the pixels of a split are, in the size that the study uses."""
    found = raw.found
    return {
        "levels": [int(raw.images.min()), int(raw.images.max())],
        "one_colour": int(of_one_colour(raw.images).sum()),
        "sizes": [[*size, number] for size, number in found.sizes.most_common(SIZES)] if found else None,
        "num_sizes": len(found.sizes) if found else None,
        "with_orientation": found.turned if found else None,
    }


def log(card: Mapping[str, Any]) -> None:
    """Log what is on a card; what may be wrong as warnings."""
    for line in lines(card):
        logger.log(logging.WARNING if line in card["remarks"] else logging.INFO, "%s", line)


def lines(card: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell a reader what is on a card."""
    images = card["images"]
    names = {"train": "training", "held_out": "the pool", "test": "test"}
    yield "images: " + ", ".join(f"{sum(found)} in {names[split]}" for split, found in images.items())
    for label, name in list(enumerate(card["classes"]))[:CLASSES]:
        yield f"  {label} = {name}: {', '.join(str(found[label]) for found in images.values())}"
    if len(card["classes"]) > CLASSES:
        yield f"  ... {len(card['classes'])} classes"
    for split, pixels in card["pixels"].items():
        low, high = pixels["levels"]
        said = [f"levels {low} to {high}", f"{pixels['one_colour']} of one colour"]
        if pixels["sizes"]:
            sizes = [f"{width}x{height} ({number})" for width, height, number in pixels["sizes"]]
            more = f", ... {pixels['num_sizes']} sizes" if pixels["num_sizes"] > len(sizes) else ""
            said += [
                f"{pixels['with_orientation']} with an EXIF orientation",
                f"sizes {', '.join(sizes)}{more}",
            ]
        yield f"{split}: {'; '.join(said)}"
    equal = card["equal"]
    yield (
        f"equal, pixel for pixel: {equal['in_train']} again in train, {equal['in_test']} again in test, "
        f"{equal['test_in_train']} of test in train, {equal['pool_in_train']} of the pool in training"
    )
    yield from card["remarks"]  # what is left out among them
