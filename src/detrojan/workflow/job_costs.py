"""What jobs cost, by the table ``slurm/costs.csv``: seconds, memory and disk of each kind of job.

Time limits, memory and ``detrojan plan`` come from this table. It comes with
assumptions, which ``detrojan costs learn`` replaces by what finished studies took. A
row holds for all jobs that its filled-in keys match:

    rule          ``train`` is for ``train_controlled`` too, and ``trigger``, ``poison``, ``triggered`` and
                  ``stamp`` for both of their rules; ``job`` is what a cluster's job takes besides its
                  script's work
    method        the defense for ``defend``, else the attack
    architecture  the network
    dataset       name of the data set in the study file
    spc           clean samples per class, up to so many
    protocol      of the defense; none for ``survey``, and for what has no row of its own
    seconds       wall time of one unit (``UNITS``), such as a draw or an epoch
    memory_mb     of the host, for the whole job, in MB of 10^6 bytes, without Snakemake's own processes
    disk_mb       that one unit leaves, or for ``defend`` holds until it is evaluated, likewise
    device        what the seconds are of; ``cpu`` for what needs no GPU
    source        ``assumed``, or ``measured, N runs``

A rule without any row is assumed to take a minute a unit. The row that fills in the most keys wins; among
rows with equally many, the one with the earlier key; then the one with the smaller ``spc``. The Snakefile
reads the table at every parse, so nothing here imports more than a moment's worth.
"""

import csv
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detrojan.cells import NO_SAMPLES, SURVEY
from detrojan.registry import CHECKOUT
from detrojan.workflow import graph

TABLE = CHECKOUT / "slurm" / "costs.csv"
KEYS = ("rule", "method", "architecture", "dataset", "spc", "protocol")
NUMBERS = ("seconds", "memory_mb", "disk_mb")
COLUMNS = (*KEYS, *NUMBERS, "device", "source")
WITHOUT_PROTOCOL = tuple(name for name in COLUMNS if name != "protocol")
ASSUMED = "assumed"
CPU, GPU = "cpu", "GPU"
# What a row's seconds are of, by stage; `job` is what a cluster's job takes besides.
UNITS = {rule.stage_name: rule.unit for rule in graph.RULES.values() if rule.unit} | {"job": "job"}

STARTUP_S = 180  # a node that is slow to start, Python, torch and its first kernel
SAFETY = 2  # on the seconds: a machine that others use, a model that is harder to repair
MIN_RUNTIME_MIN = 10
MEMORY_SAFETY = 1.25
SNAKEMAKE_MB = 500  # Snakemake's processes beside the script take 350
MIN_MEMORY_MB = 2000
# What a site allows at most, if these are set: minutes and MB. A scheduler refuses a job that asks for more.
MAX_RUNTIME, MAX_MEMORY = "DETROJAN_MAX_RUNTIME", "DETROJAN_MAX_MEM_MB"


class Estimate(NamedTuple):
    """What a unit of a job takes; memory is the whole job's."""

    seconds: float
    memory_mb: float
    disk_mb: float


# Of a rule that the table does not know yet: seconds of a unit, MB, MB.
UNKNOWN = Estimate(60, 4000, 1)


class Key(NamedTuple):
    """The jobs that a row holds for; an empty key matches all."""

    rule: str
    method: str = ""
    architecture: str = ""
    dataset: str = ""
    spc: int | None = None
    protocol: str = ""

    def matches(self, job: "Key") -> bool:
        """Return whether a row with this key holds for ``job``."""
        return (
            self.rule == job.rule
            and self.method in ("", job.method)
            and self.architecture in ("", job.architecture)
            and self.dataset in ("", job.dataset)
            and self.protocol in ("", job.protocol)
            and (self.spc is None or (job.spc is not None and job.spc <= self.spc))
        )

    @property
    def rank(self) -> tuple[Any, ...]:
        """What compares rows that hold for one job: the largest wins."""
        named = (self.protocol, self.method, self.architecture, self.dataset)
        given = [*map(bool, named), self.spc is not None]
        return (sum(given), given, -(self.spc or 0))

    def __str__(self) -> str:
        spc = "" if self.spc is None else f"spc {self.spc}"
        words = [
            self.rule,
            self.method,
            self.protocol,
            self.architecture,
            self.dataset or "any data set",
            spc,
        ]
        return " ".join(filter(None, words))


def of_draw(cell: Mapping[str, Any]) -> Key:
    """Return the key of what a draw of a defense takes, for a row of the table of cells."""
    spc = None if cell["spc"] == NO_SAMPLES else cell["spc"]
    protocol = "" if cell["protocol"] == SURVEY else cell["protocol"]
    return Key("defend", cell["defense"], cell["architecture"], cell["dataset"], spc, protocol)


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
        named = {name: texts[name] for name in ("rule", "method", "architecture", "dataset")}
        key = Key(**named, spc=spc, protocol=texts.get("protocol", ""))
        return cls(key, estimate, texts["device"], texts["source"])

    def texts(self) -> list[str]:
        """Return the line of the row."""
        numbers = map(number_text, self.estimate)
        return [*("" if key is None else str(key) for key in self.key), *numbers, self.device, self.source]

    @property
    def measured(self) -> bool:
        """Whether a run stands behind the row."""
        return self.source != ASSUMED


def number_text(value: float) -> str:
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
        self._known = {key.rule for key in self.rows}
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
                # Tables of versions without protocols lack that column.
                if tuple(reader.fieldnames or ()) not in (COLUMNS, WITHOUT_PROTOCOL):
                    raise ValueError(f"{path}, line 1: the columns should be {','.join(COLUMNS)}")
                return cls([_parsed(path, reader.line_num, line) for line in reader], path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: take the one that comes with the checkout") from None

    def row(self, rule: str, axes: Mapping[str, Any]) -> Row:
        """Return the row that holds for a job: of those that match, the one that says most of it.

        A rule that has no row at all, as one that was just added, takes ``UNKNOWN``.

        Args:
            rule: a key of ``UNITS``.
            axes: those that the job has, as ``cells.Cell.axes`` returns them.

        Raises:
            ValueError: no row holds.
        """
        method = axes.get(method_axis(rule), "")
        job = Key(rule, method, axes.get("architecture", ""), axes.get("dataset", ""), axes.get("spc"))
        if method_axis(rule) == "defense" and axes.get("protocol", SURVEY) != SURVEY:
            job = job._replace(protocol=axes["protocol"])
        if job not in self._found:
            if (rule, method) not in self._candidates:
                self._candidates[rule, method] = [
                    row for row in self._ranked if row.key.rule == rule and row.key.method in ("", method)
                ]
            found = next((row for row in self._candidates[rule, method] if row.key.matches(job)), None)
            if rule not in self._known:
                found = _unknown(rule)
            if found is None:
                raise ValueError(f"{self.path}: no row for {job}: add one with no key but the rule")
            self._found[job] = found
        return self._found[job]

    def estimate(self, rule: str, axes: Mapping[str, Any]) -> Estimate:
        """Return what a unit of a job takes; the arguments are those of :meth:`row`."""
        return self.row(rule, axes).estimate

    def write(self) -> None:
        """Write the table where it was read from, whole or not at all."""
        from detrojan.storage import records  # pyarrow, which each of a cluster's jobs would load

        order = list(UNITS)
        rows = sorted(
            self.rows.values(),
            key=lambda row: (
                order.index(row.key.rule),
                *row.key[1:4],
                row.key.protocol,
                row.key.spc or math.inf,
            ),
        )
        with records.whole(self.path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(row.texts() for row in rows)


def method_axis(rule: str) -> str:
    """Return the axis that names the method of a rule's jobs in the table."""
    own = graph.RULES.get(rule)
    return "defense" if own and "defenses" in own.methods else "attack"


def _unknown(rule: str) -> Row:
    gpu = any(own.gpu for own in graph.RULES.values() if own.stage_name == rule)
    return Row(Key(rule), UNKNOWN, GPU if gpu else CPU, ASSUMED)


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
