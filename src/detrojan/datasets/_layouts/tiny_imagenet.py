"""Tiny-ImageNet, in the folders of its archive.

Source: Stanford CS231n's Tiny ImageNet.
"""

from pathlib import Path

from detrojan.datasets._layouts.base import (
    File,
    file_labels,
    first_folder,
    lines,
    listing,
    read_files,
    unnamed_files,
)
from detrojan.datasets.base import Labels, Orientation, RawImages, Split, is_clutter

FOLDER = "tiny-imagenet-200"
BESIDE: tuple[str, ...] = ()
PUBLISHED: dict[Split, tuple[int, ...]] = {"train": (500,) * 200, "test": (50,) * 200}
ARCHIVE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def find(path: Path) -> Path | None:
    """Return the folder that holds the images of both splits; None if there is none."""
    return first_folder([path / FOLDER, path], "wnids.txt", "train", "val")


def _wnids(folder: Path) -> list[str]:
    """Return the WordNet id of each label: the labels follow the ids' alphabetical order."""
    wnids = sorted({line.strip() for line in lines(folder / "wnids.txt")} - {""})
    if not wnids:
        raise ValueError(f"{folder / 'wnids.txt'}: it names no class; unpack the archive again")
    return wnids


def _files(folder: Path, split: Split) -> list[File]:
    wnids = _wnids(folder)
    if split == "train":
        return [
            (file, label)
            for label, wnid in enumerate(wnids)
            for file in listing(folder / "train" / wnid / "images", ".jpeg")
        ]
    # The images of the folder test have no labels; those of val are what everyone tests on.
    table = folder / "val" / "val_annotations.txt"
    files = []
    for number, line in enumerate(lines(table), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in wnids:
            raise ValueError(
                f"{table}, line {number}: {wnid!r} is no class of wnids.txt; unpack the archive again"
            )
        files.append((folder / "val" / "images" / name, wnids.index(wnid)))
    if not files:
        raise ValueError(f"{table}: no rows; unpack the archive again")
    return files


def names(folder: Path | None) -> tuple[str, ...]:
    """Return the words for each class, or its WordNet id without any; before a download, its number.

    Raises:
        ValueError: a list of the classes is missing or broken.
    """
    if folder is None:
        return tuple(map(str, range(len(PUBLISHED["train"]))))
    words = folder / "words.txt"
    known = dict(line.split("\t", 1) for line in lines(words) if "\t" in line) if words.is_file() else {}
    return tuple(known.get(wnid, wnid) for wnid in _wnids(folder))


def labels(folder: Path, split: Split) -> Labels:
    """Return the labels of a split; decodes no image.

    Raises:
        ValueError: a folder or table is missing or broken.
    """
    return file_labels(_files(folder, split))


def unnamed(folder: Path, split: Split) -> list[Path]:
    """Return the files beside the images of a split, and training folders of classes that wnids.txt lacks."""
    files = _files(folder, split)
    found = unnamed_files(files, dict.fromkeys(file.parent for file, _ in files))
    if split == "test":
        return found
    wnids = set(_wnids(folder))
    folders = (entry for entry in sorted((folder / "train").iterdir()) if entry.name not in wnids)
    return found + [entry for entry in folders if not is_clutter(entry.name)]


def read(folder: Path, split: Split, side: int, orientation: Orientation) -> RawImages:
    """Return the images of a split as RGB, resized to ``side`` × ``side`` pixels.

    Raises:
        ValueError: a folder, table or image is missing or broken.
    """
    return read_files(_files(folder, split), names(folder), side, orientation)


def fetch(root: str) -> None:
    """Download and unpack the archive into ``root``."""
    from detrojan.models._parts.torchvision import torchvision

    torchvision.datasets.utils.download_and_extract_archive(ARCHIVE, root, md5=MD5)
