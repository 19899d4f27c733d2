"""Compares two folders of results, bit for bit: what a refactoring must leave as it was.

Every file of either folder has to lie in both. Tables need the same columns, metadata and rows, in the same
order; tensors the same names, types, shapes and bits; cards and all other files the same content. What
differs between equal runs is left out: time, memory, and which code ran, and so checksums of all that; the
report, which shows times; and the study file.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from detrojan.storage import records, seals
from detrojan.storage.columns import ORIGIN
from detrojan.study import files
from detrojan.workflow import graph

# Columns of tables, keys of cards.
LEFT_OUT = {"seconds", "images_per_second", "peak_memory_bytes", seals.KEY, *(field.name for field in ORIGIN)}
ABSENT = "nothing"
MOST_SHOWN = 80  # characters of a value


def compared(folder: Path) -> list[Path]:
    """Return the files of a folder of results that are compared, as paths below it, sorted."""
    report = graph.RULES["report"].folder
    below = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in below if file.parts[0] != report and file != Path(files.KEPT))


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield a line for each difference between two folders of results.

    Raises:
        ValueError: a folder has no results at all, or one of its files is broken.
    """
    found = [compared(folder) for folder in (before, after)]
    for folder, files_there in zip((before, after), found, strict=True):
        if not files_there:
            raise ValueError(f"{folder}: nothing to compare; name a folder of results")
    both = set(found[0]) & set(found[1])
    for name in sorted({*found[0], *found[1]}):
        if name not in both:
            yield f"{name}: only in {before if name in found[0] else after}"
            continue
        compare = KINDS.get(name.suffix, _of_bytes)
        try:
            yield from (f"{name}: {difference}" for difference in compare(before / name, after / name))
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{name}, in {before} or {after}, can't be read: {error}") from error


# --- tables ----------------------------------------------------------------------------------------


def _of_tables(*paths: Path) -> Iterator[str]:
    # Partitioning would add columns by the names of folders.
    before, after = (_without_seal(pq.ParquetFile(path).read()) for path in paths)
    if not before.schema.equals(after.schema, check_metadata=True):
        yield "other columns, types or metadata"
    elif len(before) != len(after):
        yield f"{len(before)} rows became {len(after)}"
    else:
        for column in before.column_names:
            if column not in LEFT_OUT:
                yield from _of_columns(column, before[column], after[column])


def _without_seal(table: pa.Table) -> pa.Table:
    """Return a table without the words of its file: its checksum, and where it was written."""
    metadata = table.schema.metadata or {}
    own = {key: word for key, word in metadata.items() if key.decode() not in (seals.KEY, records.PLACE)}
    return table.replace_schema_metadata(own)


def _of_columns(name: str, before: pa.ChunkedArray, after: pa.ChunkedArray) -> Iterator[str]:
    changed = np.flatnonzero(_bits(before) != _bits(after))
    if len(changed):
        row = int(changed[0])
        values = _became(*(repr(side[row].as_py()) for side in (before, after)))
        yield f"{name} differs in {len(changed)} of {len(before)} rows, first in row {row}: {values}"


def _bits(column: pa.ChunkedArray) -> np.ndarray:
    """Return the values of a column so that equal ones have equal bits; NaN is no null, and equals itself."""
    if pa.types.is_floating(column.type):
        values = np.asarray(column.fill_null(0))
        bits = values.view(f"u{values.itemsize}").astype(object)
        bits[np.asarray(column.is_null())] = None
        return bits
    values = np.empty(len(column), object)  # numpy would take texts and lists apart
    values[:] = column.to_pylist()
    return values


# --- tensors ---------------------------------------------------------------------------------------


def _of_tensors(*paths: Path) -> Iterator[str]:
    """Yield what differs, by the format itself, and so without torch: its header has no fixed order."""
    before, after = map(_tensors, paths)
    yield from _of_keys(before, after)


def _tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a file by name, as type, shape and bytes, and its metadata."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    for word in (seals.KEY, records.PLACE):
        metadata.pop(word, None)
    return {f"metadata {name}": text for name, text in metadata.items()} | {
        f"tensor {name}": (
            f"{tensor['dtype']} {tensor['shape']}",
            content[slice(*(start + offset for offset in tensor["data_offsets"]))],
        )
        for name, tensor in header.items()
    }


# --- cards and the rest ----------------------------------------------------------------------------


def _of_cards(*paths: Path) -> Iterator[str]:
    # As text, 0.0 and -0.0 differ, and so do 1 and 1.0.
    before, after = (
        {key: json.dumps(value) for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
        for path in paths
    )
    yield from _of_keys(before, after)


def _of_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        values = [side.get(key, ABSENT) for side in (before, after)]
        if key not in LEFT_OUT and values[0] != values[1]:
            # Of tensors, which are tuples, type and shape are told.
            yield f"{key}: {_became(*(value if isinstance(value, str) else value[0] for value in values))}"


def _became(*texts: str) -> str:
    if texts[0] == texts[1]:
        return "other values"
    return " became ".join(text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..." for text in texts)


def _of_bytes(*paths: Path) -> Iterator[str]:
    before, after = (path.read_bytes() for path in paths)
    if before != after:
        yield "other content"


KINDS: dict[str, Callable[..., Iterable[str]]] = {
    ".parquet": _of_tables,
    ".safetensors": _of_tensors,
    ".json": _of_cards,
}
