"""Compares the tables of two folders of results, bit for bit: a refactoring must not change them.

    python benchmarks/equal_tables.py before/results after/results

Run one study with the old code and with the new, on one machine. Every Parquet file of either folder has to
lie in both, with the same columns, metadata and rows, in the same order. Columns that differ between equal
runs are left out: time, memory, and which code ran. Prints what differs, and exits with 1 if anything does.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from detrojan.storage import records, seals
from detrojan.storage.columns import ORIGIN

LEFT_OUT = {"seconds", "images_per_second", "peak_memory_bytes", *(field.name for field in ORIGIN)}


def differences(before: Path, after: Path) -> Iterator[str]:
    """Yield a line for each difference between the tables of two folders of results.

    Raises:
        ValueError: a folder has no tables at all.
    """
    found = [{file.relative_to(folder) for file in folder.rglob("*.parquet")} for folder in (before, after)]
    for folder, files in zip((before, after), found, strict=True):
        if not files:
            raise ValueError(f"{folder}: no Parquet file; name a folder of results")
    for name in sorted(found[0] | found[1]):
        if name not in found[0] & found[1]:
            yield f"{name}: only in {before if name in found[0] else after}"
            continue
        # Partitioning would add columns by the names of folders.
        tables = [pq.ParquetFile(folder / name).read() for folder in (before, after)]
        yield from (f"{name}: {difference}" for difference in _of_tables(*tables))


def _of_tables(before: pa.Table, after: pa.Table) -> Iterator[str]:
    if not _own(before).schema.equals(_own(after).schema, check_metadata=True):
        yield "other columns, types or metadata"
    elif len(before) != len(after):
        yield f"{len(before)} rows became {len(after)}"
    else:
        for column in before.column_names:
            if column not in LEFT_OUT:
                yield from _of_columns(column, before[column], after[column])


def _own(table: pa.Table) -> pa.Table:
    """Return ``table`` without what its file says of itself: the checksum differs with what is left out."""
    words = table.schema.metadata or {}
    return table.replace_schema_metadata(
        {key: word for key, word in words.items() if key.decode() not in (seals.KEY, records.PLACE)}
    )


def _of_columns(name: str, before: pa.ChunkedArray, after: pa.ChunkedArray) -> Iterator[str]:
    changed = np.flatnonzero(_bits(before) != _bits(after))
    if len(changed):
        row = int(changed[0])
        values = f"{before[row].as_py()!r} became {after[row].as_py()!r}"
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


def main() -> int:
    """Compare the folders that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="folder of results of the old code")
    parser.add_argument("after", type=Path, help="folder of results of the new code")
    asked = parser.parse_args()
    try:
        found = list(differences(asked.before, asked.after))
    except (ValueError, pa.ArrowException) as error:
        sys.exit(str(error))
    files = len(list(asked.before.rglob("*.parquet")))
    print("\n".join(found) if found else f"Equal, file by file: {files}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
