"""Finds the state dict in what a file holds, and what stands beside it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from detrojan.foreign.benign import is_module, is_scripted
from detrojan.foreign.values import Named, Opaque, TensorRef

# Where training code keeps it. BackdoorBench: model (WaNet and Input-aware while they train: netC).
# BackdoorBox: the top, model, clsmodel. backdoor-toolbox: the top. timm: state_dict.
KEYS = ("model", "state_dict", "model_state_dict", "net", "clsmodel", "netC")
MAX_TENSORS = 10_000
MAX_MODULES = 20_000
MAX_DEPTH = 100  # of modules in modules, and of containers in containers
MAX_VALUES = 5_000_000  # of what stands beside it: shared lists can be made to be endless
# NumPy's types that a file's arrays may have: those of objects would need a pickle of their own.
NUMPY_TYPES = ("i1", "i2", "i4", "i8", "u1", "f4", "f8", "b1")
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2

State = dict[str, Tensor | TensorRef]


@dataclasses.dataclass(frozen=True)
class Found:
    """A state dict and its place.

    Attributes:
        state: tensors by name, or where they lie.
        place: the keys that lead to it; none if it is all that the file has.
        module: the class of the module that it is the state of; empty for a plain state dict.
        beside: what else the outermost container has.
    """

    state: State
    place: tuple[str, ...]
    module: str
    beside: dict[str, Any]


def find(value: object, key: str | None = None) -> Found:
    """Return the state dict in ``value``.

    Args:
        value: what a pickle held.
        key: of the entry that has it; if None, it is looked for.

    Raises:
        ValueError: there is none, or there are several.
    """
    if key is None and _state(value) is not None:
        return _found(value, (), {})
    if not isinstance(value, dict):
        raise ValueError("no state dict: neither named tensors, nor a module, nor a dictionary that has one")
    able = [name for name, entry in value.items() if isinstance(name, str) and _state(entry) is not None]
    if key is None:
        able_here = [name for name in KEYS if name in able]
        if len(able_here) != 1:
            raise ValueError(_which(value, able))
        key = able_here[0]
    elif key not in able:
        raise ValueError(f"no state dict under {key!r}; {_which(value, able)}")
    beside = {str(name): entry for name, entry in value.items() if name != key}
    return _found(value[key], (key,), beside)


def _which(value: Mapping[Any, Any], able: list[str]) -> str:
    if able:
        return f"it has state dicts under {', '.join(able)}: choose one with --key"
    keys = ", ".join(str(name) for name in list(value)[:10]) or "nothing"
    return f"no state dict in it, nor directly under one of its keys (it has {keys:.200})"


def _found(value: object, place: tuple[str, ...], beside: Mapping[str, Any]) -> Found:
    state = _state(value)
    assert state is not None
    if not state:
        raise ValueError("its state dict is empty")
    if len(state) > MAX_TENSORS:
        raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
    module = str(value.what) if isinstance(value, Opaque) else ""
    return Found(state, place, module, {name: plain(entry) for name, entry in beside.items()})


def _state(value: object) -> State | None:
    """Return the tensors of a state dict or of a module by their names; None if it is neither."""
    if isinstance(value, Opaque):
        if not (is_module(value) or is_scripted(value)):
            return None
        return dict(_module_tensors(value))
    if not isinstance(value, dict) or not value:
        return None
    named = all(isinstance(n, str) and isinstance(e, Tensor | TensorRef) for n, e in value.items())
    return dict(value) if named else None


def _module_tensors(module: Opaque) -> Iterator[tuple[str, TensorRef]]:
    """Yield what ``state_dict`` of the module would have, in its order.

    TorchScript keeps no note of which tensors are buffers: every attribute that is a tensor counts.
    """
    waiting, num_modules = [("", module)], 0
    while waiting:
        prefix, one = waiting.pop()
        num_modules += 1
        # A module may stand in several places, and those that hold it in several as well: without a bound
        # a small file could take years.
        if num_modules > MAX_MODULES or prefix.count(".") > MAX_DEPTH:
            raise ValueError("its modules lie in one another without end")
        state = one.attributes()
        own, children = _parts(state) if is_module(one) else (state, state)
        for name, entry in own.items():
            if isinstance(entry, TensorRef):
                yield f"{prefix}{name}", entry
        inside = [(f"{prefix}{n}.", c) for n, c in children.items() if is_module(c) or is_scripted(c)]
        waiting += reversed(inside)


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a module's own persistent tensors, and its children."""
    unsaved = state.get("_non_persistent_buffers_set")
    left_out = _set_items(unsaved) if isinstance(unsaved, Opaque) else []
    buffers = {name: entry for name, entry in state["_buffers"].items() if name not in left_out}
    return state["_parameters"] | buffers, state["_modules"]


def _set_items(value: Opaque) -> list[Any]:
    """Return what is in a set, whichever protocol wrote it."""
    given = value.arguments[0] if value.arguments else []
    return [*value.items, *(given if isinstance(given, list | tuple) else [])]


# --- what stands beside it -------------------------------------------------------------------------


def plain(value: object) -> Any:
    """Return ``value`` with NumPy's arrays and numbers in place of what stands for them.

    Raises:
        ValueError: an array has not as many numbers as it says, or the containers have no end.
    """
    return _Plain().of(value, 0)


class _Plain:
    """Counts what it has looked at."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def of(self, value: object, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > MAX_DEPTH:
            raise ValueError("what stands beside its state dict has no end")
        if isinstance(value, dict):
            return {_plain_key(key): self.of(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.of(entry, depth + 1) for entry in value]
        if isinstance(value, tuple) and not isinstance(value, Named):
            return tuple(self.of(entry, depth + 1) for entry in value)
        return _array(value) if isinstance(value, Opaque) else value


def _plain_key(key: object) -> Any:
    number = _array(key) if isinstance(key, Opaque) else key
    return key if isinstance(number, np.ndarray) else number  # which has no hash


def _array(value: Opaque) -> Any:
    """Return NumPy's array or number that ``value`` stands for; else ``value`` itself."""
    if value.what.module not in MULTIARRAY:
        return value
    match value.what.name, value.arguments, value.state:
        case "scalar", (Opaque() as dtype, bytes() | str() as content), None:
            one = _numbers(dtype, (), content, fortran=False)
            return value if one is None else one[()]
        case "_reconstruct", _, (_, tuple() as shape, Opaque() as dtype, fortran, bytes() | str() as content):
            array = _numbers(dtype, shape, content, fortran=fortran is True)
            return value if array is None else array
    return value


def _numbers(
    dtype: Opaque, shape: tuple[Any, ...], content: bytes | str, *, fortran: bool
) -> "np.ndarray[Any, Any] | None":
    kind = dtype.arguments[0] if dtype.arguments else ""
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "|"
    if dtype.what != Named("numpy", "dtype") or kind not in NUMPY_TYPES:
        return None
    if order not in ("<", "|", "="):
        raise ValueError("it has a big-endian array: save it again on a usual machine")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("it has an array whose shape is not whole numbers")
    if isinstance(content, str):  # as Python 2 wrote it
        content = content.encode("latin-1")
    if len(content) != math.prod(shape) * np.dtype(kind).itemsize:
        raise ValueError(f"it has an array of shape {list(shape)} of {len(content)} bytes")
    array = np.frombuffer(content, kind)
    if kind == "b1":  # a byte that is neither 0 nor 1 is no truth value
        array = np.frombuffer(content, np.uint8) != 0
    return array.reshape(shape, order="F" if fortran else "C").copy()
