"""Starts a new method: ``detrojan new defense NAME --threat-model clean_data``.

What it writes is a worked method that runs and keeps the contract as it stands. Each place to change
is marked ``Change:``.
"""

import ast
import keyword
import re
import string
from pathlib import Path

import click

from detrojan import registry
from detrojan.cells import NO_METHOD

MARK = "Change:"

HEAD_RESET = '''\
"""Head reset: draw a new last layer and fit it to $what.

Change: cite the paper (authors, title, venue, year, arXiv number) and its code, and name every
departure from either, with the reason. Source of this one: none, a worked example.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import $names
from detrojan.learning import training
from detrojan.settings import Optimization


class $class_name(Defense):
    """Forget which features mean which class and learn it anew; the features stay."""

    # Change: 2 if it chooses on validation images; where SPC is 1 there are none.
    min_spc: ClassVar[int] = 1
    # Change: settings with which it takes about a second, also with 200 classes.
    smoke: ClassVar[dict[str, object]] = {"epochs": 1}

    # Change: the hyperparameters, each a plain value with its bounds and its unit.
    epochs: int = Field(20, ge=1, description="passes over the images")
    batch_size: int = Field(32, ge=2, description="images a step")
    lr: float = Field(0.1, gt=0, description="learning rate of the first epoch, cosine to zero")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with another last layer."""
        # Change: the method, from here to the end.
$images
        repaired = copy.deepcopy(model).requires_grad_(False)
        layer = _last_layer(repaired)
        with streams.global_stream(streams.child(rng, "layer")):
            fresh = nn.Linear(layer.in_features, layer.out_features)
        layer.load_state_dict(fresh.state_dict())
        layer.requires_grad_(True)
        # Only what requires gradients moves. The running statistics follow the images all the same.
        history = training.fit(
            repaired,
            images,
            Optimization(epochs=self.epochs, batch_size=self.batch_size, lr=self.lr),
            rng=streams.child(rng, "fit"),
            augmentation=images.info.augmentation,
        )
        clean.chosen["train_accuracy"] = history[-1].accuracy
        return repaired.requires_grad_(True)


def _last_layer(model: nn.Module) -> nn.Linear:
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise NotApplicableError("head reset needs a linear layer; this model has none")
    return layers[-1]
'''

HEAD_CLIPPING = '''\
"""Head clipping: shorten the rows of the last layer that are much longer than the others.

Change: cite the paper (authors, title, venue, year, arXiv number) and its code, and name every
departure from either, with the reason. Source of this one: none, a worked example.
"""

import copy
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from detrojan.defenses.base import Defense
from detrojan.errors import NotApplicableError
from detrojan.images import DefenderSample


class $class_name(Defense):
    """Weaken a class that the last layer favours, which may be the attacker's; it needs no image."""

    # Change: settings with which it takes about a second, also with 200 classes.
    smoke: ClassVar[dict[str, object]] = {}

    # Change: the hyperparameters, each a plain value with its bounds and its unit.
    u: float = Field(2, ge=0, description="allowed length above the mean of all rows, standard deviations")

    def __call__(self, model: nn.Module, clean: DefenderSample, *, rng: torch.Generator) -> nn.Module:
        """Return a copy of ``model`` with shorter rows; ``clean`` is empty and ``rng`` not needed."""
        # Change: the method, from here to the end.
        repaired = copy.deepcopy(model).eval()
        layers = [module for module in repaired.modules() if isinstance(module, nn.Linear)]
        if not layers:
            raise NotApplicableError("head clipping needs a linear layer; this model has none")
        rows = layers[-1].weight.detach()
        lengths = rows.norm(dim=1)
        limit = lengths.mean() + self.u * lengths.std()
        clipped = lengths > limit
        rows[clipped] *= limit / lengths[clipped, None]
        clean.chosen["clipped"] = clipped.nonzero()[:, 0].tolist()
        return repaired
'''

# For each threat model, its template and what fills it.
TEMPLATES = {
    "data_free": (HEAD_CLIPPING, {}),
    "clean_data": (
        HEAD_RESET,
        {
            "what": "the clean images",
            "names": "DefenderSample",
            "images": "        images = clean.everything",
        },
    ),
    "known_trigger": (
        HEAD_RESET,
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
}


def write_defense(name: str, threat_model: str) -> Path:
    """Write the file of a new defense and return its path.

    Args:
        name: of the method, and of its file.
        threat_model: ``data_free``, ``clean_data`` or ``known_trigger``: what it may be given.

    Raises:
        ValueError: the name can't be a method's, or is taken.
    """
    class_name = "".join(part.capitalize() for part in name.split("_"))
    _check(name, class_name)
    template, parts = TEMPLATES[threat_model]
    text = string.Template(template).substitute(parts, class_name=class_name)
    if class_name in _imported(text):
        raise ValueError(f"{name!r} makes a class {class_name}, but the file imports another of that name")
    file = registry.PACKAGE / "defenses" / threat_model / f"{name}.py"
    with file.open("x", encoding="utf-8") as new:
        new.write(text)
    return file


def _check(name: str, class_name: str) -> None:
    if not re.fullmatch("[a-z0-9_]+", name):
        raise ValueError(f"{name!r} goes into paths: take lower-case letters, digits and _, as in my_method")
    if name == NO_METHOD:
        raise ValueError(f"{name!r} is the control, the untouched model: choose another name")
    for identifier in (name, class_name):
        if not identifier.isidentifier() or keyword.iskeyword(identifier):
            raise ValueError(f"{name!r} makes {identifier!r}, which Python can't take: choose another name")
    # Not registry.names, which knows the methods only: base.py is no method and not free either.
    for file in sorted((registry.PACKAGE / "defenses").rglob(f"{name}.py")):
        raise ValueError(f"{name!r} is taken by {_shown(file)}: choose another name, or edit that file")


def _imported(text: str) -> set[str]:
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def _shown(file: Path) -> Path:
    """Return the path as a reader in this folder would type it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


NEXT = """\
Wrote {file}, which runs as it stands. What to change is marked "{mark}".

Does it keep the contract?
  pytest -q tests/contract/test_defenses.py -k {name}
In a study: add {name} to grid.defenses of the study file, then
  snakemake --profile local --configfile my-study.yaml
In CI: add {name} to grid.defenses of config/smoke.yaml, and under defenses what its class calls smoke.
Step by step: docs/adding-a-defense.md
"""


def main(name: str, threat_model: str) -> None:
    """Write the file of a new defense, and say what comes next.

    Raises:
        ValueError: the name can't be taken.
    """
    file = write_defense(name, threat_model)
    click.echo(NEXT.format(file=_shown(file), name=name, mark=MARK), nl=False)
