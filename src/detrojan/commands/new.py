"""Starts a new method: ``detrojan new defense NAME --threat-model clean_data``.

Or an attack, an architecture, a source of images; a table or a figure, each with its test. What it writes is
a worked example that runs and keeps the contract as it stands. Each place to change is marked ``Change:``.
"""

import ast
import keyword
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import click

from detrojan import registry
from detrojan.cells import NO_METHOD

MARK = "Change:"


class Template(NamedTuple):
    """What a new file starts from.

    Attributes:
        name: of a file in ``templates/``.
        parts: what fills it, beside the name of the class.
    """

    name: str
    parts: Mapping[str, str] = {}


class Start(NamedTuple):
    """What there is to know of a kind of method before one is written.

    Attributes:
        folder: where the registry looks for it.
        templates: by threat model; with one of no name, the kind has no threat models.
        use: how a study gets it, a line or more.
        guide: the page that goes through it.
        test: the file in ``templates/`` that its own test starts from; without, the contract tests do.
    """

    folder: registry.Kind | registry.Part
    templates: Mapping[str, Template]
    use: str
    guide: str
    test: str = ""


IN_STUDY = "In a study: {use}, then\n  snakemake --profile local --configfile my-study.yaml"
STARTS = {
    "defense": Start(
        "defenses",
        {
            "data_free": Template("head_clipping"),
            "clean_data": Template(
                "head_reset",
                {
                    "what": "the clean images",
                    "names": "DefenderSample",
                    "images": "        images = clean.everything",
                },
            ),
            "known_trigger": Template(
                "head_reset",
                {
                    "what": "clean images and their triggered copies",
                    "names": "DefenderSample, concatenate",
                    "images": """\
        if clean.triggered is None:
            raise NotApplicableError("it needs triggered copies of the sample: no attack, no trigger")
        # Their labels are the true ones: fitting them is unlearning the trigger.
        triggered = concatenate(clean.triggered.train, clean.triggered.validation)
        images = concatenate(clean.everything, triggered)""",
                },
            ),
        },
        IN_STUDY.format(use="add {name} to grid.defenses of the study file"),
        "docs/adding-a-defense.md",
    ),
    "attack": Start(
        "attacks",
        {"data_poisoning": Template("stripes"), "training_control": Template("stripes_in_training")},
        IN_STUDY.format(use="add {name} to grid.attacks of the study file"),
        "docs/adding-an-attack.md",
    ),
    "architecture": Start(
        "models",
        {"": Template("plain_network")},
        IN_STUDY.format(use="add {name} to grid.architectures of the study file"),
        "docs/adding-an-architecture.md",
    ),
    "source": Start(
        "datasets",
        {"": Template("drawn_bars")},
        IN_STUDY.format(use="give a data set of the study file source: {name}"),
        "docs/adding-a-data-source.md",
    ),
    "table": Start(
        registry.TABLES,
        {"": Template("table")},
        "Made anew with all tables, by the next run of a study, or from finished ones:\n"
        "  detrojan tables --results FOLDER\n"
        "In docs/tables.md: detrojan tables --page docs/tables.md",
        "docs/adding-a-table.md",
        "table_test",
    ),
    "figure": Start(
        registry.FIGURES,
        {"": Template("figure")},
        "Drawn with all figures, by the next run of a study, or from finished tables:\n"
        "  detrojan tables --results FOLDER",
        "docs/adding-a-figure.md",
        "figure_test",
    ),
}
# Names that tables have in other places.
TAKEN: Mapping[str, tuple[str, ...]] = {registry.TABLES: (*registry.GATHERED, "made")}


def create(kind: str, name: str, threat_model: str = "") -> Path:
    """Write the file of a new method and return its path; with its test, if its kind has one of its own.

    Args:
        kind: one of ``STARTS``.
        name: of the method, and of its file.
        threat_model: what a defense may be given, or an attack may do; empty for the other kinds.

    Raises:
        ValueError: the name can't be a method's, or is taken.
    """
    start = STARTS[kind]
    class_name = "".join(part.capitalize() for part in name.split("_"))
    _check(start.folder, name, class_name)
    template = start.templates[threat_model]
    text = _filled(template.name, template.parts, class_name=class_name)
    if _names(text).count(class_name) > 1:
        raise ValueError(f"{name!r} makes a class {class_name}, but the file has another of that name")
    if start.test:
        _write(test_of(kind, name), _filled(start.test, name=name))
    file = registry.PACKAGE / start.folder / threat_model / f"{name}.py"
    _write(file, text)
    return file


def test_of(kind: str, name: str) -> Path:
    """Return the file of the own test of a new table or figure."""
    return clone() / "tests" / "unit" / f"test_{kind}_{name}.py"


def _filled(template: str, parts: Mapping[str, str] = {}, **more: str) -> str:
    raw = (Path(__file__).parent / "templates" / f"{template}.txt").read_text(encoding="utf-8")
    return string.Template(raw).substitute(parts, **more)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise ValueError(f"{_shown(file)} is there: choose another name, or edit that file") from None


def _check(folder: registry.Kind | registry.Part, name: str, class_name: str) -> None:
    if not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(f"{name!r} goes into paths: take lower-case letters, digits and _, as in my_method")
    if name == NO_METHOD:
        raise ValueError(f"{name!r} is the control's name: choose another")
    if name in TAKEN.get(folder, ()):
        raise ValueError(f"{name!r} is the name of another table: choose another")
    for identifier in (name, class_name):
        if not identifier.isidentifier() or keyword.iskeyword(identifier):
            raise ValueError(f"{name!r} makes {identifier!r}, which Python can't take: choose another name")
    # Not registry.names, which knows the methods only: base.py is no method and not free either.
    for file in sorted((registry.PACKAGE / folder).rglob(f"{name}.py")):
        raise ValueError(f"{name!r} is taken by {_shown(file)}: choose another name, or edit that file")


def _names(text: str) -> list[str]:
    """Return the names that a file imports, and those of its classes."""
    body = ast.parse(text).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = [alias.asname or alias.name for node in imports for alias in node.names]
    return imported + [node.name for node in body if isinstance(node, ast.ClassDef)]


def clone() -> Path:
    """Return the folder that holds ``src/``, where the file would be written."""
    return registry.PACKAGE.resolve().parents[1]


def stands_elsewhere() -> bool:
    """Return whether one stands outside of that folder: the file would go where nobody looks for it."""
    return not Path.cwd().is_relative_to(clone())


def next_steps(kind: str, file: Path) -> str:
    """Return what to do with the new file."""
    start = STARTS[kind]
    use = start.use.format(name=file.stem)
    test = test_of(kind, file.stem)
    written = f"{_shown(file)} and {_shown(test)}, which run as they stand" if start.test else _runs(file)
    tests = f"tests/contract {_shown(test)}" if start.test else "tests/contract"
    return NEXT.format(written=written, tests=tests, name=file.stem, use=use, guide=start.guide, mark=MARK)


def _runs(file: Path) -> str:
    return f"{_shown(file)}, which runs as it stands"


def _shown(file: Path) -> Path:
    """Return the path as a reader in this folder would type it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


NEXT = """\
Wrote {written}. What to change is marked "{mark}".

Does it keep the contract?
  pytest -q {tests} -k {name}
{use}
Step by step: {guide}
"""


def main(kind: str, name: str, threat_model: str, *, yes: bool) -> None:
    """Write the file of a new method, and say what comes next; ask first where it goes elsewhere.

    Args:
        kind: one of ``STARTS``.
        name: of the method.
        threat_model: as :func:`create` takes it.
        yes: whether to write without asking.

    Raises:
        ValueError: the name can't be taken, or the answer was no.
    """
    question = f"The package lies in {clone()}, not in this folder. Write there?"
    if stands_elsewhere() and not yes and not _agreed(question):
        raise ValueError(f"nothing is written: go to the clone that you mean, or add --yes for {clone()}")
    click.echo(next_steps(kind, create(kind, name, threat_model)), nl=False)


def _agreed(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:  # nobody is there to answer
        return False
