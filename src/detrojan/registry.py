"""Finds methods by folder and file name, and reads what they declare, without importing them.

A file's name is the method's name in study files and paths. The folder of an attack or a defense is
its threat model. The Snakefile needs all this at every parse, so nothing here imports torch or a
method's module but :func:`load`, which jobs call.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pydantic
import yaml
from pydantic import Field

from detrojan.cells import NO_METHOD

PACKAGE = Path(__file__).parent
# Where the Snakefile, rules/, scripts/, config/ and the profiles lie: a wheel has a copy of its checkout's.
CHECKOUT = next(folder for folder in (PACKAGE / "_checkout", PACKAGE.parents[1]) if folder.is_dir())
Kind = Literal["datasets", "models", "attacks", "defenses"]
# What else is found by its file: no method, so without settings.
Part = Literal["analysis/tables", "analysis/report/figures"]
TABLES: Part = "analysis/tables"
FIGURES: Part = "analysis/report/figures"
GATHERED = ("cells", "models", "measures")  # tables that follow from no others


# A network that is no file of `models/` but one of others: an architecture's field names it, by these words.
NETWORK = "network"
NETWORK_SOURCES = ("torchvision", "timm")
NAMED = PACKAGE / "models" / "_parts" / "named.py"  # makes them
CATALOGUE = PACKAGE / "models" / "catalogue.yaml"
NO_TIMM = "timm is not installed: pip install 'detrojan[timm]'"


class Declared(NamedTuple):
    """What a method's class says of itself.

    Attributes:
        settings: a pydantic model with the class's fields, bounds and defaults.
        constants: its class variables that are plain values or dotted names (as text).
    """

    settings: type[pydantic.BaseModel]
    constants: dict[str, Any]


@functools.cache
def _files(kind: Kind | Part) -> dict[str, Path]:
    folder = PACKAGE / kind
    files = sorted([*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")])
    found: dict[str, Path] = {}
    for file in files:
        if file.stem not in ("__init__", "base"):
            # The name goes into paths, whose patterns are in workflow/graph.py.
            assert re.fullmatch("[a-z0-9_]+", file.stem), f"{file}: name it in lower case, as my_method.py"
            assert file.stem != NO_METHOD, f"{file}: {NO_METHOD} is the control's name, choose another"
            assert file.stem not in found, f"{file} and {found[file.stem]} have one name: rename one"
            found[file.stem] = file
    return found


def names(kind: Kind | Part) -> list[str]:
    """Return the names of all methods of ``kind``, or of all tables or figures, in alphabetical order."""
    return sorted(_files(kind))


def path(kind: Kind | Part, name: str) -> Path:
    """Return the file of a method, a table or a figure.

    What makes a network of others stands in :data:`NAMED`, whatever its name.

    Raises:
        ValueError: there is none of this name.
    """
    if kind == "models" and is_network(name):
        return NAMED
    if name not in _files(kind):
        raise ValueError(f"no {name!r} among the {kind}: there are {', '.join(names(kind))}")
    return _files(kind)[name]


def is_network(name: str) -> bool:
    """Return whether ``name`` is that of a network of others, or a file: ``timm:NAME``, ``PATH.py``."""
    return ":" in name or name.endswith(".py")


def sources(kind: Kind | Part, name: str) -> list[Path]:
    """Return the files whose code a method runs: its own, or of a network of one's own the file too.

    Raises:
        ValueError: there is none of this name.
    """
    own = [Path(name)] if kind == "models" and name.endswith(".py") else []
    return [path(kind, name), *own]


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Return what is known of networks of others, by name: see ``docs/networks.md``."""
    read: dict[str, dict[str, Any]] = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    return read


def threat_model(kind: Kind, name: str) -> str:
    """Return the folder of an attack or a defense; ``"none"`` for the control of that name."""
    return NO_METHOD if name == NO_METHOD else path(kind, name).parent.name


def trigger_owner(attack: str) -> Literal["all", "architecture", "model"]:
    """Return to whom an attack's finished trigger belongs, on one data set and with one seed.

    To all models; to those of an architecture, if it is learned against a clean model; or to the one
    model that it was trained with.
    """
    if threat_model("attacks", attack) == "training_control":
        return "model"
    return "architecture" if declared("attacks", attack).constants["against_model"] else "all"


def imported(kind: Kind | Part, name: str) -> ModuleType:
    """Import the file of a method, a table or a figure, and return it.

    Raises:
        ValueError: there is none of this name.
    """
    file = path(kind, name).relative_to(PACKAGE.parent).with_suffix("")
    return importlib.import_module(".".join(file.parts))


def load(kind: Kind, name: str, settings: dict[str, Any] | None = None, *, smoke: bool = False) -> Any:
    """Import a method and return it, made with ``settings``; ``smoke``: with its settings for quick tests.

    Raises:
        ValueError: there is no such method, or it has no such setting (pydantic's error, a subclass).
    """
    own = kind == "models" and name.endswith(".py")
    file = Path(name) if own else path(kind, name)
    module = _imported_file(file.resolve()) if own else imported(kind, name)
    classes: list[Any] = [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if value.__module__ == module.__name__ and issubclass(value, pydantic.BaseModel)
    ]
    assert len(classes) == 1, f"{file} should have one class of settings, not {len(classes)}"
    return classes[0](**((classes[0].smoke if smoke else {}) | (settings or {})))


@functools.cache
def _imported_file(file: Path) -> ModuleType:
    """Import a file that is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"detrojan_network_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def declared(kind: Kind, name: str) -> Declared:
    """Return what the class of a method declares, read from its source without importing it.

    Bases inside the package are read too. A field whose type or default is more than a plain
    value can't be declared so: keep hyperparameters numbers, texts, flags and lists of them.

    Of a network of others the settings are those that all have, the constants what its file or the
    catalogue says of it, of one that neither knows nothing but a ``min_side`` of 1.

    Raises:
        ValueError: there is no such method.
    """
    if kind == "models" and is_network(name):
        constants = own_network(name).constants if name.endswith(".py") else catalogue().get(name, {})
        return Declared(_declared(NAMED).settings, {"min_side": 1, **constants})
    return _declared(path(kind, name))


def own_network(file: str) -> Declared:
    """Return what the one architecture in a file declares, read without importing it.

    Raises:
        ValueError: the file can't be read, is no Python, or has not one such class.
    """
    try:
        nodes = _classes(Path(file)).values()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file} can't be read ({error})") from None
    classes = [node.name for node in nodes if _is_settings(Path(file), node)]
    if len(classes) != 1:
        raise ValueError(
            f"{file} should have one subclass of Architecture, not {', '.join(classes) or 'none'}"
        )
    return _declared(Path(file))


@functools.cache
def _declared(file: Path) -> Declared:
    classes = [node.name for node in _classes(file).values() if _is_settings(file, node)]
    assert len(classes) == 1, f"{file} should have one class of settings, not {classes or 'none'}"
    fields, constants = _class_fields(file, classes[0])
    settings: type[pydantic.BaseModel] = pydantic.create_model(
        classes[0],
        __config__=pydantic.ConfigDict(extra="forbid", frozen=True),
        __module__=__name__,
        **fields,
    )
    return Declared(settings, constants)


@functools.cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _tree(file).body if isinstance(node, ast.ClassDef)}


def _is_settings(file: Path, node: ast.ClassDef) -> bool:
    """Return whether a class is a pydantic model, by itself or by a base in the package."""
    return any(isinstance(base, ast.Name) and base.id == "BaseModel" for base in node.bases) or any(
        _is_settings(origin, _classes(origin)[name]) for origin, name in _bases(file, node)
    )


def _bases(file: Path, node: ast.ClassDef) -> list[tuple[Path, str]]:
    """Return the file and name of each base class of ``node`` that the package defines."""
    origins = {name: (file, name) for name in _classes(file)}
    for statement in _tree(file).body:
        if isinstance(statement, ast.ImportFrom):
            module = PACKAGE.parent.joinpath(*(statement.module or "").split(".")).with_suffix(".py")
            if module.is_file():
                origins |= {alias.asname or alias.name: (module, alias.name) for alias in statement.names}
    return [origins[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in origins]


def _class_fields(file: Path, class_name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields (type and default) and constants of a class and of its bases in the package."""
    node = _classes(file)[class_name]
    fields: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for base in reversed(_bases(file, node)):  # the first base wins, as in Python
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
            fields[target] = (annotation, _default(statement.value, f"{file}, field {target}"))
    return fields, constants


def _plain(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _default(node: ast.expr | None, where: str) -> Any:
    """Return a field's default: none, a plain value, or pydantic's ``Field`` with plain arguments."""
    if node is None:
        return ...
    try:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Field":
            keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
            return Field(*(ast.literal_eval(a) for a in node.args), **keywords)
        return ast.literal_eval(node)
    except ValueError:
        raise AssertionError(
            f"{where}: {ast.unparse(node)} has more in it than plain values, but study files are checked "
            "without importing methods: write the values themselves"
        ) from None
