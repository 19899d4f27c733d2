"""Starts a new method: ``detrojan new defense NAME --threat-model clean_data``.

Or an attack, an architecture, a source of images. What it writes is a worked example that runs and keeps
the contract as it stands. Each place to change is marked ``Change:``.
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
        use: how a study asks for it.
        guide: the page that goes through it.
    """

    folder: registry.Kind
    templates: Mapping[str, Template]
    use: str
    guide: str


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
        "add {name} to grid.defenses of the study file",
        "docs/adding-a-defense.md",
    ),
    "attack": Start(
        "attacks",
        {"data_poisoning": Template("stripes"), "training_control": Template("stripes_in_training")},
        "add {name} to grid.attacks of the study file",
        "docs/adding-an-attack.md",
    ),
    "architecture": Start(
        "models",
        {"": Template("plain_network")},
        "add {name} to grid.architectures of the study file",
        "docs/adding-an-architecture.md",
    ),
    "source": Start(
        "datasets",
        {"": Template("drawn_bars")},
        "give a data set of the study file source: {name}",
        "docs/adding-a-data-source.md",
    ),
}


def create(kind: str, name: str, threat_model: str = "") -> Path:
    """Write the file of a new method and return its path.

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
    raw = (Path(__file__).parent / "templates" / f"{template.name}.txt").read_text(encoding="utf-8")
    text = string.Template(raw).substitute(template.parts, class_name=class_name)
    if _names(text).count(class_name) > 1:
        raise ValueError(f"{name!r} makes a class {class_name}, but the file has another of that name")
    file = registry.PACKAGE / start.folder / threat_model / f"{name}.py"
    with file.open("x", encoding="utf-8") as new:
        new.write(text)
    return file


def _check(folder: registry.Kind, name: str, class_name: str) -> None:
    if not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(f"{name!r} goes into paths: take lower-case letters, digits and _, as in my_method")
    if name == NO_METHOD:
        raise ValueError(f"{name!r} is the control's name: choose another")
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
    return NEXT.format(file=_shown(file), name=file.stem, use=use, guide=start.guide, mark=MARK)


def _shown(file: Path) -> Path:
    """Return the path as a reader in this folder would type it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


NEXT = """\
Wrote {file}, which runs as it stands. What to change is marked "{mark}".

Does it keep the contract?
  pytest -q tests/contract -k {name}
In a study: {use}, then
  snakemake --profile local --configfile my-study.yaml
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
