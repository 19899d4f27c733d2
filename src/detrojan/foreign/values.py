"""What a foreign pickle becomes when it is read: containers, numbers, text, and three kinds of our own.

None of them can be called, imports anything or has a method that a file could reach.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

# The numbers that networks here are made of. Complex and quantized ones, and 8-bit floats, are refused.
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
MAX_DIMENSIONS = 16


class Named(NamedTuple):
    """A name that a pickle asks to be imported, such as ``collections.OrderedDict``. It never is."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False, repr=False)
class Opaque:
    """What would be an object, had its class been imported: its parts, and nothing that acts on them.

    Attributes:
        what: the class, or the function that would have made it.
        arguments: those it would have been made with.
        called: whether ``what`` would have been called; otherwise it is a class of which an empty object
            would have been made.
        items: what would have been appended to it.
        pairs: what would have been set in it by key.
        state: what would have become its attributes; None if nothing would.
    """

    what: Named
    arguments: tuple[Any, ...]
    called: bool
    items: list[Any] = dataclasses.field(default_factory=list)
    pairs: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    state: Any = None

    def __repr__(self) -> str:  # of bounded length, whatever it holds
        return f"Opaque({self.what})"

    def attributes(self) -> dict[str, Any]:
        """Return the attributes by name; empty if its state is of another form."""
        return self.state if isinstance(self.state, dict) else {}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A row of numbers in a file.

    Attributes:
        dtype: of its numbers.
        key: by which the file knows it.
        length: how many numbers it has.
    """

    dtype: torch.dtype
    key: str
    length: int


@dataclasses.dataclass(frozen=True)
class TensorRef:
    """A tensor that was not read yet: where in a storage its numbers lie. :func:`located` makes it.

    Attributes:
        storage: that has its numbers.
        offset: of the first, in numbers.
        shape: of the tensor.
        strides: a dimension, in numbers.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of its numbers."""
        return self.storage.dtype


def located(storage: Storage, offset: object, shape: object, strides: object) -> TensorRef:
    """Return the tensor that lies so in ``storage``.

    Raises:
        ValueError: it is not wholly within, or is larger than, its storage: torch would let one number be
            "expanded" to a tensor that fills the memory.
    """
    place = TensorRef(storage, whole(offset, "a tensor's offset"), _whole(shape), _whole(strides))
    if len(place.shape) != len(place.strides) or len(place.shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of shape {list(place.shape)[:8]} and strides {list(place.strides)[:8]}")
    steps = sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))
    last = place.offset + (steps if 0 not in place.shape else -1)
    if last >= storage.length or math.prod(place.shape) > storage.length:
        raise ValueError(
            f"a tensor of shape {list(place.shape)} reaches beyond its storage {storage.key} of "
            f"{storage.length} numbers"
        )
    return place


def whole(value: object, what: str) -> int:
    """Return ``value`` if it is a whole number from 0 that fits 64 bits.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{what} should be a whole number, at least 0")
    return value


def _whole(values: object) -> tuple[int, ...]:
    # torch.Size, if it was pickled by its name
    if isinstance(values, Opaque) and len(values.arguments) == 1:
        values = values.arguments[0]
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise ValueError("a tensor's shape and strides should be whole numbers")
    return tuple(whole(value, "a tensor's shape or stride") for value in values)
