"""Draws a sheet a data set: what each attack's trigger does to the same test images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from detrojan.analysis.report.pictures import STYLE, WIDTH, svg, words
from detrojan.analysis.report.views import UNDEFINED, Row
from detrojan.cells import NO_METHOD, ratio_text
from detrojan.images import ImageSet
from detrojan.learning.metrics import linf
from detrojan.storage import artifacts, records

NUM_SHOWN = 5  # test images of a sheet; more would be too small in print
SIDE, PITCH = 0.56, 0.58  # inches: of an image, and from one to the next
HALVES = (1.3, WIDTH - NUM_SHOWN * PITCH)  # inches: where triggered images start, and differences
BAND, EDGE = 0.19, 0.04  # inches: for the heads above the attacks, and around everything
NAME, HEAD, DETAIL = 8, 6.5, 6  # points, of texts
DPI = 400  # of the PNG: 7 dots for each pixel of a 32-pixel image
ENLARGED = 128  # pixels: images are stored at least this large, as some viewers blur what they enlarge
GREY, RED = "0.35", "#A3260F"


class Block(NamedTuple):
    """An attack's row of a sheet.

    Attributes:
        attack: its name.
        details: lines on its trigger and on the quality of its images.
        failed: whether the attack failed the gate.
        clean: test images, uint8 (N, 3, H, W), the same in all blocks of a sheet.
        triggered: their triggered copies, likewise.
    """

    attack: str
    details: str
    failed: bool
    clean: Tensor
    triggered: Tensor


class Example(NamedTuple):
    """What shows a trigger.

    Attributes:
        file: of test images with, after them, their triggered copies.
        axes: of the trigger: those of a model, or the fewer that models share it by.
    """

    file: str | Path
    axes: Mapping[str, Any]


def draw_all(
    datasets: Sequence[str], models: pa.Table, files: Sequence[str], axes: Sequence[Mapping[str, Any]]
) -> dict[str, Figure]:
    """Return the sheet of each data set.

    Args:
        datasets: the study's.
        models: of the schema ``MODELS``.
        files: of examples, as :class:`Example` has them.
        axes: of their triggers, in the same order.
    """
    examples = list(map(Example, files, axes))
    return {dataset: draw(blocks(dataset, models, examples)) for dataset in datasets}


def write(sheets: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Write each sheet into ``folder``, as ``triggers-{dataset}`` in SVG, PNG and PDF; return the SVGs."""
    texts = {dataset: svg(sheet) for dataset, sheet in sheets.items()}
    for dataset, sheet in sheets.items():
        path = folder / f"triggers-{dataset}.svg"
        records.write_text(texts[dataset], path)
        for kind, undated in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
            with mpl.rc_context(STYLE), records.whole(path.with_suffix(f".{kind}")) as partial:
                sheet.savefig(partial, format=kind, dpi=DPI, metadata=undated)
    return texts


# --- what a sheet shows ----------------------------------------------------------------------------


def blocks(dataset: str, models: pa.Table, examples: Sequence[Example]) -> list[Block]:
    """Return what a data set's sheet shows of each attack, in alphabetical order.

    Of an attack's triggers, which may differ by seed, ratio and architecture, it is that of the first
    model whose attack took, or of the first model where none did.
    """
    shown: dict[str, Row] = {}
    for row in sorted(models.to_pylist(), key=lambda row: not row["attack_took"]):
        if row["dataset"] == dataset and row["attack"] != NO_METHOD:
            shown.setdefault(row["attack"], row)
    return [_block(row, *_example(row, examples)) for _, row in sorted(shown.items())]


def _example(row: Row, examples: Sequence[Example]) -> tuple[ImageSet, str]:
    """Return the images that show a model's trigger, and what that trigger belongs to."""
    for file, axes in examples:
        if all(row[axis] == value for axis, value in axes.items()):
            owner = f"{row['architecture']}\nratio {ratio_text(row['ratio'])}, " if "ratio" in axes else ""
            return artifacts.read_images(file), f"{owner}seed {row['seed']}"
    raise AssertionError(f"no examples of {row['attack']} on {row['dataset']}, seed {row['seed']}")


def _block(row: Row, images: ImageSet, owner: str) -> Block:
    half = len(images) // 2
    some = torch.linspace(0, half - 1, min(NUM_SHOWN, half)).round().long()  # not of the first classes only
    clean, triggered = images[some], images[half + some]
    factor = amplification(clean.images, triggered.images)
    details = [
        f"PSNR {_number(row['psnr'], 1)} dB, SSIM {_number(row['ssim'], 3)}",
        f"L∞ {_number(row['linf'], 0)}, difference ×{factor:g}",
        owner,
    ]
    return Block(row["attack"], "\n".join(details), not row["attack_took"], clean.images, triggered.images)


def _number(value: float | None, decimals: int) -> str:
    return UNDEFINED if value is None else f"{value:.{decimals}f}"


def amplification(clean: Tensor, triggered: Tensor) -> float:
    """Return what makes the largest difference of the images black or white: two digits, rounded down."""
    exact = 127.5 / max(1, linf(clean, triggered))
    scale = 10.0 ** (1 - math.floor(math.log10(exact)))
    return math.floor(exact * scale) / scale


# --- how it is drawn -------------------------------------------------------------------------------


def draw(blocks: Sequence[Block]) -> Figure:
    """Return a sheet: clean images on top, then a row an attack, triggered images beside differences."""
    if not blocks:
        return words("No model of this data set was attacked: there is no trigger to show.")
    clean = blocks[0].clean
    assert all(torch.equal(block.clean, clean) for block in blocks), "the attacks' test images differ"
    height = EDGE + PITCH + BAND + len(blocks) * PITCH + EDGE
    with mpl.rc_context(STYLE):
        figure = Figure((WIDTH, height))
        page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))  # inches from the top left
        page.set_axis_off()
        _head(page, blocks)
        for place, block in enumerate(blocks):
            _row(page, block, EDGE + PITCH + BAND + place * PITCH)
    return figure


def _head(page: Axes, blocks: Sequence[Block]) -> None:
    page.text(EDGE, EDGE, "clean", va="top", fontsize=NAME, fontweight="bold")
    _details(page, EDGE, EDGE + 0.15, "test images")
    _images(page, blocks[0].clean, HALVES[0], EDGE)
    key = [
        "PSNR, SSIM: of triggered against clean test images, means",
        "L∞: largest change, grey levels (0 to 255)",
        *(["failed: the attack failed the gate"] if any(block.failed for block in blocks) else []),
    ]
    _details(page, HALVES[1], EDGE, "\n".join(key))
    for left, text in zip(HALVES, ("triggered", "difference × factor (grey: none)"), strict=True):
        page.text(left, EDGE + PITCH + BAND - 0.05, text, fontsize=HEAD, color=GREY)


def _row(page: Axes, block: Block, top: float) -> None:
    page.text(EDGE, top, block.attack, va="top", fontsize=NAME, fontweight="bold")
    _details(page, EDGE, top + 0.15, block.details)
    if block.failed:
        page.text(HALVES[0] - 0.06, top + 0.02, "failed", va="top", ha="right", fontsize=DETAIL, color=RED)
    factor = amplification(block.clean, block.triggered)
    difference = 127.5 + factor * (block.triggered.double() - block.clean.double())
    for left, images in zip(HALVES, (block.triggered, difference.round().to(torch.uint8)), strict=True):
        _images(page, images, left, top)


def _details(page: Axes, left: float, top: float, lines: str) -> None:
    page.text(left, top, lines, va="top", fontsize=DETAIL, color=GREY, linespacing=1.15)


def _images(page: Axes, images: Tensor, left: float, top: float) -> None:
    times = math.ceil(ENLARGED / images.shape[-1])
    for place, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        x = left + place * PITCH
        pixels = np.repeat(np.repeat(image, times, 0), times, 1)
        page.imshow(pixels, extent=(x, x + SIDE, top + SIDE, top), aspect="auto", interpolation="none")
