"""CIFAR-10, GTSRB and Tiny-ImageNet in the folders that torchvision or their own archives make.

Sources: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; Stallkamp et al.,
"The German Traffic Sign Recognition Benchmark", IJCNN 2011; Stanford CS231n's Tiny ImageNet.

GTSRB is its final training set of 39,209 images, which the survey uses, where it is on disk, and else
torchvision's, the competition's 26,640. So ``download`` fetches the training archive of the former,
not torchvision's; its test set is the same.
"""

import csv
import http.client
import pickle
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from detrojan.datasets.base import (
    Labels,
    Pixels,
    RawImages,
    Source,
    Split,
    count,
    decode_all,
    refuse_missing_classes,
    resize_all,
)

File = tuple[Path, int]  # an image and its label


class TorchvisionFolder(Source):
    """A published data set, as it lies on disk; fetched first where ``download`` says so."""

    path: Path = Field(description="folder that holds, or is, the data set's own (cifar-10-batches-py, ...)")
    layout: Literal["cifar10", "gtsrb", "tiny_imagenet"] = Field(description="which data set it is")
    download: bool = Field(False, description="fetch the data set if it isn't there; needs the network")

    def counts(self, split: Split) -> Counter[int]:
        """Return how many images each label has on disk; those of the published set before a download.

        Raises:
            ValueError: the data set is neither there nor to be downloaded, or it is broken.
        """
        layout = LAYOUTS[self.layout]
        if self.download and layout.find(self.path) is None:
            return Counter(dict(enumerate(layout.published[split])))
        return count(layout.labels(self._folder(), split))

    def read(self, split: Split, side: int) -> RawImages:
        """Return all images of a split as RGB, resized to ``side`` × ``side`` pixels.

        Raises:
            ValueError: as for :meth:`counts`, or the download failed, or an image is broken.
        """
        layout = LAYOUTS[self.layout]
        if self.download and layout.find(self.path) is None:
            self._fetch()
        raw = layout.read(self._folder(), split, side)
        if split == "train":
            refuse_missing_classes(raw.labels, raw.classes, self.path)
        return raw

    def _folder(self) -> Path:
        folder = LAYOUTS[self.layout].find(self.path)
        if folder is None:
            raise ValueError(
                f"{self.path}: no {self.layout} in it ({LAYOUTS[self.layout].folder} is missing): set path "
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
                (Path(scratch) / layout.folder).rename(self.path / layout.folder)
        except (
            OSError,
            RuntimeError,
            http.client.HTTPException,
            tarfile.TarError,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(
                f"{self.path}: could not download {self.layout} ({error}); put {layout.folder} there by "
                "hand, or run this stage on a machine that has a network"
            ) from error


def _first_folder(candidates: Iterable[Path], *contents: str) -> Path | None:
    """Return the first of ``candidates`` that holds one of ``contents``; None if there is none."""
    return next(
        (folder for folder in candidates if any((folder / inner).exists() for inner in contents)), None
    )


def _read_files(files: list[File], classes: tuple[str, ...], side: int) -> RawImages:
    images = decode_all(((str(file), file) for file, _ in files), len(files), side)
    return RawImages(images, _labels(files), classes)


def _labels(files: list[File]) -> Labels:
    return np.array([label for _, label in files], np.int64)


def _listing(folder: Path, suffix: str) -> list[Path]:
    """Return the files in ``folder`` with this suffix in any case, in the order of their names."""
    files = sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []
    found = [file for file in files if file.suffix.lower() == suffix and not file.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder}: no {suffix} images there; unpack the data set's archive again")
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: can't be read ({error}); unpack the data set's archive again") from error


# --- CIFAR-10 --------------------------------------------------------------------------------------

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR_SIDE = 32
CIFAR_BYTES = 3 * CIFAR_SIDE**2  # of an image: all red values, all green ones, all blue ones
CIFAR_BATCHES: dict[Split, list[str]] = {
    "train": [f"data_batch_{number}" for number in range(1, 6)],
    "test": ["test_batch"],
}
CIFAR_FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py")


def _cifar_find(path: Path) -> Path | None:
    candidates = [*(path / folder for folder in CIFAR_FOLDERS), path]
    # The binary batches come first: nothing needs to be unpickled.
    return _first_folder(
        candidates, *(f"{name}{suffix}" for name in CIFAR_BATCHES["train"] for suffix in (".bin", ""))
    )


def _cifar_batches(folder: Path, split: Split) -> list[tuple[Pixels, Labels]]:
    """Return the flat images (N, 3072) and the labels of each batch."""
    is_binary = any((folder / f"{name}.bin").exists() for name in CIFAR_BATCHES["train"])
    batches = []
    for name in CIFAR_BATCHES[split]:
        file = folder / (f"{name}.bin" if is_binary else name)
        if not file.is_file():
            raise ValueError(f"{file}: this batch is missing; unpack the CIFAR-10 archive again")
        images, labels = _binary_batch(file) if is_binary else _pickled_batch(file)
        if not 0 <= labels.min() <= labels.max() < len(CIFAR_CLASSES):
            row = int(np.flatnonzero((labels < 0) | (labels >= len(CIFAR_CLASSES)))[0])
            raise ValueError(f"{file}, image {row}: label {labels[row]}, but CIFAR-10 has labels 0 to 9")
        batches.append((images, labels))
    return batches


def _cifar_labels(folder: Path, split: Split) -> Labels:
    return np.concatenate([labels for _, labels in _cifar_batches(folder, split)])


def _cifar_read(folder: Path, split: Split, side: int) -> RawImages:
    batches = _cifar_batches(folder, split)
    labels = np.concatenate([labels for _, labels in batches])
    images = np.empty((len(labels), side, side, 3), np.uint8)
    start = 0
    for flat, _ in batches:
        planes = flat.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
        pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        images[start : start + len(flat)] = resize_all(pixels, side)
        start += len(flat)
    return RawImages(images, labels, CIFAR_CLASSES)


def _binary_batch(file: Path) -> tuple[Pixels, Labels]:
    """Return the images and labels of a batch whose records are a label's byte and an image's."""
    raw = np.fromfile(file, np.uint8)
    if not len(raw) or len(raw) % (1 + CIFAR_BYTES):
        raise ValueError(
            f"{file}: {len(raw)} bytes are no whole number of records of {1 + CIFAR_BYTES}; unpack the "
            "CIFAR-10 archive again"
        )
    records = raw.reshape(-1, 1 + CIFAR_BYTES)
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
        if not len(labels) or images.shape != (len(labels), CIFAR_BYTES):
            raise ValueError(f"{len(labels)} labels, but images of shape {images.shape}")
    # A broken or foreign pickle ends in any of a dozen types, KeyError and IndexError among them.
    except Exception as error:
        raise ValueError(
            f"{file}: not a batch of CIFAR-10 ({error!s}); unpack the official archive again, or use its "
            f"binary version ({CIFAR_FOLDERS[0]})"
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


def _cifar_fetch(root: str) -> None:
    from detrojan.vision import torchvision

    # Not CIFAR10(download=True): after the download it unpickles the batches, without restriction.
    cifar10 = torchvision.datasets.CIFAR10
    torchvision.datasets.utils.download_and_extract_archive(
        cifar10.url, root, filename=cifar10.filename, md5=cifar10.tgz_md5
    )


# --- GTSRB -----------------------------------------------------------------------------------------

GTSRB_CLASSES = (
    *("speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70"),
    *("speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120", "no passing"),
    *("no passing for trucks", "right of way at next crossing", "priority road", "yield", "stop"),
    *("no vehicles", "no trucks", "no entry", "general caution", "curve left", "curve right"),
    *("double curve", "bumpy road", "slippery road", "road narrows on the right", "road work"),
    *("traffic signals", "pedestrians", "children crossing", "bicycles crossing", "ice or snow"),
    *("wild animals crossing", "end of all limits", "turn right ahead", "turn left ahead", "ahead only"),
    *("straight or right", "straight or left", "keep right", "keep left", "roundabout"),
    *("end of no passing", "end of no passing for trucks"),
)
GTSRB_PUBLISHED: dict[Split, tuple[int, ...]] = {
    "train": (
        *(210, 2220, 2250, 1410, 1980, 1860, 420, 1440, 1410, 1470, 2010, 1320, 2100, 2160, 780),
        *(630, 420, 1110, 1200, 210, 360, 330, 390, 510, 270, 1500, 600, 240, 540, 270),
        *(450, 780, 240, 689, 420, 1200, 390, 210, 2070, 300, 360, 240, 240),
    ),
    "test": (
        *(60, 720, 750, 450, 660, 630, 150, 450, 450, 480, 660, 420, 690, 720, 270),
        *(210, 150, 360, 390, 60, 90, 90, 120, 150, 90, 480, 180, 60, 150, 90),
        *(150, 270, 60, 210, 120, 390, 120, 60, 690, 90, 90, 60, 90),
    ),
}
GTSRB_TRAINING = ("Final_Training/Images", "Training")  # the final set, torchvision's smaller one
GTSRB_TEST = "Final_Test/Images"
GTSRB_ARCHIVE = (
    "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/GTSRB_Final_Training_Images.zip"
)
GTSRB_MD5 = "f33fd80ac59bff73c82d25ab499e03a3"


def _gtsrb_find(path: Path) -> Path | None:
    """Return the folder ``GTSRB``, which holds the images of both splits."""
    return _first_folder([path / "gtsrb" / "GTSRB", path / "GTSRB", path], *GTSRB_TRAINING, GTSRB_TEST)


def _gtsrb_files(folder: Path, split: Split) -> list[File]:
    if split == "train":
        images = next((folder / inner for inner in GTSRB_TRAINING if (folder / inner).is_dir()), None)
        if images is None:
            raise ValueError(
                f"{folder}: no folder {' or '.join(GTSRB_TRAINING)}; unpack the training archive there"
            )
        return [file for label in range(len(GTSRB_CLASSES)) for file in _gtsrb_class(images, label)]
    # torchvision keeps the labels beside the folder GTSRB, others inside it.
    name = "GT-final_test.csv"
    places = [folder.parent / name, folder / name, folder / GTSRB_TEST / name]
    table = next((file for file in places if file.is_file()), places[0])
    return [(folder / GTSRB_TEST / name, label) for name, label in _ground_truth(table)]


def _gtsrb_class(images: Path, label: int) -> list[File]:
    """Return a class's training images; those of its table, if there is one, so that none goes missing."""
    folder = images / f"{label:05}"
    table = folder / f"GT-{label:05}.csv"
    if not table.is_file():
        return [(file, label) for file in _listing(folder, ".ppm")]
    files = sorted(_ground_truth(table))
    for name, told in files:
        if told != label:
            raise ValueError(f"{table}: {name} has ClassId {told}, but lies in the folder of class {label}")
    return [(folder / name, label) for name, _ in files]


def _ground_truth(table: Path) -> list[tuple[str, int]]:
    """Return the file name and label of each row of a GTSRB table."""
    rows = []
    reader = csv.DictReader(_lines(table), delimiter=";", skipinitialspace=True)
    for row in reader:
        name, label = row.get("Filename"), row.get("ClassId")
        if not (name and label and label.isdecimal() and int(label) < len(GTSRB_CLASSES)):
            raise ValueError(
                f"{table}, line {reader.line_num}: Filename {name!r} and ClassId {label!r}, but a row needs "
                f"a file and a class from 0 to {len(GTSRB_CLASSES) - 1}; unpack the archive again"
            )
        rows.append((name, int(label)))
    if not rows:
        raise ValueError(f"{table}: no rows; unpack the archive again")
    return rows


def _gtsrb_labels(folder: Path, split: Split) -> Labels:
    return _labels(_gtsrb_files(folder, split))


def _gtsrb_read(folder: Path, split: Split, side: int) -> RawImages:
    return _read_files(_gtsrb_files(folder, split), GTSRB_CLASSES, side)


def _gtsrb_fetch(root: str) -> None:
    from detrojan.vision import torchvision

    torchvision.datasets.GTSRB(root, split="test", download=True)
    torchvision.datasets.utils.download_and_extract_archive(
        GTSRB_ARCHIVE, str(Path(root) / "gtsrb"), md5=GTSRB_MD5
    )


# --- Tiny-ImageNet ---------------------------------------------------------------------------------

TINY_FOLDER = "tiny-imagenet-200"
TINY_ARCHIVE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def _tiny_find(path: Path) -> Path | None:
    return _first_folder([path / TINY_FOLDER, path], "wnids.txt", "train", "val")


def _tiny_wnids(folder: Path) -> list[str]:
    """Return the WordNet id of each label: the labels follow the ids' alphabetical order."""
    wnids = sorted({line.strip() for line in _lines(folder / "wnids.txt")} - {""})
    if not wnids:
        raise ValueError(f"{folder / 'wnids.txt'}: it names no class; unpack the archive again")
    return wnids


def _tiny_files(folder: Path, split: Split) -> list[File]:
    wnids = _tiny_wnids(folder)
    if split == "train":
        return [
            (file, label)
            for label, wnid in enumerate(wnids)
            for file in _listing(folder / "train" / wnid / "images", ".jpeg")
        ]
    # The images of the folder test have no labels; those of val are what everyone tests on.
    table = folder / "val" / "val_annotations.txt"
    files = []
    for number, line in enumerate(_lines(table), 1):
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


def _tiny_labels(folder: Path, split: Split) -> Labels:
    return _labels(_tiny_files(folder, split))


def _tiny_read(folder: Path, split: Split, side: int) -> RawImages:
    words = folder / "words.txt"
    names = dict(line.split("\t", 1) for line in _lines(words) if "\t" in line) if words.is_file() else {}
    classes = tuple(names.get(wnid, wnid) for wnid in _tiny_wnids(folder))
    return _read_files(_tiny_files(folder, split), classes, side)


def _tiny_fetch(root: str) -> None:
    from detrojan.vision import torchvision

    torchvision.datasets.utils.download_and_extract_archive(TINY_ARCHIVE, root, md5=TINY_MD5)


# --- all three -------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How one data set lies on disk.

    Attributes:
        folder: what its archive unpacks to, or torchvision's download makes.
        find: the folder that holds the images, given the path that the user names; None if there is none.
        labels: the labels of a split, given that folder; decodes no image.
        read: the images of a split.
        fetch: downloads and unpacks it, so that ``folder`` lies in the folder that it's given.
        published: how many images each label of the published data set has.
    """

    folder: str
    find: Callable[[Path], Path | None]
    labels: Callable[[Path, Split], Labels]
    read: Callable[[Path, Split, int], RawImages]
    fetch: Callable[[str], None]
    published: dict[Split, tuple[int, ...]]


LAYOUTS = {
    "cifar10": _Layout(
        CIFAR_FOLDERS[1],
        _cifar_find,
        _cifar_labels,
        _cifar_read,
        _cifar_fetch,
        {"train": (5000,) * 10, "test": (1000,) * 10},
    ),
    "gtsrb": _Layout("gtsrb", _gtsrb_find, _gtsrb_labels, _gtsrb_read, _gtsrb_fetch, GTSRB_PUBLISHED),
    "tiny_imagenet": _Layout(
        TINY_FOLDER,
        _tiny_find,
        _tiny_labels,
        _tiny_read,
        _tiny_fetch,
        {"train": (500,) * 200, "test": (50,) * 200},
    ),
}
