"""CIFAR-100, as its binary or its pickled files, with its 100 fine labels.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from pathlib import Path

import numpy as np

from detrojan.datasets._layouts import cifar10
from detrojan.datasets._layouts.base import first_folder
from detrojan.datasets.base import Labels, Orientation, Pixels, RawImages, Split, resize_all

# In the order of their labels, which is the alphabet's.
CLASSES = (
    *("apple", "aquarium_fish", "baby", "bear", "beaver"),
    *("bed", "bee", "beetle", "bicycle", "bottle"),
    *("bowl", "boy", "bridge", "bus", "butterfly"),
    *("camel", "can", "castle", "caterpillar", "cattle"),
    *("chair", "chimpanzee", "clock", "cloud", "cockroach"),
    *("couch", "crab", "crocodile", "cup", "dinosaur"),
    *("dolphin", "elephant", "flatfish", "forest", "fox"),
    *("girl", "hamster", "house", "kangaroo", "keyboard"),
    *("lamp", "lawn_mower", "leopard", "lion", "lizard"),
    *("lobster", "man", "maple_tree", "motorcycle", "mountain"),
    *("mouse", "mushroom", "oak_tree", "orange", "orchid"),
    *("otter", "palm_tree", "pear", "pickup_truck", "pine_tree"),
    *("plain", "plate", "poppy", "porcupine", "possum"),
    *("rabbit", "raccoon", "ray", "road", "rocket"),
    *("rose", "sea", "seal", "shark", "shrew"),
    *("skunk", "skyscraper", "snail", "snake", "spider"),
    *("squirrel", "streetcar", "sunflower", "sweet_pepper", "table"),
    *("tank", "telephone", "television", "tiger", "tractor"),
    *("train", "trout", "tulip", "turtle", "wardrobe"),
    *("whale", "willow_tree", "wolf", "woman", "worm"),
)
SIDE, BYTES = cifar10.SIDE, cifar10.BYTES
HEAD = 2  # bytes before each image of a binary file: its coarse label, then its fine one
FOLDER = "cifar-100-python"
BINARY_FOLDER = "cifar-100-binary"
BESIDE: tuple[str, ...] = ()
PUBLISHED: dict[Split, tuple[int, ...]] = {"train": (500,) * 100, "test": (100,) * 100}


def find(path: Path) -> Path | None:
    """Return the folder that holds the two files; None if there is none."""
    # The binary files come first: nothing needs to be unpickled. `train` alone may be any folder's.
    pickled = [path / FOLDER, *([path] if path.name == FOLDER else [])]
    return first_folder([path / BINARY_FOLDER, path], "train.bin", "test.bin") or first_folder(
        pickled, "train", "test"
    )


def _batch(folder: Path, split: Split) -> tuple[Pixels, Labels]:
    """Return the flat images (N, 3072) of a split, and their labels."""
    binary = folder / f"{split}.bin"
    is_binary = (folder / "train.bin").exists() or (folder / "test.bin").exists()
    file = binary if is_binary else folder / split
    if not file.is_file():
        raise ValueError(f"{file} is missing; unpack the CIFAR-100 archive again")
    images, labels = _binary(file) if is_binary else _pickled(file)
    if not 0 <= labels.min() <= labels.max() < len(CLASSES):
        row = int(np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))[0])
        raise ValueError(f"{file}, image {row}: label {labels[row]}, but CIFAR-100 has labels 0 to 99")
    return images, labels


def names(folder: Path | None) -> tuple[str, ...]:
    """Return the name of each class."""
    return CLASSES


def labels(folder: Path, split: Split) -> Labels:
    """Return the labels of a split; decodes no image.

    Raises:
        ValueError: a file is missing or broken.
    """
    return _batch(folder, split)[1]


def unnamed(folder: Path, split: Split) -> list[Path]:
    """Return nothing: files are read whole."""
    return []


def read(folder: Path, split: Split, side: int, orientation: Orientation) -> RawImages:
    """Return the images of a split as RGB, resized to ``side`` × ``side`` pixels.

    They are pixels, and have no ``orientation``.

    Raises:
        ValueError: a file is missing or broken.
    """
    flat, found = _batch(folder, split)
    planes = flat.reshape(-1, 3, SIDE, SIDE)
    pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return RawImages(resize_all(pixels, side), found, CLASSES)


def _binary(file: Path) -> tuple[Pixels, Labels]:
    raw = np.fromfile(file, np.uint8)
    if not len(raw) or len(raw) % (HEAD + BYTES):
        raise ValueError(
            f"{file}: {len(raw)} bytes are no whole number of records of {HEAD + BYTES}; unpack the "
            "CIFAR-100 archive again"
        )
    records = raw.reshape(-1, HEAD + BYTES)
    return records[:, HEAD:], records[:, HEAD - 1].astype(np.int64)


def _pickled(file: Path) -> tuple[Pixels, Labels]:
    try:
        with file.open("rb") as opened:
            batch = cifar10._BatchUnpickler(opened, encoding="latin1").load()
        found = np.array([int(label) for label in batch["fine_labels"]], np.int64)
        images = cifar10._pixels(batch["data"])
        if not len(found) or images.shape != (len(found), BYTES):
            raise ValueError(f"{len(found)} labels, but images of shape {images.shape}")
    # A broken or foreign pickle ends in any of a dozen types, KeyError and IndexError among them.
    except Exception as error:
        raise ValueError(
            f"{file}: not a file of CIFAR-100 ({error!s}); unpack the official archive again, or use its "
            f"binary version ({BINARY_FOLDER})"
        ) from error
    return images, found


def fetch(root: str) -> None:
    """Download and unpack the pickled files, as torchvision has them, into ``root``."""
    from detrojan.models._parts.torchvision import torchvision

    # Not CIFAR100(download=True): after the download it unpickles the files, without restriction.
    cifar100 = torchvision.datasets.CIFAR100
    torchvision.datasets.utils.download_and_extract_archive(
        cifar100.url, root, filename=cifar100.filename, md5=cifar100.tgz_md5
    )
