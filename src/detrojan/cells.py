"""What a cell, a model and a shard are, and how their axes are written in paths and tables."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

NO_METHOD = "none"  # the control: no attack (a clean model), no defense (the untouched model)
MODEL_AXES = ("dataset", "architecture", "attack", "ratio", "seed")
CELL_AXES = (*MODEL_AXES, "defense", "protocol", "spc", "draw")
SURVEY = "survey"  # the protocol that every defense has


def label_of(wanted: int | str, classes: Sequence[str]) -> int:
    """Return the label that a study means: a number as it is, a name by its place among ``classes``.

    Raises:
        ValueError: there is no such label, or several classes have this name.
    """
    if isinstance(wanted, int):
        if wanted >= len(classes):
            raise ValueError(f"there is no label {wanted}: labels are 0 to {len(classes) - 1}")
        return wanted
    places = [label for label, name in enumerate(classes) if name == wanted]
    if len(places) != 1:
        shown = ", ".join([*classes[:10], "..."] if len(classes) > 10 else classes)
        what = f"labels {', '.join(map(str, places))} are all" if places else "there is no class"
        raise ValueError(f"{what} {wanted!r}: {'write the number' if places else f'classes are {shown}'}")
    return places[0]


class Model(NamedTuple):
    """One trained model of the grid; ``ratio`` is 0 for a clean one."""

    dataset: str
    architecture: str
    attack: str
    ratio: float
    seed: int


class Draws(NamedTuple):
    """The draws ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1

    def numbers(self) -> range:
        """Return the draws one by one."""
        return range(self.first, self.last + 1)

    @classmethod
    def parse(cls, text: str) -> "Draws":
        """Return the draws that ``text`` names: ``"0-9"``, or ``"4"`` for one.

        Raises:
            ValueError: ``text`` is neither, or the last draw comes before the first.
        """
        first, dash, last = text.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise ValueError(f"{text[:40]!r} is no range of draws: write one as 0-9, or 4 for a single draw")
        draws = cls(int(first), int(last if dash else first))
        if draws.last < draws.first:
            raise ValueError(f"{text[:40]!r} ends before it starts: write the smaller draw first")
        return draws


class Shard(NamedTuple):
    """The unit of a job: one model, one defense under one protocol, one SPC, a range of draws."""

    model: Model
    defense: str
    spc: int
    draws: Draws
    protocol: str = SURVEY

    @property
    def axes(self) -> dict[str, Any]:
        """The axes that all its cells share, with their values."""
        own = {"defense": self.defense, "protocol": self.protocol, "spc": self.spc}
        return self.model._asdict() | own


# The untouched model, and methods that are given no data, have one shard a model: neither the number
# of samples nor the draw can change what they do.
NO_SAMPLES = 0
ONE_DRAW = Draws(0, 0)


def untouched(model: Model) -> Shard:
    """Return the shard of a model to which nothing is done."""
    return Shard(model, NO_METHOD, NO_SAMPLES, ONE_DRAW, NO_METHOD)


@dataclasses.dataclass(frozen=True)
class Cell:
    """The axes that a job's wildcards name; an axis that its rule lacks is None."""

    dataset: str | None = None
    architecture: str | None = None
    attack: str | None = None
    ratio: float | None = None
    seed: int | None = None
    defense: str | None = None
    protocol: str | None = None
    spc: int | None = None
    draws: Draws | None = None

    @classmethod
    def from_wildcards(cls, wildcards: dict[str, str]) -> "Cell":
        """Return the cell of a job with these wildcards (texts, as Snakemake gives them)."""
        read: dict[str, Callable[[str], Any]] = {
            "ratio": float,
            "seed": int,
            "spc": int,
            "draws": Draws.parse,
        }
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: read.get(k, str)(v) for k, v in wildcards.items() if k in names})

    @property
    def axes(self) -> dict[str, Any]:
        """The axes that are named, with their values."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def model(self) -> Model:
        """The model of this cell; its rule must name all five axes."""
        values = [getattr(self, axis) for axis in MODEL_AXES]
        assert None not in values, f"this rule's wildcards name no whole model: {values}"
        return Model(*values)

    @property
    def shard(self) -> Shard:
        """The shard of this cell; its rule must name all nine axes."""
        assert self.defense is not None
        assert self.protocol is not None
        assert self.spc is not None
        assert self.draws is not None
        return Shard(self.model, self.defense, self.spc, self.draws, self.protocol)

    def __str__(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.axes.items())


def ratio_text(ratio: float) -> str:
    """Return ``ratio`` as paths write it: plain decimals, no exponent, no trailing zeros."""
    return format(Decimal(repr(ratio)).normalize(), "f")


def axes_text(axes: Mapping[str, Any]) -> str:
    """Return ``axes`` as :func:`detrojan.workflow.site.parse_axes` reads them."""
    return " ".join(f"{axis}={value_text(value)}" for axis, value in axes.items())


def value_text(value: Any) -> str:
    """Return the value of an axis as paths write it."""
    return ratio_text(value) if isinstance(value, float) else str(value)
