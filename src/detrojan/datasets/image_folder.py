"""A folder of images, a subfolder a class, as torchvision's ``ImageFolder`` lays it out."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from detrojan.datasets.base import (
    SPLITS,
    FileSource,
    Found,
    RawImages,
    Split,
    decode_all,
    is_clutter,
    refuse_all,
    selected,
    suffixes,
)


class _Class(NamedTuple):
    """The files of one class: images, what is left out, and what is wrong."""

    images: list[str]
    others: list[str]
    problems: list[str]


class ImageFolder(FileSource):
    """Images of the formats of ``base.FORMATS``, in ``train/CLASS/`` and ``test/CLASS/``.

    Classes are numbered in the order of their names, as numbers where all are numbers; images lie in the
    order of theirs. What has another suffix is left out, and told; a class of which most is left out is
    refused if the study uses it.
    """

    path: Path = Field(description="folder that holds train/ and test/")

    def counts(self, split: Split) -> Counter[int]:
        """Return how many image files each class folder of a split holds.

        Raises:
            ValueError: the split's class folders are not those of train.
        """
        classes = self._files(split).values()
        return Counter({label: len(files.images) for label, files in enumerate(classes)})

    def read(self, split: Split, side: int) -> RawImages:
        """Return all images of a split as RGB, resized to ``side`` × ``side`` pixels.

        Raises:
            ValueError: as for :meth:`counts`, or an image is broken.
        """
        classes = self._files(split)
        files = [file for members in classes.values() for file in members.images]
        encoded = ((file, Path(file)) for file in files)
        found = Found()
        images = decode_all(encoded, len(files), side, self.orientation, found)
        labels = np.repeat(np.arange(len(classes)), [len(members.images) for members in classes.values()])
        return RawImages(images, labels.astype(np.int64), tuple(classes), tuple(files), found)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class folders, in the order of their labels."""
        return tuple(self._classes("train"))

    def check_classes(self, wanted: Sequence[int | str] | None) -> None:
        """Refuse class folders without images, of which most is left out, or with links that lead nowhere."""
        names = self._classes("train")
        used = [names[label] for label in selected(names, wanted)]
        found = [self._files(split) for split in SPLITS]
        refuse_all([said for files in found for name in used for said in files[name].problems])

    def left_out(self) -> dict[str, list[str]]:
        """Return the files that are no images by their suffix, and those that lie in no class folder."""
        found: dict[str, list[str]] = {}
        for split in SPLITS:
            loose = [entry.path for entry in _entries(self.path / split) if not entry.is_dir()]
            files = [file for members in self._files(split).values() for file in members.others]
            for why, names in (("in no class folder", loose), ("of no image format that is read", files)):
                if names:
                    found.setdefault(why, []).extend(names)
        return found

    def _files(self, split: Split) -> dict[str, _Class]:
        """Return the files of each class, both in the order of their names."""
        train, test = self._classes("train"), self._classes("test")
        for name in sorted(set(train) ^ set(test)):
            has, lacks = ("train", "test") if name in train else ("test", "train")
            raise ValueError(
                f"{self.path / lacks / name}: no such class folder, but {has} has one: both splits need the "
                f"same classes, so add it to {lacks} or remove it from {has}"
            )
        for name in train:
            folder, other = self.path / "test" / name, self.path / "train" / name
            if folder.samefile(other):
                raise ValueError(
                    f"{folder}: the same folder as {other}, so a model would be tested on what it learned; "
                    "give each split its own images"
                )
        known = suffixes()
        return {name: _class(self.path / split / name, known) for name in train}

    def _classes(self, split: Split) -> list[str]:
        folder = self.path / split
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; {_hint(self.path, split)}")
        entries = _entries(folder)
        refuse_all([said for entry in entries if (said := _leads_nowhere(entry))])
        classes = [entry.name for entry in entries if entry.is_dir()]
        if all(name.isdecimal() for name in classes):
            classes.sort(key=lambda name: (int(name), name))  # 10 after 9: as text it would follow 1
        if not classes:
            raise ValueError(
                f"{folder}: no class folders in it; put each class's images in a folder of its own"
            )
        return classes


def _hint(path: Path, split: Split) -> str:
    """Return what to do where a split's folder is missing, by what lies there."""
    names = {entry.name.lower(): entry.name for entry in _entries(path)} if path.is_dir() else {}
    others = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation")}[split]
    if found := [names[name] for name in others if name in names]:
        link = f"ln -s {found[0]} {path / split}"
        return f"{found[0]}/ lies there: if it is meant, rename it, or link to it ({link})"
    return "path must name a folder that holds train/CLASS/ and test/CLASS/"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder, in the order of the names; what nobody means is not among it."""
    with os.scandir(folder) as entries:
        return sorted(
            (entry for entry in entries if not is_clutter(entry.name)), key=lambda entry: entry.name
        )


def _leads_nowhere(entry: os.DirEntry[str]) -> str:
    """Return what is wrong with a link; empty if nothing is."""
    # Asks the file system about links alone: there may be a million files.
    if not entry.is_symlink() or Path(entry.path).exists():
        return ""
    where = Path(entry.path).readlink()
    return f"{entry.path}: a link that leads nowhere, to {where}; mount or fetch what it means, or remove it"


def _wrong(entry: os.DirEntry[str], is_image: bool) -> str:
    """Return what is wrong with an entry of a class folder; empty if nothing is."""
    if entry.is_dir():
        return (
            f"{entry.path}: a folder inside a class folder; images must lie directly in that, so move or "
            "remove it"
        )
    if is_image and not entry.is_symlink() and not entry.is_file():
        return f"{entry.path}: no regular file, but a pipe or a device; remove it"
    return _leads_nowhere(entry)


def _class(folder: Path, known: set[str]) -> _Class:
    found = _Class([], [], [])
    for entry in _entries(folder):
        is_image = os.path.splitext(entry.name)[1].lower() in known  # noqa: PTH122 (a Path each takes seconds)
        if said := _wrong(entry, is_image):
            found.problems.append(said)
        else:
            (found.images if is_image else found.others).append(entry.path)
    if found.problems:
        return found
    if len(found.others) > len(found.images):
        found.problems.append(
            f"{folder}: {len(found.images)} images, but {len(found.others)} files of no format that is read, "
            f"as {Path(found.others[0]).name}: convert them, to PNG say, or remove them"
        )
    elif not found.images:
        found.problems.append(
            f"{folder}: a class folder without images; add some, or remove it from both splits"
        )
    return found
