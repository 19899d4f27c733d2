"""Reads a checkpoint that somebody else wrote, without running any of it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detrojan.foreign import archives, benign, configs, containers
from detrojan.foreign.archives import Archive
from detrojan.foreign.configs import Known
from detrojan.foreign.containers import Found
from detrojan.foreign.pickles import Pickle
from detrojan.foreign.values import DTYPES, Named, TensorRef

T = TypeVar("T")
STORAGES = "data/"
WEIGHTS = "model.safetensors"  # in a folder of Hugging Face's or timm's
MAX_SHOWN = 1000  # signs of a message
HEAD = 512  # bytes that tell what a file is
ADVICE = "save the state dict with torch.save, or as safetensors"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A file of weights, wholly read.

    Attributes:
        path: of the file.
        kind: of the file, in words.
        tensors: by the file's own names, in its order, on the CPU; all are finite.
        known: what the file, or a configuration beside it, says of the model.
        place: the keys that lead to the tensors in the file; none if they are all it has.
        module: the class of the module that was saved whole; empty otherwise.
        beside: what else the file has beside the tensors, NumPy's arrays decoded.
        names: what the file asks to import, as ``torch.nn.modules.conv.Conv2d``; nothing was.
    """

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    known: Known
    place: tuple[str, ...] = ()
    module: str = ""
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)
    names: tuple[str, ...] = ()


def read(path: Path | str, key: str | None = None) -> Checkpoint:
    """Return the checkpoint at ``path``; nothing in it is imported or called.

    Args:
        path: a pickled archive of torch (a state dict, a module, TorchScript), an older file of torch, a
            program of torch.export (.pt2), a safetensors file, or a folder that has ``model.safetensors``.
        key: of the entry that has the state dict; if None, it is looked for.

    Raises:
        ValueError: it is missing, damaged, of another kind, or would run something if torch.load loaded it.
    """
    path = Path(path)
    try:
        file = path / WEIGHTS if path.is_dir() else path
        if not file.is_file():
            raise ValueError("no such file")
        return _read(file, key)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {shown(str(error))}") from error


def shown(text: str) -> str:
    """Return a text of a file on one line, without what a terminal would act on, and not without end."""
    line = "".join(sign if sign.isprintable() else " " for sign in text[:MAX_SHOWN])
    return " ".join(line.split())


def _read(path: Path, key: str | None) -> Checkpoint:
    with path.open("rb") as file:
        head = file.read(HEAD)
    if path.suffix == ".safetensors":
        _no_key(key)
    if head.startswith(b"PK\x03\x04"):
        with archives.opened(path) as archive:
            checkpoint = _of_archive(path, archive, key)
    elif head[8:9] == b"{" and (path.suffix == ".safetensors" or _has_header(path, head)):
        checkpoint = _of_safetensors(path)
    elif head.startswith(b"\x80") and path.suffix != ".onnx":
        checkpoint = _of_older(path, key)
    else:
        raise ValueError(_other(path, head))
    for name, tensor in checkpoint.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name} has values that are not finite")
    return checkpoint


def _other(path: Path, head: bytes) -> str:
    """Return the refusal of a file that is not read."""
    if path.suffix == ".onnx":
        return (
            f"ONNX is not read: exporters fold layers and rename tensors, so there is no way back; {ADVICE}"
        )
    if head[257:262] == b"ustar":
        return f"a tar file, as torch wrote before 2018, is not read; {ADVICE}"
    return f"neither a file of torch nor safetensors; {ADVICE}"


# --- zip files of torch ----------------------------------------------------------------------------


def _of_archive(path: Path, archive: Archive, key: str | None) -> Checkpoint:
    if "data.pkl" in archive.entries:
        return _of_pickle(path, archive, key)
    if "archive_format" in archive.entries or "models/model.json" in archive.entries:
        _no_key(key)
        tensors = archive.tensors(_bounded(archives.exported(archive)), archives.WEIGHTS)
        return Checkpoint(path, "program of torch.export (.pt2)", tensors, Known())
    raise ValueError("a zip file without data.pkl, so none of torch's")


def _of_pickle(path: Path, archive: Archive, key: str | None) -> Checkpoint:
    pickle = Pickle(archive.read("data.pkl"), archive.sizes(STORAGES))
    benign.check(pickle)
    found = containers.find(pickle.value, key)
    places = {name: place for name, place in found.state.items() if isinstance(place, TensorRef)}
    scripted = any(name.startswith(archives.CODE) for name in archive.entries)
    kind = (
        "TorchScript" if scripted else "module, pickled whole" if found.module else "pickled archive of torch"
    )
    names = tuple(sorted(str(name) for name in pickle.names))
    return _of_found(path, kind, found, archive.tensors(places, STORAGES), names)


def _of_found(
    path: Path, kind: str, found: Found, tensors: dict[str, Tensor], names: tuple[str, ...] = ()
) -> Checkpoint:
    return Checkpoint(
        path, kind, tensors, _said(found.beside), found.place, found.module, found.beside, names
    )


def _said(beside: Mapping[str, Any]) -> Known:
    """Return what training code wrote beside a state dict: BackdoorBench's words, and timm's ``arch``."""
    network = beside.get("model_name", beside.get("arch"))
    num_classes, size = beside.get("num_classes"), beside.get("img_size")
    sides = size if isinstance(size, list | tuple) else [size]
    return Known(
        network=network if isinstance(network, str) else None,
        num_classes=num_classes if type(num_classes) is int and num_classes > 0 else None,
        image_size=sides[0] if sides and type(sides[0]) is int and sides[0] > 0 else None,
    )


# --- older files of torch --------------------------------------------------------------------------


def _of_older(path: Path, key: str | None) -> Checkpoint:
    """Read a file that torch wrote before 1.6, or that was asked to be so, as far as torch calls it safe."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle anything; it is passed on in one line
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named and not benign.is_benign(Named(*named[1].rpartition(".")[::2])):
            raise ValueError(benign.would_run(named[1])) from error
        raise ValueError(f"an older file of torch with more than weights, or damaged; {ADVICE}") from error
    found = containers.find(value, key)
    tensors = {name: tensor for name, tensor in found.state.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        _check_kept(name, tensor)
    archives.check_growth(sum(t.numel() * t.itemsize for t in tensors.values()), path.stat().st_size)
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return _of_found(path, "older file of torch", found, copies)


def _check_kept(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of a kind that networks here do not have, or larger than what it lies in."""
    if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"tensor {name} is of a kind that no network here has ({tensor.dtype})")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"tensor {name} of shape {list(tensor.shape)} reaches beyond its storage")


# --- safetensors -----------------------------------------------------------------------------------


def _has_header(path: Path, head: bytes) -> bool:
    return int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _of_safetensors(path: Path) -> Checkpoint:
    known = configs.beside(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = _bounded({name: name for name in file.keys()})  # noqa: SIM118  # it is no dictionary
            tensors = {name: file.get_tensor(name).clone() for name in names}
            beside = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"damaged: {error}") from error
    for name, tensor in tensors.items():
        _check_kept(name, tensor)
    return Checkpoint(path, "safetensors", tensors, known, beside=beside)


def _no_key(key: str | None) -> None:
    if key is not None:
        raise ValueError(f"it has named tensors alone, so there is no {key!r} in it: leave out --key")


def _bounded(tensors: Mapping[str, T]) -> Mapping[str, T]:
    if not 0 < len(tensors) <= containers.MAX_TENSORS:
        raise ValueError(f"it has {len(tensors):,} tensors; from 1 to {containers.MAX_TENSORS:,} are read")
    return tensors
