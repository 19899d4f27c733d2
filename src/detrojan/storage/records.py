"""Tables, cards and other files that need no torch: whole or absent, one clear line on a broken one.

A write goes to ``.NAME.partial`` beside its target and is then renamed. The name is fixed, so that
what a killed job leaves is overwritten and renamed away by its rerun.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from safetensors import SafetensorError

if TYPE_CHECKING:
    from PIL import Image

FilePath = str | os.PathLike[str]
# What libraries, and our dataclasses made from metadata, raise on a file that is not what it should be.
BROKEN = (
    pa.ArrowException,
    SafetensorError,
    json.JSONDecodeError,
    UnicodeDecodeError,
    ValidationError,
    KeyError,
    TypeError,
)


@contextlib.contextmanager
def whole(path: FilePath) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or a folder to; rename it when the block ends well."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_file():
            # A rename may reach the disk before the data: after a power cut, an empty file.
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        if target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
    except BaseException:
        _remove(partial)
        raise


@contextlib.contextmanager
def whole_folder(path: FilePath) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill; rename it when the block ends well."""
    with whole(path) as partial:
        partial.mkdir()
        yield partial


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def readable(path: FilePath, what: str) -> Iterator[None]:
    """Turn a library's error about a broken file into a line that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such {what}; run the workflow again to make it") from error
    except BROKEN as error:
        raise ValueError(
            f"{path}: not a whole {what} ({one_line(error)}); delete the file and run the workflow again"
        ) from error


def one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def write_table(table: pa.Table, path: FilePath, schema: pa.Schema) -> None:
    """Write ``table`` as Parquet with exactly the columns and types of ``schema``."""
    with whole(path) as partial:
        pq.write_table(table.select(schema.names).cast(schema), partial, compression="zstd")


def write_rows(rows: list[dict[str, Any]], path: FilePath, schema: pa.Schema) -> None:
    """Write ``rows``, each with a value for every column of ``schema``, as Parquet."""
    for row in rows:
        assert set(row) == set(schema.names), set(row) ^ set(schema.names)
    write_table(pa.Table.from_pylist(rows, schema=schema), path, schema)


def read_rows(path: FilePath, schema: pa.Schema) -> list[dict[str, Any]]:
    """Return the rows of the table at ``path``; raise as :func:`read_table` does."""
    return cast("list[dict[str, Any]]", read_table(path, schema).to_pylist())


def read_table(path: FilePath, schema: pa.Schema | None = None) -> pa.Table:
    """Return the Parquet table at ``path``.

    Raises:
        ValueError: it is missing, truncated, or its columns differ from ``schema``.
    """
    with readable(path, "Parquet table"):
        # memory_map=False: a mapped file on a network file system turns its loss into a bus error.
        table = pq.ParquetFile(path, memory_map=False).read()
    if schema is not None and table.schema.remove_metadata() != schema.remove_metadata():
        found, declared = (s.remove_metadata().to_string().splitlines() for s in (table.schema, schema))
        differing = sorted(set(found) ^ set(declared)) or ["another order"]
        raise ValueError(
            f"{path}: its columns are not this version's ({', '.join(differing)}); "
            "delete the file and run the workflow again"
        )
    return table


def write_predictions(table: pa.Table, path: FilePath) -> None:
    """Write predicted classes, compactly: the classes dictionary-coded, the sorted indices as differences."""
    with whole(path) as partial:
        pq.write_table(
            table,
            partial,
            compression="zstd",
            use_dictionary=[name for name in table.column_names if name != "index"],
            column_encoding={"index": "DELTA_BINARY_PACKED"},
        )


def write_text(text: str, path: FilePath) -> None:
    """Write ``text`` as UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_picture(picture: "Image.Image", path: FilePath) -> None:
    """Write ``picture`` as PNG."""
    with whole(path) as partial:
        picture.save(partial, format="PNG")


def write_card(card: Mapping[str, Any], path: FilePath) -> None:
    """Write ``card`` as indented JSON."""
    with whole(path) as partial:
        partial.write_text(json.dumps(card, indent=2, allow_nan=False) + "\n")


def read_card(path: FilePath) -> dict[str, Any]:
    """Return the card at ``path``."""
    with readable(path, "card"):
        return cast("dict[str, Any]", json.loads(Path(path).read_text()))
