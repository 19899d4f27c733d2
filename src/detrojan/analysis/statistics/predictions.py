"""Measures of the predicted classes that a study keeps: no images, no weights, no GPU.

A measure is a function with ``@measure`` before it; its name is the measure's. It is given the
:class:`Answers` of a shard, all draws at once, and returns their :class:`Values`. ``docs/measures.md``
says how to add one and how to run it over a finished study: ``detrojan measure``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from detrojan.cells import Model, Shard, untouched
from detrojan.storage import records
from detrojan.storage.columns import CELL_KEYS, PREDICTIONS, required

Labels = npt.NDArray[np.int16]
Flags = npt.NDArray[np.bool_]
Numbers = npt.NDArray[Any]

MEASURES = pa.schema(
    [
        *CELL_KEYS,
        required("measure", pa.string()),
        pa.field("label", pa.int16()),
        pa.field("value", pa.float64()),
        required("num_images", pa.int32()),
    ]
)
NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Answers:
    """What the models of a shard say of the test images, and what to compare it with.

    D draws that ended well, N clean test images, M triggered ones (none for a clean model). Classes are
    int16; the images come in the same order throughout.

    Attributes:
        clean: (D, N), predicted class of each clean test image.
        triggered: (D, M), predicted class of each triggered test image.
        labels: (N,), true class of the clean images.
        true_labels: (M,), true class of the triggered images.
        wanted_labels: (M,), the class that the attacker wants for them, never the true one.
        untouched_clean: (N,), what the model said of the clean images before any defense.
        untouched_triggered: (M,), and of the triggered ones.
    """

    clean: Labels
    triggered: Labels
    labels: Labels
    true_labels: Labels
    wanted_labels: Labels
    untouched_clean: Labels
    untouched_triggered: Labels


class Values(NamedTuple):
    """A measure of D models, K values each: one, or one for each class that has images.

    Attributes:
        value: float64 (D, K), NaN where undefined.
        num_images: int (K,), or (D, K) where it differs from draw to draw: images behind each value.
        label: int (K,), the class that a value is of, or (D, K) where it differs from draw to draw;
            ``NO_LABEL`` for a value of the whole cell.
    """

    value: npt.NDArray[np.float64]
    num_images: npt.NDArray[np.integer]
    label: npt.NDArray[np.integer]


Measure = Callable[[Answers], Values]
REGISTRY: dict[str, Measure] = {}


def measure(function: Measure) -> Measure:
    """Add ``function`` to the measures, under its own name."""
    REGISTRY[function.__name__] = function
    return function


def share(hits: Flags) -> Values:
    """Return the share of images that are hits, bool (D, N); undefined without images."""
    count = hits.shape[1]
    value = hits.sum(1, keepdims=True) / count if count else np.full((len(hits), 1), np.nan)
    return Values(value, np.array([count]), np.array([NO_LABEL]))


def share_of_each_class(hits: Flags, classes: Labels) -> Values:
    """Return the share of hits, bool (D, N), among the images of each class that has any.

    Args:
        hits: of each draw and image.
        classes: (N,), of each image.
    """
    counts = np.bincount(classes)
    label = np.flatnonzero(counts)
    # One count for all draws: each has its own range of numbers.
    numbered = classes + len(counts) * np.arange(len(hits))[:, None]
    found = np.bincount(numbered[hits], minlength=len(hits) * len(counts)).reshape(len(hits), len(counts))
    return Values(found[:, label] / counts[label], counts[label], label)


# --- the measures ----------------------------------------------------------------------------------


@measure
def acc(answers: Answers) -> Values:
    """Return ACC: the share of clean images given their true label."""
    return share(answers.clean == answers.labels)


@measure
def asr(answers: Answers) -> Values:
    """Return ASR: the share of triggered images given the label that the attacker wants."""
    return share(answers.triggered == answers.wanted_labels)


@measure
def ra(answers: Answers) -> Values:
    """Return RA: the share of triggered images given their true label."""
    return share(answers.triggered == answers.true_labels)


@measure
def class_acc(answers: Answers) -> Values:
    """Return the ACC of each class, which is its recall."""
    return share_of_each_class(answers.clean == answers.labels, answers.labels)


@measure
def class_asr(answers: Answers) -> Values:
    """Return the ASR of each class that the attacker wants: of the triggered images that should get it."""
    return share_of_each_class(answers.triggered == answers.wanted_labels, answers.wanted_labels)


@measure
def class_ra(answers: Answers) -> Values:
    """Return the RA of each class: of the triggered images whose true class it is."""
    return share_of_each_class(answers.triggered == answers.true_labels, answers.true_labels)


@measure
def source_asr(answers: Answers) -> Values:
    """Return the ASR of each source class: of the triggered images whose true class it is."""
    return share_of_each_class(answers.triggered == answers.wanted_labels, answers.true_labels)


@measure
def worst_source_asr(answers: Answers) -> Values:
    """Return the highest ASR of a source class, and which one that is: of several the first."""
    sources = source_asr(answers)
    if not len(sources.label):
        return asr(answers)  # undefined: no triggered images
    worst = sources.value.argmax(1)[:, None]
    value = np.take_along_axis(sources.value, worst, 1)
    return Values(value, sources.num_images[worst], sources.label[worst])


@measure
def agreement(answers: Answers) -> Values:
    """Return the share of clean images that get the label which the untouched model gives them."""
    return share(answers.clean == answers.untouched_clean)


@measure
def triggered_agreement(answers: Answers) -> Values:
    """Return the share of triggered images that get the label which the untouched model gives them."""
    return share(answers.triggered == answers.untouched_triggered)


# --- reading ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is true of the test images of one kind, clean or triggered.

    Attributes:
        index: int32 (N,), the image's row in the data set's test set.
        labels: int16 (N,), what a model should say, or an attacker wants it to say.
        true_labels: int16 (N,), what the image shows.
    """

    index: npt.NDArray[np.int32]
    labels: Labels
    true_labels: Labels


NO_IMAGES = Truth(np.empty(0, np.int32), np.empty(0, np.int16), np.empty(0, np.int16))


class Places(Protocol):
    """Says where a study's predictions and test sets lie."""

    def predictions(self, shard: Shard) -> Path:
        """Return where the predictions of ``shard`` lie."""

    def test_images(self, dataset: str) -> Path:
        """Return where the test images of a data set lie."""

    def triggered_images(self, model: Model) -> Path | None:
        """Return where the triggered test images of ``model`` lie; None for a clean one."""


class Reader:
    """Reads what was predicted in a study, a shard at a time.

    The sets and the untouched model that were read last are kept: those of a model's shards, which
    a study plans one after the other, are read once.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self._truth = functools.lru_cache(maxsize=2)(_truth)
        self._untouched = functools.lru_cache(maxsize=1)(self._read_untouched)

    def is_there(self, shard: Shard) -> bool:
        """Return whether a shard and the untouched model that it is compared with were evaluated."""
        return all(self.places.predictions(s).exists() for s in (shard, untouched(shard.model)))

    def answers(self, shard: Shard) -> tuple[list[int], Answers]:
        """Return the draws of ``shard`` that ended well, and what their models say.

        Raises:
            ValueError: a file is missing or broken, or it predicts other images than the test sets have.
        """
        clean, triggered = self._truths(shard.model)
        draws, said = self._said(shard)
        (before,) = self._untouched(shard.model)
        count = len(clean.index)
        answers = Answers(
            clean=said[:, :count],
            triggered=said[:, count:],
            labels=clean.labels,
            true_labels=triggered.true_labels,
            wanted_labels=triggered.labels,
            untouched_clean=before[:count],
            untouched_triggered=before[count:],
        )
        return draws, answers

    def _truths(self, model: Model) -> tuple[Truth, Truth]:
        """Return the clean test images and the triggered ones."""
        triggered = self.places.triggered_images(model)
        clean = self._truth(self.places.test_images(model.dataset))
        return clean, NO_IMAGES if triggered is None else self._truth(triggered)

    def _read_untouched(self, model: Model) -> Labels:
        return self._said(untouched(model))[1]

    def _said(self, shard: Shard) -> tuple[list[int], Labels]:
        """Return the draws that have predictions, and these, int16 (D, N + M): clean images first."""
        path = self.places.predictions(shard)
        table = records.read_table(path, PREDICTIONS)
        clean, triggered = self._truths(shard.model)
        index = np.concatenate([clean.index, triggered.index])
        is_triggered = np.arange(len(index)) >= len(clean.index)
        if len(table) % len(index):
            raise _other_images(path, f"{len(table):,} rows are no multiple of {len(index):,} test images")
        draws, flags, indices, predicted = (
            table[name].to_numpy().reshape(-1, len(index)) for name in PREDICTIONS.names
        )
        if (indices != index).any() or (flags != is_triggered).any() or (draws != draws[:, :1]).any():
            raise _other_images(path, "its images, or their order, are not those of the test sets")
        return draws[:, 0].tolist(), predicted


def _other_images(path: Path, found: str) -> ValueError:
    return ValueError(f"{path}: {found}; delete it and run the workflow again")


def _truth(path: Path) -> Truth:
    with records.readable(path, "test set"):
        file = records.open_table(path)
        names = [name for name in ("index", "label", "true_label") if name in file.schema_arrow.names]
        table = file.read(columns=names)  # without the images
        index, labels = table["index"].to_numpy(), table["label"].to_numpy()
        return Truth(index, labels, table[names[-1]].to_numpy())


# --- the table -------------------------------------------------------------------------------------


def rows(reader: Reader, shard: Shard, draws: Sequence[int], measures: Mapping[str, Measure]) -> pa.Table:
    """Return the rows of ``MEASURES`` of a shard: each measure of each draw.

    A draw without a repaired model has no predictions: its values are null, over 0 images.

    Args:
        reader: of the results.
        shard: one that :meth:`Reader.is_there`.
        draws: those to measure.
        measures: by name, see ``REGISTRY``.
    """
    there, answers = reader.answers(shard)
    place = {draw: row for row, draw in enumerate(there)}
    found = np.array([place.get(draw, -1) for draw in draws])
    blocks = [_block(function(answers), found) for function in measures.values()]
    value, num_images, label = (
        np.concatenate([*map(np.ravel, parts)]) for parts in zip(*blocks, strict=True)
    )
    widths = [block[0].shape[1] for block in blocks]
    which = np.repeat(np.arange(len(blocks), dtype=np.int32), np.multiply(widths, len(draws)))
    repeated = {
        name: pa.repeat(pa.scalar(key, MEASURES.field(name).type), len(value))
        for name, key in shard.axes.items()
    }
    table = {
        **repeated,
        "draw": np.concatenate([np.repeat(np.asarray(draws, np.int32), width) for width in widths]),
        "measure": pa.DictionaryArray.from_arrays(which, list(measures)).cast(pa.string()),
        "label": pa.array(label.astype(np.int16), mask=label == NO_LABEL),
        "value": pa.array(value, mask=np.isnan(value)),
        "num_images": pa.array(num_images.astype(np.int32)),
    }
    return pa.table(table, MEASURES)


def _block(values: Values, found: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Return value, number of images and label, each (draws, K), of all draws asked for.

    Args:
        values: of the draws that have predictions.
        found: for each draw asked for, its row in ``values``; -1 if it has none.
    """
    shape = values.value.shape

    def picked(part: Numbers, of_none: Numbers | float) -> Numbers:
        last = np.broadcast_to(of_none, (1, shape[1]))  # what -1 picks
        return np.concatenate([np.broadcast_to(part, shape), last])[found]

    label_of_none = values.label if values.label.ndim == 1 else NO_LABEL
    return (
        picked(values.value, np.nan),
        picked(values.num_images, 0),
        picked(values.label, label_of_none),
    )
