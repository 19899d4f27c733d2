"""Which names in a pickle a checkpoint may have.

Nothing that a pickle names is ever imported here. The file would do so elsewhere, though: its owner
should hear of it, and a repaired model should not come from it.
"""

import re
from collections.abc import Iterable

from detrojan.foreign.pickles import STORAGES, Pickle
from detrojan.foreign.values import DTYPES, Named, Opaque

# Of these packages any class; a function of theirs could read files or fetch what an address names.
PACKAGES = ("torch.nn", "torch.optim", "torchvision", "timm", "PIL")
CLASS = re.compile("[A-Z][A-Za-z0-9_]*")
SCRIPTED = "__torch__"  # TorchScript's name for whatever module was scripted
EXACT = frozenset(
    [
        *(Named("torch", name) for name in (*DTYPES, *STORAGES, "Size", "device", "Tensor")),
        *(Named("torch.cuda", name) for name in STORAGES),
        *(Named("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "parameter")),
        Named("torch._utils", "_rebuild_parameter_with_state"),
        *(Named("torch.nn.functional", name) for name in ("relu", "gelu", "silu", "hardswish", "relu6")),
        *(Named("torch.jit._pickle", f"build_{kind}list") for kind in ("int", "double", "bool", "tensor")),
        Named("torch.jit._pickle", "restore_type_tag"),
        *(Named("collections", name) for name in ("OrderedDict", "defaultdict", "deque", "Counter")),
        *(Named("builtins", name) for name in ("set", "frozenset", "slice", "range", "complex", "bytearray")),
        *(Named("builtins", name) for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
        Named("_codecs", "encode"),
        *(
            Named(f"numpy.{core}.multiarray", name)
            for core in ("core", "_core")
            for name in ("scalar", "_reconstruct")
        ),
        *(Named("numpy", name) for name in ("ndarray", "dtype")),
        Named("argparse", "Namespace"),
        Named("functools", "partial"),
        *(Named("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath")),
    ]
)


def check(pickle: Pickle) -> None:
    """Refuse a pickle that names what is neither benign nor the class of a module in it.

    Raises:
        ValueError: and what torch.load would have run.
    """
    modules = _module_classes(pickle.objects)
    for named in pickle.names:
        if not is_benign(named) and named not in modules:
            raise ValueError(would_run(str(named)))


def would_run(name: str) -> str:
    """Return the refusal of a file that names what it should not."""
    return f"this file would run {name:.100} if it were loaded by torch.load: not imported"


def is_module(value: object) -> bool:
    """Return whether this would be a module of torch, by its state and by how it was made."""
    if not isinstance(value, Opaque) or value.called or value.arguments:
        return False
    state = value.attributes()
    return all(isinstance(state.get(part), dict) for part in ("_parameters", "_buffers", "_modules"))


def is_scripted(value: object) -> bool:
    """Return whether this would be a module of TorchScript."""
    return isinstance(value, Opaque) and not value.called and value.what.module.split(".")[0] == SCRIPTED


def is_benign(named: Named) -> bool:
    """Return whether a checkpoint may name this, whatever would become of it."""
    if named in EXACT:
        return True
    if named.module.split(".")[0] == SCRIPTED:
        return True
    inside = any(named.module == package or named.module.startswith(f"{package}.") for package in PACKAGES)
    # Without a dot: torchvision.x with the name os.system is a way to the system as well.
    return inside and CLASS.fullmatch(named.name) is not None


def _module_classes(objects: Iterable[Opaque]) -> set[Named]:
    """Return the classes of which every object is a module; files of one's own networks name these."""
    modules: set[Named] = set()
    others: set[Named] = set()
    for one in objects:
        (modules if is_module(one) else others).add(one.what)
    return modules - others
