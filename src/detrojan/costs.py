"""What jobs cost, by the table ``slurm/costs.csv``: seconds, memory and disk of each kind of job.

    python -m detrojan.costs show defense=anp dataset=gtsrb architecture=preactresnet18 spc=10
    python -m detrojan.costs learn results

Time limits, memory and ``python -m detrojan.plan`` come from this table. ``learn`` replaces its
assumptions by what finished studies took. A row holds for all jobs that its filled-in keys match:

    rule          ``train`` is for ``train_controlled`` too, and ``trigger``, ``poison``, ``triggered`` and
                  ``stamp`` for both of their rules; ``job`` is what a cluster's job takes besides its
                  script's work
    method        the defense for ``defend``, else the attack
    architecture  the network
    dataset       name of the data set in the study file
    spc           clean samples per class, up to so many
    seconds       wall time of one unit (``UNITS``), such as a draw or an epoch
    memory_mb     of the host, for the whole job, in MB of 10^6 bytes, without Snakemake's own processes
    disk_mb       that one unit leaves, or for ``defend`` holds until it is evaluated, likewise
    device        what the seconds are of; ``cpu`` for what needs no GPU
    source        ``assumed``, or ``measured, N runs``

The row that fills in the most keys wins; among rows with equally many, the one with the earlier key;
then the one with the smaller ``spc``. The Snakefile reads the table at every parse, so nothing here
imports more than a moment's worth until ``learn`` reads results.
"""

import argparse
import csv
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detrojan import registry
from detrojan.cells import NO_METHOD, NO_SAMPLES, Draws
from detrojan.paths import RESULTS
from detrojan.settings import Optimization

TABLE = Path(__file__).parents[2] / "slurm" / "costs.csv"
KEYS = ("rule", "method", "architecture", "dataset", "spc")
NUMBERS = ("seconds", "memory_mb", "disk_mb")
COLUMNS = (*KEYS, *NUMBERS, "device", "source")
ASSUMED = "assumed"
UNITS = {
    "dataset": "job",
    "sample": "draw",
    "trigger": "job",
    "poison": "training set",  # a poisoning ratio of it
    "triggered": "job",
    "stamp": "draw",
    "train": "epoch",  # its disk is the job's
    "defend": "draw",
    "evaluate": "draw",
    "evaluate_untouched": "job",
    "aggregate": "thousand shards",
    "report": "thousand shards",
    "job": "job",
}

# The axes whose values are methods.
KINDS: dict[str, registry.Kind] = {"defense": "defenses", "attack": "attacks", "architecture": "models"}

STARTUP_S = 180  # a node that is slow to start, Python, torch and its first kernel
SAFETY = 2  # on the seconds: a machine that others use, a model that is harder to repair
MIN_RUNTIME_MIN = 10
MEMORY_SAFETY = 1.25
SNAKEMAKE_MB = 500  # Snakemake's processes beside the script take 350
MIN_MEMORY_MB = 2000
# What a site allows at most, if these are set: minutes and MB. A scheduler refuses a job that asks for more.
MAX_RUNTIME, MAX_MEMORY = "DETROJAN_MAX_RUNTIME", "DETROJAN_MAX_MEM_MB"
MEASURED = ("seconds", "peak_memory_bytes", "device")  # columns of finished runs
QUANTILE = 0.9  # of the measured seconds: one draw in ten may take longer, and SAFETY covers it


class Estimate(NamedTuple):
    """What a unit of a job takes; memory is the whole job's."""

    seconds: float
    memory_mb: float
    disk_mb: float


class Key(NamedTuple):
    """The jobs that a row holds for; an empty key matches all."""

    rule: str
    method: str = ""
    architecture: str = ""
    dataset: str = ""
    spc: int | None = None

    def matches(self, job: "Key") -> bool:
        """Return whether a row with this key holds for ``job``."""
        return (
            self.rule == job.rule
            and self.method in ("", job.method)
            and self.architecture in ("", job.architecture)
            and self.dataset in ("", job.dataset)
            and (self.spc is None or (job.spc is not None and job.spc <= self.spc))
        )

    @property
    def rank(self) -> tuple[Any, ...]:
        """What compares rows that hold for one job: the largest wins."""
        given = [bool(self.method), bool(self.architecture), bool(self.dataset), self.spc is not None]
        return (sum(given), given, -(self.spc or 0))

    def __str__(self) -> str:
        spc = "" if self.spc is None else f"spc {self.spc}"
        words = [self.rule, self.method, self.architecture, self.dataset or "any data set", spc]
        return " ".join(filter(None, words))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table."""

    key: Key
    estimate: Estimate
    device: str
    source: str

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> "Row":
        """Return the row that the texts of a line stand for.

        Raises:
            ValueError: a number is none or below 0, or there is no such rule.
        """
        estimate = Estimate(*(float(texts[name]) for name in NUMBERS))
        if not all(0 <= number < math.inf for number in estimate):
            raise ValueError(f"{', '.join(NUMBERS)} should be numbers of 0 or more")
        if texts["rule"] not in UNITS:
            raise ValueError(f"no rule {texts['rule']!r}: there are {', '.join(UNITS)}")
        spc = int(texts["spc"]) if texts["spc"] else None
        key = Key(texts["rule"], texts["method"], texts["architecture"], texts["dataset"], spc)
        return cls(key, estimate, texts["device"], texts["source"])

    def texts(self) -> list[str]:
        """Return the line of the row."""
        numbers = map(_number, self.estimate)
        return [*("" if key is None else str(key) for key in self.key), *numbers, self.device, self.source]

    @property
    def measured(self) -> bool:
        """Whether a run stands behind the row."""
        return self.source != ASSUMED


def _number(value: float) -> str:
    """Return ``value`` with three digits, more if it has more before the point, and no exponent."""
    digits = 0 if value >= 100 or not value else 2 - math.floor(math.log10(value))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class Costs:
    """A table of costs."""

    def __init__(self, rows: Iterable[Row], path: Path = TABLE) -> None:
        self.rows = {row.key: row for row in rows}
        self.path = path
        self._ranked = sorted(self.rows.values(), key=lambda row: row.key.rank, reverse=True)
        self._candidates: dict[tuple[str, str], list[Row]] = {}  # by rule and method
        self._found: dict[Key, Row] = {}

    @classmethod
    def load(cls, path: Path = TABLE) -> "Costs":
        """Read a table.

        Raises:
            ValueError: it is missing, or a line of it is wrong.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != COLUMNS:
                    raise ValueError(f"{path}, line 1: the columns should be {','.join(COLUMNS)}")
                return cls([_parsed(path, reader.line_num, line) for line in reader], path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: take the one that comes with the checkout") from None

    def row(self, rule: str, axes: Mapping[str, Any]) -> Row:
        """Return the row that holds for a job: of those that match, the one that says most of it.

        Args:
            rule: a key of ``UNITS``.
            axes: those that the job has, as ``cells.Cell.axes`` returns them.

        Raises:
            ValueError: no row holds.
        """
        method = axes.get("defense" if rule == "defend" else "attack", "")
        job = Key(rule, method, axes.get("architecture", ""), axes.get("dataset", ""), axes.get("spc"))
        if job not in self._found:
            if (rule, method) not in self._candidates:
                self._candidates[rule, method] = [
                    row for row in self._ranked if row.key.rule == rule and row.key.method in ("", method)
                ]
            found = next((row for row in self._candidates[rule, method] if row.key.matches(job)), None)
            if found is None:
                raise ValueError(f"{self.path}: no row for {job}: add one with no key but the rule")
            self._found[job] = found
        return self._found[job]

    def estimate(self, rule: str, axes: Mapping[str, Any]) -> Estimate:
        """Return what a unit of a job takes; the arguments are those of :meth:`row`."""
        return self.row(rule, axes).estimate

    def write(self) -> None:
        """Write the table where it was read from, whole or not at all."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        order = list(UNITS)
        rows = sorted(
            self.rows.values(),
            key=lambda row: (order.index(row.key.rule), *row.key[1:4], row.key.spc or math.inf),
        )
        with partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row.texts() for row in rows)
        partial.replace(self.path)


def _parsed(path: Path, number: int, texts: Mapping[str, str]) -> Row:
    try:
        return Row.parse(texts)
    except (ValueError, TypeError) as error:  # TypeError: a line with too few columns
        raise ValueError(f"{path}, line {number}: {error}") from None


# --- what to ask of a scheduler --------------------------------------------------------------------


@functools.cache
def default() -> Costs:
    """Return the table that comes with the checkout."""
    return Costs.load()


def num_units(rule: str, axes: Mapping[str, Any]) -> float:
    """Return how many units a job has, as far as its axes tell: draws, a share of a training set, or 1."""
    if UNITS[rule] == "draw":
        return len(axes["draws"])
    return float(axes["ratio"]) if rule == "poison" else 1


def runtime_min(rule: str, axes: Mapping[str, Any], attempt: int, units: float | None = None) -> int:
    """Return the time limit to ask for, minutes.

    Args:
        rule: a key of ``UNITS``.
        axes: of the job, as ``cells.Cell.axes`` returns them.
        attempt: 1 for the first; each further one gets twice the time.
        units: how many the job has, where its axes don't tell: epochs of ``train``, thousands of shards of
            ``aggregate`` and ``report``.

    Raises:
        ValueError: no row holds, or ``DETROJAN_MAX_RUNTIME`` is no number.
    """
    count = num_units(rule, axes) if units is None else units
    seconds = STARTUP_S + SAFETY * count * default().estimate(rule, axes).seconds
    return _allowed(max(math.ceil(seconds / 60), MIN_RUNTIME_MIN) * 2 ** (attempt - 1), MAX_RUNTIME)


def mem_mb(rule: str, axes: Mapping[str, Any], attempt: int) -> int:
    """Return the memory to ask for, MB; each attempt gets twice that of the one before."""
    memory = MEMORY_SAFETY * default().estimate(rule, axes).memory_mb + SNAKEMAKE_MB
    return _allowed(max(math.ceil(memory), MIN_MEMORY_MB) * 2 ** (attempt - 1), MAX_MEMORY)


def _allowed(wanted: int, variable: str) -> int:
    """Return ``wanted``, or the most that a variable of the environment allows if that is less."""
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and int(text)):
        raise ValueError(f"{variable}: should be a whole number from 1 up, found {text!r}")
    return min(wanted, int(text)) if text else wanted


# --- what runs took --------------------------------------------------------------------------------


class Run(NamedTuple):
    """What one draw of a defense, or one epoch of a training, has taken."""

    key: Key
    seconds: float
    peak_memory_mb: float
    device: str


def runs(results: Path) -> Iterator[Run]:
    """Yield what is known of finished draws and trainings in a folder of results.

    The tables tell; before there are any, the metrics and cards that they are made from.

    Raises:
        ValueError: there are none of either, or a file is broken.
    """
    rows = list(_cells(results))
    for row in rows:
        if row["defense"] != NO_METHOD and row["status"] == "ok":
            spc = None if row["spc"] == NO_SAMPLES else row["spc"]
            yield _run(Key("defend", row["defense"], row["architecture"], row["dataset"], spc), row, 1)
    models = list(_models(results))
    for row in models:
        key = Key("train", row["attack"], row["architecture"], row["dataset"])
        yield _run(key, row, row["epochs"])
    if not (rows or models):
        raise ValueError(f"{results}: no tables, metrics or models of a study: name its folder of results")


def _run(key: Key, row: Mapping[str, Any], units: int) -> Run:
    return Run(key, row["seconds"] / units, row["peak_memory_bytes"] / 1e6, row["device"])


def _cells(results: Path) -> Iterator[dict[str, Any]]:
    columns = ["dataset", "architecture", "defense", "spc", "status", *MEASURED]
    table = results / "tables" / "cells.parquet"
    for file in [table] if table.exists() else sorted(results.glob("metrics/**/metrics.parquet")):
        yield from _read(file, columns)


def _models(results: Path) -> Iterator[dict[str, Any]]:
    columns = ["dataset", "architecture", "attack", "epochs", *MEASURED]
    table = results / "tables" / "models.parquet"
    if table.exists():
        yield from _read(table, columns)
        return
    for file in sorted(results.glob("models/**/card.json")):
        try:
            card = json.loads(file.read_text(encoding="utf-8"))
            yield {name: card[name] for name in columns}
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: not the card of a model ({error})") from None


def _read(file: Path, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[dict[str, Any]] = pq.ParquetFile(file, memory_map=False).read(columns).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not a whole table ({str(error).splitlines()[0]})") from None
    if any(set(row) != set(columns) for row in rows):
        raise ValueError(f"{file}: it lacks one of the columns {', '.join(columns)}")
    return rows


def learned(costs: Costs, found: Iterable[Run]) -> Costs:
    """Return ``costs`` with rows for what was measured, and for data sets that were not.

    Seconds are the 90th percentile. Memory is the largest on a CPU; a GPU's runs tell the GPU's memory,
    so there the host's stays what it was. Where no data set is named, a row has the largest of what was
    measured on any, in earlier studies too.

    Raises:
        ValueError: there are runs of CPUs and of GPUs.
    """
    by_key: dict[Key, list[Run]] = {}
    for run in found:
        by_key.setdefault(run.key, []).append(run)
    devices = sorted({run.device for of_key in by_key.values() for run in of_key})
    if "cpu" in devices and len(devices) > 1:
        raise ValueError(f"runs on {', '.join(devices)}: choose a device, such as --device {devices[1]!r}")
    rows = dict(costs.rows)
    for key, of_key in by_key.items():
        rows[key] = _measured(costs, key, of_key)
    for key in {key._replace(dataset="") for key in by_key}:
        same = [row for row in rows.values() if row.measured and row.key.dataset]
        rows[key] = _largest(key, [row for row in same if row.key._replace(dataset="") == key])
    return Costs(rows.values(), costs.path)


def _measured(costs: Costs, key: Key, of_key: list[Run]) -> Row:
    before = costs.row(key.rule, _axes(key)).estimate
    seconds = sorted(run.seconds for run in of_key)
    on_cpu = all(run.device == "cpu" for run in of_key)
    estimate = Estimate(
        seconds[math.ceil(QUANTILE * len(seconds)) - 1],
        max(run.peak_memory_mb for run in of_key) if on_cpu else before.memory_mb,
        before.disk_mb,
    )
    device = " / ".join(sorted({run.device for run in of_key}))
    return Row(key, estimate, device, _source(len(of_key)))


def _largest(key: Key, rows: list[Row]) -> Row:
    estimate = Estimate(*(max(numbers) for numbers in zip(*(row.estimate for row in rows), strict=True)))
    device = " / ".join(sorted({row.device for row in rows}))
    return Row(key, estimate, device, _source(sum(int(row.source.split()[1]) for row in rows)))


def _source(count: int) -> str:
    return f"measured, {count} run{'s' if count != 1 else ''}"


def _axes(key: Key) -> dict[str, Any]:
    """Return axes of a job that ``key`` stands for."""
    method = "defense" if key.rule == "defend" else "attack"
    axes = {method: key.method, "architecture": key.architecture, "dataset": key.dataset, "spc": key.spc}
    return {axis: value for axis, value in axes.items() if value not in ("", None)}


# --- the command -----------------------------------------------------------------------------------


def learn(results: Sequence[Path], table: Path, device: str) -> list[str]:
    """Rewrite ``table`` by what the runs in ``results`` took; return lines that say what has changed.

    Args:
        results: folders of results.
        table: a table of costs.
        device: part of the name of the devices whose runs count; empty for all.

    Raises:
        ValueError: there are no such runs, or a file is missing or broken.
    """
    costs = Costs.load(table)
    found = [run for folder in results for run in runs(folder)]
    chosen = [run for run in found if device in run.device]
    if not chosen:
        there = ", ".join(sorted({run.device for run in found})) or "none that ended well"
        raise ValueError(f"no run on a device named {device!r}: there are {there}")
    new = learned(costs, chosen)
    new.write()
    lines = []
    for key, row in new.rows.items():
        if costs.rows.get(key) != row:
            before = costs.row(key.rule, _axes(key)).estimate
            lines.append(f"{key}: {_change(before.seconds, row.estimate.seconds)} s, {row.source}")
    measured = sum(row.measured for row in new.rows.values())
    changed = f"{len(lines)} rows changed" if lines else "nothing changed"
    lines.append(f"{table}: {changed}; {measured} are measured, {len(new.rows) - measured} assumed.")
    return lines


def _change(before: float, after: float) -> str:
    texts = _number(before), _number(after)
    return " → ".join(texts) if texts[0] != texts[1] else texts[1]


def show(conditions: Sequence[str], table: Path) -> list[str]:
    """Return lines that say what the jobs of a cell take.

    Args:
        conditions: axes as ``KEY=VALUE``.
        table: a table of costs.

    Raises:
        ValueError: there is no such axis or method, or a value is no number.
    """
    costs, axes = Costs.load(table), _parsed_axes(conditions)
    epochs = Optimization().epochs
    lines = [f"{'rule':<18} {'seconds':>9}  {'of a':<16} {'MB':>7} {'disk, MB':>9}  source"]
    for rule, unit in UNITS.items():
        row = costs.row(rule, axes)
        seconds, memory, disk = map(_number, row.estimate)
        lines.append(f"{rule:<18} {seconds:>9}  {unit:<16} {memory:>7} {disk:>9}  {row.source}, {row.device}")
    draws = axes["draws"]
    shard = sum(len(draws) * costs.estimate(rule, axes).seconds for rule in ("defend", "evaluate"))
    training = epochs * costs.estimate("train", axes).seconds
    lines.append(f"Draws {draws} take {_number(shard)} s, {epochs} epochs {_number(training)} s.")
    return lines


def _parsed_axes(conditions: Sequence[str]) -> dict[str, Any]:
    read: dict[str, Callable[[str], Any]] = {
        **dict.fromkeys((*KINDS, "dataset"), str),
        "spc": int,
        "draws": Draws.parse,
        "ratio": float,
    }
    axes: dict[str, Any] = {"draws": Draws(0, 9)}
    for condition in conditions:
        axis, equals, value = condition.partition("=")
        if not equals or axis not in read:
            raise ValueError(f"{condition!r} should be KEY=VALUE, with a KEY of {', '.join(read)}")
        if axis in KINDS and value != NO_METHOD:
            registry.path(KINDS[axis], value)  # is there such a method?
        axes[axis] = read[axis](value)
    return axes


def _arguments() -> argparse.ArgumentParser:
    about = "What jobs cost, by a table of measured and assumed seconds, memory and disk."
    parser = argparse.ArgumentParser(prog="python -m detrojan.costs", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("show", help="what the jobs of a cell take")
    shown.add_argument("conditions", nargs="*", metavar="KEY=VALUE", help="an axis of the cell, as spc=10")
    learns = commands.add_parser("learn", help="replace assumptions by what finished studies took")
    learns.add_argument(
        "results", nargs="*", default=[Path(RESULTS)], type=Path, help="folders of results; results if none"
    )
    learns.add_argument("--device", default="", help="part of a device's name: only runs on it count")
    for command in (shown, learns):
        command.add_argument("--table", default=TABLE, type=Path, help="slurm/costs.csv if not given")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what ``arguments`` ask for; return the exit code."""
    asked = _arguments().parse_args(arguments)
    try:
        if asked.command == "learn":
            lines = learn(asked.results, asked.table, asked.device)
        else:
            lines = show(asked.conditions, asked.table)
    except ValueError as error:
        print(f"detrojan.costs: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print("\n".join(lines))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
