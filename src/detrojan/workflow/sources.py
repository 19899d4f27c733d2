"""Whether the images of a data set are still those that its job has read.

Snakemake watches no file of a source: there may be a million, on a machine that the job alone sees. So the
rule ``dataset`` has a param, a text that stays the same as long as the source holds the same bytes. It is
found by names, sizes and times alone, in one walk, for it is asked for at each parse. Where these have
changed, as in a copy, the bytes decide: they are compared with what the job noted on its card.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from detrojan import registry
from detrojan.study import grid
from detrojan.study.schema import Dataset, Study
from detrojan.workflow import graph

if TYPE_CHECKING:
    from detrojan.datasets.base import Source

BLOCK = 1 << 20  # bytes that are read at once


class _File(NamedTuple):
    """A file: its name below the place it was found in, which a copy keeps, and where it lies."""

    name: str
    path: str
    size: int
    changed: int  # ns


def _files(places: Iterable[Path]) -> Iterator[_File]:
    """Yield the files below each place, or the place itself, in the order of their names."""
    for place in places:
        if place.is_dir():
            yield from _walk(str(place), "", frozenset())
        else:
            told = place.stat()
            yield _File(place.name, str(place), told.st_size, told.st_mtime_ns)


def _walk(folder: str, name: str, above: frozenset[tuple[int, int]]) -> Iterator[_File]:
    # Jobs parse this module too, and need neither numpy nor Pillow for that.
    from detrojan.datasets.base import is_clutter

    told = Path(folder).stat()
    here = (told.st_dev, told.st_ino)
    if here in above:  # a link to a folder that it lies in
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{name}{entry.name}/", above | {here})
            elif entry.is_file():
                told = entry.stat()
                yield _File(name + entry.name, entry.path, told.st_size, told.st_mtime_ns)


def stamp(places: Iterable[Path]) -> str:
    """Return a digest of the names, sizes and times of all files of a source; reads none of them."""
    digest = hashlib.sha256()
    for file in _files(places):
        digest.update(f"{file.name}\0{file.size}\0{file.changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def content(places: Iterable[Path]) -> str:
    """Return a digest of the names and the bytes of all files of a source."""
    digest = hashlib.sha256()
    for file in _files(places):
        digest.update(f"{file.name}\0{file.size}\n".encode(errors="surrogateescape"))
        with Path(file.path).open("rb") as opened:
            while block := opened.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def unchanged(source: "Source") -> Iterator[dict[str, str]]:
    """Yield a part of a card, in which the digest of what was read stands when the block has ended.

    Raises:
        ValueError: the files of the source were changed meanwhile.
    """
    before, noted = stamp(source.places()), dict[str, str]()
    # A data set that the block fetches was not there before.
    was_there = bool(source.places())
    yield noted
    noted["content"] = content(source.places())
    if was_there and stamp(source.places()) != before:
        raise ValueError("images were changed while they were read: run again when they stay as they are")


# --- what was planned, and what was read -----------------------------------------------------------


class Read:
    """What the job of a data set has read last, by its card, and where else the same bytes were found.

    The card says with which param the job was ``planned`` and the digest of the ``content`` that it read;
    ``.source.json`` beside it has the stamps of other folders, or of other times, with that content.
    """

    def __init__(self, name: str) -> None:
        card = Path(graph.job("dataset", {"dataset": name}).file("card"))
        self._card, self._path = _json(card), card.with_name(".source.json")

    def identity(self, source: "Source") -> str:
        """Return the param: that of the last job, if the source still holds what it has read."""
        places = source.places()
        now = stamp(places)
        if "planned" not in self._card or "content" not in self._card:
            return now
        planned, was_read = str(self._card["planned"]), self._card["content"]
        noted = _json(self._path)
        stamps = noted["stamps"] if noted.get("content") == was_read else []
        if now == planned or now in stamps:
            return planned
        if was_read != content(places):
            return now
        self._note(was_read, [*stamps, now])
        return planned

    def _note(self, was_read: str, stamps: list[str]) -> None:
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            partial.write_text(json.dumps({"content": was_read, "stamps": stamps}))
            partial.replace(self._path)
        except OSError:  # results that may be read alone: the next parse compares the bytes again
            return


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@functools.cache
def _places_fields(source: str) -> tuple[str, ...]:
    fields = registry.declared("datasets", source).settings.model_fields
    return tuple(name for name, field in fields.items() if field.annotation is Path)


def what(dataset: Dataset) -> dict[str, Any]:
    """Return the settings of a data set's source but for where it lies."""
    where = _places_fields(dataset.source)
    return {key: value for key, value in dataset.source_settings.items() if key not in where}


def load(dataset: Dataset) -> "Source":
    """Return the source of a data set."""
    source: Source = registry.load("datasets", dataset.source, dataset.source_settings)
    return source


def classes_read(study: Study, results: Path = Path(graph.RESULTS)) -> dict[str, int]:
    """Return how many classes each data set of a study has by its card, if it was read already.

    Results may lie where their images do not.
    """
    found = {}
    for name in study.datasets:
        card = _json(graph.below(results, graph.job("dataset", {"dataset": name}).file("card")))
        if "classes" in card:
            found[name] = len(card["classes"])
    return found


def of(study: Study) -> list[str]:
    """Return the data sets that a study has models of."""
    return list(dict.fromkeys(model.dataset for model in grid.models(study)))
