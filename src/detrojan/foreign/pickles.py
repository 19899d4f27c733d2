"""Reads a pickle without unpickling it: nothing is imported, nothing is called.

A pickle is a program for a small stack machine, and Python's own unpickler runs it: it imports what the
program names and calls it with what the program says. Here the same program is read opcode by opcode
(``pickletools.genops``, which only decodes), and an instruction to import gives a
:class:`~detrojan.foreign.values.Named`, one to call or to build gives an
:class:`~detrojan.foreign.values.Opaque`. There is no subclass of ``pickle.Unpickler``: of its instructions
some reach Python code before a subclass is asked (hashes of keys, attributes that are set, sizes that are
allocated), and a list of what to override would have to be complete.

Known by name and done by hand are ``collections.OrderedDict`` (a plain dict), torch's functions that put
a tensor together (a :class:`~detrojan.foreign.values.TensorRef`) and ``_codecs.encode`` (bytes, as pickles
of protocol 2 write them).
"""

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

from detrojan.foreign.values import DTYPES, Named, Opaque, Storage, TensorRef, located, whole

# Each makes at most one small object, so this bounds memory (about 200 bytes each) and time (about 4 µs).
# BackdoorBench's note of one poisoned image takes 41: a result with 100,000 of them is read.
MAX_STEPS = 5_000_000

STORAGES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}
ORDERED = Named("collections", "OrderedDict")
ENCODE = Named("_codecs", "encode")
# Of dictionaries, and tuples of these. NumPy's numbers are opaque: BackdoorBench's keys are such.
KEYS = (str, bytes, int, float, bool, type(None), Named, Opaque)


class _Mark:
    """Where on the stack a list of values begins."""


MARK: Final = _Mark()


class Pickle:
    """A pickle that is being read, and then what it holds.

    Attributes:
        value: the object: containers, numbers, text, ``Named``, ``Opaque`` and ``TensorRef``.
        names: all that it would have imported, in the order in which it names them.
        objects: every ``Opaque`` that was met, those that ``value`` does not lead to as well.
    """

    value: Any

    def __init__(self, content: bytes, sizes: Mapping[str, int]) -> None:
        """Read ``content``.

        Args:
            content: the pickle.
            sizes: how many bytes each storage has that lies beside it, by key.

        Raises:
            ValueError: it is damaged, too long, or asks for what no checkpoint needs.
        """
        self.names: dict[Named, None] = {}
        self.objects: list[Opaque] = []
        self._sizes = sizes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        try:
            self._run(content)
        except (IndexError, KeyError) as error:  # the stack ran empty; nothing was kept under that number
            raise ValueError("its pickle is damaged") from error

    def _run(self, content: bytes) -> None:
        for step, (opcode, argument, _) in enumerate(_decoded(content)):
            if step >= MAX_STEPS:
                raise ValueError(f"its pickle has more than {MAX_STEPS:,} steps")
            if opcode.name in LITERALS:
                self._stack.append(argument)
            elif opcode.name in STEPS:
                STEPS[opcode.name](self, argument)
            else:
                raise ValueError(f"its pickle has the instruction {opcode.name}, which no checkpoint needs")
        self.value = self._pop()

    # --- the stack -----------------------------------------------------------------------------------

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is MARK:
            raise IndexError
        return value

    def _above_mark(self) -> list[Any]:
        values = []
        while (value := self._stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def _top(self) -> Any:
        if self._stack[-1] is MARK:
            raise IndexError
        return self._stack[-1]

    def _mark(self, _: Any) -> None:
        self._stack.append(MARK)

    def _drop(self, _: Any) -> None:
        self._stack.pop()

    def _drop_to_mark(self, _: Any) -> None:
        self._above_mark()

    def _again(self, _: Any) -> None:
        self._stack.append(self._top())

    def _nothing(self, _: Any) -> None:
        pass

    def _put(self, number: Any) -> None:
        self._memo[number] = self._top()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, number: Any) -> None:
        self._stack.append(self._memo[number])

    # --- containers ----------------------------------------------------------------------------------

    def _constant(self, value: Any) -> None:
        self._stack.append(value)

    def _list(self, _: Any) -> None:
        self._stack.append(self._above_mark())

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._above_mark()))

    def _short_tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._stack.append(tuple(values[::-1]))

    def _dict(self, _: Any) -> None:
        values = self._above_mark()
        self._stack.append({})
        self._set(values)

    def _set_of(self, name: str, items: list[Any]) -> None:
        made = self._made(self._name("builtins", name), (), called=False)
        made.items += items
        self._stack.append(made)

    def _append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Opaque):
            target.items += values
        elif isinstance(target, list):
            target += values
        else:
            raise ValueError("its pickle appends to what is no list")

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _set_items(self, _: Any) -> None:
        self._set(self._above_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._top()
        if len(values) % 2:
            raise IndexError
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, Opaque):
            target.pairs += pairs
        elif isinstance(target, dict):
            target.update((_key(key), value) for key, value in pairs)
        else:
            raise ValueError("its pickle sets a key of what is no dictionary")

    # --- what would import, call and build -------------------------------------------------------------

    def _name(self, module: object, name: object) -> Named:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("its pickle imports what is no name")
        named = Named("builtins" if module == "__builtin__" else module, name)
        self.names[named] = None
        return named

    def _made(self, what: object, arguments: object, *, called: bool) -> Opaque:
        if not isinstance(what, Named) or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what is no name")
        made = Opaque(what, arguments, called)
        self.objects.append(made)
        return made

    def _global(self, names: Any) -> None:
        module, _, name = names.partition(" ")
        self._stack.append(self._name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self._name(module, name))

    def _reduce(self, _: Any) -> None:
        arguments, what = self._pop(), self._pop()
        self._stack.append(self._call(what, arguments))

    def _inst(self, names: Any) -> None:
        module, _, name = names.partition(" ")
        arguments = tuple(self._above_mark())
        self._stack.append(self._call(self._name(module, name), arguments))

    def _obj(self, _: Any) -> None:
        what, *arguments = self._above_mark() or [None]
        self._stack.append(self._call(what, tuple(arguments)))

    def _new(self, _: Any) -> None:
        arguments, what = self._pop(), self._pop()
        empty = what == ORDERED and arguments == ()
        self._stack.append({} if empty else self._made(what, arguments, called=False))

    def _new_ex(self, _: Any) -> None:
        keywords, arguments, what = self._pop(), self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what is no name")
        self._stack.append(self._made(what, (*arguments, keywords), called=False))

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        for part in state if isinstance(state, tuple) else (state,):
            names = [key for key in part if isinstance(key, str)] if isinstance(part, dict) else []
            hidden = [name for name in names if name.startswith("__")]
            if hidden:
                raise ValueError(f"its pickle sets {hidden[0]} of an object, which no checkpoint needs")
        if isinstance(target, Opaque) and target.state is None:
            target.state = state
        elif not (isinstance(target, dict) and isinstance(state, dict) and state.keys() <= {"_metadata"}):
            # torch's versions of a state dict's layers are all that a dictionary may have besides
            raise ValueError("its pickle sets attributes of what has none")

    def _call(self, what: object, arguments: object) -> Any:
        """Return what a call would give: of the few functions known here the thing itself, else a note."""
        made = self._made(what, arguments, called=True)
        if made.what == ORDERED and len(made.arguments) <= 1:
            self.objects.pop()
            return _ordered(*made.arguments)
        if made.what == ENCODE:
            return _encoded(made)
        return _tensor(made) if made.what.module == "torch._utils" else made

    def _persistent(self, _: Any) -> None:
        """Read a reference to a storage: ``("storage", type, key, device, length)``."""
        wanted = self._pop()
        if not isinstance(wanted, tuple) or len(wanted) != 5 or wanted[0] != "storage":
            raise ValueError("its pickle refers to something other than a storage")
        _, kind, key, _, length = wanted
        if not isinstance(key, str) or not (key.isascii() and key.isdigit()):
            what = key if isinstance(key, str) else type(key).__name__
            raise ValueError(f"its pickle refers to a storage {what!r:.40}, which should be a number")
        if key not in self._sizes:
            raise ValueError(f"storage {key} is missing")
        storage = Storage(_storage_dtype(kind), key, whole(length, f"the length of storage {key}"))
        if storage.length * storage.dtype.itemsize > self._sizes[key]:
            raise ValueError(
                f"storage {key} should have {length} numbers of {storage.dtype.itemsize} bytes, but the file "
                f"has {self._sizes[key]} bytes there"
            )
        self._stack.append(storage)


def _decoded(content: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    try:
        yield from pickletools.genops(content)
    except ValueError as error:
        raise ValueError(f"its pickle is damaged: {error}") from error


def _key(key: object) -> Any:
    """Return a key if its hash is made in one step: nested tuples can be made that take years."""
    parts = key if isinstance(key, tuple) and not isinstance(key, Named) else (key,)
    if not all(isinstance(part, KEYS) for part in parts):
        raise ValueError("its pickle has a dictionary whose keys are neither text nor numbers")
    return key


def _ordered(pairs: object = ()) -> dict[Any, Any]:
    if isinstance(pairs, dict):
        return dict(pairs)
    if isinstance(pairs, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        return {_key(key): value for key, value in pairs}
    raise ValueError("its pickle has an ordered dictionary of what are no pairs")


def _encoded(made: Opaque) -> bytes:
    match made.arguments:
        case (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
    raise ValueError("its pickle encodes what is no text in Latin 1")


def _storage_dtype(kind: object) -> torch.dtype:
    name = kind.name if isinstance(kind, Named) and kind.module in ("torch", "torch.cuda") else ""
    if name not in STORAGES:
        what = str(kind) if isinstance(kind, Named) else type(kind).__name__
        raise ValueError(f"numbers of the kind {what:.60}: only {', '.join(DTYPES)} are read")
    return DTYPES[STORAGES[name]]


def _tensor(made: Opaque) -> TensorRef:
    """Return the tensor that one of torch's functions would have put together."""
    match made.what.name, made.arguments:
        case ("_rebuild_tensor" | "_rebuild_tensor_v2", (Storage() as storage, offset, shape, strides, *_)):
            return located(storage, offset, shape, strides)
        case (
            "_rebuild_parameter" | "_rebuild_parameter_with_state",
            (TensorRef() as tensor, *_),
        ):
            return tensor
    raise ValueError(f"a tensor of a kind that no network here has ({made.what})")


LITERALS = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    ]
)
# What is not here is refused: EXT1, EXT2 and EXT4 (imports by a number), PERSID, buffers out of band.
STEPS: dict[str, Callable[[Pickle, Any], None]] = {
    "PROTO": Pickle._nothing,
    "FRAME": Pickle._nothing,
    "STOP": Pickle._nothing,
    "MARK": Pickle._mark,
    "POP": Pickle._drop,
    "POP_MARK": Pickle._drop_to_mark,
    "DUP": Pickle._again,
    "PUT": Pickle._put,
    "BINPUT": Pickle._put,
    "LONG_BINPUT": Pickle._put,
    "MEMOIZE": Pickle._memoize,
    "GET": Pickle._get,
    "BINGET": Pickle._get,
    "LONG_BINGET": Pickle._get,
    "NONE": lambda pickle, _: pickle._constant(None),
    "NEWTRUE": lambda pickle, _: pickle._constant(True),
    "NEWFALSE": lambda pickle, _: pickle._constant(False),
    "EMPTY_LIST": lambda pickle, _: pickle._constant([]),
    "EMPTY_TUPLE": lambda pickle, _: pickle._constant(()),
    "EMPTY_DICT": lambda pickle, _: pickle._constant({}),
    "EMPTY_SET": lambda pickle, _: pickle._set_of("set", []),
    "FROZENSET": lambda pickle, _: pickle._set_of("frozenset", pickle._above_mark()),
    "ADDITEMS": Pickle._appends,
    "LIST": Pickle._list,
    "TUPLE": Pickle._tuple,
    "TUPLE1": lambda pickle, _: pickle._short_tuple(1),
    "TUPLE2": lambda pickle, _: pickle._short_tuple(2),
    "TUPLE3": lambda pickle, _: pickle._short_tuple(3),
    "DICT": Pickle._dict,
    "APPEND": Pickle._append,
    "APPENDS": Pickle._appends,
    "SETITEM": Pickle._set_item,
    "SETITEMS": Pickle._set_items,
    "GLOBAL": Pickle._global,
    "STACK_GLOBAL": Pickle._stack_global,
    "REDUCE": Pickle._reduce,
    "INST": Pickle._inst,
    "OBJ": Pickle._obj,
    "NEWOBJ": Pickle._new,
    "NEWOBJ_EX": Pickle._new_ex,
    "BUILD": Pickle._build,
    "BINPERSID": Pickle._persistent,
}
