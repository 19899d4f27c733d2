"""Tables, cards and other files that need no torch: whole or absent, one clear line on a broken one.

A write goes to ``.NAME.HOST.PID.partial`` beside its target and is then renamed. So two jobs that write one
target have a file each, and the last rename wins, whole. What a killed job leaves, the next write removes.
"""

import contextlib
import errno
import glob
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from safetensors import SafetensorError

from detrojan.errors import told
from detrojan.storage import processes, seals

if TYPE_CHECKING:
    from PIL import Image

FilePath = str | os.PathLike[str]
# A writer on another machine can't be asked whether it lives: its file counts as left after this time.
FORGOTTEN = 7 * 24 * 3600  # seconds without a write
PLACE = "place"  # key of where a file was written, beside the one of its checksum
# What is in the way of a rename: a folder that is not empty, a folder for a file, a file for a folder.
OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
# What libraries, and our dataclasses made from metadata, raise on a file that is not what it should be.
BROKEN = (
    seals.DamagedError,
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
    """Yield a path beside ``path`` to write a file or a folder to; rename it when the block ends well.

    Raises:
        FaultError: the disk is full, say, or the folder may not be written to.
    """
    target = Path(path)
    partial = _beside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        _remove(partial)
        yield partial
        if partial.is_file():
            # A rename may reach the disk before the data: after a power cut, an empty file.
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        _put(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # of a fault, the first word counts
            _remove(partial)
        if isinstance(error, OSError):
            # Nobody knows the file by the name that it was written under.
            other = error.filename and not os.fsdecode(error.filename).startswith(str(partial))
            fault = told(error, None if other else target)
            if fault is not error:
                raise fault from error
        raise


def sweep(path: FilePath) -> None:
    """Remove what writers of ``path`` left beside it when they were killed; not what others write now."""
    target = Path(path)
    form = re.compile(rf"\.{re.escape(target.name)}\.(.+)\.(\d+)\.(partial|old)")
    for left in target.parent.glob(f".{glob.escape(target.name)}.*"):
        if found := form.fullmatch(left.name):
            with contextlib.suppress(OSError):  # finished meanwhile, or not ours to remove
                touched = left.stat().st_mtime
                at_work = processes.is_at_work(found[1], int(found[2]), touched)
                if at_work is None:
                    at_work = time.time() - touched < FORGOTTEN
                if not at_work:
                    _remove(left)


def _beside(target: Path, what: str) -> Path:
    """Return a path beside ``target`` that no other process has."""
    return target.with_name(f".{target.name}{_ending(what)}")


def _ending(what: str) -> str:
    return f".{socket.gethostname()}.{os.getpid()}.{what}"


def place(path: FilePath) -> str:
    """Return where a file lies below the last folder ``results`` of its path; nothing if there is none.

    Of a file in a folder that is being written, where it will lie.
    """
    own = _ending("partial")
    parts = [part.removesuffix(own)[1:] if part.endswith(own) else part for part in Path(path).parts]
    return "/".join(parts[-parts[::-1].index("results") :]) if "results" in parts[:-1] else ""


def check_place(path: FilePath, written: str) -> None:
    """Refuse a file that was written to another place below its results than ``path``.

    Args:
        path: where it was found; folders of results may have any name by now.
        written: its :func:`place` then; nothing is known of one that is empty.

    Raises:
        ValueError: it lies elsewhere.
    """
    if written and not f"/{Path(path).as_posix()}".endswith(f"/{written}"):
        said = f"{path}: written as {written}, so it is another's; was it copied there?"
        raise ValueError(f"{said} {anew(path)}")


def _put(partial: Path, target: Path) -> None:
    """Rename ``partial`` to ``target``, also where another process does the same."""
    old = _beside(target, "old")
    while True:
        try:
            partial.replace(target)
        except OSError as error:
            if error.errno not in OCCUPIED:
                raise
        else:
            return
        # A folder that is not empty can't be replaced: put aside what is there.
        with contextlib.suppress(FileNotFoundError):
            target.replace(old)
            _remove(old)


@contextlib.contextmanager
def sealed(path: FilePath) -> Iterator[Path]:
    """Yield a path as :func:`whole` does, for a file with a place for its checksum, which is filled in."""
    with whole(path) as partial:
        yield partial
        seals.seal(partial)


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
    except OSError as error:
        if error.errno is not None:
            raise told(error, path) from error
        # Arrow's word on what is no Parquet.
        raise ValueError(f"{path}: not a whole {what} ({one_line(error)}); {anew(path)}") from error
    except BROKEN as error:
        raise ValueError(f"{path}: not a whole {what} ({one_line(error)}); {anew(path)}") from error


def anew(path: FilePath) -> str:
    """Return what to do to have the file at ``path`` made again, with all that was made of it."""
    file = Path(path)
    if file.name.startswith("."):  # beside results, and nothing that the workflow knows
        return "delete it and run the workflow again"
    # What waits to be evaluated is made as one, folder and all.
    parts = (file.parent if (file.parent / "runs.parquet").exists() else file).parts
    # As the workflow names it, whose folder need not be where we are.
    start = max((at for at, part in enumerate(parts) if file.is_absolute() and part == "results"), default=0)
    forced = f"-R {shlex.quote(str(Path(*parts[start:])))}"
    return f"make it anew: run your study with {forced}, as `snakemake --profile local {forced}`"


def one_line(error: Exception) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def table_writer(path: FilePath, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of the Parquet table at ``path``, with checksums; the table is there at the end.

    Args:
        path: of the table.
        schema: its columns, and metadata of our own, if any.
        options: more of pyarrow's, for the writer.
    """
    options = {"compression": "zstd", "write_page_checksum": True, **options}
    with sealed(path) as partial, pq.ParquetWriter(partial, schema, **options) as writer:
        yield writer
        writer.add_key_value_metadata({PLACE: place(path), seals.KEY: seals.BLANK})


def write_table(table: pa.Table, path: FilePath, schema: pa.Schema) -> None:
    """Write ``table`` as Parquet with exactly the columns, types and metadata of ``schema``."""
    with table_writer(path, schema) as writer:
        writer.write_table(table.select(schema.names).cast(schema))


def write_rows(rows: list[dict[str, Any]], path: FilePath, schema: pa.Schema) -> None:
    """Write ``rows``, each with a value for every column of ``schema``, as Parquet."""
    for row in rows:
        assert set(row) == set(schema.names), set(row) ^ set(schema.names)
    write_table(pa.Table.from_pylist(rows, schema=schema), path, schema)


def read_rows(path: FilePath, schema: pa.Schema) -> list[dict[str, Any]]:
    """Return the rows of the table at ``path``; raise as :func:`read_table` does."""
    return cast("list[dict[str, Any]]", read_table(path, schema).to_pylist())


def read_table(path: FilePath, schema: pa.Schema | None = None) -> pa.Table:
    """Return the Parquet table at ``path``, with the metadata of its schema.

    Raises:
        ValueError: it is missing, damaged or another's, or its columns differ from ``schema``.
    """
    with readable(path, "Parquet table"):
        table = open_table(path).read()
    metadata = dict(table.schema.metadata or {})
    metadata.pop(seals.KEY.encode(), None)
    check_place(path, metadata.pop(PLACE.encode(), b"").decode())
    table = table.replace_schema_metadata(metadata or None)
    if schema is not None and table.schema.remove_metadata() != schema.remove_metadata():
        found, declared = (s.remove_metadata().to_string().splitlines() for s in (table.schema, schema))
        differing = sorted(set(found) ^ set(declared)) or ["another order"]
        raise ValueError(f"{path}: its columns are not this version's ({', '.join(differing)}); {anew(path)}")
    return table


def open_table(path: FilePath, **options: Any) -> pq.ParquetFile:
    """Return the Parquet file at ``path``, whose bytes are those that were written.

    Args:
        path: of the file.
        options: of pyarrow's, for reading it.

    Raises:
        DamagedError: they are not, or it has no checksum.
        OSError, pyarrow.ArrowException: it can't be read.
    """
    # What was checked is what is read. Nor is the file mapped: on a network file system the loss of
    # a mapped file is a bus error.
    content = pa.BufferReader(seals.read(path))
    return pq.ParquetFile(content, page_checksum_verification=True, **options)


def write_predictions(table: pa.Table, path: FilePath) -> None:
    """Write predicted classes, compactly: the classes dictionary-coded, the sorted indices as differences."""
    coded = [name for name in table.column_names if name != "index"]
    encoded = {"index": "DELTA_BINARY_PACKED"}
    with table_writer(path, table.schema, use_dictionary=coded, column_encoding=encoded) as writer:
        writer.write_table(table)


def write_text(text: str, path: FilePath) -> None:
    """Write ``text`` as UTF-8."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_picture(picture: "Image.Image", path: FilePath) -> None:
    """Write ``picture`` as PNG."""
    with whole(path) as partial:
        picture.save(partial, format="PNG")


def write_card(card: Mapping[str, Any], path: FilePath) -> None:
    """Write ``card`` as indented JSON, with its checksum."""
    text = json.dumps({**card, seals.KEY: seals.BLANK}, indent=2, allow_nan=False)
    with sealed(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8")


def read_card(path: FilePath) -> dict[str, Any]:
    """Return the card at ``path``, without its checksum.

    Raises:
        ValueError: it is missing or damaged.
    """
    with readable(path, "card"):
        card: dict[str, Any] = json.loads(seals.read(path))
        card.pop(seals.KEY, None)
        return card
