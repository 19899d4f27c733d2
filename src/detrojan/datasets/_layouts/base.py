"""What a layout is, and what layouts share: finding folders, listing and reading files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from detrojan.datasets.base import Found, Labels, Orientation, RawImages, Split, decode_all, is_clutter

File = tuple[Path, int]  # an image and its label


class Layout(Protocol):
    """How one data set lies on disk; each module beside this one is such a layout.

    Attributes:
        FOLDER: what its archive unpacks to, or torchvision's download makes.
        BESIDE: names of files beside its folder that belong to it.
        PUBLISHED: how many images each label of the published data set has.
    """

    FOLDER: str
    BESIDE: tuple[str, ...]
    PUBLISHED: dict[Split, tuple[int, ...]]

    def find(self, path: Path) -> Path | None:
        """Return the folder that holds the images, given the path that the user names; None if none does."""

    def names(self, folder: Path | None) -> tuple[str, ...]:
        """Return the name of each class, given what ``find`` returned; None before a download."""

    def labels(self, folder: Path, split: Split) -> Labels:
        """Return the labels of a split, given what ``find`` returned; decodes no image."""

    def unnamed(self, folder: Path, split: Split) -> list[Path]:
        """Return what lies beside a split's images and is none of them, given what ``find`` returned."""

    def read(self, folder: Path, split: Split, side: int, orientation: Orientation) -> RawImages:
        """Return a split's images, given what ``find`` returned, as RGB of ``side`` × ``side`` pixels."""

    def fetch(self, root: str) -> None:
        """Download and unpack it, so that ``FOLDER`` lies in ``root``."""


def first_folder(candidates: Iterable[Path], *contents: str) -> Path | None:
    """Return the first of ``candidates`` that holds one of ``contents``; None if there is none."""
    return next(
        (folder for folder in candidates if any((folder / inner).exists() for inner in contents)), None
    )


def read_files(files: list[File], classes: tuple[str, ...], side: int, orientation: Orientation) -> RawImages:
    """Return the images in ``files``, in their order, as RGB, resized to ``side`` × ``side`` pixels.

    Raises:
        ValueError: an image is missing or broken.
    """
    found = Found()
    encoded = ((str(file), file) for file, _ in files)
    images = decode_all(encoded, len(files), side, orientation, found)
    return RawImages(images, file_labels(files), classes, tuple(str(file) for file, _ in files), found)


def file_labels(files: list[File]) -> Labels:
    """Return the label of each file."""
    return np.array([label for _, label in files], np.int64)


def listing(folder: Path, suffix: str) -> list[Path]:
    """Return the files in ``folder`` with this suffix in any case, in the order of their names.

    Raises:
        ValueError: there are none.
    """
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    found = [file for file in files if file.suffix.lower() == suffix and not file.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder}: no {suffix} images there; unpack the data set's archive again")
    return found


def unnamed_files(files: list[File], folders: Iterable[Path], expected: tuple[str, ...] = ()) -> list[Path]:
    """Return what lies in ``folders`` and is none of ``files``; ``expected`` suffixes and clutter aside."""
    named = {file for file, _ in files}
    found = (file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir()))
    return [
        file
        for file in found
        if file not in named and file.suffix.lower() not in expected and not is_clutter(file.name)
    ]


def lines(file: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        ValueError: it is missing, or not UTF-8.
    """
    if file.exists() and not file.is_file():  # a pipe would be read for ever
        raise ValueError(f"{file}: no regular file; unpack the data set's archive again")
    try:
        # Windows' editors put a mark before the text, which utf-8 alone would take for part of it.
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: can't be read ({error}); unpack the data set's archive again") from error
