"""Parquet shards as the Hugging Face hub keeps image data sets: an image column and a label column."""

import contextlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from detrojan.datasets._layouts import arrays
from detrojan.datasets.base import (
    FileSource,
    Found,
    Labels,
    RawImages,
    Split,
    count,
    decode_all,
    refuse_all,
)

IMAGE_COLUMNS = ("image", "img")
ROWS_AT_ONCE = 1024  # bounds how much encoded data is in memory
# The hub once put a hash behind the count, and a browser that fetches a file again " (1)".
SHARD = re.compile(r"^(?P<of>.*?)-?(?P<number>\d+)-of-(?P<total>\d+)(?!\d).*\.parquet$")
COUNTED = re.compile(r"^(?P<of>.*\D|)(?P<number>\d+)\.parquet$")  # as in the hub's converted branch


class HuggingFaceParquet(FileSource):
    """Images of Parquet shards, in the order of the shards' names and of their rows.

    The image column, ``image`` or ``img`` if the study names none, is a struct of ``bytes`` and ``path``,
    or plain binary, or lists of lists of integers, of which 1 or 3 channels stand first or last, or which are
    grey. Where ``bytes`` is null, ``path`` is read, relative to the shard's folder. Class names
    come from the features that the ``datasets`` library stores in the schema; without them the label's
    number is its name.
    """

    path: Path = Field(description="folder that holds the shards, in itself or in data/")
    train: str | None = Field(None, description="pattern of the training shards under path, as data/train-*")
    test: str | None = Field(None, description="pattern of the test shards, as valid-*.parquet")
    label_column: str = Field("label", description="integer column of the labels")
    image_column: str | None = Field(None, description="column of the images; image or img if not given")

    @field_validator("train", "test")
    @classmethod
    def _relative(cls, pattern: str | None) -> str | None:
        if pattern is not None and (Path(pattern).is_absolute() or pattern.startswith("~")):
            raise ValueError(
                f"{pattern} should be relative to path: put the folder there, and the shards' names here"
            )
        return pattern

    def counts(self, split: Split) -> Counter[int]:
        """Return how many rows each label has, read from the label column alone.

        Raises:
            ValueError: shards are missing or broken, or labels are null or negative.
        """
        return count(self._checked_labels()[0][split])

    def class_names(self) -> tuple[str, ...]:
        """Return the class names of the schema; the labels' numbers where it has none."""
        return self._checked_labels()[1]

    def places(self) -> list[Path]:
        """Return the shards, and the folders of those whose images lie in files of their own."""
        shards = [*self._shards("train"), *self._shards("test")]
        folders = dict.fromkeys(shard.parent for shard in shards if _names_files(shard, self.image_column))
        return [*shards, *folders]

    def read(self, split: Split, side: int) -> RawImages:
        """Return all images of a split as RGB, resized to ``side`` × ``side`` pixels.

        Raises:
            ValueError: as for :meth:`counts`, or an image is missing or broken.
        """
        labels, classes = self._checked_labels()
        shards = self._shards(split)
        found = Found()
        if _has_arrays(shards, self.image_column):
            numbers = (row for shard in shards for row in _rows(shard, self.image_column))
            images = arrays.read_all(numbers, len(labels[split]), side, found)
        else:
            encoded = (_content(*row) for shard in shards for row in _values(shard, self.image_column))
            images = decode_all(encoded, len(labels[split]), side, self.orientation, found)
        names = tuple(f"{shard.name}, row {row}" for shard in shards for row in range(_num_rows(shard)))
        return RawImages(images, labels[split], classes, names, found)

    def _shards(self, split: Split) -> list[Path]:
        """Return the shards of a split, in the order of their names."""
        found = self._matching(split)
        other = {shard.resolve(): shard for shard in self._matching("test" if split == "train" else "train")}
        for shard in found:
            if shard.resolve() in other:
                raise ValueError(
                    f"{shard}: the patterns of both train and test match it, so images that a model learned "
                    "would test it; set train and test to patterns that share no file"
                )
        _refuse_repeated(found)
        _refuse_missing_shards(found)
        return found

    def _matching(self, split: Split) -> list[Path]:
        pattern = self.train if split == "train" else self.test
        patterns = [pattern] if pattern else [f"{split}-*.parquet", f"{split}.parquet"]
        folders = [self.path] if pattern else [self.path, self.path / "data"]
        places = [(folder, candidate) for folder in folders for candidate in patterns]
        matching = {place: _visible(*place) for place in places}
        found = {place: shards for place, shards in matching.items() if shards}
        if not found:
            raise ValueError(
                f"{self.path}: no file like {' or '.join(patterns)} in it"
                f"{'' if pattern else ' or in its folder data'}; {_hint(self.path, split)}"
            )
        if len(found) > 1:
            first, second, *_ = (shards[0] for shards in found.values())
            raise ValueError(
                f"{second}: {first} lies there too, and which of them {split} means can't be told; remove "
                f"one, or set {split} to a pattern that matches what you mean"
            )
        return next(iter(found.values()))

    def _checked_labels(self) -> tuple[dict[Split, Labels], tuple[str, ...]]:
        """Return the labels of both splits, in order, and the name of each class."""
        splits: tuple[Split, Split] = ("train", "test")
        shards = {split: self._shards(split) for split in splits}
        problems = []
        for shard in (*shards["train"], *shards["test"]):
            try:
                _check_columns(shard, self.label_column, self.image_column)
            except ValueError as error:
                problems.append(str(error))
        refuse_all(problems)
        names = self._class_names([*shards["train"], *shards["test"]])
        read = {split: [_labels(shard, self.label_column) for shard in shards[split]] for split in splits}
        if names is None:
            names = tuple(map(str, range(_num_classes(shards["train"][0], read["train"], read["test"]))))
        for split in splits:
            for shard, labels in zip(shards[split], read[split], strict=True):
                beyond = np.flatnonzero(labels >= len(names))
                if len(beyond):
                    raise ValueError(
                        f"{shard}, row {beyond[0]}: label {labels[beyond[0]]}, but the schema names "
                        f"{len(names)} classes, 0 to {len(names) - 1}: mend the label or the names"
                    )
        return {split: np.concatenate(read[split]) for split in splits}, names

    def _class_names(self, shards: list[Path]) -> tuple[str, ...] | None:
        """Return the class names that all shards agree on; None where none has any."""
        first = _schema_names(shards[0], self.label_column)
        for shard in shards[1:]:
            if (names := _schema_names(shard, self.label_column)) != first:
                raise ValueError(
                    f"{shard}: its class names ({_listed(names)}) are not those of {shards[0]} "
                    f"({_listed(first)}): all shards must be of one data set"
                )
        return first


def _hint(path: Path, split: Split) -> str:
    """Return what to do where a split's shards aren't found, by what lies there."""
    if not path.is_dir():
        return "there is no such folder: set path to the one that holds the shards"
    if next(path.glob("**/state.json"), None) or (path / "dataset_dict.json").exists():
        return (
            "what lies there is Arrow, as save_to_disk writes it: load it and write each split by "
            f"load_from_disk(...)['{split}'].to_parquet('{split}.parquet')"
        )
    others = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev")}[split]
    likes = [like for name in others for like in (f"**/{name}*.parquet", f"**/{name}/*.parquet")]
    found = next((file for like in likes for file in sorted(path.glob(like))), None)
    if found:
        pattern = found.with_name(re.sub(r"\d{2,}.*", "*.parquet", found.name)).relative_to(path)
        return f"{found.relative_to(path)} lies there: if that is meant, say {split}: {pattern}"
    return f"set path to the folder of the shards, and {split} to a pattern of their names if need be"


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _refuse_repeated(shards: list[Path]) -> None:
    """Refuse what would bring images in twice: one file by two names, two shards of one number."""
    seen: dict[object, Path] = {}
    for shard in shards:
        match = SHARD.match(shard.name)
        # Of one number, whatever else the name says: a second push has another hash.
        keys: list[object] = [shard.resolve()]
        keys += [(shard.parent, match["of"], int(match["number"]), int(match["total"]))] if match else []
        for key in keys:
            if key in seen:
                raise ValueError(
                    f"{shard}: the same shard as {seen[key].name}, so its images would count twice; remove "
                    "one of them"
                )
            seen[key] = shard


def _refuse_missing_shards(shards: list[Path]) -> None:
    for (folder, of), numbers in _numbers(shards, SHARD).items():
        totals = {total for _, total in numbers}
        if len(totals) > 1:
            raise ValueError(
                f"{folder}: shards {of} of {' and of '.join(map(str, sorted(totals)))} lie side by side, as "
                "two downloads leave them; remove those that are not meant"
            )
        _refuse_gap(shards[0], {number for number, _ in numbers}, range(totals.pop()))
    counted = [shard for shard in shards if not SHARD.match(shard.name)]
    for numbers in _numbers(counted, COUNTED).values():
        there = {number for number, _ in numbers}
        # Not years, say: only what counts from its start.
        if len(there) > 1 and min(there) <= 1:
            _refuse_gap(counted[0], there, range(min(there), max(there) + 1))


def _numbers(shards: list[Path], kind: re.Pattern[str]) -> dict[tuple[Path, str], set[tuple[int, int]]]:
    """Return number and total (0 where the names have none) of the shards of each folder and name."""
    found: dict[tuple[Path, str], set[tuple[int, int]]] = {}
    for shard in shards:
        if match := kind.match(shard.name):
            numbers = match.groupdict()
            place = found.setdefault((shard.parent, match["of"]), set())
            place.add((int(numbers["number"]), int(numbers.get("total", 0))))
    return found


def _refuse_gap(shard: Path, there: set[int], wanted: range) -> None:
    if beyond := sorted(there - set(wanted)):
        raise ValueError(
            f"{shard}: shard {beyond[0]} beside it is none of 0 to {wanted[-1]}; fetch them again"
        )
    if absent := sorted(set(wanted) - there):
        raise ValueError(
            f"{shard}: shard {absent[0]} of {wanted[0]} to {wanted[-1]} is missing beside it; fetch it"
        )


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[pq.ParquetFile]:
    """Yield an open shard; an error of the library while it is in use becomes one that names it."""
    if not shard.is_file():
        raise ValueError(
            f"{shard}: no regular file, but a folder, a pipe, or a link that leads nowhere; remove it"
        )
    try:
        # No memory map: on a network file system the loss of the file would be a bus error.
        with pq.ParquetFile(shard, memory_map=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{shard}: not a whole Parquet file ({reason}); fetch it again") from error


def _check_columns(shard: Path, label: str, image: str | None) -> None:
    """Refuse a shard without the columns, or with them of other types, before anything is read of it."""
    with _opened(shard) as file:
        _refuse_missing_column(shard, file, label)
        kind = file.schema_arrow.field(label).type
        if not pa.types.is_integer(kind):
            raise ValueError(f"{shard}: column {label} is {kind}, but labels must be integers, 0 to K - 1")
        _refuse_type(shard, file.schema_arrow.field(_image_column(shard, file, image)))


def _image_column(shard: Path, file: pq.ParquetFile, named: str | None) -> str:
    found = [name for name in IMAGE_COLUMNS if name in file.schema_arrow.names]
    if named is None and not found:
        _refuse_missing_column(shard, file, " or ".join(IMAGE_COLUMNS))
    if named is None and len(found) > 1:
        raise ValueError(f"{shard}: it has columns {' and '.join(found)}: say which, as image_column")
    column = named or found[0]
    _refuse_missing_column(shard, file, column)
    return column


def _num_rows(shard: Path) -> int:
    with _opened(shard) as file:
        return int(file.metadata.num_rows)


def _schema_names(shard: Path, column: str) -> tuple[str, ...] | None:
    with _opened(shard) as file:
        raw = (file.schema_arrow.metadata or {}).get(b"huggingface")
    if raw is None:
        return None
    try:
        feature: Any = json.loads(raw).get("info", {}).get("features", {}).get(column, {})
        names = feature.get("names")
        return None if names is None else tuple(map(str, names))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{shard}: its schema's 'huggingface' metadata is broken ({error}); write the file again"
        ) from error


def _listed(names: tuple[str, ...] | None) -> str:
    return "none" if names is None else f"{len(names)}: {', '.join(names[:3])}, ..."


def _labels(shard: Path, column: str) -> Labels:
    with _opened(shard) as file:
        values = file.read(columns=[column])[column]
    if not len(values):
        raise ValueError(f"{shard}: it has no rows; fetch it again or remove it")
    if values.null_count:
        row = pc.index(pc.is_null(values), value=True).as_py()
        raise ValueError(
            f"{shard}, row {row}: its {column} is null; give every image a label or drop the row"
        )
    numbers = values.to_numpy()
    if numbers.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{shard}: label {numbers.max()} is no number of a class: labels must be 0 to K - 1")
    labels: Labels = numbers.astype(np.int64)
    if labels.min() < 0:
        row = int(np.flatnonzero(labels < 0)[0])
        raise ValueError(
            f"{shard}, row {row}: label {labels[row]}, but labels start at 0 (the hub marks unlabelled test "
            "images with -1: choose a split that has labels)"
        )
    return labels


def _num_classes(where: Path, train: list[Labels], test: list[Labels]) -> int:
    largest = max(int(labels.max()) for labels in [*train, *test])
    if largest >= sum(map(len, train)):
        # Said here, because a column of identifiers would make a billion classes.
        raise ValueError(
            f"{where}: labels up to {largest}, but only {sum(map(len, train))} training images: every class "
            "needs one, so number the labels from 0 without gaps, or set label_column to another column"
        )
    return largest + 1


def _names_files(shard: Path, named: str | None) -> bool:
    """Return whether a shard has images that it only names, by the statistics in its footer."""
    with _opened(shard) as file:
        column = f"{_image_column(shard, file, named)}.bytes"
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            for place in range(group.num_columns):
                chunk = group.column(place)
                told = chunk.statistics
                if chunk.path_in_schema == column and (told is None or told.null_count):
                    return True
    return False


def _has_arrays(shards: list[Path], named: str | None) -> bool:
    """Return whether the image columns of shards hold arrays of numbers.

    Raises:
        ValueError: of some they do, of others not.
    """
    found = []
    for shard in shards:
        with _opened(shard) as file:
            found.append(arrays.is_array(file.schema_arrow.field(_image_column(shard, file, named)).type))
    if len(set(found)) > 1:
        other = shards[found.index(not found[0])]
        raise ValueError(
            f"{other}: its image column is not of the kind of {shards[0].name}'s: write both the same way"
        )
    return found[0]


def _batches(shard: Path, named: str | None) -> Iterator[pa.Array]:
    with _opened(shard) as file:
        column = _image_column(shard, file, named)
        # Errors of whoever takes the rows aren't raised in here, so this names broken shards only.
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
            yield batch.column(0)


def _values(shard: Path, named: str | None) -> Iterator[tuple[Path, int, Any]]:
    """Yield the shard, the row and the value of each image."""
    values = itertools.chain.from_iterable(batch.to_pylist() for batch in _batches(shard, named))
    yield from ((shard, row, value) for row, value in enumerate(values))


def _rows(shard: Path, named: str | None) -> Iterator[tuple[str, pa.Array]]:
    """Yield the name of each row's image, for errors, and its numbers: an array of one row."""
    number = 0
    for batch in _batches(shard, named):
        for row in range(len(batch)):
            yield f"{shard}, row {number}", batch.slice(row, 1)
            number += 1


def _refuse_missing_column(shard: Path, file: pq.ParquetFile, column: str) -> None:
    found = file.schema_arrow.names
    if found.count(column) > 1:
        raise ValueError(f"{shard}: {found.count(column)} columns are called {column}; rename all but one")
    if column not in found:
        # What a table of text had before its first name, a byte order mark, can't be seen.
        marked = [ascii(name) for name in found if name.strip("\ufeff \t\r\n") == column]
        raise ValueError(
            f"{shard}: no column {column}; it has {', '.join(marked or found)}: rename one, or set "
            "label_column or image_column to the name that it has"
        )


def _refuse_type(shard: Path, column: pa.Field) -> None:
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not _is_binary(kind) and not arrays.is_array(kind):
        raise ValueError(
            f"{shard}: column {column.name} is {column.type}, but must be binary or a struct of "
            "bytes and path, as the library `datasets` writes its feature Image, or lists of lists of "
            "integers, as its Array2D and Array3D: cast the column to one of them, and write the shards anew"
        )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _content(shard: Path, row: int, value: Any) -> tuple[str, Path | bytes]:
    name = f"{shard}, row {row}"
    if isinstance(value, bytes):
        return name, value
    if value and value["bytes"] is not None:
        return name, value["bytes"]
    if value and value.get("path"):
        file = shard.parent / value["path"]
        return f"{name} ({file})", file
    raise ValueError(f"{name}: its image is null; give it bytes, or a path relative to {shard.parent}")
