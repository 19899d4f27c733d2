"""The file that a new method starts from is whole: linted, found, run, and held to the contract."""

import dataclasses
import importlib.util
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from detrojan import registry, rng
from detrojan.commands import new
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample, empty
from detrojan.study import files as study_files
from detrojan.study import schema
from tests.command import exit_code
from tests.contract import test_datasets as contract

ROOT = Path(__file__).parents[2]


def page(kind):
    return (ROOT / new.STARTS[kind].guide).read_text()


def python_of(kind):
    """Return the pieces of Python on a kind's page; the first is a whole method."""
    return re.findall(r"^```python\n(.*?)^```", page(kind), re.M | re.S)


PAGE = page("defense")
METHOD_TESTS = python_of("defense")[1]
THREAT_MODELS = ("data_free", "clean_data", "known_trigger")
EVERY_START = [(kind, threat_model) for kind, start in new.STARTS.items() for threat_model in start.templates]
METHODS = [(kind, model) for kind, model in EVERY_START if new.STARTS[kind].folder in get_args(registry.Kind)]
WITH_TESTS = ("table", "figure")
# The methods of the pages: kind, name, threat model.
ON_PAGES = [
    ("defense", "bold_tuning", "clean_data"),
    ("attack", "frame", "data_poisoning"),
    ("architecture", "wide_lenet", ""),
    ("source", "numpy_file", ""),
    ("table", "hard_attacks", ""),
    ("figure", "harm", ""),
]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Return a folder with a copy of the package and its settings, in which the command writes."""
    for name in ("src", "config"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(registry, "PACKAGE", tmp_path / "src" / "detrojan")
    monkeypatch.chdir(tmp_path)
    clear_caches()
    yield tmp_path
    clear_caches()


def clear_caches():
    for cached in (registry._files, registry._tree, registry.declared, schema.shipped):
        cached.cache_clear()


def arguments(kind, name, threat_model):
    return [kind, name, *(["--threat-model", threat_model] if threat_model else [])]


def write(threat_model, name="my_method", kind="defense"):
    assert exit_code("new", *arguments(kind, name, threat_model)) == 0
    clear_caches()
    return registry.path(new.STARTS[kind].folder, name)


def load(file, *, smoke=False, **settings):
    """Return the method of ``file``, which is no module of the installed package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    (method,) = (value for value in classes if value.__module__ == file.stem)
    return method(**(method.smoke if smoke else {}) | settings)


def write_the_page_s(kind, name, threat_model):
    """Write the method that a page has in full."""
    file = write(threat_model, name, kind)
    file.write_text(python_of(kind)[0])
    if kind in WITH_TESTS:
        new.test_of(kind, name).write_text(python_of(kind)[1])
    clear_caches()
    return file


def write_all():
    """Write one of every kind and threat model, and those of the pages; return their files."""
    files = [write(threat_model, f"new_{threat_model or kind}", kind) for kind, threat_model in EVERY_START]
    return files + [write_the_page_s(*one) for one in ON_PAGES]


def defend(defense, model, sample):
    return defense(model, sample, rng=rng.stream("test"))


# --- what is written -------------------------------------------------------------------------------


def test_every_kind_and_threat_model_has_a_template():
    kinds = {*get_args(registry.Kind), *get_args(registry.Part)}
    assert {start.folder for start in new.STARTS.values()} == kinds
    for start in new.STARTS.values():
        folders = {folder.name for folder in (registry.PACKAGE / start.folder).glob("[a-z]*/")}
        assert set(start.templates) == (folders or {""})


@pytest.mark.parametrize(("kind", "threat_model"), METHODS)
def test_the_registry_finds_it(clone, kind, threat_model, capsys):
    file, folder = write(threat_model, kind=kind), new.STARTS[kind].folder
    assert file == clone / "src/detrojan" / folder / threat_model / "my_method.py"
    assert registry.threat_model(folder, "my_method") == (threat_model or folder)
    settings, constants = registry.declared(folder, "my_method")
    assert settings.__name__ == "MyMethod"
    assert settings(**constants.get("smoke", {}))
    assert all(field.description for field in settings.model_fields.values())
    text = file.read_text()
    assert text.count(new.MARK) >= 4
    assert new.STARTS[kind].guide in (printed := capsys.readouterr().out)
    assert not re.search(r"\$|TODO", text)  # nothing left to fill in
    assert str(file.relative_to(clone)) in printed
    assert "pytest -q tests/contract -k my_method\n" in printed


@pytest.mark.parametrize("kind", WITH_TESTS)
def test_a_table_and_a_figure_come_with_their_test(clone, kind, capsys):
    file, test = write("", kind=kind), clone / f"tests/unit/test_{kind}_my_method.py"
    assert file == clone / "src/detrojan" / new.STARTS[kind].folder / "my_method.py"
    assert registry.names(new.STARTS[kind].folder).count("my_method") == 1
    for written in (file, test):
        assert new.MARK in written.read_text()
        assert not re.search(r"\$|TODO", written.read_text())
        assert str(written.relative_to(clone)) in capsys.readouterr().out or written == test
    test.unlink()
    test.write_text("edited")
    clear_caches()
    file.unlink()
    assert exit_code("new", kind, "my_method") == 1
    assert "is there: choose another name" in capsys.readouterr().err
    assert test.read_text() == "edited"
    assert not file.exists()


@pytest.mark.parametrize("name", ["cells", "measures", "made", "ranks"])
def test_a_table_has_a_name_of_its_own(clone, name, capsys):
    assert exit_code("new", "table", name) == 1
    assert re.search("another table|taken by", capsys.readouterr().err)
    assert not (clone / "tests").exists()


@pytest.mark.skipif(not shutil.which("ruff"), reason="ruff is not installed: make lint installs it")
@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_it_passes_the_linters(clone, command):
    files = write_all()
    for folder in ("tests", "tests/unit"):  # as in a clone, where tests are a package
        (clone / folder / "__init__.py").touch()
    done = subprocess.run(
        ["ruff", *command, "--no-cache", *files, *(clone / "tests").rglob("*.py")],
        cwd=clone,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_else_has_to_change(clone):
    """A file of each kind, and those of the pages, keep the contract; the tests of studies pass as before.

    Tables and figures pass their own tests, and the pages and readers take them as they come.
    """
    names = [file.stem for file in write_all()]
    own = [new.test_of(kind, f"new_{kind}") for kind in WITH_TESTS]
    own += [new.test_of(kind, name) for kind, name, _ in ON_PAGES if kind in WITH_TESTS]
    # What reads files needs an example of them, as its page says.
    names.remove("numpy_file")
    # Of the many pairs of a defense and a new architecture, those with layers that settings name.
    networks, layers = ("new_architecture", "wide_lenet"), ("fst", "mm_bd", "nad", "npd")
    wanted = [name for name in names if name not in networks]
    wanted += [f"({network} and ({' or '.join(layers)} or test_models))" for network in networks]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-k", f"smoke or survey or explained or (({' or '.join(wanted)}) and not vgg and not 200)"),
            *(
                ROOT / "tests" / "contract",
                ROOT / "tests/unit/test_schema.py",
                ROOT / "tests/unit/test_grid.py",
                ROOT / "tests/unit/test_reading.py",
                *own,
            ),
        ],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(clone / "src"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_s_source_keeps_the_contract(clone, tmp_path, monkeypatch):
    file = write_the_page_s("source", "numpy_file", "")
    example = {"np": np, "noise": contract.noise}
    exec(python_of("source")[1], example)
    settings = example["numpy_file"](tmp_path)
    source = load(file, **settings)
    monkeypatch.setattr(registry, "load", lambda *_: source)
    contract.test_source_is_declared_in_full("numpy_file", source, settings)
    contract.test_images_are_of_the_size_asked_for_and_counted_right(source)
    contract.test_images_are_the_same_whenever_they_are_read(source)
    contract.test_splits_share_no_image(source)
    (tmp_path / "test.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"test\.npz: no NumPy file"):
        source.counts("test")


def test_the_command_names_a_path_that_can_be_typed(clone):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "detrojan",
            "new",
            "defense",
            "my_method",
            "--threat-model",
            "clean_data",
        ],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(clone / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("Wrote src/detrojan/defenses/clean_data/my_method.py, which"), done.stderr


# --- what the methods do ---------------------------------------------------------------------------


def moved(model, repaired):
    """Return the names of the parameters that differ."""
    pairs = zip(model.named_parameters(), repaired.parameters(), strict=True)
    return {name for (name, before), after in pairs if not torch.equal(before, after)}


HEAD = {"network.linear.weight", "network.linear.bias"}


def test_head_reset_forgets_and_relearns_the_last_layer(clone, backdoored):
    acc, _, _ = backdoored.rates(backdoored.model)
    file = write("clean_data")
    forgot = defend(load(file, lr=1e-12, epochs=1), backdoored.model, backdoored.sample)
    assert backdoored.rates(forgot)[0] < 0.5  # a new layer: 0.1 by chance
    repaired = defend(load(file), backdoored.model, backdoored.sample)
    assert moved(backdoored.model, forgot) == moved(backdoored.model, repaired) == HEAD
    assert all(parameter.requires_grad for parameter in repaired.parameters())
    assert backdoored.rates(repaired)[0] > acc - 0.03
    assert backdoored.sample.chosen["train_accuracy"] > 0.8


def test_head_reset_with_triggered_images_removes_the_backdoor(clone, backdoored):
    acc, asr, ra = backdoored.rates(backdoored.model)
    assert asr > 0.9
    repaired = defend(load(write("known_trigger")), backdoored.model, backdoored.sample)
    assert moved(backdoored.model, repaired) == HEAD
    again = backdoored.rates(repaired)
    assert again[0] > acc - 0.05
    assert again[1] < 0.1
    assert again[2] > ra + 0.5


def test_head_reset_without_a_trigger_is_not_applicable(clone, planted, planted_sample):
    defense = load(write("known_trigger"))
    with pytest.raises(NotApplicableError, match="no attack, no trigger"):
        defend(defense, planted, dataclasses.replace(planted_sample, triggered=None))


def test_head_clipping_shortens_the_longest_row_alone(clone, toy_model):
    layer = nn.Linear(5, 20)
    toy_model.network.linear = layer
    layer.weight.data[:] = 1
    layer.weight.data[3] = 10
    clean = DefenderSample(empty(20), empty(20))
    repaired = defend(load(write("data_free"), u=1), toy_model, clean)
    assert clean.chosen == {"clipped": [3]}
    rows = repaired.network.linear.weight
    # Lengths 1 (19 times) and 10, each times the root of 5: mean 1.45, standard deviation 2.01.
    torch.testing.assert_close(rows[3], torch.full((5,), 1.45 + 9 / 20**0.5))
    assert moved(toy_model, repaired) == {"network.linear.weight"}
    assert torch.equal(rows[:3], torch.ones(3, 5))


# --- the page that goes through it -----------------------------------------------------------------


def test_the_page_shows_what_the_command_prints_and_writes(clone, capsys):
    file = write("clean_data", "bold_tuning")
    capsys.readouterr()
    shown = file.relative_to(clone)
    assert f"```text\n{new.next_steps('defense', file)}```" in PAGE
    lines = enumerate(file.read_text().splitlines(), 1)
    places = "".join(f"{number}:{line}\n" for number, line in lines if new.MARK in line)
    assert f"grep -n {new.MARK} {shown}\n```\n\n```text\n{places}```" in PAGE


def test_the_page_s_tests_pass(clone, backdoored, monkeypatch):
    file = write_the_page_s(*ON_PAGES[0])
    monkeypatch.setattr(
        registry,
        "load",
        lambda _kind, _name, settings=None, *, smoke=False: load(file, smoke=smoke, **(settings or {})),
    )
    tests = {}
    exec(METHOD_TESTS, tests)
    for name in [name for name in tests if name.startswith("test_")]:
        with monkeypatch.context() as patch:
            given = {"backdoored": backdoored, "monkeypatch": patch}
            tests[name](**{k: v for k, v in given.items() if k in inspect.signature(tests[name]).parameters})
    assert sum(name.startswith("test_") for name in tests) == 2


def test_the_page_s_settings_are_allowed(clone, monkeypatch):
    write_the_page_s(*ON_PAGES[0])
    study, overrides = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    study_files.load_study(yaml.safe_load(study))
    monkeypatch.setattr(schema, "CONFIG", clone / "config")
    folder = clone / "config" / "defenses"
    folder.mkdir(exist_ok=True)
    (folder / "bold_tuning.yaml").write_text(overrides)
    assert not list(study_files.wrong_shipped("defenses", "bold_tuning"))
    assert schema.shipped("defenses", "bold_tuning").resolve({"num_classes": 43}) == {"epochs": 10}


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MyMethod", "lower-case letters"),
        ("my-method", "lower-case letters"),
        ("../my_method", "lower-case letters"),
        ("my_method.py", "lower-case letters"),
        ("", "lower-case letters"),
        ("none", "the control"),
        ("2nd", "'2nd', which Python can't take"),
        ("_2nd", "'2nd', which Python can't take"),
        ("_", "'', which Python can't take"),
        ("lambda", "'lambda', which Python can't take"),
        ("true", "'True', which Python can't take"),
        ("ft", r"taken by .*clean_data/ft\.py"),
        ("base", r"taken by .*defenses/base\.py"),
        ("__init__", r"taken by .*__init__\.py"),
        ("optimization", "has another of that name"),
    ],
)
def test_bad_names(clone, name, message, capsys):
    files = sorted(clone.rglob("*"))
    assert exit_code("new", "defense", name, "--threat-model", "known_trigger") == 1
    output = capsys.readouterr()
    assert re.search(f"^detrojan: .*{message}", output.err)
    assert output.out == ""
    assert sorted(clone.rglob("*")) == files


def test_a_second_start_leaves_the_first_alone(clone, capsys):
    file = write("clean_data")
    file.write_text("edited")
    assert exit_code("new", "defense", "my_method", "--threat-model", "clean_data") == 1
    assert "taken by" in capsys.readouterr().err
    assert file.read_text() == "edited"


@pytest.mark.parametrize(
    "arguments",
    [
        ["trigger", "a"],
        ["attack", "a"],
        ["defense", "a"],
        ["defense", "a", "--threat-model", "x"],
        ["architecture", "a", "--threat-model", "clean_data"],
    ],
    ids=" ".join,
)
def test_bad_arguments(clone, arguments):
    assert exit_code("new", *arguments) == 2


# --- where it goes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "written"), [("y", True), ("n", False), ("", False), (None, False)])
def test_a_clone_elsewhere_is_asked_for(clone, tmp_path_factory, monkeypatch, capsys, answer, written):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr("sys.stdin", io.StringIO("" if answer is None else f"{answer}\n"))
    assert exit_code("new", "architecture", "my_network") == (0 if written else 1)
    assert (clone / "src/detrojan/models/my_network.py").exists() == written
    captured = capsys.readouterr()
    assert str(clone) in captured.out
    assert written or f"go to the clone that you mean, or add --yes for {clone}" in captured.err


def test_a_script_says_yes(clone, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setattr("click.confirm", lambda _: pytest.fail("nobody is there to answer"))
    assert exit_code("new", "architecture", "my_network", "--yes") == 0
    assert (clone / "src/detrojan/models/my_network.py").exists()


def test_within_the_clone_nothing_is_asked(clone, monkeypatch):
    monkeypatch.chdir(clone / "config")
    monkeypatch.setattr("click.confirm", lambda _: pytest.fail("it is this clone"))
    assert exit_code("new", "architecture", "my_network") == 0
