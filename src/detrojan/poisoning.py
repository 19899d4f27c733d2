"""Poisons a training set, triggers a test set, stamps a defender's sample: the same for all attacks."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageDraw

from detrojan import metrics
from detrojan.attacks.base import Attack, LabelMode, Trigger
from detrojan.data import DefenderSample, ImageSet, TriggeredSample

PREVIEW_IMAGES = 8
PREVIEW_SIDE = 96  # pixels of one picture in a preview


def poison(
    attack: Attack, trigger: Trigger, train: ImageSet, ratio: float, target: int, *, rng: torch.Generator
) -> ImageSet:
    """Return the poisoned rows: triggered images with the label that the attacker gives them.

    The rows are the head of one permutation, so those of a small ratio are among those of a larger
    one, and attacks with the same label mode poison the same images.

    Raises:
        ValueError: no image would be poisoned, or more than there are to choose from.
    """
    wanted = round(ratio * len(train))  # half to even, as the survey's benchmark rounds
    pool = torch.arange(len(train))
    if attack.label_mode is LabelMode.CLEAN_LABEL:
        pool = pool[train.labels == target]
    if not 0 < wanted <= len(pool):
        raise ValueError(
            f"ratio {ratio:g} of {len(train)} images asks for {wanted} poisoned ones, but there are "
            f"{len(pool)} to choose from (label mode {attack.label_mode.name.lower()}): the ratio must "
            f"lie between {0.5 / len(train):.2g} and {len(pool) / len(train):.2g}"
        )
    order = pool[torch.randperm(len(pool), generator=rng)]
    rows = train[order[:wanted].sort().values]
    return ImageSet(
        attack.apply(rows.images, trigger),
        torch.full_like(rows.labels, target),
        rows.index,
        rows.info,
        rows.true_labels,
    )


def triggered_test(attack: Attack, trigger: Trigger, test: ImageSet, target: int) -> ImageSet:
    """Return the test images that count for ASR and RA: triggered, true class not the target.

    Raises:
        ValueError: all test images are of the target class.
    """
    rows = test[test.labels != target]
    if not len(rows):
        raise ValueError(
            f"all {len(test)} test images are of the target class {target}: choose another target"
        )
    labels = torch.full_like(rows.labels, target)
    return ImageSet(attack.apply(rows.images, trigger), labels, rows.index, rows.info, rows.labels)


def stamp(
    attack: Attack, trigger: Trigger, samples: Mapping[int, DefenderSample]
) -> dict[int, TriggeredSample]:
    """Return triggered copies of each draw's own images, with their true labels."""

    def stamped(images: ImageSet) -> ImageSet:
        copies = attack.apply(images.images, trigger)
        return ImageSet.clean(copies, images.labels, images.index, images.info)

    return {
        draw: TriggeredSample(stamped(sample.train), stamped(sample.validation))
        for draw, sample in samples.items()
    }


def card(attack: Attack, rows: ImageSet, train: ImageSet, target: int) -> dict[str, Any]:
    """Return what is worth knowing of a poisoned set.

    ``effective_ratio`` is the poisoned share of the training set, which rounding moves off the
    nominal ratio; image quality (PSNR in dB, SSIM, L∞ in grey levels) compares the poisoned images
    with their clean originals, mean over the images but for L∞, the largest.
    """
    clean = _originals(rows, train)
    return {
        "hyperparameters": attack.model_dump(),
        "target": target,
        "num_train": len(train),
        "num_poisoned": len(rows),
        "num_relabelled": int((rows.labels != rows.true_labels).sum()),
        "effective_ratio": len(rows) / len(train),
        "indices_digest": hashlib.sha256(rows.index.numpy().tobytes()).hexdigest(),
        "psnr": metrics.psnr(clean.images, rows.images),
        "ssim": metrics.ssim(clean.images, rows.images),
        "linf": metrics.linf(clean.images, rows.images),
    }


def preview(rows: ImageSet, train: ImageSet) -> Image.Image:
    """Return a picture of some poisoned images: clean, triggered, and their difference.

    The difference is scaled so that the largest change shown is black or white, on grey.
    """
    # Spread over the set: some data sets are sorted by class.
    shown = rows[torch.linspace(0, len(rows) - 1, min(PREVIEW_IMAGES, len(rows))).round().long()]
    clean = _originals(shown, train).images.int()
    triggered = shown.images.int()
    scale = 127 / max(1, metrics.linf(clean, triggered))
    difference = 128 + scale * (triggered - clean)
    captions = ("clean", "triggered", f"difference x{scale:.1f}")
    margin, gap = 84, 4
    step = PREVIEW_SIDE + gap
    sheet = Image.new("RGB", (margin + step * len(shown), step * len(captions)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (caption, images) in enumerate(zip(captions, (clean, triggered, difference), strict=True)):
        draw.text((4, row * step + PREVIEW_SIDE // 2 - 6), caption, fill="black")
        for column, image in enumerate(images):
            pixels = image.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.NEAREST)
            sheet.paste(picture, (margin + column * step, row * step))
    return sheet


def _originals(rows: ImageSet, train: ImageSet) -> ImageSet:
    """Return the clean images of which ``rows`` are poisoned copies; ``train`` is sorted by index."""
    return train[torch.searchsorted(train.index, rows.index)]
