"""What a source of images is, and what sources share: decoding, resizing, counting.

Free of torch: the Snakefile counts a source's images while it is parsed.
"""

import contextlib
import dataclasses
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, field_validator

from detrojan.cells import label_of

Split = Literal["train", "test"]
SPLITS: tuple[Split, Split] = ("train", "test")
Orientation = Literal["applied", "stored"]
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclasses.dataclass
class Found:
    """What decoding has met.

    Attributes:
        sizes: how many images have which width and height, pixels, as they are looked at.
        turned: how many have an EXIF orientation other than upright.
    """

    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    turned: int = 0


@dataclasses.dataclass(frozen=True)
class RawImages:
    """Labelled images as a source gives them, resized.

    Attributes:
        images: uint8 (N, H, W, 3), 0 to 255.
        labels: int64 (N,), 0 to len(classes) - 1.
        classes: the name of each label, in order; equal for both splits.
        names: of each image, its file or shard and row, for messages; empty where the source has none.
        found: what decoding has met, in all of the split; None where nothing was decoded.
    """

    images: Pixels
    labels: Labels
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()
    found: Found | None = None

    def __getitem__(self, rows: Labels | npt.NDArray[np.bool_]) -> "RawImages":
        """Return the images at ``rows``, positions or a mask."""
        names = tuple(np.array(self.names, object)[rows]) if self.names else ()
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows], names=names)


class Source(BaseModel):
    """A kind of source; its fields are what a study file says under ``datasets: NAME:`` besides the
    fields that all data sets have.

    Errors in the data (missing, corrupt, truncated, empty, mislabelled) are ``ValueError`` and name
    the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*")
    @classmethod
    def _whole_paths(cls, value: Any) -> Any:
        """Put the home folder in place of ``~``, and a variable's value in place of ``$NAME``."""
        if not isinstance(value, Path):
            return value
        try:
            whole = os.path.expandvars(value.expanduser())
        except RuntimeError as error:
            raise ValueError(f"{value}: {error}") from None
        if unknown := re.search(r"\$(\w+|\{\w+\})", whole):
            raise ValueError(
                f"{value}: the environment has no {unknown[0]}; set it, or write the path itself"
            )
        return Path(whole)

    def counts(self, split: Split) -> Counter[int]:
        """Return how many images each label has, without decoding one; cheap, for planning."""
        raise NotImplementedError

    def read(self, split: Split, side: int) -> RawImages:
        """Return all images of a split as RGB, resized to ``side`` × ``side`` pixels."""
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...]:
        """Return the name of each label, as ``read`` does; cheap, as :meth:`counts`.

        Labels are their own names here: a source whose classes have others says so.
        """
        return tuple(map(str, range(max(self.counts("train"), default=-1) + 1)))

    def check_classes(self, wanted: Sequence[int | str] | None) -> None:
        """Refuse what is wrong with classes that a study uses, and with no others; cheap, as :meth:`counts`.

        Args:
            wanted: the classes, by number or name, as ``selected`` takes them; all for None.

        Raises:
            ValueError: something is wrong, or there is no such class.
        """

    def places(self) -> list[Path]:
        """Return the files and folders that hold all that is read, for whoever asks whether they changed."""
        return [value for name in type(self).model_fields if isinstance(value := getattr(self, name), Path)]

    def left_out(self) -> dict[str, list[str]]:
        """Return what lies there and is not read, by the reason; cheap, as :meth:`counts`.

        What no one takes for an image (hidden files, an operating system's thumbnails) is not among it.
        """
        return {}

    def remarks(self) -> list[str]:
        """Return what may be wrong and is no error, a line each; cheap, as :meth:`counts`."""
        lines = [
            f"left out, {why}: {len(names)} {'file' if len(names) == 1 else 'files'}: {listed(names)}"
            for why, names in self.left_out().items()
        ]
        train, test = +self.counts("train"), self.counts("test")  # without classes that have no image
        names = self.class_names()
        if untested := [f"{label} ({names[label]})" for label in sorted(train) if not test[label]]:
            lines.append(
                f"{len(untested)} of {len(train)} classes have training images, but no test image: "
                f"{listed(untested)}"
            )
        return lines


class FileSource(Source):
    """A source whose images are encoded, as JPEG, PNG and the like."""

    orientation: Literal["applied", "stored"] = Field(
        "applied", description="turn images as their EXIF entry says, as viewers do, or leave them as stored"
    )


# --- words ---------------------------------------------------------------------------------------


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first few of ``names``, and "..." where there are more."""
    return ", ".join([*names[:most], "..."] if len(names) > most else names)


# --- counts ----------------------------------------------------------------------------------------


def count(labels: Labels) -> Counter[int]:
    """Return how many images each label has."""
    return Counter(labels.tolist())


def selected(classes: Sequence[str], wanted: Sequence[int | str] | None) -> list[int]:
    """Return the labels that a study keeps, in its order, given by number or by name; all for None.

    Raises:
        ValueError: one is no class, or stands there by number and by name.
    """
    if wanted is None:
        return list(range(len(classes)))
    try:
        labels = [label_of(one, classes) for one in wanted]
    except ValueError as error:
        raise ValueError(f"classes: {error}") from None
    for place, label in enumerate(labels):
        if label in labels[:place]:
            raise ValueError(f"classes: {wanted[place]!r} is label {label}, which stands there already")
    return labels


def selected_counts(
    counts: Counter[int], classes: Sequence[str], wanted: Sequence[int | str] | None
) -> Counter[int]:
    """Return how many images each label that a study keeps has, numbered by its place there.

    Raises:
        ValueError: as for :func:`selected`.
    """
    return Counter({place: counts[label] for place, label in enumerate(selected(classes, wanted))})


def split_counts(
    counts: Counter[int], held_out: float, per_class: int | None
) -> tuple[Counter[int], Counter[int]]:
    """Return how many images of each class training and the defender's pool get (train, held out).

    Args:
        counts: the source's training images of each class.
        held_out: share of each class for the pool, rounded half to even; at least one image unless 0.
        per_class: how many images of a class count at all; None for all of them.

    Raises:
        ValueError: a class would have no training image left.
    """
    train: Counter[int] = Counter()
    reserved: Counter[int] = Counter()
    for label in sorted(counts):
        number = counts[label] if per_class is None else min(counts[label], per_class)
        reserved[label] = max(1, round(held_out * number)) if held_out > 0 else 0
        train[label] = number - reserved[label]
        if train[label] < 1:
            raise ValueError(
                f"class {label} has {number} training images, and held_out {held_out:g} reserves "
                f"{reserved[label]} of them, which leaves none to train on: lower held_out, or give "
                "the class more images"
            )
    return train, reserved


def refuse_missing_classes(counts: Counter[int], classes: Sequence[str], where: Path | str) -> None:
    """Raise ``ValueError``, which names ``where``, if a class has no image among the training ``counts``."""
    missing = [label for label in range(len(classes)) if not counts[label]]
    if missing:
        raise ValueError(
            f"{where}: no training image of class {missing[0]} ({classes[missing[0]]}); {len(missing)} of "
            f"{len(classes)} classes have none: add images, number the labels from 0 without gaps, or say "
            "in the study which classes to use"
        )


# --- pixels ----------------------------------------------------------------------------------------

# What operating systems and file managers leave in folders, besides hidden files.
CLUTTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir"}
# What we know to read right. Of the others that Pillow knows, EPS would start Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
NAMED = 10  # broken images that a message names
ORIENTATION = 0x0112  # the EXIF entry
# What turns an image as its EXIF entry says, and what undoes it.
TURNS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_180),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSPOSE),
    6: (Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_90),
    7: (Image.Transpose.TRANSVERSE, Image.Transpose.TRANSVERSE),
    8: (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
}


def is_clutter(name: str) -> bool:
    """Return whether nobody means a file or folder of this name: hidden ones, thumbnails."""
    return name.startswith(".") or name.lower() in CLUTTER


def suffixes() -> set[str]:
    """Return the suffixes of the files that :func:`decode` reads, in lower case."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def refuse_all(problems: Sequence[str]) -> None:
    """Raise ``ValueError``, which names ten of ``problems`` and counts the others, if there are any."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise ValueError(f"{len(problems)} problems: {'; '.join(problems[:NAMED])}{more}")


class BrokenImageError(ValueError):
    """Images that can't be read, each in a line of :attr:`lines`: whoever mends them sees all at once."""

    lines: list[str]

    @classmethod
    def of(cls, lines: Sequence[str]) -> "BrokenImageError":
        """Return an error that names the first ten and counts the others."""
        more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
        head = f"{len(lines)} images can't be read: " if len(lines) > 1 else ""
        error = cls(f"{head}{'; '.join(lines[:NAMED])}{more}; replace or remove {'them' if head else 'it'}")
        error.lines = list(lines)
        return error


def decode_all(
    encoded: Iterable[tuple[str, Path | bytes]],
    num_images: int,
    side: int,
    orientation: Orientation = "applied",
    found: Found | None = None,
) -> Pixels:
    """Return images as RGB, resized, uint8 (num_images, side, side, 3), in the order of ``encoded``.

    No threads: Pillow releases the GIL, but for images as small as these the hand-over costs more
    than the second core gives (32 and 64 pixels, two cores: two threads took 1.4 to 1.7 times as long).

    Args:
        encoded: the name of each image, for errors, and its file or the file's content.
        num_images: how many there are; the result is one block of memory, allocated once.
        side: of the result, pixels.
        orientation: what becomes of EXIF orientations, see :func:`decode`.
        found: is told what decoding meets.

    Raises:
        BrokenImageError: images are missing or broken; all are tried.
    """
    pixels = np.empty((num_images, side, side, 3), np.uint8)
    filled = 0
    broken = []
    for name, content in encoded:
        try:
            image = decode(name, content, orientation, found)
            pixels[filled] = _resized(image, side)
        except BrokenImageError as error:
            broken.append(str(error))
        filled += 1
    if broken:
        raise BrokenImageError.of(broken)
    assert filled == num_images, (filled, num_images)
    return pixels


def decode(
    name: str, content: Path | bytes, orientation: Orientation = "applied", found: Found | None = None
) -> Image.Image:
    """Return an image as RGB in its own size.

    Of an animation, it's the first frame. Transparent parts show white.

    Args:
        name: of the image, for errors.
        content: its file or the file's content, in one of ``FORMATS``.
        orientation: "applied" turns an image as its EXIF entry says, as all viewers do and Pillow itself
            does with TIFF alone; "stored" leaves the pixels as they lie in the file, of TIFF too.
        found: is told size and orientation.

    Raises:
        BrokenImageError: it is missing, truncated or broken, or its pixels have no meaning as RGB.
    """
    # Pillow's decoders raise a dozen unrelated types on broken input, SyntaxError and struct.error
    # among them; all of them mean the same here.
    try:
        if isinstance(content, Path) and content.exists() and not content.is_file():
            raise ValueError(
                "no regular file, but a folder, a pipe or a device"
            )  # a pipe would be read for ever
        raw = content.read_bytes() if isinstance(content, Path) else content
        # Loading skips checksums that verifying checks (PNG), and a verified image can't be loaded.
        with _opened(raw) as image:
            image.verify()
        with _opened(raw) as image:
            is_turned = image.format == "TIFF"  # by Pillow, while it loads the pixels
            turns = _turns(image) if is_turned else None
            rgb = _rgb(image)
            turns = turns or _turns(image)
    except UnidentifiedImageError as error:
        kind = "an unknown format" if raw else "an empty file"
        raise BrokenImageError(f"{name}: no image ({kind})") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BrokenImageError(f"{name}: no whole image ({reason})") from error
    if turns and is_turned != (orientation == "applied"):
        rgb = rgb.transpose(turns[is_turned])
    if found:
        found.sizes[rgb.size] += 1
        found.turned += bool(turns)
    return rgb


def _opened(raw: bytes) -> Image.Image:
    Image.init()
    return Image.open(io.BytesIO(raw), formats=[name for name in FORMATS if name in Image.OPEN])


def _turns(image: Image.Image) -> tuple[Image.Transpose, Image.Transpose] | None:
    """Return what turns an image as its EXIF entry says, and what undoes that; None if nothing is."""
    # Cameras and editors write broken EXIF; the image is whole all the same, and as it lies.
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    return None


def of_one_colour(images: Pixels) -> npt.NDArray[np.bool_]:
    """Return which images (N, H, W, 3) have pixels of one colour only, bool (N,)."""
    rows = np.flatnonzero((images[:, 0, 0] == images[:, -1, -1]).all(1))  # no others need a closer look
    found = np.zeros(len(images), np.bool_)
    found[rows] = [bool((images[row] == images[row, 0, 0]).all()) for row in rows]
    return found


def resize_all(images: Pixels, side: int) -> Pixels:
    """Return images (N, H, W, 3) resized to (N, side, side, 3); themselves where that is their size."""
    if images.shape[1:3] == (side, side):
        return images
    resized = np.empty((len(images), side, side, 3), np.uint8)
    for row, image in enumerate(images):
        resized[row] = _resized(Image.fromarray(image), side)
    return resized


def _resized(image: Image.Image, side: int) -> Pixels:
    """Return an RGB image as uint8 (side, side, 3), stretched where it isn't square.

    Pillow's bilinear filter widens its support when it shrinks, so there is no aliasing.
    """
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def _rgb(image: Image.Image) -> Image.Image:
    # Before transparency: Pillow clips grey of 16 bits at 255 when it converts it.
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey(image)
    if image.has_transparency_data:
        # Just dropping alpha would show whatever colour an editor left under transparent pixels.
        layer = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
        if _is_flat(flat) and not _is_flat(layer.getchannel("A")):
            raise ValueError("white on transparent, which shows white on white; give it a background")
        return flat
    if image.mode == "F":
        raise ValueError("floating-point grey levels of unknown range; save it with 8 bits")
    return image.convert("RGB")


def _is_flat(image: Image.Image) -> bool:
    """Return whether all pixels are of one colour."""
    extrema = np.reshape(image.getextrema(), (-1, 2))  # lowest and highest level of each channel
    return bool((extrema[:, 0] == extrema[:, 1]).all())


def _grey(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit grey levels as RGB: its high byte, as Pillow does with 16-bit colour."""
    # Pillow gives 16-bit PNM, and no other 16-bit file, as 32 bits, scaled to 65,535.
    if image.mode == "I" and image.format not in ("PPM", "PNG"):
        raise ValueError("32-bit grey levels of unknown range; save it with 8 or 16 bits")
    grey = np.asarray(image)
    pixels = (grey >> 8).astype(np.uint8)
    level = image.info.get("transparency")
    if isinstance(level, int):
        pixels[grey == level] = 255  # transparent parts show white
    return Image.fromarray(pixels).convert("RGB")
