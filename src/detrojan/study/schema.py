"""The schema of study files.

Free of torch and of method modules: the Snakefile reads the study at every parse, in every cluster
job.
"""

import functools
import itertools
import operator
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from detrojan import registry
from detrojan.cells import MODEL_AXES, NO_METHOD, SURVEY, Draws
from detrojan.settings import Augmentation, Gate, Optimization
from detrojan.study import trials
from detrojan.study.tuned import NO_FILE, Choice, Tuned, given

ATTEMPTS = 3  # of a job, before `close: true` gives it up: the first, and two retries of the SLURM profile
ALL = "all"  # in place of a list of attacks or defenses
BASELINES = ("ft", "fp")  # the two seminal defenses that every comparison needs
NAMED_AXES = ("dataset", "architecture", "attack", "defense", "protocol")  # the others are numbers
FILTER_AXES = (*MODEL_AXES, "defense", "protocol", "spc")
FACTS = ("num_classes", "image_size")  # of a data set, whatever its name; overrides may ask for them
CONDITIONS = (*FILTER_AXES, *FACTS)
TRIGGER_AXES = ("dataset", "attack", "seed")  # of a trigger that all architectures and ratios share
OWN_TRIGGER_AXES = ("dataset", "architecture", "attack", "seed")  # of one that is learned against a model
CONFIG = registry.CHECKOUT / "config"
MethodKind = Literal["models", "attacks", "defenses"]
ProtocolName = Literal["survey", "paper", "ours"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
# What a study file may name besides: what follows from trials, and these.
SEARCHED = (trials.TUNED, trials.TRIALS, *trials.NAMES)
SECTIONS: dict[MethodKind, str] = {"models": "architectures", "attacks": "attacks", "defenses": "defenses"}
LARGEST = 2**31 - 1  # of all whole numbers: what numpy, torch and Parquet take for one everywhere
LONGEST_NAME = 64  # of a data set: it is part of paths, of which file systems take 255 bytes a part
MOST_DRAWS = 10_000  # of a range, which one job takes
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Strict(BaseModel):
    """Refuses what YAML and pydantic let pass: unknown keys, infinities, huge numbers, truth values."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int) and abs(item) > LARGEST:
                raise ValueError(f"should be at most {LARGEST:,}, found {shown(item)}")
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else bool
        if bool not in (annotation, *get_args(annotation)):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, bool):
                    raise ValueError(f"{item} is a truth value (YAML reads yes, no, on and off so)")
        return value


def shown(value: Any) -> str:
    """Return ``value`` as an error message shows it, cut short."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name_condition(value: Any) -> Any:
    if isinstance(value, str) or (value and isinstance(value, list) and all(type(v) is str for v in value)):
        return value
    raise ValueError(f"should be a name or a list of names, found {shown(value)}")


def _number_condition(value: Any) -> Any:
    sign, bound = split_comparison(value)
    try:
        # YAML reads 1e-3, without a point, as text.
        numbers = [float(item) for item in (bound if isinstance(bound, list) else [bound])]
        if not numbers or any(number != number for number in numbers):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"{shown(value)} is no condition: write a number, a list of numbers, or a comparison, one of "
            '"> 1" ">= 1" "< 1" "<= 1"'
        ) from None
    return f"{sign} {numbers[0]!r}" if sign else numbers


def split_comparison(value: Any) -> tuple[str, Any]:
    """Return the sign of a comparison and its bound; "" and ``value`` itself if it is none."""
    match = re.fullmatch(r"\s*(>=|<=|>|<)\s*(\S+)\s*", value) if isinstance(value, str) else None
    return (match[1], match[2]) if match else ("", value)


Axis = str | int | float
# What a file may hold before it is validated, for the JSON schema.
_Range = Annotated[str, Field(pattern=r"^\s*[0-9]+(-[0-9]+)?\s*$")] | Annotated[int, Field(ge=0)]
_Comparison = Annotated[str, Field(pattern=r"^\s*(>=|<=|>|<)\s*\S+\s*$")]
DrawRange = Annotated[
    Draws, BeforeValidator(lambda value: Draws.parse(str(value)), json_schema_input_type=_Range)
]
NameCondition = Annotated[
    str | list[str] | None, BeforeValidator(_name_condition, json_schema_input_type=str | list[str])
]
NumberCondition = Annotated[
    str | list[float] | None,
    BeforeValidator(_number_condition, json_schema_input_type=float | list[float] | _Comparison),
]
Label = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]  # its number, or its class's name
Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(gt=0, le=1)]


class Filter(Strict):
    """Selects part of the grid: every axis that is given must match.

    A condition is a value, a list of values, or for a number a comparison such as ``"> 0.005"``.
    """

    dataset: NameCondition = None
    architecture: NameCondition = None
    attack: NameCondition = None
    ratio: NumberCondition = None
    seed: NumberCondition = None
    defense: NameCondition = None
    protocol: NameCondition = None
    spc: NumberCondition = None
    num_classes: NumberCondition = None
    image_size: NumberCondition = None
    why: str = Field("", description="a note for readers")

    @pydantic.model_validator(mode="after")
    def _has_conditions(self) -> "Filter":
        if not self.conditions:
            raise ValueError(f"without a condition it matches all: name one of {', '.join(CONDITIONS)}")
        return self

    @functools.cached_property
    def conditions(self) -> dict[str, str | list[str] | list[float]]:
        """The axes that are given, each with its condition."""
        return {axis: getattr(self, axis) for axis in CONDITIONS if getattr(self, axis) is not None}

    def matches(self, axes: Mapping[str, Axis], *, partial: bool = False) -> bool:
        """Return whether ``axes`` meet every condition.

        A condition on an axis that ``axes`` lack is not met, or doesn't count if ``partial``. A clean
        model lacks a ratio and a data-free method an SPC: written as 0, they're no small values.
        """
        for axis, condition in self.conditions.items():
            value = axes.get(axis)
            if value is None or (axis in ("ratio", "spc") and value == 0):
                if not partial:
                    return False
            elif not _meets(value, condition):
                return False
        return True


def _meets(value: Axis, condition: str | list[str] | list[float]) -> bool:
    if isinstance(condition, list):
        return value in condition
    if isinstance(value, str):
        return value == condition
    sign, bound = split_comparison(condition)
    return bool(COMPARISONS[sign](value, float(bound)))


class Grid(Strict):
    """The axes of the study. Its cells are all combinations, as far as the filters let them."""

    datasets: list[str] = Field(min_length=1, description="names from the section datasets")
    architectures: list[str] = Field(
        min_length=1,
        description="names of files in models/ or of the section architectures, or networks of others, such "
        "as torchvision:resnet50",
    )
    attacks: list[str] = Field(min_length=1, description="names of files in attacks/, or none; or all")
    ratios: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        min_length=1, description="poisoned share of all training images"
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        [0], min_length=1, description="drive poisoning, trigger and training: a model each"
    )
    defenses: list[str] = Field(min_length=1, description="names of files in defenses/, or none; or all")
    trials: int = Field(
        trials.NUM_TRIALS, ge=1, le=trials.NUM_TRIALS, description="how many trials `trials` stands for"
    )
    protocols: list[str] = Field(
        [SURVEY], min_length=1, description="sets of settings that each defense runs with; or trials"
    )
    spc: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="clean samples per class that the defender holds"
    )
    draws: list[DrawRange] = Field(
        min_length=1, description="ranges of defender samples, such as 0-4; a job takes a range"
    )
    include: list[Filter] = Field([], description="only what one of these matches is run")
    exclude: list[Filter] = Field([], description="nothing that one of these matches is run")
    controls: bool = Field(True, description="insist on the two baselines among the defenses")

    @pydantic.field_validator(
        "attacks", "defenses", mode="before", json_schema_input_type=list[str] | Literal["all"]
    )
    @classmethod
    def _all_methods(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kinds: dict[str | None, MethodKind] = {"attacks": "attacks", "defenses": "defenses"}
        return [NO_METHOD, *registry.names(kinds[info.field_name])] if value == ALL else value

    @pydantic.field_validator("protocols", mode="before", json_schema_input_type=list[str])
    @classmethod
    def _each_trial(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if not isinstance(value, list):
            return value
        every = trials.NAMES[: info.data.get("trials", trials.NUM_TRIALS)]
        return [name for given in value for name in (every if given == trials.TRIALS else [given])]

    @pydantic.field_validator("*")
    @classmethod
    def _no_repeats(cls, values: Any) -> Any:
        if isinstance(values, list):
            repeated = [value for place, value in enumerate(values) if value in values[:place]]
            if repeated:
                shown = ", ".join(dict.fromkeys(map(str, repeated)))
                raise ValueError(f"{shown} stands there more than once: remove the repeats")
        return values

    @pydantic.field_validator("draws")
    @classmethod
    def _no_overlap(cls, ranges: list[Draws]) -> list[Draws]:
        ordered = sorted(ranges)
        for draws in ordered:
            if draws.last > LARGEST:
                raise ValueError(f"draw {shown(draws.last)} is more than {LARGEST:,}")
            if len(draws) > MOST_DRAWS:
                raise ValueError(
                    f"{draws} are more than {MOST_DRAWS:,} draws, which one job takes: split them"
                )
        for before, after in itertools.pairwise(ordered):
            if after.first <= before.last:
                raise ValueError(f"draws {before} and {after} overlap: give each draw to one range")
        return ordered


class Dataset(Strict):
    """A data set: the fields that all have; those of its kind of source stand beside them."""

    model_config = ConfigDict(extra="allow")

    source: str = Field(description="name of a file in src/detrojan/datasets/")
    image_size: int = Field(ge=16, le=512, description="side of the square images, pixels")
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of each class kept from training, for the defender"
    )
    classes: list[Label] | None = Field(
        None,
        min_length=2,
        description="use only these labels, numbers or names, numbered anew in this order",
    )
    per_class: int | None = Field(None, ge=2, description="use only the first so many images of each class")
    overlap: Share | Literal["allowed"] = Field(
        0.0,
        description="largest share of test images that training may hold too, pixel for pixel; or allowed",
    )
    augmentation: Augmentation = Field(Augmentation(), description="how training images are varied")
    mean: tuple[Share, Share, Share] | None = Field(
        None, description="of red, green, blue in [0, 1]; measured if not given"
    )
    std: tuple[Spread, Spread, Spread] | None = Field(None, description="likewise")

    @pydantic.field_validator("classes")
    @classmethod
    def _each_once(cls, values: list[int | str] | None) -> list[int | str] | None:
        if values is not None and len(set(values)) < len(values):
            raise ValueError("a label stands there more than once: remove the repeats")
        return values

    @pydantic.model_validator(mode="after")
    def _crop_shows_an_image(self) -> "Dataset":
        if self.augmentation.crop_padding >= self.image_size:
            raise ValueError(
                f"augmentation.crop_padding is {self.augmentation.crop_padding}, so that a crop of "
                f"{self.image_size} pixels can miss the image: it should be less than image_size"
            )
        return self

    @property
    def source_settings(self) -> dict[str, Any]:
        """The fields of the kind of source."""
        return dict(self.model_extra or {})

    @property
    def options(self) -> dict[str, Any]:
        """What else decides the images, in the words of :func:`detrojan.stages.ingest.build`."""
        own = self.model_dump(include={"held_out", "classes", "per_class", "overlap", "mean", "std"})
        return {"side": self.image_size, **own}


class Overrides(Strict):
    """Settings for part of the grid."""

    when: Filter = Field(description="the part of the grid, a filter")
    set: dict[str, Any] = Field(min_length=1, description="the settings that hold there")


class Settings(Strict):
    """Settings of a method or of training: values, and overrides that later ones win."""

    model_config = ConfigDict(extra="allow")

    overrides: list[Overrides] = Field([], description="settings for parts of the grid; the last match wins")

    def resolve(self, axes: Mapping[str, Axis]) -> dict[str, Any]:
        """Return the values that hold at ``axes``."""
        values = dict(self.model_extra or {})
        for override in self.overrides:
            if override.when.matches(axes):
                values |= override.set
        return values

    @property
    def asks_classes(self) -> bool:
        """Whether an override depends on how many classes a data set has."""
        return any(override.when.num_classes is not None for override in self.overrides)


class Protocol(Strict):
    """With which settings a defense runs: those of its class, but for what is set here.

    Every setting has a source: the first word says whose value it is (``survey``, ``paper`` or ``ours``), the
    rest where it stands.
    """

    set: dict[str, Any] = Field({}, description="settings that differ from the class's")
    sources: dict[str, str] = Field({}, description="where the value of each setting is from")
    overrides: list[Overrides] = Field([], description="settings for parts of the grid; the last match wins")


class Shipped(Strict):
    """What ``config/`` has beside a method's class; of a defense, its protocols.

    ``overrides`` here hold under every protocol: where a layer lies in an architecture, what memory needs.
    """

    protocols: dict[ProtocolName, Protocol] = Field({}, description="of a defense, by name")
    search: dict[str, trials.Range] = Field(
        {}, max_length=trials.MOST_SEARCHED, description="of a defense, where trials look for settings"
    )
    overrides: list[Overrides] = Field([], description="settings for parts of the grid; the last match wins")


@functools.cache
def shipped_file(kind: MethodKind, name: str) -> Shipped:
    """Return what ``config/`` has beside a method's class; nothing for most that are no defenses."""
    file = CONFIG / SECTIONS[kind] / f"{name}.yaml"
    return Shipped(**yaml.safe_load(file.read_text(encoding="utf-8"))) if file.exists() else Shipped()


@functools.cache
def shipped(kind: MethodKind, name: str, protocol: str = SURVEY) -> Settings:
    """Return the settings of a method that are not its class's, from ``config/``.

    A study file overrides them.

    Args:
        kind: of method.
        name: of it.
        protocol: of a defense; any method may be run as its class is, which is the first one.
    """
    file = shipped_file(kind, name)
    own = {str(key): value for key, value in file.protocols.items()}.get(protocol, Protocol())
    return Settings(**own.set, overrides=[*own.overrides, *file.overrides])


def protocols(defense: str) -> list[str]:
    """Return the protocols that a defense declares.

    One that declares none, as one that was just written, runs as its class is under either of the first two.
    """
    return [*shipped_file("defenses", defense).protocols] or ["survey", "paper"]


def has(defense: str, protocol: str) -> bool:
    """Return whether a defense has cells under a protocol: it declares it, or where trials may look."""
    if protocol == trials.TUNED or trials.number(protocol) is not None:
        return bool(shipped_file("defenses", defense).search)
    return protocol in protocols(defense)


@functools.cache
def trial(defense: str, number: int) -> tuple[str, dict[str, Any]]:
    """Return the protocol that a trial of a defense starts from, and the settings that it draws.

    The second trial of a defense that declares no ``paper`` is ``survey`` once more.
    """
    base = "paper" if number == 1 and has(defense, "paper") else SURVEY
    fields = registry.declared("defenses", defense).settings.model_fields
    whole = [name for name, field in fields.items() if field.annotation is int]
    return base, trials.drawn(defense, shipped_file("defenses", defense).search, whole, number)


class Study(Strict):
    """A study file."""

    target: Label = Field(0, description="the label that the attacker wants: its number, or its class's name")
    label_map: Literal["all_to_one", "all_to_all"] = Field(
        "all_to_one", description="whether all triggered images should get the target, or each the next class"
    )
    pool: Literal["held_out", "train"] = Field(description="where the defender's images come from")
    datasets: dict[str, Dataset] = Field(min_length=1, description="data sets by name")
    grid: Grid = Field(description="the axes of the study")
    architectures: dict[str, Settings] = Field(
        {}, description="settings that differ from the defaults; with a network, an architecture of your own"
    )
    training: Settings = Field(Settings(), description="likewise, of training the models")
    attacks: dict[str, Settings] = Field({}, description="likewise")
    defenses: dict[str, Settings] = Field({}, description="likewise")
    smoke: bool = Field(
        False, description="run attacks and defenses with their quick settings, which show that they run"
    )
    tuned: Annotated[Tuned, BeforeValidator(given, json_schema_input_type=str)] | None = Field(
        None, description="file of `detrojan tune`, which the protocol tuned needs"
    )
    tuned_as: dict[str, str] = Field(
        {}, description="data sets of this study that are called otherwise in that file"
    )
    gate: Gate = Field(Gate(), description="when an attack counts as having worked")
    keep_defended: bool = Field(False, description="keep repaired weights after they are evaluated")
    close: bool | Annotated[int, Field(ge=1)] = Field(
        False,
        description="give up jobs that time or memory limits killed so many times, true for 3: their cells "
        "become rows",
    )
    _num_classes: dict[str, int] = PrivateAttr(default_factory=dict)

    @property
    def kills(self) -> int:
        """After how many kills by a limit a job is given up; 0 for never."""
        return {True: ATTEMPTS, False: 0}[self.close] if isinstance(self.close, bool) else self.close

    @property
    def labels(self) -> dict[str, Any]:
        """Which labels the attacker wants, in the words of :class:`detrojan.labels.LabelMap`."""
        return {"target": self.target, "kind": self.label_map}

    def method(self, kind: MethodKind, name: str, axes: Mapping[str, Axis]) -> dict[str, Any]:
        """Return all settings of a method at ``axes``: the class's, the shipped, the study's.

        Those of a defense are its protocol's. Where ``smoke`` is set, the quick ones of an attack or a
        defense come before the study's.

        Raises:
            ValueError: a setting depends on the number of classes, and the data set's source can't be read.
        """
        values = self._declared(kind, name, axes) | self._own(kind, name, axes)
        of_others = self.network(name) if kind == "models" else ""
        return registry.declared(kind, of_others or name).settings(**values).model_dump(mode="json")

    def network(self, architecture: str) -> str:
        """Return the network of others that an architecture is, such as ``timm:NAME``; else nothing."""
        settings = self.architectures.get(architecture)
        return str(((settings and settings.model_extra) or {}).get(registry.NETWORK, ""))

    @property
    def networks(self) -> list[str]:
        """The networks of others that the study names, each once."""
        return list(dict.fromkeys(filter(None, map(self.network, self.architectures))))

    def sources(self, defense: str, axes: Mapping[str, Axis]) -> dict[str, str]:
        """Return whose value each setting of a defense is: ``survey``, ``paper``, ``ours`` or ``study``.

        ``study`` is what is set here; ``ours`` the value of a class that declares no source; ``trial`` what
        a trial draws. Where a trial was chosen, it is named: ``tuned: trial-07``.
        """
        file = shipped_file("defenses", defense)
        named = {str(key): protocol.sources for key, protocol in file.protocols.items()}
        base, drawn = self._base(defense, axes)
        said = {key: text.partition(":")[0] for key, text in named.get(base, {}).items()}
        said |= dict.fromkeys(drawn, "trial")
        if axes.get("protocol") == trials.TUNED:
            chosen = f"{trials.TUNED}: {trials.name(self.choice(defense, axes).trial)}"
            said |= dict.fromkeys({*file.search, *drawn}, chosen)
        fields = registry.declared("defenses", defense).settings.model_fields
        own = self._own("defenses", defense, axes)
        return {name: "study" if name in own else said.get(name, "ours") for name in fields}

    def deviates(self, defense: str, axes: Mapping[str, Axis]) -> bool:
        """Return whether a defense runs with other settings than its protocol's."""
        if not self._own("defenses", defense, axes):
            return False  # asked of every job that is planned
        kind = registry.declared("defenses", defense).settings
        declared = kind(**self._declared("defenses", defense, axes)).model_dump(mode="json")
        return declared != self.method("defenses", defense, axes)

    def choice(self, defense: str, axes: Mapping[str, Axis]) -> Choice:
        """Return what was chosen for a cell of the protocol ``tuned``.

        Raises:
            ValueError: the study names no file of choices, or that has none for such a cell.
        """
        if self.tuned is None:
            raise ValueError(f"tuned: {NO_FILE}")
        dataset = str(axes["dataset"])
        named = self.tuned_as.get(dataset, dataset)
        return self.tuned.choice(defense, named, int(axes["spc"]), str(axes["attack"]))

    def _declared(self, kind: MethodKind, name: str, axes: Mapping[str, Axis]) -> dict[str, Any]:
        if kind != "defenses":
            return self._resolved(shipped(kind, name), axes)
        base, drawn = self._base(name, axes)
        return self._resolved(shipped(kind, name, base), axes) | drawn

    def _base(self, defense: str, axes: Mapping[str, Axis]) -> tuple[str, dict[str, Any]]:
        """Return the declared protocol of a cell, and what its trial or choice sets over that."""
        protocol = str(axes.get("protocol", SURVEY))
        if protocol == trials.TUNED:
            chosen = self.choice(defense, axes)
            # The file's own settings: ranges that were edited since change no choice.
            return trial(defense, chosen.trial)[0], chosen.settings
        number = trials.number(protocol)
        return (protocol, {}) if number is None else trial(defense, number)

    def _own(self, kind: MethodKind, name: str, axes: Mapping[str, Axis]) -> dict[str, Any]:
        """Return the settings of a method that this study sets at ``axes``."""
        smoke = registry.declared(kind, name).constants["smoke"] if self.smoke and kind != "models" else {}
        own: dict[str, Settings] = getattr(self, SECTIONS[kind])
        return {**smoke, **(self._resolved(own[name], axes) if name in own else {})}

    def _resolved(self, settings: Settings, axes: Mapping[str, Axis]) -> dict[str, Any]:
        name = axes.get("dataset")
        if name in self.datasets:
            facts: dict[str, Axis] = {"image_size": self.datasets[str(name)].image_size}
            if settings.asks_classes:
                facts["num_classes"] = self.num_classes(str(name))
            axes = {**facts, **axes}
        return settings.resolve(axes)

    def num_classes(self, dataset: str) -> int:
        """Return how many classes a data set has, from its source if nobody has said.

        Raises:
            ValueError, OSError: the source can't be read.
        """
        asked = self.datasets[dataset]
        if asked.classes is not None:
            return len(asked.classes)
        if dataset not in self._num_classes:
            source = registry.load("datasets", asked.source, asked.source_settings)
            self._num_classes[dataset] = len(source.class_names())
        return self._num_classes[dataset]

    def know_classes(self, counts: Mapping[str, int]) -> None:
        """Take the number of classes of data sets as given, for where their sources may not be at hand."""
        self._num_classes.update(counts)

    def optimization(self, axes: Mapping[str, Axis]) -> dict[str, Any]:
        """Return all settings of training at ``axes``, defaults included."""
        return Optimization(**self._resolved(self.training, axes)).model_dump(mode="json")
