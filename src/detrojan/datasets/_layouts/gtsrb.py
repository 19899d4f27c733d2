"""GTSRB, the German traffic signs, in the folders that torchvision or its own archives make.

Source: Stallkamp et al., "The German Traffic Sign Recognition Benchmark", IJCNN 2011.

It is the final training set of 39,209 images, which the survey uses, where it is on disk, and else
torchvision's, the competition's 26,640. So ``fetch`` fetches the training archive of the former, not
torchvision's; its test set is the same.
"""

import csv
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
from detrojan.datasets.base import Labels, Orientation, RawImages, Split

CLASSES = (
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
FOLDER = "gtsrb"
GROUND_TRUTH = "GT-final_test.csv"
BESIDE: tuple[str, ...] = (GROUND_TRUTH,)
PUBLISHED: dict[Split, tuple[int, ...]] = {
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
TRAINING = ("Final_Training/Images", "Training")  # the final set, torchvision's smaller one
TEST = "Final_Test/Images"
ARCHIVE = (
    "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/GTSRB_Final_Training_Images.zip"
)
MD5 = "f33fd80ac59bff73c82d25ab499e03a3"


def find(path: Path) -> Path | None:
    """Return the folder ``GTSRB``, which holds the images of both splits; None if there is none."""
    return first_folder([path / "gtsrb" / "GTSRB", path / "GTSRB", path], *TRAINING, TEST)


def _files(folder: Path, split: Split) -> list[File]:
    if split == "train":
        images = next((folder / inner for inner in TRAINING if (folder / inner).is_dir()), None)
        if images is None:
            raise ValueError(
                f"{folder}: no folder {' or '.join(TRAINING)}; unpack the training archive there"
            )
        return [file for label in range(len(CLASSES)) for file in _class_files(images, label)]
    # torchvision keeps the labels beside the folder GTSRB, others inside it.
    name = GROUND_TRUTH
    places = [folder.parent / name, folder / name, folder / TEST / name]
    table = next((file for file in places if file.is_file()), places[0])
    return [(folder / TEST / name, label) for name, label in _ground_truth(table)]


def _class_files(images: Path, label: int) -> list[File]:
    """Return a class's training images; those of its table, if there is one, so that none goes missing."""
    folder = images / f"{label:05}"
    table = folder / f"GT-{label:05}.csv"
    if not table.is_file():
        return [(file, label) for file in listing(folder, ".ppm")]
    files = sorted(_ground_truth(table))
    for name, told in files:
        if told != label:
            raise ValueError(f"{table}: {name} has ClassId {told}, but lies in the folder of class {label}")
    return [(folder / name, label) for name, _ in files]


def _ground_truth(table: Path) -> list[tuple[str, int]]:
    """Return the file name and label of each row of a GTSRB table."""
    rows = []
    reader = csv.DictReader(lines(table), delimiter=";", skipinitialspace=True)
    for row in reader:
        name, label = row.get("Filename"), row.get("ClassId")
        if not (name and label and label.isdecimal() and int(label) < len(CLASSES)):
            raise ValueError(
                f"{table}, line {reader.line_num}: Filename {name!r} and ClassId {label!r}, but a row needs "
                f"a file and a class from 0 to {len(CLASSES) - 1}; unpack the archive again"
            )
        rows.append((name, int(label)))
    if not rows:
        raise ValueError(f"{table}: no rows; unpack the archive again")
    return rows


def names(folder: Path | None) -> tuple[str, ...]:
    """Return the name of each class."""
    return CLASSES


def labels(folder: Path, split: Split) -> Labels:
    """Return the labels of a split; decodes no image.

    Raises:
        ValueError: a folder or table is missing or broken.
    """
    return file_labels(_files(folder, split))


def unnamed(folder: Path, split: Split) -> list[Path]:
    """Return the images of a split that no table names."""
    files = _files(folder, split)
    return unnamed_files(files, dict.fromkeys(file.parent for file, _ in files), (".csv",))


def read(folder: Path, split: Split, side: int, orientation: Orientation) -> RawImages:
    """Return the images of a split as RGB, resized to ``side`` × ``side`` pixels.

    Raises:
        ValueError: a folder, table or image is missing or broken.
    """
    return read_files(_files(folder, split), CLASSES, side, orientation)


def fetch(root: str) -> None:
    """Download and unpack the final training set and the test set into ``root``."""
    from detrojan.models._parts.torchvision import torchvision

    torchvision.datasets.GTSRB(root, split="test", download=True)
    torchvision.datasets.utils.download_and_extract_archive(ARCHIVE, str(Path(root) / "gtsrb"), md5=MD5)
