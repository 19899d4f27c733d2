"""Methods are found by folder and file, and what they declare is read without importing them."""

import importlib
import inspect
import shutil
import subprocess
import sys
import textwrap
from typing import get_args

import pydantic
import pytest

from detrojan import registry
from detrojan.cells import NO_METHOD
from detrojan.registry import PACKAGE

KINDS = get_args(registry.Kind)
METHODS = [(kind, name) for kind in KINDS for name in registry.names(kind)]


def real_class(kind, name):
    file = registry.path(kind, name).relative_to(PACKAGE.parent).with_suffix("")
    module = importlib.import_module(".".join(file.parts))
    [found] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, pydantic.BaseModel)
        and value.__module__ == module.__name__
    ]
    return found


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Let the registry look at a copy of the package, which a test may change."""
    copy = tmp_path / "detrojan"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(registry, "PACKAGE", copy)
    clear_caches()
    yield copy
    clear_caches()


def clear_caches():
    for cached in (registry._files, registry._tree, registry.declared):
        cached.cache_clear()


def write(file, text):
    file.write_text(textwrap.dedent(text))
    clear_caches()


# --- names -----------------------------------------------------------------------------------------


def test_names_are_those_of_the_files():
    assert registry.names("models") == sorted(registry.names("models"))
    assert {"digits", "image_folder"} <= set(registry.names("datasets"))
    assert {"badnets", "blended", "sig"} <= set(registry.names("attacks"))
    assert {"ft", "fp", "clp", "grad_prune"} <= set(registry.names("defenses"))
    for kind in KINDS:
        assert not {"base", "__init__"} & set(registry.names(kind))


def test_threat_model_is_the_folder():
    assert registry.threat_model("defenses", "clp") == "data_free"
    assert registry.threat_model("defenses", "ft") == "clean_data"
    assert registry.threat_model("defenses", "grad_prune") == "known_trigger"
    assert registry.threat_model("attacks", "badnets") == "data_poisoning"
    assert registry.threat_model("defenses", NO_METHOD) == NO_METHOD


def test_unknown_method():
    with pytest.raises(ValueError, match=r"no 'clap' among the defenses: there are .*clp"):
        registry.path("defenses", "clap")
    with pytest.raises(ValueError, match="no 'clap' among the defenses"):
        registry.load("defenses", "clap")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("attacks/data_poisoning/MyAttack.py", "name it in lower case"),
        ("attacks/data_poisoning/none.py", "none is the control's name"),
        ("defenses/data_free/ft.py", "have one name: rename one"),
    ],
)
def test_bad_file_names(package, file, message):
    write(package / file, "")
    with pytest.raises(AssertionError, match=message):
        registry.names(file.partition("/")[0])


# --- what methods declare --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_declared_fields_are_those_of_the_class(kind, name):
    declared, real = registry.declared(kind, name).settings.model_fields, real_class(kind, name).model_fields
    assert list(declared) == list(real)
    for field, there in real.items():
        here = declared[field]
        assert here.annotation == there.annotation, field
        assert here.is_required() == there.is_required(), field
        assert (here.default, type(here.default)) == (there.default, type(there.default)), field
        assert here.metadata == there.metadata, field  # the bounds
        assert here.description == there.description, field


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_declared_constants_are_those_of_the_class(kind, name):
    declared, real = registry.declared(kind, name).constants, real_class(kind, name)
    constants = {
        constant: getattr(real, constant)
        for base in real.__mro__
        if base.__module__.startswith("detrojan.")
        for constant in inspect.get_annotations(base)
        if constant not in real.model_fields and hasattr(real, constant)
    }
    assert set(declared) == set(constants)
    for constant, value in constants.items():
        assert declared[constant] in (value, str(value)), constant


# A data source is loaded when its images are counted, before the first job, with all its checks.
@pytest.mark.parametrize(("kind", "name"), [m for m in METHODS if m[0] != "datasets"])
def test_classes_have_no_checks_that_planning_would_miss(kind, name):
    decorators = real_class(kind, name).__pydantic_decorators__
    assert not decorators.field_validators
    assert not decorators.model_validators


@pytest.mark.parametrize(("kind", "name"), [m for m in METHODS if m[0] != "datasets"])
def test_smoke_settings_are_allowed(kind, name):
    smoke = registry.declared(kind, name).constants.get("smoke", {})
    declared = registry.declared(kind, name).settings(**smoke).model_dump()
    assert registry.load(kind, name, smoke=kind != "models").model_dump() == declared


def test_settings_win_over_smoke():
    assert registry.load("defenses", "ft", {"epochs": 9}, smoke=True).epochs == 9
    with pytest.raises(ValueError, match="epoch"):
        registry.load("defenses", "ft", {"epoch": 9})


# --- new methods -----------------------------------------------------------------------------------

HEAD_RESET = '''
    """Head reset: draw a new classifier layer."""

    from typing import ClassVar, NamedTuple

    from pydantic import Field

    from detrojan.defenses.base import FineTuning as Base
    from detrojan.errors import DivergedError


    class ResetError(DivergedError):
        """No method: a class with a base in the package that declares no settings."""


    class Place(NamedTuple):
        layer: int


    class HeadReset(Base):
        """Forget the last layer."""

        min_spc: ClassVar[int] = 3
        smoke: ClassVar[dict[str, object]] = {"epochs": 1}

        epochs: int = Field(20, ge=1, description="passes")
        share: float = 0.5
'''


def test_a_new_file_is_a_new_method(package):
    write(package / "defenses" / "clean_data" / "head_reset.py", HEAD_RESET)
    assert "head_reset" in registry.names("defenses")
    assert registry.threat_model("defenses", "head_reset") == "clean_data"
    settings, constants = registry.declared("defenses", "head_reset")
    assert constants == {"min_spc": 3, "smoke": {"epochs": 1}}
    inherited = registry.declared("defenses", "ft").settings().model_dump()
    assert settings().model_dump() == inherited | {"epochs": 20, "share": 0.5}
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        settings(epochs=0)


def test_a_new_file_is_loaded(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "detrojan", ignore=shutil.ignore_patterns("__pycache__"))
    write(tmp_path / "detrojan" / "defenses" / "clean_data" / "head_reset.py", HEAD_RESET)
    program = "from detrojan import registry; print(registry.load('defenses', 'head_reset', smoke=True))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("epochs=1 "), done.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "EPOCHS = 3\nclass New(Defense):\n    epochs: int = EPOCHS\n",
            "field epochs: EPOCHS has more",
        ),
        (
            "class New(Defense):\n    lr: float = Field(1 / 100, gt=0)\n",
            r"new.py, field lr: Field\(1 / 100, gt=0\) has more",
        ),
        ("class New(Defense):\n    ...\nclass Newer(Defense):\n    ...\n", "one class of settings, not"),
        ("def new():\n    ...\n", "one class of settings, not none"),
    ],
)
def test_a_method_that_cannot_be_read(package, body, message):
    head = "from pydantic import Field\nfrom detrojan.defenses.base import Defense\n"
    write(package / "defenses" / "clean_data" / "new.py", head + body)
    with pytest.raises(AssertionError, match=message):
        registry.declared("defenses", "new")


def test_declaring_imports_no_method():
    program = (
        "import sys\n"
        "from detrojan import registry\n"
        "for kind in ('models', 'attacks', 'defenses', 'datasets'):\n"
        "    for name in registry.names(kind): registry.declared(kind, name)\n"
        "print([m for m in sys.modules if m == 'torch' or m.startswith(('detrojan.attacks', "
        "'detrojan.defenses', 'detrojan.models', 'detrojan.datasets'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
