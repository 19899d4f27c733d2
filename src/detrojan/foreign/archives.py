"""Opens the zip files of torch: pickled archives, TorchScript, and programs of ``torch.export`` (.pt2).

torch writes them without compression, one entry a storage, all below one folder. What differs from that is
refused before an entry is read.
"""

import contextlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detrojan.foreign.values import DTYPES, Storage, TensorRef, located, whole

MAX_ENTRIES = 100_000
CODE = "code/"  # TorchScript's sources, which are never read and may be compressed
# All tensors together, as a multiple of the file: two may share a storage, thousands are a bomb.
MAX_GROWTH = 8
LOCAL_HEADER = 30  # bytes before an entry's name, at least
# torch.export's numbers for types (schema of torch 2.8 and later).
EXPORTED = dict(
    zip(
        (1, 2, 3, 4, 5, 6, 7, 8, 12, 13),
        ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool", "bfloat16"),
        strict=True,
    )
)
WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"


class Archive:
    """A zip file of torch that was found in order.

    Attributes:
        entries: by name, without the folder that all lie in.
    """

    entries: Mapping[str, zipfile.ZipInfo]

    def __init__(self, opened: zipfile.ZipFile, size: int) -> None:
        """Check an opened zip file of ``size`` bytes.

        Raises:
            ValueError: torch does not write such a file.
        """
        self._zip, self._size = opened, size
        listed = opened.infolist()
        _check_places(listed, size)
        root, names = _below_one_folder([entry.filename for entry in listed])
        self.entries = dict(zip(names, listed, strict=True))
        for name, entry in self.entries.items():
            if not name.startswith(CODE) and entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its entry {root}/{name} is compressed, which torch never does")
        if "byteorder" in self.entries and self.read("byteorder") != b"little":
            raise ValueError("its numbers are big-endian: save it again on a usual machine")

    def read(self, name: str) -> bytes:
        """Return what an entry holds.

        Raises:
            ValueError: there is no such entry, or it does not have its checksum.
        """
        if name not in self.entries:
            raise ValueError(f"its entry {name} is missing")
        return self._zip.read(self.entries[name])

    def sizes(self, folder: str) -> dict[str, int]:
        """Return how many bytes each entry of ``folder`` has, by its name there."""
        return {
            name.removeprefix(folder): entry.file_size
            for name, entry in self.entries.items()
            if name.startswith(folder)
        }

    def tensors(self, wanted: Mapping[str, TensorRef], folder: str) -> dict[str, Tensor]:
        """Return tensors by the names of ``wanted``, in memory of their own.

        Args:
            wanted: where each lies.
            folder: that has their storages.

        Raises:
            ValueError: they are many times as large as the file.
        """
        check_growth(sum(_num_bytes(place) for place in wanted.values()), self._size)
        stored: dict[Storage, Tensor] = {}
        tensors = {}
        for name, place in wanted.items():
            if place.storage not in stored:
                stored[place.storage] = _numbers(self.read(folder + place.storage.key), place.storage)
            whole = stored[place.storage]
            # A copy: torch aligns its memory, and a tensor should not keep a storage alive that others share.
            tensors[name] = whole.as_strided(place.shape, place.strides, place.offset).clone()
        return tensors


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Yield the archive at ``path``.

    Raises:
        ValueError: it is damaged, or torch does not write such a file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            yield Archive(file, path.stat().st_size)
    # All that the library says of a damaged file, or of one that it does not know how to read.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        struct.error,
        zlib.error,
    ) as error:
        raise ValueError(f"damaged: {error}") from error


def check_growth(num_bytes: int, size: int) -> None:
    """Refuse tensors of ``num_bytes`` together from a file of ``size`` bytes, if they are a bomb.

    Raises:
        ValueError: they are.
    """
    if num_bytes > MAX_GROWTH * size:
        raise ValueError(f"its tensors would take {num_bytes:,} bytes, and the file has {size:,}")


def exported(archive: Archive) -> dict[str, TensorRef]:
    """Return where the weights of a program of ``torch.export`` lie, in the folder ``WEIGHTS``.

    The program itself is not read. Buffers that it does not count as its state are not among its weights.

    Raises:
        ValueError: it is of another version, or its weights are pickled.
    """
    if WEIGHTS_CONFIG not in archive.entries:
        raise ValueError("a program of torch.export before torch 2.8: save it again with a later one")
    sizes = archive.sizes(WEIGHTS)
    try:
        listed = json.loads(archive.read(WEIGHTS_CONFIG))["config"]
        return {name: _exported(entry, sizes) for name, entry in listed.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its list of weights {WEIGHTS_CONFIG} is of another form") from error


def _exported(entry: Mapping[str, Any], sizes: Mapping[str, int]) -> TensorRef:
    if entry["use_pickle"]:
        raise ValueError("its weights are pickled: save the state dict instead")
    meta, key = entry["tensor_meta"], entry["path_name"]
    kind = whole(meta["dtype"], "a tensor's type")
    if kind not in EXPORTED:
        raise ValueError(f"numbers of torch.export's kind {kind}: only {', '.join(DTYPES)} are read")
    dtype = DTYPES[EXPORTED[kind]]
    storage = Storage(dtype, key, sizes[key] // dtype.itemsize)
    shape, strides = ([size["as_int"] for size in meta[part]] for part in ("sizes", "strides"))
    return located(storage, meta["storage_offset"]["as_int"], shape, strides)


def _check_places(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse entries that share a name or a place, or are larger than the file of ``size`` bytes."""
    if len(entries) > MAX_ENTRIES:
        raise ValueError(f"it has more than {MAX_ENTRIES:,} entries")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two of its entries have one name")
    begins = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [entry.header_offset for entry in begins[1:]] + [size]
    for entry, end in zip(begins, ends, strict=True):
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ValueError(f"its entry {name!r:.60} points out of it")
        if entry.flag_bits & 1:
            raise ValueError(f"its entry {name} is encrypted")
        if entry.header_offset < 0 or entry.header_offset + LOCAL_HEADER + entry.compress_size > end:
            raise ValueError(f"its entry {name} reaches beyond its place")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise ValueError(f"its entry {name} is said to have two sizes")


def _below_one_folder(names: list[str]) -> tuple[str, list[str]]:
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or not all("/" in name for name in names):
        raise ValueError("a zip file that torch did not write: its entries lie in several folders")
    root = roots.pop()
    return root, [name.removeprefix(f"{root}/") for name in names]


def _num_bytes(place: TensorRef) -> int:
    return torch.Size(place.shape).numel() * place.dtype.itemsize


def _numbers(content: bytes, storage: Storage) -> Tensor:
    """Return a storage's numbers (length,)."""
    content = content[: storage.length * storage.dtype.itemsize]
    if not content:  # which torch.frombuffer refuses
        return torch.empty(0, dtype=storage.dtype)
    if storage.dtype == torch.bool:  # a byte that is neither 0 nor 1 is no truth value
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) != 0
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)
