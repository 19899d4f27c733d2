"""What jobs cost: seconds, memory and disk of each kind of job, as it was measured or by a formula.

Time limits, memory and ``detrojan plan`` come from here. The table ``slurm/costs.csv`` has what runs took;
``detrojan costs learn`` writes it. A row holds for all jobs that its filled-in keys match:

    rule          ``train`` is for ``train_controlled`` too, and ``trigger``, ``poison``, ``triggered`` and
                  ``stamp`` for both of their rules; ``job`` is what a cluster's job takes besides its
                  script's work
    method        the defense for ``defend``, else the attack
    architecture  the network
    dataset       name of the data set in the study file
    spc           clean samples per class, up to so many
    protocol      of the defense; none for ``survey``, and where no method is named either for any
    seconds       wall time of one unit (``UNITS``), such as a draw or an epoch
    memory_mb     of the host, for the whole job, in MB of 10^6 bytes, without Snakemake's own processes
    disk_mb       that one unit leaves, or for ``defend`` holds until it is evaluated, likewise
    device        what the seconds are of; ``cpu`` for what needs no GPU
    source        such as ``measured, N runs``
    expected_s    seconds of a unit that need no safety: the median, where ``seconds`` are the ninth decile

The row that fills in the most keys wins; among rows with equally many, the one with the earlier key; then
the one with the smaller ``spc``. Where no row holds, :mod:`detrojan.workflow.cost_formula` says what the job
should take. Rows correct it: its seconds are multiplied by the share that measured jobs of the same rule and
method took of what it expects of them, by the median of these; where there is none of the method, of the
rule's. A rule of which the formula knows nothing takes a minute a unit.

How often a defense's loops went round, by the medians of finished runs, stands beside the table in
``counts.csv``: what to expect follows from it. The Snakefile reads the tables at every parse, so nothing here
imports more than a moment's worth.
"""

import csv
import dataclasses
import functools
import math
import os
import statistics
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detrojan.cells import NO_SAMPLES, SURVEY
from detrojan.registry import CHECKOUT
from detrojan.study.schema import Study
from detrojan.workflow import cost_formula, graph
from detrojan.workflow.cost_formula import ASSUMED, CPU, GPU, Machine

TABLE = CHECKOUT / "slurm" / "costs.csv"
COUNTS = "counts.csv"  # beside the table
KEYS = ("rule", "method", "architecture", "dataset", "spc", "protocol")
NUMBERS = ("seconds", "memory_mb", "disk_mb")
COLUMNS = (*KEYS, *NUMBERS, "device", "source", "expected_s")
LATER = {"protocol", "expected_s"}  # columns that tables of earlier versions lack
COUNT_COLUMNS = ("method", "dataset", "spc", "protocol", "count", "median", "runs")
BY_FORMULA, CORRECTED = "assumed", "assumed, corrected by what was measured"
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


# Of a rule that the formula does not know yet: seconds of a unit, MB, MB.
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
            and (self.protocol == job.protocol or not (self.protocol or self.method))
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
    """What is known of jobs: a row of the table, or what the formula says."""

    key: Key
    estimate: Estimate
    device: str
    source: str
    expected_s: float  # at most the estimate's seconds

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
        expected = float(texts.get("expected_s") or estimate.seconds)
        if not 0 <= expected <= estimate.seconds:
            raise ValueError(f"expected_s should be from 0 to the seconds, {estimate.seconds:g}")
        return cls(key, estimate, texts["device"], texts["source"], expected)

    def texts(self) -> list[str]:
        """Return the line of the row."""
        keys = ("" if key is None else str(key) for key in self.key)
        expected = number_text(self.expected_s)
        return [*keys, *map(number_text, self.estimate), self.device, self.source, expected]

    @property
    def measured(self) -> bool:
        """Whether a run stands behind the row."""
        return not self.source.startswith(BY_FORMULA)


def number_text(value: float) -> str:
    """Return ``value`` with three digits, more if it has more before the point, and no exponent."""
    digits = 0 if value >= 100 or not value else 2 - math.floor(math.log10(value))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class CountKey(NamedTuple):
    """The runs that a count is the median of."""

    method: str
    dataset: str
    spc: int
    protocol: str


Counts = Mapping[CountKey, Mapping[str, tuple[float, int]]]  # by name: the median, and of how many runs


class Costs:
    """What jobs cost: a table of rows, and the formula for what has none.

    Args:
        rows: of the table.
        path: where it lies.
        counts: how often loops went round, learned.
        study: that the jobs are of; without one, the formula takes the shipped settings and the published
            data sets.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        path: Path = TABLE,
        counts: Counts | None = None,
        study: Study | None = None,
    ) -> None:
        self.rows = {row.key: row for row in rows}
        self.path = path
        self.counts = counts or {}
        self.study = study
        self._ranked = sorted(self.rows.values(), key=lambda row: row.key.rank, reverse=True)
        self._candidates: dict[tuple[str, str], list[Row]] = {}  # by rule and method
        self._found: dict[Hashable, Row] = {}

    @classmethod
    def load(cls, path: Path = TABLE, study: Study | None = None) -> "Costs":
        """Read a table, and the counts beside it.

        Raises:
            ValueError: it is missing, or a line of it is wrong.
        """
        try:
            with path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file)
                names = reader.fieldnames or ()
                if [name for name in COLUMNS if name not in LATER - {*names}] != [*names]:
                    raise ValueError(f"{path}, line 1: the columns should be {','.join(COLUMNS)}")
                rows = [_parsed(path, reader.line_num, line) for line in reader]
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: take the one that comes with the checkout") from None
        return cls(rows, path, read_counts(path.with_name(COUNTS)), study)

    def of(self, study: Study) -> "Costs":
        """Return the same table for the jobs of a study."""
        return Costs(self.rows.values(), self.path, self.counts, study)

    def row(self, rule: str, axes: Mapping[str, Any]) -> Row:
        """Return what holds for a job: of the rows that match, the one that says most of it, or the formula.

        A rule of which neither knows, as one that was just added, takes ``UNKNOWN``.

        Args:
            rule: a key of ``UNITS``.
            axes: those that the job has, as ``cells.Cell.axes`` returns them.
        """
        asked = self.kind(rule, axes)
        if asked not in self._found:
            job = job_key(rule, axes)
            self._found[asked] = self._measured(job) or self._corrected(job, axes)
        return self._found[asked]

    def kind(self, rule: str, axes: Mapping[str, Any]) -> Hashable:
        """Return what is equal for jobs that take the same; the arguments are those of :meth:`row`."""
        return (job_key(rule, axes), *self._beside(rule, axes))

    def estimate(self, rule: str, axes: Mapping[str, Any]) -> Estimate:
        """Return what a unit of a job takes at most; the arguments are those of :meth:`row`."""
        return self.row(rule, axes).estimate

    def by_formula(self, rule: str, axes: Mapping[str, Any], machine: Machine = ASSUMED) -> Row:
        """Return what the formula says of a job, whatever was measured; arguments as :meth:`row` has them."""
        job = job_key(rule, axes)
        counts = self.counts_of(job) if rule == "defend" else {}
        known = cost_formula.facts(rule, job.method, axes, self.study, counts)
        taken = cost_formula.taken(known, machine)
        if taken is None:
            gpu = any(own.gpu for own in graph.RULES.values() if own.stage_name == rule)
            return Row(job, UNKNOWN, GPU if gpu else CPU, BY_FORMULA, UNKNOWN.seconds)
        estimate = Estimate(taken.seconds, taken.memory_mb, taken.disk_mb)
        device = machine.name if taken.device == GPU else CPU
        return Row(job, estimate, device, BY_FORMULA, taken.expected_s)

    def counts_of(self, job: Key) -> dict[str, float]:
        """Return how often the loops of a defense went round: there, or where else it ran.

        Of runs at another SPC or on another data set, the median of medians.
        """
        protocol = job.protocol or SURVEY
        exact = self.counts.get(CountKey(job.method, job.dataset, job.spc or NO_SAMPLES, protocol))
        if exact:
            return {name: median for name, (median, _) in exact.items()}
        found: dict[str, list[float]] = {}
        for key, counts in self.counts.items():
            if (key.method, key.protocol) == (job.method, protocol):
                for name, (median, _) in counts.items():
                    found.setdefault(name, []).append(median)
        return {name: float(statistics.median(values)) for name, values in found.items()}

    def _beside(self, rule: str, axes: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return what else of a job's axes can change its settings, in this study."""
        own = self.study and self.study.defenses.get(axes.get("defense", ""))
        if rule == "defend" and own and own.overrides:
            return tuple(axes.get(axis) for axis in ("attack", "ratio", "seed"))
        if rule == "train" and self.study and self.study.training.overrides:
            return tuple(axes.get(axis) for axis in ("ratio", "seed"))
        return ()

    def _measured(self, job: Key) -> Row | None:
        names = (job.rule, job.method)
        if names not in self._candidates:
            self._candidates[names] = [
                row for row in self._ranked if row.key.rule == job.rule and row.key.method in ("", job.method)
            ]
        return next((row for row in self._candidates[names] if row.key.matches(job)), None)

    def _corrected(self, job: Key, axes: Mapping[str, Any]) -> Row:
        row = self.by_formula(job.rule, axes)
        ratios = self._ratios(job.rule)
        of_method = [ratio for method, ratio, _ in ratios if method == job.method]
        factors = of_method or [ratio for _, ratio, _ in ratios]
        if not factors:
            return row
        factor = statistics.median(factors)
        seconds = row.estimate.seconds * factor
        (device, *_) = sorted({device for *_, device in ratios})
        estimate = row.estimate._replace(seconds=seconds)
        return Row(job, estimate, device, CORRECTED, row.expected_s * factor)

    @functools.cache  # noqa: B019, as long as the table
    def _ratios(self, rule: str) -> list[tuple[str, float, str]]:
        """Return what rows of a rule took for what the formula expects: method, ratio and device.

        Expected, not at most: how early loops ended says nothing of the machine. Only of images that are
        known: those of another data set say nothing either.
        """
        return [
            (row.key.method, row.expected_s / said, row.device)
            for row in self.rows.values()
            if row.key.rule == rule and cost_formula.is_known(row.key.dataset, self.study)
            if (said := self.by_formula(rule, key_axes(row.key)).expected_s)
        ]

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
        write_counts(self.counts, self.path.with_name(COUNTS))


def read_counts(path: Path) -> dict[CountKey, dict[str, tuple[float, int]]]:
    """Return the counts of a file; none if there is no file.

    Raises:
        ValueError: a line is wrong.
    """
    if not path.exists():
        return {}
    counts: dict[CountKey, dict[str, tuple[float, int]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for line in reader:
            try:
                key = CountKey(line["method"], line["dataset"], int(line["spc"]), line["protocol"])
                counts.setdefault(key, {})[line["count"]] = (float(line["median"]), int(line["runs"]))
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{path}, line {reader.line_num}: should have {','.join(COUNT_COLUMNS)}"
                ) from None
    return counts


def write_counts(counts: Counts, path: Path) -> None:
    """Write counts, whole or not at all; nothing where there are none and no file."""
    from detrojan.storage import records

    if not counts and not path.exists():
        return
    with records.whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COUNT_COLUMNS)
        for key in sorted(counts):
            for name, (median, runs) in sorted(counts[key].items()):
                writer.writerow([*key, name, number_text(median), runs])


def job_key(rule: str, axes: Mapping[str, Any]) -> Key:
    """Return the key of a job, for the axes that it has."""
    method = axes.get(method_axis(rule), "")
    job = Key(rule, method, axes.get("architecture", ""), axes.get("dataset", ""), axes.get("spc"))
    if method_axis(rule) == "defense" and axes.get("protocol", SURVEY) != SURVEY:
        job = job._replace(protocol=axes["protocol"])
    return job


def key_axes(key: Key) -> dict[str, Any]:
    """Return axes of a job that ``key`` stands for."""
    axes = {
        method_axis(key.rule): key.method,
        "architecture": key.architecture,
        "dataset": key.dataset,
        "spc": key.spc,
        "protocol": key.protocol,
    }
    return {axis: value for axis, value in axes.items() if value not in ("", None)}


def method_axis(rule: str) -> str:
    """Return the axis that names the method of a rule's jobs in the table."""
    own = graph.RULES.get(rule)
    return "defense" if own and "defenses" in own.methods else "attack"


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


def runtime_min(
    rule: str,
    axes: Mapping[str, Any],
    attempt: int,
    units: float | None = None,
    costs: Costs | None = None,
) -> int:
    """Return the time limit to ask for, minutes.

    Args:
        rule: a key of ``UNITS``.
        axes: of the job, as ``cells.Cell.axes`` returns them.
        attempt: 1 for the first; each further one gets twice the time.
        units: how many the job has, where its axes don't tell: epochs of ``train``, thousands of shards of
            ``aggregate`` and ``report``.
        costs: of the study's jobs; the checkout's table if not given.

    Raises:
        ValueError: ``DETROJAN_MAX_RUNTIME`` is no number.
    """
    count = num_units(rule, axes) if units is None else units
    seconds = STARTUP_S + SAFETY * count * (costs or default()).estimate(rule, axes).seconds
    return _allowed(max(math.ceil(seconds / 60), MIN_RUNTIME_MIN) * 2 ** (attempt - 1), MAX_RUNTIME)


def mem_mb(rule: str, axes: Mapping[str, Any], attempt: int, costs: Costs | None = None) -> int:
    """Return the memory to ask for, MB; each attempt gets twice that of the one before."""
    memory = MEMORY_SAFETY * (costs or default()).estimate(rule, axes).memory_mb + SNAKEMAKE_MB
    return _allowed(max(math.ceil(memory), MIN_MEMORY_MB) * 2 ** (attempt - 1), MAX_MEMORY)


def _allowed(wanted: int, variable: str) -> int:
    """Return ``wanted``, or the most that a variable of the environment allows if that is less."""
    text = os.environ.get(variable, "")
    if text and not (text.isdecimal() and int(text)):
        raise ValueError(f"{variable}: should be a whole number from 1 up, found {text!r}")
    return min(wanted, int(text)) if text else wanted
