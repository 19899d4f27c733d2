"""Reads a study file, and lists all its mistakes in one error.

The Snakefile does so at every parse, so nothing here imports torch or a method. What costs more than
a moment (counting images) is in :mod:`detrojan.study.feasibility`, which only the main process calls.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import pydantic
import yaml
from pydantic import BaseModel

from detrojan import registry
from detrojan.cells import MODEL_AXES, NO_METHOD, Draws
from detrojan.settings import Augmentation, Optimization
from detrojan.study import grid as axes_of_grid
from detrojan.study import networks, trials, tuned, yaml_text
from detrojan.study.schema import (
    ALL,
    BASELINES,
    FACTS,
    FILTER_AXES,
    LONGEST_NAME,
    OWN_TRIGGER_AXES,
    PROTOCOLS,
    SEARCHED,
    SECTIONS,
    TRIGGER_AXES,
    Dataset,
    MethodKind,
    Protocol,
    Strict,
    Study,
    shipped_file,
    shown,
)

KEPT = "study.yaml"
KEPT_HEAD = "# The study that was run last, written when its run began.\n"


class StudyError(ValueError):
    """A study file has mistakes; the message lists each with its YAML path."""

    what: ClassVar[str] = "study file"

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = list(mistakes)
        count = len(self.mistakes)
        head = f"the {self.what} has {'a mistake' if count == 1 else f'{count} mistakes'}"
        super().__init__("\n".join([f"{head}:", *(f"  {mistake}" for mistake in self.mistakes)]))


def load_study(raw: Mapping[str, Any]) -> Study:
    """Return the study that a parsed study file describes.

    Raises:
        StudyError: it has mistakes.
    """
    raw = networks.expanded(raw)
    try:
        study, mistakes = Study.model_validate(raw), []
    except pydantic.ValidationError as error:
        mistakes = explain(error, Study, raw)
    # These read the raw file, so that all mistakes are in one list, whatever the schema refused.
    mistakes += [*_unknown_names(raw), *_wrong_settings(raw), *_wrong_filters(raw), *_inconsistent(raw)]
    mistakes += [*networks.wrong(raw), *_wrong_trials(raw)]
    mistakes = list(mistakes) or [*_untuned(study)]
    if mistakes:
        raise StudyError(dict.fromkeys(mistakes))
    return study


def with_choices(raw: dict[str, Any], study: Study) -> None:
    """Put what was chosen in place of the name of its file, in ``raw``.

    Jobs, and whoever reads the study later, then need no file, which may have been written anew.
    """
    if study.tuned is not None:
        raw["tuned"] = tuned.in_a_line(study.tuned)


def read(paths: Iterable[Path]) -> dict[str, Any]:
    """Return what study files hold, merged as Snakemake merges them: later ones win, key by key.

    Raises:
        ValueError: a file can't be read, or is no plain YAML; see :mod:`detrojan.study.yaml_text`.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, yaml_text.read(path))
    return merged


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def keep(raw: Mapping[str, Any], results: Path) -> None:
    """Write a study beside its results, for what reads them later and is not told the study file."""
    from detrojan.storage import records  # pyarrow, which each of a cluster's jobs would load

    text = yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True)
    records.write_text(KEPT_HEAD + text, results / KEPT)


def kept(results: Path) -> dict[str, Any]:
    """Return the study, as parsed, that was run last in the folder of ``results``.

    Raises:
        StudyError: none was run there, or the file is damaged.
    """
    path = results / KEPT
    if not path.is_file():
        raise StudyError([f"{path} is missing: no study was run there"])
    try:
        found: dict[str, Any] = networks.expanded(yaml_text.read(path))
    except ValueError as error:
        raise StudyError([f"{path} is broken: run the study again, which writes it ({error})"]) from None
    return found


# --- what the schema alone can't tell --------------------------------------------------------------


def _mapping(value: Any) -> dict[str, Any]:
    """Return the text keys of what should be a mapping, with their values; nothing if it is none."""
    return {k: v for k, v in value.items() if isinstance(k, str)} if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _unknown_names(raw: Any) -> Iterator[str]:
    """Say which names stand for nothing, or can't be part of a path."""
    for path, name, allowed in _names(raw):
        if isinstance(name, str) and name not in allowed:
            yield f"{path}: {no_such(name, allowed)}"
    for name in _mapping(_mapping(raw).get("datasets")):
        if not re.fullmatch("[A-Za-z0-9_-]+", name):
            yield f"datasets.{name}: the name becomes part of paths: use letters, digits, _ and - only"
        if len(name) > LONGEST_NAME:
            yield f"datasets.{name[:20]}...: a name of {len(name)} characters; at most {LONGEST_NAME} can be"


def _names(raw: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """Yield the YAML path of each name, the name, and the names that may stand there."""
    study, known = _mapping(raw), _known(raw)
    for axis, allowed in known.items():
        for place, name in enumerate(_list(_mapping(study.get("grid")).get(f"{axis}s"))):
            yield f"grid.{axis}s[{place}]", name, allowed
    for path, condition, _ in _filters(raw):
        for axis, allowed in known.items():
            values = condition.get(axis)
            for name in [values] if isinstance(values, str) else _list(values):
                yield f"{path}.{axis}", name, allowed
    for kind, section in SECTIONS.items():
        for name in _mapping(study.get(section)):
            yield f"{section}.{name}", name, _allowed_names(kind, raw)
    for name in _mapping(study.get("tuned_as")):
        yield f"tuned_as.{name}", name, known["dataset"]
    for name, dataset in _mapping(study.get("datasets")).items():
        yield f"datasets.{name}.source", _mapping(dataset).get("source"), registry.names("datasets")


def _known(raw: Any) -> dict[str, list[str]]:
    """Return the names that each named axis of the grid may take."""
    return {
        "dataset": list(_mapping(_mapping(raw).get("datasets"))),
        "architecture": _allowed_names("models", raw),
        "attack": [NO_METHOD, *registry.names("attacks")],
        "defense": [NO_METHOD, *registry.names("defenses")],
        "protocol": [*PROTOCOLS, *SEARCHED],
    }


def _allowed_names(kind: MethodKind, raw: Any) -> list[str]:
    """Return the names of methods that a study may use: of the files, and of networks that it declares."""
    return [*registry.names(kind), *(networks.of(raw) if kind == "models" else ())]


class _Place(NamedTuple):
    """Settings with their YAML path, the class that declares them, and the axes that overrides may name."""

    path: str
    settings: dict[str, Any]
    kind: type[BaseModel]
    axes: tuple[str, ...]


def _places(raw: Any) -> Iterator[_Place]:
    """Yield where the study sets something of a known method or of training."""
    study = _mapping(raw)
    yield _Place("training", _mapping(study.get("training")), Optimization, (*MODEL_AXES, *FACTS))
    axes = {"models": MODEL_AXES, "attacks": TRIGGER_AXES, "defenses": FILTER_AXES}
    for kind, section in SECTIONS.items():
        for name, settings in _mapping(study.get(section)).items():
            if name in _allowed_names(kind, raw):
                of_others = kind == "models" and name not in registry.names(kind)
                declared = networks.FIELDS if of_others else registry.declared(kind, name).settings
                own = kind == "attacks" and registry.trigger_owner(name) == "architecture"
                allowed = OWN_TRIGGER_AXES if own else axes[kind]
                yield _Place(f"{section}.{name}", _mapping(settings), declared, (*allowed, *FACTS))


def _filters(raw: Any) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Yield the YAML path of each filter, the filter, and the axes that it may name."""
    grid = _mapping(_mapping(raw).get("grid"))
    for kind in ("include", "exclude"):
        for number, condition in enumerate(_list(grid.get(kind))):
            yield f"grid.{kind}[{number}]", _mapping(condition), FILTER_AXES
    for place in _places(raw):
        for number, override in enumerate(_list(place.settings.get("overrides"))):
            when = _mapping(_mapping(override).get("when"))
            yield f"{place.path}.overrides[{number}].when", when, place.axes


def _wrong_filters(raw: Any) -> Iterator[str]:
    """Say which overrides depend on what can't be known where their settings are used."""
    for path, condition, axes in _filters(raw):
        for axis in condition:
            if axis in FACTS and axis not in axes:
                yield f"{path}.{axis}: filters of the grid ask for axes alone: use {', '.join(axes)}"
            elif axis in FILTER_AXES and axis not in axes:
                shared = "model" if "ratio" in axes else "trigger"
                only = ", ".join(axes)
                yield f"{path}.{axis}: one {shared} serves every {axis}: use {only}"


def _wrong_settings(raw: Any) -> Iterator[str]:
    """Say which settings of sources, methods and training are unknown or out of range."""
    for name, dataset in _mapping(_mapping(raw).get("datasets")).items():
        own = {k: v for k, v in _mapping(dataset).items() if k not in Dataset.model_fields}
        source = _mapping(dataset).get("source")
        if source in registry.names("datasets"):
            declared = registry.declared("datasets", source).settings
            yield from _check(declared, own, f"datasets.{name}", Dataset.model_fields)
        augmentation = _mapping(_mapping(dataset).get("augmentation"))
        yield from _check(Augmentation, augmentation, f"datasets.{name}.augmentation")
    for path, settings, kind, _ in _places(raw):
        yield from wrong_values(path, settings, kind)


def wrong_values(path: str, settings: dict[str, Any], kind: type[BaseModel]) -> Iterator[str]:
    """Say what is wrong with the values of ``settings``, at this YAML path, and of their overrides."""
    values = {key: value for key, value in settings.items() if key != "overrides"}
    yield from _check(kind, values, path, ["overrides"])
    for number, override in enumerate(_list(settings.get("overrides"))):
        changes = _mapping(_mapping(override).get("set"))
        yield from _check(kind, changes, f"{path}.overrides[{number}].set")


def wrong_shipped(kind: MethodKind, name: str) -> Iterator[str]:
    """Say what is wrong in the file of ``config/`` that comes along with a method."""
    where = f"config/{SECTIONS[kind]}/{name}.yaml"
    try:
        file = shipped_file(kind, name)
    except (pydantic.ValidationError, yaml.YAMLError, TypeError) as error:
        yield f"{where}: {str(error).splitlines()[0]}"
        return
    settings = registry.declared(kind, name).settings
    parts = [(where, {"overrides": file.overrides})]
    for key, protocol in file.protocols.items():
        parts.append((f"{where}.protocols.{key}", {**protocol.set, "overrides": protocol.overrides}))
        yield from _wrong_sources(f"{where}.protocols.{key}", protocol, settings)
    yield from _wrong_search(f"{where}.search", file.search, settings)
    for path, values in parts:
        overrides = [override.model_dump() for override in values.pop("overrides")]
        yield from wrong_values(path, {**values, "overrides": overrides}, settings)
        for number, override in enumerate(overrides):
            if override["when"]["dataset"] is not None:
                yield (
                    f"{path}.overrides[{number}].when.dataset: a data set may have any name: ask for "
                    f"{' or '.join(FACTS)}"
                )


def _wrong_sources(path: str, protocol: Protocol, settings: type[BaseModel]) -> Iterator[str]:
    """Say of which settings a protocol has no source, or none that says whose value it is."""
    for field in settings.model_fields:
        if protocol.sources.get(field, "").partition(":")[0] not in PROTOCOLS:
            first = ", ".join(PROTOCOLS)
            yield f"{path}.sources.{field}: say where the value is from, with {first} and a colon in front"
    for name in protocol.sources.keys() - settings.model_fields.keys():
        yield f"{path}.sources.{name}: {no_such(name, settings.model_fields, 'setting')}"


def _wrong_search(path: str, search: Mapping[str, trials.Range], settings: type[BaseModel]) -> Iterator[str]:
    """Say which settings trials can't draw: there is none such, or an end of its range is not allowed."""
    for name, found in search.items():
        if name not in settings.model_fields:
            yield f"{path}.{name}: {no_such(name, settings.model_fields, 'setting')}"
            continue
        whole = settings.model_fields[name].annotation is int
        for value in found.among or (found.at(0, whole=whole), found.at(1, whole=whole)):
            yield from _check(settings, {name: value}, path)


def _check(
    kind: type[BaseModel], values: dict[str, Any], where: str, also: Iterable[str] = ()
) -> Iterator[str]:
    try:
        _strict(kind).model_validate(values)
    except pydantic.ValidationError as error:
        yield from explain(error, kind, values, where, also)


@functools.cache
def _strict(kind: type[BaseModel]) -> type[BaseModel]:
    return pydantic.create_model(kind.__name__, __base__=(Strict, kind))


def _inconsistent(raw: Any) -> Iterator[str]:
    """Say what doesn't go together, or goes against a rule of the project."""
    study = _mapping(raw)
    grid, datasets = _mapping(study.get("grid")), _mapping(study.get("datasets"))
    missing = [name for name in BASELINES if name not in _list(grid.get("defenses"))]
    if missing and _list(grid.get("defenses")) and grid.get("controls", True) is True:
        yield (
            f"grid.defenses: {' and '.join(missing)} missing, the baselines that every table is read "
            "against: add them, or set grid.controls: false"
        )
    if study.get("label_map") == "all_to_all":
        for name in registry.names("attacks") if grid.get("attacks") == ALL else _list(grid.get("attacks")):
            if name in registry.names("attacks") and _is_clean_label(name):
                yield (
                    f"label_map: all_to_all changes labels, but {name} is a clean-label attack, which leaves "
                    "them as they are: take it out of grid.attacks"
                )
    for name, dataset in datasets.items():
        given = _mapping(dataset)
        if (given.get("mean") is None) != (given.get("std") is None):
            yield f"datasets.{name}: give both mean and std, or neither to have them measured"
        in_grid = name in _list(grid.get("datasets"))
        if in_grid and study.get("pool") == "held_out" and given.get("held_out", 0) == 0:
            yield (
                f"datasets.{name}.held_out: with pool: held_out the defender needs a share of the images, "
                "such as 0.1; or take pool: train"
            )


def _wrong_trials(raw: Any) -> Iterator[str]:
    """Say where trials, and what is chosen by them, would meet: the seeds and draws of tuning are its own."""
    study = _mapping(raw)
    grid = _mapping(study.get("grid"))
    named = [name for name in _list(grid.get("protocols")) if isinstance(name, str)]
    are_trials = [name for name in named if name == trials.TRIALS or trials.number(name) is not None]
    if not are_trials and trials.TUNED not in named:
        return
    if are_trials and trials.TUNED in named:
        yield f"grid.protocols: tuned is chosen by trials, so {are_trials[0]} can't run beside it"
        return
    least, asked = trials.FIRST_OF_TUNING, {"seeds": [0], **grid}
    for axis in ("seeds", "draws"):
        ends = [end for value in _list(asked.get(axis)) for end in _ends(value)]
        if are_trials and any(end < least for end in ends):
            yield (
                f"grid.{axis}: trials run on {axis} of their own, {least} and more, which no other study "
                "has: settings must not be chosen where they are measured"
            )
        if not are_trials and any(end >= least for end in ends):
            yield (
                f"grid.{axis}: {axis} of {least} and more are for trials: what these chose is measured on "
                "others"
            )
    for defense, settings in _mapping(study.get("defenses")).items() if are_trials else ():
        if defense in registry.names("defenses"):
            yield from _fixed(defense, _mapping(settings))


def _ends(value: Any) -> list[int]:
    """Return the ends of a range of draws, or a seed; nothing for what the schema refuses."""
    try:
        return [*Draws.parse(str(value))]
    except ValueError:
        return []


def _fixed(defense: str, settings: dict[str, Any]) -> Iterator[str]:
    """Say which settings a study of trials sets, though the trials draw them."""
    parts = [(f"defenses.{defense}", settings)]
    for number, override in enumerate(_list(settings.get("overrides"))):
        place = f"defenses.{defense}.overrides[{number}].set"
        parts.append((place, _mapping(_mapping(override).get("set"))))
    for path, values in parts:
        for name in values:
            if name in shipped_file("defenses", defense).search:
                yield f"{path}.{name}: the trials draw it, so no study of trials can set it"


def _untuned(study: Study) -> Iterator[str]:
    """Say for which cells of the protocol ``tuned`` nothing was chosen, or on another data set."""
    if trials.TUNED not in study.grid.protocols:
        return
    if study.tuned is None:
        yield f"grid.protocols: {tuned.NO_FILE}"
        return
    for name in study.grid.datasets:
        on = study.tuned.datasets.get(study.tuned_as.get(name, name))
        if on is not None and on.image_size != study.datasets[name].image_size:
            yield (
                f"tuned: its {study.tuned_as.get(name, name)} has images of {on.image_size} pixels, {name} "
                f"of {study.datasets[name].image_size}: what was chosen is for others; tune on {name}, or "
                "name with tuned_as what is like it"
            )
    asked = {
        (shard.model.dataset, shard.defense, shard.spc, trials.left_out(shard.model.attack)): shard
        for shard in axes_of_grid.shards(study)
        if shard.protocol == trials.TUNED
    }
    said: dict[tuple[str, str, int], str] = {}  # a line for what one run of trials would add
    for (dataset, defense, spc, _), shard in asked.items():
        try:
            study.choice(defense, shard.axes)
        except ValueError as error:
            more = "`detrojan tune` reads the trials of more studies, or leave this out"
            said.setdefault((dataset, defense, spc), f"tuned: it {error}; {more}")
    yield from said.values()


def _is_clean_label(attack: str) -> bool:
    return bool(registry.declared("attacks", attack).constants["label_mode"].endswith("CLEAN_LABEL"))


# --- what is wrong, in words -----------------------------------------------------------------------

_EXPECTED = {  # pydantic's kinds of errors whose own words are not a reader's
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "keys with values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list, such as [a, b]",
    "model_type": "keys with values",
    "path_type": "a path",
    "string_type": "text",
    "tuple_type": "a list of three numbers",
}


def explain(
    error: pydantic.ValidationError,
    kind: type[BaseModel],
    raw: Any,
    where: str = "",
    also: Iterable[str] = (),
) -> list[str]:
    """Return one line for each place with a mistake: its YAML path, what is allowed, what was found.

    Args:
        error: of validating ``raw`` as ``kind``.
        kind: knows the keys that are allowed, and what they mean.
        raw: part of a study file.
        where: its YAML path.
        also: keys that are allowed beside those of ``kind``.
    """
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        location = _location(item, raw)
        path = where + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location)
        path = path.lstrip(".") or "study file"
        model = _model_at(kind, location[:-1])
        if item["type"] == "extra_forbidden":
            keys = [*(model.model_fields if model else ()), *also]
            lines[path] = no_such(str(location[-1]), keys, "key")
        elif item["type"] == "missing":
            field = model.model_fields.get(str(location[-1])) if model else None
            lines[path] = f"missing: {field.description}" if field and field.description else "missing"
        elif item["type"] == "value_error":
            lines[path] = item["msg"].removeprefix("Value error, ")
        else:
            allowed = _allowed(item["type"], item["msg"])
            if path in lines:  # a value that is none of several types has an error for each
                allowed = lines[path].rpartition(", found ")[0] + " or " + allowed.removeprefix("should be ")
            lines[path] = f"{allowed}, found {shown(item['input'])}"
    return [f"{path}: {said}" for path, said in lines.items()]


def _location(item: Any, raw: Any) -> list[str | int]:
    """Return the keys and places that lead to an error, as far as the file has them.

    Pydantic's own location also names the types that it tried and whether a key or its value is wrong.
    """
    found: list[str | int] = []
    for part in item["loc"]:
        if (isinstance(raw, Mapping) and part in raw) or (
            isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        ):
            found.append(part)
            raw = raw[part]
    if item["type"] == "missing":
        found.append(item["loc"][-1])
    return found


def _allowed(kind: str, message: str) -> str:
    """Return what an error of pydantic's says is allowed, as "should be ..."."""
    if kind in _EXPECTED:
        return f"should be {_EXPECTED[kind]}"
    words = re.sub(" after validation, not .*", "", message)
    return re.sub("^[A-Z][a-z]* should ", "should ", words)


def _model_at(kind: Any, location: list[str | int]) -> type[BaseModel] | None:
    """Return the model that ``location`` leads to from ``kind``."""
    for part in location:
        if isinstance(kind, type) and issubclass(kind, BaseModel) and part in kind.model_fields:
            kind = kind.model_fields[str(part)].annotation
        else:  # into a list or a dict: its last type argument
            kind = get_args(kind)[-1] if get_args(kind) else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def no_such(name: str, allowed: Iterable[str], what: str = "name") -> str:
    """Return that ``name`` stands for nothing, and what comes close to it, or what there is."""
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names) or 'none'}"
    return f"unknown {what} {shown(name)}; {hint}"
