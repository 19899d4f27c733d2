"""Poisons a training set, triggers a test set, stamps a defender's sample: the same for all attacks."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageDraw

from detrojan.attacks.base import Attack, LabelMode, LearnedTrigger, Trigger
from detrojan.images import DefenderSample, ImageSet, TriggeredSample, concatenate
from detrojan.labels import LabelMap
from detrojan.learning import metrics

logger = logging.getLogger(__name__)

EXAMPLES = 8  # test images that show what a trigger looks like
QUALITY_IMAGES = 1000  # test images over which PSNR and SSIM are the mean; more cost minutes

PREVIEW_IMAGES = 8
PREVIEW_SIDE = 96  # pixels of one picture in a preview


def trigger_card(attack: Attack, trigger: Trigger) -> dict[str, Any]:
    """Return what is worth knowing of a trigger, with the history of one that was learned."""
    learned = trigger if isinstance(trigger, LearnedTrigger) else LearnedTrigger({}, history=[], findings={})
    if learned.weakness is not None:
        logger.warning("a weak trigger: %s", learned.weakness)
    return {
        "hyperparameters": attack.model_dump(),
        "history": learned.history,
        "findings": learned.findings,
        "weakness": learned.weakness,
    }


def poison(
    attack: Attack,
    trigger: Trigger,
    train: ImageSet,
    ratio: float,
    labels: LabelMap,
    *,
    rng: torch.Generator,
) -> ImageSet:
    """Return the poisoned rows: triggered images with the label that the attacker gives them.

    The rows are the head of one permutation, so those of a small ratio are among those of a larger
    one, and attacks with the same label mode poison the same images.

    Raises:
        ValueError: no image would be poisoned, more than there are to choose from, or a clean-label
            attack is to have labels changed.
    """
    wanted = round(ratio * len(train))  # half to even, as the survey's benchmark rounds
    pool = torch.arange(len(train))
    is_clean_label = attack.label_mode is LabelMode.CLEAN_LABEL
    if is_clean_label:
        if labels.single_target is None:
            raise ValueError(f"a clean-label attack needs one target, not the label map {labels.kind}")
        pool = pool[train.labels == labels.target]
    if not 0 < wanted <= len(pool):
        raise ValueError(
            f"ratio {ratio:g} of {len(train)} images asks for {wanted} poisoned ones, but there are "
            f"{len(pool)} to choose from (label mode {attack.label_mode.name.lower()}): the ratio must "
            f"lie between {0.5 / len(train):.2g} and {len(pool) / len(train):.2g}"
        )
    order = pool[torch.randperm(len(pool), generator=rng)]
    rows = train[order[:wanted].sort().values]
    wanted_labels = rows.labels if is_clean_label else labels.attacked(rows.labels, train.num_classes)
    images = attack.apply(rows.images, trigger)
    return ImageSet(images, wanted_labels, rows.index, rows.info, rows.true_labels)


def triggered_test(attack: Attack, trigger: Trigger, test: ImageSet, labels: LabelMap) -> ImageSet:
    """Return the test images that count for ASR and RA: triggered, true class not the wanted one.

    Raises:
        ValueError: all test images are of the target class.
    """
    rows = test[labels.counts(test.labels, test.num_classes)]
    if not len(rows):
        raise ValueError(
            f"all {len(test)} test images are of the target class {labels.target}: choose another target"
        )
    wanted = labels.attacked(rows.labels, test.num_classes)
    return ImageSet(attack.apply(rows.images, trigger), wanted, rows.index, rows.info, rows.labels)


def triggered_card(attack: Attack, triggered: ImageSet, test: ImageSet, labels: LabelMap) -> dict[str, Any]:
    """Return what is worth knowing of a triggered test set, with the quality of its images.

    PSNR (dB) and SSIM are means, L∞ (grey levels) is the largest change, over at most
    ``QUALITY_IMAGES`` images spread over the set.
    """
    some = _spread(triggered, QUALITY_IMAGES)
    clean = originals(some, test)
    return {
        "hyperparameters": attack.model_dump(),
        "label_map": labels.kind,
        "target": labels.single_target,
        "num_triggered": len(triggered),
        "psnr": metrics.psnr(clean.images, some.images),
        "ssim": metrics.ssim(clean.images, some.images),
        "linf": metrics.linf(clean.images, some.images),
    }


def examples(triggered: ImageSet, test: ImageSet) -> ImageSet:
    """Return a few test images and then, in the same order, their triggered copies.

    All attacks of a data set with the same label map show the same images.
    """
    some = _spread(triggered, EXAMPLES)
    return concatenate(originals(some, test), some)


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


def card(attack: Attack, rows: ImageSet, train: ImageSet) -> dict[str, Any]:
    """Return what is worth knowing of a poisoned set.

    ``effective_ratio`` is the poisoned share of the training set, which rounding moves off the
    nominal ratio.
    """
    return {
        "hyperparameters": attack.model_dump(),
        "num_train": len(train),
        "num_poisoned": len(rows),
        "num_relabelled": int((rows.labels != rows.true_labels).sum()),
        "effective_ratio": len(rows) / len(train),
        "indices_digest": hashlib.sha256(rows.index.numpy().tobytes()).hexdigest(),
    }


def preview(rows: ImageSet, train: ImageSet) -> Image.Image:
    """Return a picture of some poisoned images: clean, triggered, and their difference.

    The difference is scaled so that the largest change shown is black or white, on grey.
    """
    shown = _spread(rows, PREVIEW_IMAGES)
    clean = originals(shown, train).images.int()
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


def _spread(images: ImageSet, count: int) -> ImageSet:
    """Return up to ``count`` images from all over a set: some data sets are sorted by class."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()]


def originals(rows: ImageSet, clean: ImageSet) -> ImageSet:
    """Return the clean images of which ``rows`` are triggered copies; ``clean`` is sorted by index."""
    return clean[torch.searchsorted(clean.index, rows.index)]
