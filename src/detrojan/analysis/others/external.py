"""Other people's results: a table and a mapping from its columns to ours become cells.

Free of guesses: what is missing in the table is missing in the cells, with the reason, and what a mapping
does not say is a mistake.
"""

import csv
import io
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from detrojan import registry
from detrojan.analysis.escape import UNPRINTABLE
from detrojan.analysis.statistics.collect import CELLS, NOTHING_MEASURED
from detrojan.analysis.statistics.gate import table as table_of_gate
from detrojan.analysis.statistics.gate import verdict
from detrojan.analysis.statistics.ranking import RANKED
from detrojan.analysis.statistics.relative import MEASURED, relative
from detrojan.cells import CELL_AXES, MODEL_AXES, NO_METHOD, NO_SAMPLES, SURVEY
from detrojan.settings import Augmentation, Gate
from detrojan.storage.columns import COST, MISSING, OK
from detrojan.study import yaml_text
from detrojan.study.files import StudyError, explain, no_such, wrong_values
from detrojan.study.schema import NAMED_AXES, MethodKind, Settings, Strict

logger = logging.getLogger(__name__)

SCALES = {"fraction": 1.0, "percent": 100.0}
WHOLE_AXES = ("seed", "spc", "draw")
# Seconds that are not known are not 0, which would be a cost.
COST_UNKNOWN: dict[str, Any] = {**NOTHING_MEASURED, "seconds": float("nan")}
UNKNOWN = ("steps", *(field.name for field in COST if field.name != "device"), "num_test", "num_triggered")
SHOWN = 3  # examples in a message
SLACK = 1e-9  # of a share that was written in percent


class MappingError(StudyError):
    """A mapping has mistakes; the message lists each with its YAML path."""

    what = "mapping"


class TableError(StudyError):
    """A table is not what its mapping says; the message lists each mistake with the rows."""

    what = "table"


# --- the mapping -----------------------------------------------------------------------------------


def _texts(value: Any) -> Any:
    """Return ``value`` with its keys as text: YAML reads -1 as a number."""
    if isinstance(value, dict):
        return {str(k) if isinstance(k, int | float) else k: v for k, v in value.items()}
    return value


Name = Annotated[str, Field(min_length=1)]
Names = Annotated[dict[str, Name], BeforeValidator(_texts)]
Numbers = Annotated[dict[str, Annotated[float, Field(ge=0, lt=1)]], BeforeValidator(_texts)]
Count = Annotated[int, Field(ge=0)]
Value = bool | int | float | str
# What a defense may be given: a folder of src/detrojan/defenses/, or the poisoned training set.
ThreatModel = Literal["data_free", "clean_data", "known_trigger", "training_data"]


class Columns(Strict):
    """Which column of the table holds what."""

    dataset: Name | None = Field(None, description="column of the data set")
    architecture: Name | None = Field(None, description="column of the network")
    attack: Name | None = Field(None, description="column of the attack")
    ratio: Name | None = Field(None, description="column of the poisoning ratio, a fraction")
    seed: Name | None = Field(None, description="column of the attack seed")
    defense: Name | None = Field(None, description="column of the defense")
    spc: Name | None = Field(None, description="column of the clean samples per class")
    draw: Name | None = Field(None, description="column of the draw, or of the repeat")
    acc: Name = Field(description="column of ACC")
    asr: Name = Field(description="column of ASR")
    ra: Name | None = Field(None, description="column of RA, if the table has it")


class Constants(Strict):
    """What all rows have in common, for the axes that the table has no column for."""

    dataset: Name | None = Field(None, description="data set of all rows")
    architecture: Name | None = Field(None, description="network of all rows")
    attack: Name | None = Field(None, description="attack of all rows")
    ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="poisoning ratio of all rows")
    seed: Count | None = Field(None, description="attack seed of all rows")
    defense: Name | None = Field(None, description="defense of all rows")
    spc: Count | None = Field(
        None, description="clean samples per class in all rows; 0 if it is no such number"
    )
    draw: Count | None = Field(None, description="draw of all rows")


class Renames(Strict):
    """The table's names, and ours for them; a name that is not here stays as it is."""

    dataset: Names = Field({}, description="names of data sets")
    architecture: Names = Field({}, description="names of networks, as files of src/detrojan/models/")
    attack: Names = Field({}, description="names of attacks; none for a clean model")
    defense: Names = Field({}, description="names of defenses; none for the untouched model")
    ratio: Numbers = Field({}, description="texts that stand for ratios")


class TheirSetting(BaseModel):
    """How the table's results came about, as far as it is known; what is not given is not compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int | None = Field(None, ge=1, description="side of the images, pixels")
    num_classes: int | None = Field(None, ge=2, description="classes")
    num_train: int | None = Field(None, ge=1, description="training images")
    samples_per_class: float | None = Field(
        None,
        gt=0,
        description="clean samples per class that `budget` comes to; ours with the nearest SPC is taken",
    )
    epochs: int | None = Field(None, ge=1, description="passes over the training images")
    batch_size: int | None = Field(None, ge=1, description="images a step of training")
    lr: float | None = Field(None, gt=0, description="learning rate of the first epoch")
    momentum: float | None = Field(None, ge=0, lt=1, description="of SGD")
    weight_decay: float | None = Field(None, ge=0, description="of training")
    schedule: str | None = Field(None, description="of the learning rate, such as cosine")
    augmentation: Augmentation | None = Field(None, description="of training images, as in a study file")
    architecture: dict[str, Value] = Field({}, description="settings of the network, by our names")
    attack: dict[str, Value] = Field({}, description="hyperparameters of the attack, by our names")
    defense: dict[str, Value] = Field({}, description="hyperparameters of the defense, by our names")
    remark: str | None = Field(None, description="what else is different, in words")


class TableMapping(Strict):
    """A mapping file."""

    source: Name = Field(description="whose results these are")
    citation: Name = Field(description="what to cite")
    columns: Columns = Field(description="which column of the table holds what")
    constants: Constants = Field(
        Constants(), description="values of the axes that the table has no column for"
    )
    rename: Renames = Field(Renames(), description="the table's names and ours")
    missing: Names = Field(
        {"": "no value published"}, description="texts that stand for a missing measure, each with the reason"
    )
    scale: Literal["fraction", "percent"] = Field(description="of the measures")
    budget: Name = Field(description="what the defender holds, in words")
    protocol: Name = Field(SURVEY, description="whose settings the defenses run with, as ours are called")
    threat_models: Annotated[dict[str, ThreatModel], BeforeValidator(_texts)] = Field(
        {}, description="what a defense is given, by our name; ours have theirs"
    )
    gate: Gate = Field(Gate(), description="when an attack counts as having worked")
    settings: Settings = Field(Settings(), description="how the results came about")

    def setting(self, axes: dict[str, str | int | float]) -> TheirSetting:
        """Return what is known of how the results at ``axes`` came about."""
        return TheirSetting(**self.settings.resolve(axes))


def load_mapping(path: Path) -> TableMapping:
    """Return the mapping in a YAML file.

    Raises:
        MappingError: it has mistakes.
        ValueError: it can't be read, or is no YAML.
    """
    raw = yaml_text.read(path)
    mistakes: list[str] = []
    try:
        mapping = TableMapping.model_validate(raw)
    except pydantic.ValidationError as error:
        mistakes = explain(error, TableMapping, raw)
    # These read the raw file, so that all mistakes are in one list.
    mistakes += [*_misplaced_axes(raw), *_wrong_notes(raw)]
    if mistakes:
        raise MappingError(dict.fromkeys(mistakes))
    return mapping


def _misplaced_axes(raw: dict[str, Any]) -> Iterator[str]:
    """Say which axes have no value, or two."""
    columns, constants = (raw.get(key) for key in ("columns", "constants"))
    columns, constants = (given if isinstance(given, dict) else {} for given in (columns, constants))
    for axis in (axis for axis in CELL_AXES if axis != "protocol"):
        if axis in columns and axis in constants:
            yield f"constants.{axis}: columns.{axis} is given too: keep one of them"
        elif axis not in columns and axis not in constants:
            yield (
                f"columns.{axis}: missing: {Columns.model_fields[axis].description}; "
                f"without one, give constants.{axis}"
            )


def _wrong_notes(raw: dict[str, Any]) -> Iterator[str]:
    settings = raw.get("settings")
    if isinstance(settings, dict):
        yield from wrong_values("settings", settings, TheirSetting)


# --- the table -------------------------------------------------------------------------------------


def read_table(path: Path) -> pd.DataFrame:
    """Return the columns of a CSV, TSV or Parquet table as text, empty where there is nothing.

    Raises:
        ValueError: there is no such file, it is of another kind, or it is broken.
    """
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path, page_checksum_verification=True)
            named = [
                (name, _written(column.to_pylist()))
                for name, column in zip(table.column_names, table, strict=True)
            ]
        elif path.suffix in (".csv", ".tsv"):
            named = _separated(path, "\t" if path.suffix == ".tsv" else ",")
        else:
            kind = path.suffix or "without an ending"
            raise ValueError(f"{path}: tables are .csv, .tsv or .parquet, not {kind}")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no whole table ({' '.join(str(error).split())})") from None
    _check_text(path, named)
    return pd.DataFrame(dict(named), dtype=str)


def _separated(path: Path, separator: str) -> list[tuple[str, list[str]]]:
    """Return the columns of a CSV or TSV table, each with its name; blank lines don't count.

    Raises:
        ValueError: it is cut short, or a row has more or fewer cells than the head.
    """
    text = path.read_bytes().decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, where the head has {len(rows[0])}"
                )
            rows += [row] if row else []
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no whole table ({error})") from None
    if not rows:
        raise ValueError(f"{path}: no whole table (it is empty)")
    if not text.endswith(("\n", "\r")):
        _check_end(path, rows)
    return [(name, [row[place] for row in rows[1:]]) for place, name in enumerate(rows[0])]


def _check_end(path: Path, rows: list[list[str]]) -> None:
    """Look whether the last cell of a table was cut short, whose last line has no end: 0.9312 to 0.93, say.

    Raises:
        ValueError: it is shorter than all others of its column.
    """
    last, *others = [row[-1] for row in reversed(rows[1:])] or [""]
    unfinished = "." in last or not last  # not a whole number, which may be a marker
    if others and unfinished and len(last) < min(map(len, others)):
        raise ValueError(
            f"{path}: cut short in its last line, whose last value {last!a} is shorter than all "
            "others; if it is whole, end the line"
        )
    logger.warning("%s: its last line has no end; see that nothing is missing there", path)


def _check_text(path: Path, named: list[tuple[str, list[str]]]) -> None:
    """Refuse characters that nobody can see, and two columns of one name.

    Raises:
        ValueError: there is one; the message says in which row, the first below the head being 1.
    """
    names = [name for name, _ in named]
    for name, column in named:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two columns are named {name!a}")
        for row, text in enumerate([name, *column]):
            if found := UNPRINTABLE.search(text):
                where = f"{path}: {f'row {row}' if row else 'the head'}, column {name!a}"
                raise ValueError(f"{where}: a character that is none to print, U+{ord(found[0]):04X}")


def _written(values: Iterable[Any]) -> list[str]:
    return ["" if value is None or value != value else str(value) for value in values]


class _Numbers(NamedTuple):
    """A column of numbers: NaN where there is none.

    Attributes:
        values: float64.
        reasons: why there is none, by the table's marker; None where there is one.
    """

    values: "pd.Series[float]"
    reasons: "pd.Series[Any]"


def cells(table: pd.DataFrame, mapping: TableMapping) -> pa.Table:
    """Return the rows of ``table`` as cells, of the schema ``CELLS``, in the order of their keys.

    A row without a measure has the status ``missing`` and the reason. One that lacks some keeps the others,
    and its reason says which it lacks. Costs are not known: seconds are NaN, counts 0. An attack took by
    the ASR of the untouched model, and by its ACC where the table has the clean model; without the
    untouched model nothing is known, and ``attack_took`` is null.

    Args:
        table: as :func:`read_table` returns it.
        mapping: of its columns to ours.

    Raises:
        TableError: it lacks a column, or a value is not what it should be.
    """
    _check_columns(table, mapping)
    mistakes: list[str] = []
    axes = _axes(table, mapping, mistakes)
    numbers = {name: _measure(table, mapping, name, mistakes) for name in MEASURED}
    _check_scale(numbers, mapping, mistakes)
    _check_keys(axes, mistakes)
    threat_models = _threat_models(axes["defense"], mapping, mistakes)
    if mistakes:
        raise TableError(mistakes)
    frame = axes.assign(
        threat_model=axes["defense"].map(threat_models), **{name: numbers[name].values for name in MEASURED}
    )
    frame = frame.assign(**_outcomes(frame, numbers, mapping))
    frame.loc[frame["attack"] == NO_METHOD, ["asr", "ra"]] = float("nan")  # of a clean model, undefined
    frame["attack_took"] = _took(frame, mapping.gate)
    frame = pd.concat([frame.assign(**COST_UNKNOWN), relative(frame)], axis="columns")
    frame = frame.sort_values(list(CELL_AXES), kind="stable", ignore_index=True)
    rows = {name: frame[name] for name in CELLS.names}
    return pa.Table.from_arrays(
        [pa.array(rows[field.name], field.type, from_pandas=field.nullable) for field in CELLS], schema=CELLS
    )


def _check_columns(table: pd.DataFrame, mapping: TableMapping) -> None:
    wanted = mapping.columns.model_dump(exclude_none=True)
    mistakes = [
        f"columns.{ours}: {no_such(theirs, map(str, table.columns), 'column')}"
        for ours, theirs in wanted.items()
        if theirs not in table.columns
    ]
    if not len(table):
        mistakes.append("it has no rows")
    if mistakes:
        raise TableError(mistakes)


def _axes(table: pd.DataFrame, mapping: TableMapping, mistakes: list[str]) -> pd.DataFrame:
    """Return the keys of the rows, renamed; add what is wrong with them to ``mistakes``."""
    axes = {}
    no_ratio = pd.Series(False, table.index)
    for axis in CELL_AXES:
        constant = mapping.protocol if axis == "protocol" else getattr(mapping.constants, axis)
        if constant is not None:
            axes[axis] = pd.Series(constant, table.index)
            continue
        where = f"column {getattr(mapping.columns, axis)!r} ({axis})"
        texts = table[getattr(mapping.columns, axis)].str.strip()
        names = getattr(mapping.rename, axis, {})
        if axis in NAMED_AXES:
            blank = texts == ""
            if blank.any():
                mistakes.append(f"{where}: {_rows(blank)} blank: every row needs a name there")
            axes[axis] = texts.map(lambda name, names=names: names.get(name, name))
        else:
            no_ratio |= (texts == "") & (axis == "ratio")
            axes[axis] = _number_axis(axis, where, texts, names, mistakes)
    frame = pd.DataFrame(axes)
    attacked = frame["attack"] != NO_METHOD
    # A clean model has no ratio; tables write 0, a blank, or that of the models beside it.
    frame["ratio"] = frame["ratio"].where(attacked, 0.0)
    frame.loc[frame["defense"] == NO_METHOD, ["spc", "draw"]] = NO_SAMPLES
    frame.loc[frame["defense"] == NO_METHOD, "protocol"] = NO_METHOD
    if (attacked & no_ratio).any():
        mistakes.append(f"ratio: {_rows(attacked & no_ratio)} blank: only a clean model has none")
    outside = attacked & ~((frame["ratio"] > 0) & (frame["ratio"] < 1)) & frame["ratio"].notna()
    if outside.any():
        mistakes.append(
            f"ratio: {_rows(outside, frame['ratio'])} not between 0 and 1, as the poisoned share of all "
            "training images: write others as texts in rename.ratio, such as '10': 0.1"
        )
    return frame


def _number_axis(
    axis: str, where: str, texts: "pd.Series[str]", names: dict[str, float], mistakes: list[str]
) -> "pd.Series[Any]":
    numbers = pd.to_numeric(texts.map(lambda text: str(names.get(text, text))), errors="coerce").astype(float)
    wrong = numbers.isna()
    if axis in WHOLE_AXES:
        wrong |= (numbers < 0) | (numbers % 1 != 0)
    if axis == "ratio":
        wrong &= texts != ""  # of a clean model
    if wrong.any():
        kind = "whole number" if axis in WHOLE_AXES else "number"
        mistakes.append(f"{where}: {_rows(wrong, texts)} no {kind}")
    return numbers.where(~wrong, 0).astype(int) if axis in WHOLE_AXES else numbers


def _measure(table: pd.DataFrame, mapping: TableMapping, name: str, mistakes: list[str]) -> _Numbers:
    """Return a measure as fractions; add what is wrong with it to ``mistakes``."""
    column = getattr(mapping.columns, name)
    if column is None:
        nothing = pd.Series(float("nan"), table.index)
        return _Numbers(nothing, pd.Series("the table has no such column", table.index))
    texts = table[column].str.strip()
    numbers = pd.to_numeric(texts, errors="coerce").astype(float)
    reasons = texts.map(mapping.missing)
    for marker, reason in mapping.missing.items():
        number = pd.to_numeric(marker, errors="coerce") if marker else float("nan")
        reasons = reasons.mask(numbers == number, reason)  # -1 and -1.0 are the same marker
    numbers = numbers.mask(reasons.notna())
    where = f"column {column!r} ({name})"
    no_number = numbers.isna() & reasons.isna()
    if no_number.any():
        markers = ", ".join(map(repr, mapping.missing))
        mistakes.append(
            f"{where}: {_rows(no_number, texts)} no number: if that stands for a missing value, add it to "
            f"missing, which has {markers or 'nothing'}"
        )
    shares = numbers / SCALES[mapping.scale]
    outside = (shares < -SLACK) | (shares > 1 + SLACK)
    if outside.any():
        too_large = mapping.scale == "fraction" and (shares > 1 + SLACK).any()
        other = " (is it in percent?)" if too_large else ""
        mistakes.append(
            f"{where}: {_rows(outside, texts)} outside 0 to {SCALES[mapping.scale]:g}, the range of "
            f"scale: {mapping.scale}{other}; a number that stands for a missing value belongs into missing"
        )
    return _Numbers(shares.clip(0, 1), reasons.astype(object).where(reasons.notna(), None))


def _check_scale(numbers: dict[str, _Numbers], mapping: TableMapping, mistakes: list[str]) -> None:
    largest = max(
        (found.values.max() for found in numbers.values() if found.values.notna().any()), default=1.0
    )
    if mapping.scale == "percent" and largest <= 0.01:
        mistakes.append(
            f"scale: in percent no measure exceeds {100 * largest:g} %: if they are fractions, say so, "
            "scale: fraction"
        )


def _check_keys(axes: pd.DataFrame, mistakes: list[str]) -> None:
    """Say which rows are one cell, and whether there is nothing to compare a defense with."""
    twice = axes.duplicated(list(CELL_AXES), keep=False)
    if twice.any():
        groups = axes[twice].groupby(list(CELL_AXES), sort=False).groups
        rows = next(iter(groups.values()))
        named = ", ".join(f"{axis}={axes[axis][rows[0]]}" for axis in CELL_AXES)
        mistakes.append(
            f"{len(groups)} cells have two rows or more, such as rows {_listed(row + 1 for row in rows)} "
            f"({named}): remove the repeats, or name the column that tells them apart, columns.seed, spc or "
            "draw; of the untouched model there is one row a seed, whatever its spc and draw"
        )
    if not (axes["defense"] == NO_METHOD).any():
        mistakes.append(
            "no row of an untouched model, which every defense is compared with: rename.defense says which "
            f"name is {NO_METHOD!r}; there are {', '.join(sorted(axes['defense'].unique()))}"
        )


def _threat_models(defenses: "pd.Series[str]", mapping: TableMapping, mistakes: list[str]) -> dict[str, str]:
    """Return what each defense is given: by the mapping, else by our folder."""
    found: dict[str, str] = {NO_METHOD: NO_METHOD}
    for name in sorted(set(defenses) - {NO_METHOD, ""}):
        if name in mapping.threat_models:
            found[name] = mapping.threat_models[name]
        elif name in registry.names("defenses"):
            found[name] = registry.threat_model("defenses", name)
        else:
            mistakes.append(
                f"defense {name!r} is none of ours: threat_models.{name} should say what it is given "
                "(clean_data, data_free, known_trigger or training_data), or rename.defense what we call it"
            )
    return found


def _outcomes(frame: pd.DataFrame, numbers: dict[str, _Numbers], mapping: TableMapping) -> dict[str, Any]:
    """Return the columns ``status`` and ``reason``."""
    own = [name for name in MEASURED if getattr(mapping.columns, name)]
    reasons = zip(*(numbers[name].reasons for name in own), strict=True)
    found = [
        # A clean model has no ASR and no RA to miss.
        _outcome({"acc": why[0]} if attack == NO_METHOD else dict(zip(own, why, strict=True)))
        for attack, why in zip(frame["attack"], reasons, strict=True)
    ]
    return dict(zip(("status", "reason"), map(list, zip(*found, strict=True)), strict=True))


def _outcome(reasons: dict[str, str | None]) -> tuple[str, str | None]:
    """Return status and reason of a row, by why each measure that it should have is missing, or None."""
    missing = {name: why for name, why in reasons.items() if why is not None}
    why = "; ".join(dict.fromkeys(missing.values()))
    if not missing:
        return OK, None
    if len(missing) == len(reasons):
        return MISSING, why
    return OK, f"without {' and '.join(name.upper() for name in missing)}: {why}"


def _untouched(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row an untouched model: its axes, ``acc`` and ``asr``, and ``acc_loss``; None if unknown."""
    rows = frame.loc[frame["defense"] == NO_METHOD, [*MODEL_AXES, "acc", "asr"]].to_dict("records")
    known: list[dict[str, Any]] = [
        {str(name): None if value is None or value != value else value for name, value in row.items()}
        for row in rows
    ]
    by_model = {tuple(row[axis] for axis in MODEL_AXES): row["acc"] for row in known}
    for row in known:
        clean = by_model.get(tuple({**row, "attack": NO_METHOD, "ratio": 0.0}[axis] for axis in MODEL_AXES))
        row["acc_loss"] = None if clean is None or row["acc"] is None else clean - row["acc"]
    return known


def _took(frame: pd.DataFrame, gate: Gate) -> "pd.Series[Any]":
    """Return of each row whether its model's attack took; None where nobody knows, or nobody attacked."""
    took = {
        tuple(row[axis] for axis in MODEL_AXES): verdict(*_judged_by(row), gate).attack_took
        for row in _untouched(frame)
    }
    keys = zip(*(frame[axis] for axis in MODEL_AXES), strict=True)
    return pd.Series([took.get(key) for key in keys], frame.index, dtype=object)


def _judged_by(row: dict[str, Any]) -> tuple[float, float | None, float | None]:
    """Return ACC, ASR and the clean model's ACC; where a table has no ACC, the ASR alone decides."""
    acc = row["acc"] or 0.0
    return acc, row["asr"], None if row["acc_loss"] is None else acc + row["acc_loss"]


def gate_table(cells: pa.Table, gate: Gate) -> pa.Table:
    """Return how near each attacked model came to the gate, of the schema ``GATE``.

    Args:
        cells: of the schema ``CELLS``, from :func:`cells`.
        gate: that of the mapping.
    """
    return table_of_gate((row | {"acc": row["acc"] or 0.0} for row in _untouched(cells.to_pandas())), gate)


def _rows(wrong: "pd.Series[bool]", values: "pd.Series[Any] | None" = None) -> str:
    """Return which rows are wrong, counted from 1 below the header, with their values, and a verb."""
    places = [place + 1 for place, is_wrong in enumerate(wrong) if is_wrong]
    found = "" if values is None else f" ({_listed(map(repr, values[wrong].unique().tolist()))})"
    noun, verb = ("row", "is") if len(places) == 1 else ("rows", "are")
    return f"{noun} {_listed(places)}{found} {verb}"


def _listed(values: Iterable[Any]) -> str:
    """Return the first few values, and how many more there are."""
    texts = [str(value) for value in values]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def without_costs(cells: pa.Table) -> pa.Table:
    """Return ``cells`` with null for costs and counts that nobody knows, as the page shows them.

    Args:
        cells: of the schema ``CELLS``, from :func:`cells`.
    """
    for name in UNKNOWN:
        place = cells.column_names.index(name)
        cells = cells.set_column(place, name, pa.nulls(len(cells), cells.schema.field(name).type))
    return cells


# --- what a reader must know -----------------------------------------------------------------------


def notes(cells: pa.Table, mapping: TableMapping) -> list[str]:
    """Return sentences about what the table has, lacks and calls otherwise, numbers in them."""
    frame = cells.to_pandas()
    attacked = frame[frame["attack"] != NO_METHOD]
    models = attacked.drop_duplicates(list(MODEL_AXES))
    took, failed = (int((models["attack_took"] == verdict).sum()) for verdict in (True, False))
    with_values = frame["status"] == OK
    found = [
        f"{len(frame)} rows: {int(with_values.sum())} with values, {int((~with_values).sum())} without.",
    ]
    unknown = len(models) - took - failed
    found.append(
        f"{len(models)} attacked models: the attack took in {took}, not in {failed}; of {unknown} the "
        "untouched model is missing."
    )
    partial = int((with_values & frame["reason"].notna()).sum())
    if partial:
        found.append(f"Rows that lack some of their measures: {partial}; their reason says which.")
    orphans = int((attacked["attack_took"].isna() & with_values).sum())
    if orphans:
        found.append(
            f"Rows with values of a model whose untouched row is missing: {orphans}; they have no relative "
            "measures and are in no ranking."
        )
    kinds: dict[str, MethodKind] = {"architecture": "models", "attack": "attacks", "defense": "defenses"}
    for axis, kind in kinds.items():
        ours = {NO_METHOD, *registry.names(kind)}
        if kind == "models":  # those of others that a study may name in short are called so
            ours |= {name.partition(":")[2] for name in registry.catalogue()}
        names = sorted(set(frame[axis]) - ours)
        if names:
            found.append(f"Not ours, under the table's own names: {axis} {', '.join(names)}.")
    aside = frame[~frame["threat_model"].isin([NO_METHOD, *RANKED])].drop_duplicates("defense")
    for threat_model, group in aside.groupby("threat_model"):
        found.append(
            f"Shown and marked, but not ranked ({threat_model}): {', '.join(sorted(group['defense']))}."
        )
    found.append(f"The defender holds {mapping.budget}.")
    return found
