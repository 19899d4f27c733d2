"""Finds methods by folder and file name, and reads what they declare, without importing them.

A file's name is the method's name in study files and paths. The folder of an attack or a defense is
its threat model. The Snakefile needs all this at every parse, so nothing here imports torch or a
method's module but :func:`load`, which jobs call.
"""

import ast
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pydantic
from pydantic import Field

from detrojan.cells import NO_METHOD

PACKAGE = Path(__file__).parent
Kind = Literal["datasets", "models", "attacks", "defenses"]


class Declared(NamedTuple):
    """What a method's class says of itself.

    Attributes:
        settings: a pydantic model with the class's fields, bounds and defaults.
        constants: its class variables that are plain values or dotted names (as text).
    """

    settings: type[pydantic.BaseModel]
    constants: dict[str, Any]


@functools.cache
def _files(kind: Kind) -> dict[str, Path]:
    folder = PACKAGE / kind
    files = [*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")]
    return {path.stem: path for path in sorted(files) if path.stem not in ("__init__", "base")}


def names(kind: Kind) -> list[str]:
    """Return the names of all methods of ``kind``, in alphabetical order."""
    return sorted(_files(kind))


def path(kind: Kind, name: str) -> Path:
    """Return the file of a method.

    Raises:
        ValueError: there is no such method.
    """
    if name not in _files(kind):
        raise ValueError(f"no {name!r} among the {kind}: there are {', '.join(names(kind))}")
    return _files(kind)[name]


def threat_model(kind: Kind, name: str) -> str:
    """Return the folder of an attack or a defense; ``"none"`` for the control of that name."""
    return NO_METHOD if name == NO_METHOD else path(kind, name).parent.name


def load(kind: Kind, name: str, settings: dict[str, Any] | None = None, *, smoke: bool = False) -> Any:
    """Import a method and return it, made with ``settings``; ``smoke``: with its settings for quick tests.

    Raises:
        ValueError: there is no such method, or it has no such setting (pydantic's error, a subclass).
    """
    file = path(kind, name).relative_to(PACKAGE.parent).with_suffix("")
    module = importlib.import_module(".".join(file.parts))
    classes = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__ == module.__name__ and issubclass(value, pydantic.BaseModel)
    ]
    assert len(classes) == 1, f"{file}.py should have one class of settings, not {len(classes)}"
    method = classes[0]
    return method(**((method.smoke if smoke else {}) | (settings or {})))


@functools.cache
def declared(kind: Kind, name: str) -> Declared:
    """Return what the class of a method declares, read from its source without importing it.

    Bases inside the package are read too. A field whose type or default is more than a plain
    value can't be declared so: keep hyperparameters numbers, texts, flags and lists of them.
    """
    file = path(kind, name)
    classes = [
        node.name
        for node in ast.parse(file.read_text(), str(file)).body
        if isinstance(node, ast.ClassDef) and _bases(file, node)
    ]
    assert len(classes) == 1, f"{file} should have one class of settings, not {classes}"
    fields, constants = _class_fields(file, classes[0])
    settings: type[pydantic.BaseModel] = pydantic.create_model(
        classes[0],
        __config__=pydantic.ConfigDict(extra="forbid", frozen=True),
        __module__=__name__,
        **fields,
    )
    return Declared(settings, constants)


def _bases(file: Path, node: ast.ClassDef) -> list[tuple[Path, str]]:
    """Return the file and name of each base class of ``node`` that ``file`` imports from the package."""
    tree = ast.parse(file.read_text(), str(file))
    origins = {
        alias.asname or alias.name: PACKAGE.parent.joinpath(*(statement.module or "").split("."))
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in origins]
    found = [(origins[base].with_suffix(".py"), base) for base in bases]
    return [(origin, base) for origin, base in found if origin.is_file()]


def _class_fields(file: Path, class_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields (type and default) and constants of a class and of its bases in the package."""
    tree = ast.parse(file.read_text(), str(file))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    fields: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for base in _bases(file, node):
        inherited = _class_fields(*base)
        fields |= inherited[0]
        constants |= inherited[1]
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        annotation, target = ast.unparse(statement.annotation), statement.target.id
        if annotation.startswith("ClassVar"):
            if statement.value is not None:
                constants[target] = _plain(statement.value)
        else:
            # pydantic resolves the annotation's text in this module: plain types, Literal and Path.
            default = ... if statement.value is None else _default(statement.value)
            fields[target] = (annotation, default)
    return fields, constants


def _plain(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _default(node: ast.expr) -> Any:
    """Return a field's default: a plain value, or pydantic's ``Field`` with plain arguments."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field":
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
        return Field(*(ast.literal_eval(a) for a in node.args), **keywords)
    return ast.literal_eval(node)
