"""Packs tables into text that a page carries in itself, for its scripts to filter; page/data.js reads it.

It is base64 of gzip of: the length of a header (uint32, little endian), the header (JSON), and after it the
numbers of the columns, each aligned to 8 bytes. A column with few distinct values is an array of codes with
the values in the header; any other is an array of float64, with NaN for null. So each number on the page is
the one in the table, bit for bit.
"""

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ALIGNED = 8  # bytes, as typed arrays of JavaScript want them
CODES = ("u1", "u2", "u4")
LEVEL = 6  # of compression: the highest takes three times as long for 3 % less
MOST_VALUES = 1 << 16  # of a column of numbers that is written as codes


def pack(tables: Mapping[str, pa.Table], rest: Mapping[str, Any]) -> str:
    """Return tables, and anything else that JSON can hold, as text; the same tables give the same text.

    Args:
        tables: by name; columns of text, truth values and numbers.
        rest: goes into the header beside ``tables``.
    """
    parts: list[bytes] = []
    described = {
        name: {
            "length": table.num_rows,
            "columns": {column: _column(table[column], parts) for column in table.column_names},
        }
        for name, table in tables.items()
    }
    header = json.dumps({**rest, "tables": described}, separators=(",", ":"), allow_nan=False).encode()
    length = np.array([len(header)], "<u4").tobytes()
    whole = b"".join([_aligned(length + header), *parts])
    return base64.b64encode(gzip.compress(whole, LEVEL, mtime=0)).decode()


def _column(column: pa.ChunkedArray, parts: list[bytes]) -> dict[str, Any]:
    """Return what the header says of a column; its numbers are added to ``parts``."""
    is_number = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
    if is_number and pc.count_distinct(column, mode="all").as_py() > MOST_VALUES:
        return {"kind": "f8", "at": _add(column.cast(pa.float64()).to_numpy(), "<f8", parts)}
    coded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
    values = coded.dictionary.to_pylist()
    kind = next(kind for kind in CODES if len(values) <= 1 << 8 * int(kind[1]))
    return {"kind": kind, "at": _add(coded.indices.to_numpy(), f"<{kind}", parts), "values": values}


def _add(numbers: npt.NDArray[Any], kind: str, parts: list[bytes]) -> int:
    """Add an array to ``parts``; return where it starts after the header."""
    start = sum(map(len, parts))
    parts.append(_aligned(numbers.astype(kind).tobytes()))
    return start


def _aligned(part: bytes) -> bytes:
    return part + b"\0" * (-len(part) % ALIGNED)
