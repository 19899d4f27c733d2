"""A folder of images, a subfolder a class, as torchvision's ``ImageFolder`` lays it out."""

from collections import Counter
from pathlib import Path

import numpy as np
from pydantic import Field

from detrojan.datasets.base import FileSource, RawImages, Split, decode_all, suffixes


class ImageFolder(FileSource):
    """Images of the formats of ``base.FORMATS``, in ``train/CLASS/`` and ``test/CLASS/``.

    Classes are numbered in the order of their names, and images lie in the order of theirs. Hidden
    files and files of other kinds are left out.
    """

    path: Path = Field(description="folder that holds train/ and test/")

    def counts(self, split: Split) -> Counter[int]:
        """Return how many image files each class folder of a split holds.

        Raises:
            ValueError: the split's class folders are not those of train, or hold no images.
        """
        return Counter({label: len(files) for label, files in enumerate(self._files(split).values())})

    def read(self, split: Split, side: int) -> RawImages:
        """Return all images of a split as RGB, resized to ``side`` × ``side`` pixels.

        Raises:
            ValueError: as for :meth:`counts`, or an image is broken.
        """
        classes = self._files(split)
        files = [file for members in classes.values() for file in members]
        images = decode_all(((str(file), file) for file in files), len(files), side, self.orientation)
        labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])
        return RawImages(images, labels.astype(np.int64), tuple(classes), tuple(map(str, files)))

    def _files(self, split: Split) -> dict[str, list[Path]]:
        """Return the image files of each class, both in the order of their names."""
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
        return {name: _images(self.path / split / name, known) for name in train}

    def _classes(self, split: Split) -> list[str]:
        folder = self.path / split
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder; path must name a folder that holds train/CLASS/ and test/CLASS/"
            )
        classes = sorted(entry.name for entry in _visible(folder) if entry.is_dir())
        if not classes:
            raise ValueError(
                f"{folder}: no class folders in it; put each class's images in a folder of its own"
            )
        return classes


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _images(folder: Path, suffixes: set[str]) -> list[Path]:
    entries = sorted(_visible(folder), key=lambda entry: entry.name)
    # What has an image's suffix isn't asked whether it is a folder: that would be a question to the
    # file system for every image, each time that the workflow is planned.
    images = [entry for entry in entries if entry.suffix.lower() in suffixes]
    nested = [entry for entry in entries if entry.suffix.lower() not in suffixes and entry.is_dir()]
    if nested:
        raise ValueError(
            f"{nested[0]}: a folder inside a class folder; images must lie directly in {folder}, so move or "
            "remove it"
        )
    if not images:
        raise ValueError(f"{folder}: a class folder without images; add some, or remove it from both splits")
    return images
