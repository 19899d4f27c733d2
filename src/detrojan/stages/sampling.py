"""What the defender holds: which images of a pool, and their split into training and validation."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from detrojan import rng as streams
from detrojan.images import DefenderSample, ImageSet

VALIDATION_SHARE = 0.1  # of the SPC images of a class, at least one (the survey's benchmark)


def num_validation(spc: int) -> int:
    """Return how many of a class's ``spc`` images are for validation; 0 if there is only one image."""
    return max(1, math.floor(VALIDATION_SHARE * spc)) if spc > 1 else 0


def draw_samples(pool: ImageSet, dataset: str, spc: int, draws: Iterable[int]) -> dict[int, DefenderSample]:
    """Return the defender's sample of each draw: ``spc`` images of each class of ``pool``.

    SPC counts all that the defender holds. (The survey's benchmark draws one image more where a
    method wants validation images and SPC is below 10; see the method cards of any of its defenses.)
    A draw's images at a small SPC are among its images at a larger one. Nothing but the pool, the
    data set's name, SPC and the draw decides, so every model and every defense meets the same images.

    Raises:
        ValueError: a class has fewer than ``spc`` images in the pool.
    """
    counts = torch.bincount(pool.labels, minlength=pool.num_classes)
    short = int(counts.argmin())
    if counts[short] < spc:
        raise ValueError(
            f"class {short} ({pool.info.classes[short]}) has {int(counts[short])} images in the defender's "
            f"pool, but spc asks for {spc}: lower grid.spc, or reserve more (held_out of data set {dataset})"
        )
    return {draw: _draw(pool, dataset, spc, draw) for draw in draws}


def _draw(pool: ImageSet, dataset: str, spc: int, draw: int) -> DefenderSample:
    train: list[Tensor] = []
    validation: list[Tensor] = []
    for label in range(pool.num_classes):
        members = (pool.labels == label).nonzero()[:, 0]
        rng = streams.stream("sample", dataset, draw, label)
        taken = members[torch.randperm(len(members), generator=rng)[:spc]]
        split = num_validation(spc)
        validation.append(taken[:split])
        train.append(taken[split:])
    # Shuffled, because the order of a file should mean nothing: a method that takes "the last
    # tenth" must not get the last classes.
    order = streams.stream("sample order", dataset, spc, draw)
    fit_to, choose_by = (pool[_shuffled(torch.cat(rows), order)] for rows in (train, validation))
    return DefenderSample(fit_to, choose_by)


def _shuffled(rows: Tensor, rng: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=rng)]
