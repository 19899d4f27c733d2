"""CIFAR-10 and CIFAR-100, GTSRB and Tiny-ImageNet in the folders that torchvision or their own archives make.

Each data set's source and layout on disk stand in its module under ``_layouts``.
"""

import http.client
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field

from detrojan.datasets._layouts import cifar10, cifar100, gtsrb, tiny_imagenet
from detrojan.datasets._layouts.base import Layout
from detrojan.datasets.base import (
    SPLITS,
    FileSource,
    RawImages,
    Split,
    count,
)

LAYOUTS: dict[str, Layout] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "gtsrb": gtsrb,
    "tiny_imagenet": tiny_imagenet,
}


class TorchvisionFolder(FileSource):
    """A published data set, as it lies on disk; fetched first where ``download`` says so."""

    path: Path = Field(description="folder that holds, or is, the data set's own (cifar-10-batches-py, ...)")
    layout: Literal["cifar10", "cifar100", "gtsrb", "tiny_imagenet"] = Field(
        description="which data set it is"
    )
    download: bool = Field(False, description="fetch the data set if it isn't there; needs the network")

    def counts(self, split: Split) -> Counter[int]:
        """Return how many images each label has on disk; those of the published set before a download.

        Raises:
            ValueError: the data set is neither there nor to be downloaded, or it is broken.
        """
        layout = LAYOUTS[self.layout]
        if self.download and layout.find(self.path) is None:
            return Counter(dict(enumerate(layout.PUBLISHED[split])))
        return count(layout.labels(self._folder(), split))

    def read(self, split: Split, side: int) -> RawImages:
        """Return all images of a split as RGB, resized to ``side`` × ``side`` pixels.

        Raises:
            ValueError: as for :meth:`counts`, or the download failed, or an image is broken.
        """
        layout = LAYOUTS[self.layout]
        if self.download and layout.find(self.path) is None:
            self._fetch()
        return layout.read(self._folder(), split, side, self.orientation)

    def class_names(self) -> tuple[str, ...]:
        """Return the name of each class; labels' numbers where only the data set to be fetched has names."""
        layout = LAYOUTS[self.layout]
        if self.download and layout.find(self.path) is None:
            return layout.names(None)
        return layout.names(self._folder())

    def places(self) -> list[Path]:
        """Return the data set's own folder, and what lies beside it; nothing before a download."""
        layout = LAYOUTS[self.layout]
        folder = layout.find(self.path)
        if folder is None:
            return []
        return [folder, *(file for name in layout.BESIDE if (file := folder.parent / name).is_file())]

    def left_out(self) -> dict[str, list[str]]:
        """Return the files that lie where the images do, but that no table or class names."""
        layout = LAYOUTS[self.layout]
        if self.download and layout.find(self.path) is None:
            return {}
        names = [str(file) for split in SPLITS for file in layout.unnamed(self._folder(), split)]
        return {"in no table, or no image of a class": names} if names else {}

    def remarks(self) -> list[str]:
        """Return what is left out, and where there are more or fewer images than were published."""
        lines = super().remarks()
        for split in SPLITS:
            found, published = self.counts(split), LAYOUTS[self.layout].PUBLISHED[split]
            wrong = [label for label, number in enumerate(published) if found[label] != number]
            if wrong:
                lines.append(
                    f"{split} has {found.total()} images, but {sum(published)} were published as "
                    f"{self.layout}: class {wrong[0]} has {found[wrong[0]]} of {published[wrong[0]]}, and "
                    f"{len(wrong)} of {len(published)} classes differ; unpack the archive anew to have all"
                )
        return lines

    def _folder(self) -> Path:
        folder = LAYOUTS[self.layout].find(self.path)
        if folder is None and (self.path / "Test.csv").is_file():
            raise ValueError(
                f"{self.path}: GTSRB as Kaggle has it, with Train/, Test/ and Test.csv, which is laid out "
                "otherwise: fetch the original archives (download: true), or sort the images into "
                "train/CLASS/ and test/CLASS/, those of Test by their ClassId, and take source: image_folder"
            )
        if folder is None:
            raise ValueError(
                f"{self.path}: no {self.layout} in it ({LAYOUTS[self.layout].FOLDER} is missing): set path "
                "to the folder that holds it, or say download: true to fetch it there"
            )
        return folder

    def _fetch(self) -> None:
        layout = LAYOUTS[self.layout]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Unpacked aside and then renamed: an interrupted download must not look like a data set.
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".download-") as scratch:
                layout.fetch(scratch)
                (Path(scratch) / layout.FOLDER).rename(self.path / layout.FOLDER)
        except (
            OSError,
            RuntimeError,
            http.client.HTTPException,
            tarfile.TarError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(
                f"{self.path}: could not download {self.layout} ({error}); put {layout.FOLDER} there by "
                "hand, or run this stage on a machine that has a network"
            ) from error
