"""CIFAR-10, as its binary or its pickled batches.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from detrojan.datasets._layouts.base import first_folder
from detrojan.datasets.base import Labels, Orientation, Pixels, RawImages, Split, resize_all

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SIDE = 32
BYTES = 3 * SIDE**2  # of an image: all red values, all green ones, all blue ones
BATCHES: dict[Split, list[str]] = {
    "train": [f"data_batch_{number}" for number in range(1, 6)],
    "test": ["test_batch"],
}
FOLDER = "cifar-10-batches-py"
BINARY_FOLDER = "cifar-10-batches-bin"
BESIDE: tuple[str, ...] = ()
PUBLISHED: dict[Split, tuple[int, ...]] = {"train": (5000,) * 10, "test": (1000,) * 10}


def find(path: Path) -> Path | None:
    """Return the folder that holds the batches; None if there is none."""
    candidates = [path / BINARY_FOLDER, path / FOLDER, path]
    # The binary batches come first: nothing needs to be unpickled.
    return first_folder(
        candidates, *(f"{name}{suffix}" for name in BATCHES["train"] for suffix in (".bin", ""))
    )


def _batches(folder: Path, split: Split) -> list[tuple[Pixels, Labels]]:
    """Return the flat images (N, 3072) and the labels of each batch."""
    is_binary = any((folder / f"{name}.bin").exists() for name in BATCHES["train"])
    batches = []
    for name in BATCHES[split]:
        file = folder / (f"{name}.bin" if is_binary else name)
        if not file.is_file():
            raise ValueError(f"{file}: this batch is missing; unpack the CIFAR-10 archive again")
        images, labels = _binary_batch(file) if is_binary else _pickled_batch(file)
        if not 0 <= labels.min() <= labels.max() < len(CLASSES):
            row = int(np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))[0])
            raise ValueError(f"{file}, image {row}: label {labels[row]}, but CIFAR-10 has labels 0 to 9")
        batches.append((images, labels))
    return batches


def names(folder: Path | None) -> tuple[str, ...]:
    """Return the name of each class."""
    return CLASSES


def labels(folder: Path, split: Split) -> Labels:
    """Return the labels of a split; decodes no image.

    Raises:
        ValueError: a batch is missing or broken.
    """
    return np.concatenate([labels for _, labels in _batches(folder, split)])


def unnamed(folder: Path, split: Split) -> list[Path]:
    """Return nothing: batches are read whole."""
    return []


def read(folder: Path, split: Split, side: int, orientation: Orientation) -> RawImages:
    """Return the images of a split as RGB, resized to ``side`` × ``side`` pixels.

    They are pixels, and have no ``orientation``.

    Raises:
        ValueError: a batch is missing or broken.
    """
    batches = _batches(folder, split)
    labels = np.concatenate([labels for _, labels in batches])
    images = np.empty((len(labels), side, side, 3), np.uint8)
    start = 0
    for flat, _ in batches:
        planes = flat.reshape(-1, 3, SIDE, SIDE)
        pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        images[start : start + len(flat)] = resize_all(pixels, side)
        start += len(flat)
    return RawImages(images, labels, CLASSES)


def _binary_batch(file: Path) -> tuple[Pixels, Labels]:
    """Return the images and labels of a batch whose records are a label's byte and an image's."""
    raw = np.fromfile(file, np.uint8)
    if not len(raw) or len(raw) % (1 + BYTES):
        raise ValueError(
            f"{file}: {len(raw)} bytes are no whole number of records of {1 + BYTES}; unpack the "
            "CIFAR-10 archive again"
        )
    records = raw.reshape(-1, 1 + BYTES)
    return records[:, 1:], records[:, 0].astype(np.int64)


class _Built:
    """What a pickled batch builds in place of an array or a dtype: it only keeps what it's given."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _BatchUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, texts and arrays, and calls nothing that a file names.

    A pickle may name any function and call it. Here the four names that CIFAR's batches hold stand
    for a class of ours that runs no code, and any other name ends the reading. So not even numpy sees
    a shape or a dtype from the file before it's checked.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for ``module.name``.

        Raises:
            pickle.UnpicklingError: no batch of CIFAR-10 needs it.
        """
        # Written by numpy 1 or 2, on Python 2 or 3.
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return _Built
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")


def _pickled_batch(file: Path) -> tuple[Pixels, Labels]:
    try:
        with file.open("rb") as opened:
            batch = _BatchUnpickler(opened, encoding="latin1").load()
        labels = np.array([int(label) for label in batch["labels"]], np.int64)
        images = _pixels(batch["data"])
        if not len(labels) or images.shape != (len(labels), BYTES):
            raise ValueError(f"{len(labels)} labels, but images of shape {images.shape}")
    # A broken or foreign pickle ends in any of a dozen types, KeyError and IndexError among them.
    except Exception as error:
        raise ValueError(
            f"{file}: not a batch of CIFAR-10 ({error!s}); unpack the official archive again, or use its "
            f"binary version ({BINARY_FOLDER})"
        ) from error
    return images, labels


def _pixels(array: _Built) -> Pixels:
    """Return the uint8 array whose pickled parts ``array`` holds."""
    _, shape, dtype, is_fortran, content = array.state
    if dtype.arguments[0] != "u1" or is_fortran:
        raise ValueError(f"its data are {dtype.arguments[0]!r}, not bytes in C order")
    if isinstance(content, _Built):
        content = content.arguments[0]  # Python 3 pickles bytes for Python 2 as text to be encoded
    raw = content if isinstance(content, bytes) else content.encode("latin1")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def fetch(root: str) -> None:
    """Download and unpack the pickled batches, as torchvision has them, into ``root``."""
    from detrojan.models._parts.torchvision import torchvision

    # Not CIFAR10(download=True): after the download it unpickles the batches, without restriction.
    cifar10 = torchvision.datasets.CIFAR10
    torchvision.datasets.utils.download_and_extract_archive(
        cifar10.url, root, filename=cifar10.filename, md5=cifar10.tgz_md5
    )
