"""The file that ``detrojan tune`` writes: which trial was chosen for which cells, and why.

One setting a defense, data set, number of samples and family of attacks left out. It has the chosen settings
themselves, so that it means the same whatever becomes of the ranges that they were drawn from, and what each
trial was worth, so that the choice can be checked by hand. Free of torch.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from detrojan.cells import NO_METHOD
from detrojan.study import trials, yaml_text

ABOUT = (
    "Written by `detrojan tune`, for the key `tuned` of study files; docs/tuning.md explains it. `left_out` "
    "is the family of attacks that had no say in a choice (none: all had one), `der` and `acc_loss` are "
    "means of each of the trials `numbers` over the `cells` that had one."
)
NO_FILE = "the protocol tuned needs the file that `detrojan tune` writes: name it with the key tuned"

Key = tuple[str, str, int, str]


class Part(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TunedOn(Part):
    """What a data set was when trials ran on it, and the attacks that they met there."""

    num_classes: int = Field(ge=2)
    image_size: int = Field(ge=1)
    attacks: tuple[str, ...] = Field(min_length=1)
    studied: dict[str, dict[str, Any]] = Field({}, description="settings that the study of the trials set")

    @functools.cached_property
    def families(self) -> frozenset[str]:
        """Those of its attacks."""
        return frozenset(map(trials.family, self.attacks))


class Choice(Part):
    """The trial that was chosen for some cells.

    Attributes:
        left_out: the family of the attacks of these cells; ``none`` if no attack was left out.
        settings: what the trial draws; none of the first two.
        code: digests of the code that ran.
        numbers: of the trials that every cell has, in the order of what follows.
        der: mean of each trial, a cell without a result counting as 0.
        acc_loss: mean ACC lost in each trial, a fraction; a cell without a result has lost all.
    """

    defense: str
    dataset: str
    spc: int = Field(ge=0)
    left_out: str
    trial: int = Field(ge=0, lt=trials.NUM_TRIALS)
    settings: dict[str, Any]
    code: tuple[str, ...]
    cells: int = Field(ge=1)
    numbers: tuple[int, ...] = Field(min_length=1, max_length=trials.NUM_TRIALS)
    der: tuple[float, ...] = Field(min_length=1, max_length=trials.NUM_TRIALS)
    acc_loss: tuple[float, ...] = Field(min_length=1, max_length=trials.NUM_TRIALS)

    @property
    def key(self) -> Key:
        """What no other choice of a file has."""
        return (self.defense, self.dataset, self.spc, self.left_out)


class Tuned(Part):
    """All choices, by data set and defense, with a digest of what it says."""

    digest: str
    datasets: dict[str, TunedOn]
    choices: tuple[Choice, ...]

    @pydantic.model_validator(mode="after")
    def _is_as_written(self) -> "Tuned":
        if self.digest != digest(self.model_dump(mode="json")):
            raise ValueError("it was changed since `detrojan tune` wrote it: write it anew")
        return self

    @functools.cached_property
    def _by_key(self) -> dict[Key, Choice]:
        return {choice.key: choice for choice in self.choices}

    def choice(self, defense: str, dataset: str, spc: int, attack: str) -> Choice:
        """Return what was chosen for the cells of an attack.

        Args:
            defense: the method.
            dataset: as this file calls it.
            spc: samples a class; 0 of a method without data.
            attack: of the cells; none for a clean model.

        Raises:
            ValueError: nothing was; the message says for what.
        """
        on = self.datasets.get(dataset)
        if on is None:
            raise ValueError(f"has no data set {dataset}; it has {', '.join(self.datasets)}")
        family = trials.left_out(attack)
        # An attack that is like none of those in the trials has nothing to leave out.
        wanted = family if family in on.families else NO_METHOD
        found = self._by_key.get((defense, dataset, spc, wanted))
        if found is None:
            without = "" if wanted == NO_METHOD else f", where attacks like {wanted} are left out"
            raise ValueError(f"has no choice for {defense} on {dataset} at SPC {spc}{without}")
        return found


def digest(content: Mapping[str, Any]) -> str:
    """Return the digest of what a file says, whatever digest it has."""
    said = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def made(datasets: Mapping[str, Mapping[str, Any]], choices: list[dict[str, Any]]) -> Tuned:
    """Return the content of a file, sorted, with its digest."""
    unsigned = Tuned.model_construct(
        digest="",
        datasets={name: TunedOn(**datasets[name]) for name in sorted(datasets)},
        choices=tuple(sorted((Choice(**choice) for choice in choices), key=lambda choice: choice.key)),
    )
    content = unsigned.model_dump(mode="json")
    return Tuned(**{**content, "digest": digest(content)})


def text(content: Tuned) -> str:
    """Return the text of a file, in JSON: a line a value of a choice, lists and settings whole."""
    plain = content.model_dump(mode="json")
    lines = ["{", f'"about": {json.dumps(ABOUT)},', f'"digest": "{content.digest}",', '"datasets": {']
    lines += [",\n".join(f"{json.dumps(key)}: {json.dumps(on)}" for key, on in plain["datasets"].items())]
    blocks = (
        ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in choice.items()
        )
        for choice in plain["choices"]
    )
    lines += ["},", '"choices": [', ",\n".join(f"{{\n{block}\n}}" for block in blocks), "]", "}", ""]
    return "\n".join(lines)


def in_a_line(content: Tuned) -> str:
    """Return what may stand in place of a file's name, so that a study no longer hangs on the file."""
    return json.dumps(content.model_dump(mode="json"))


def given(value: Any) -> Any:
    """Return what a study says with the key ``tuned``: the content of the file that it names.

    Raises:
        ValueError: it can't be read.
    """
    if not isinstance(value, str):
        return value
    if value.startswith("{"):  # see `in_a_line`
        return json.loads(value)
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError(f"{path} is missing: `detrojan tune` writes such a file")
    try:
        return Tuned(**{key: part for key, part in yaml_text.read(path).items() if key != "about"})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {': '.join(filter(None, (where, said)))}") from None
