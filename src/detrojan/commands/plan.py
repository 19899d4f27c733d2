"""Says what a study will take before anyone starts it.

Jobs, files, disk, GPU-hours and days follow from the study file and the costs of jobs alone, so this
needs no data and takes seconds where Snakemake's dry run takes a minute. Where a run itself decides how long
it goes on, hours are given twice: as one should expect, and at most. What a job takes is as good as
:mod:`detrojan.workflow.job_costs` knows it.
"""

import dataclasses
import heapq
import textwrap
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from detrojan.cells import NO_METHOD
from detrojan.study import grid
from detrojan.study.files import load_study, read
from detrojan.study.schema import Study
from detrojan.workflow import graph
from detrojan.workflow.cost_formula import ASSUMED, CPU, H100, H100_FAST, LAPTOP, Machine
from detrojan.workflow.job_costs import UNITS, Costs, Row, num_units

DEFAULT_STUDY = Path("config/config.yaml")  # the Snakefile's
BLOCK_BYTES = 4096  # of a file system: what the smallest file takes
WIDTH = 100  # of what is printed
MACHINES = (ASSUMED, H100, H100_FAST, LAPTOP)  # whose hours are given beside those of the table
MOST_PARTS = 10  # that are printed where nobody asks for more

# --- jobs ------------------------------------------------------------------------------------------


KEPT_STUDY = 1  # the file of the study, of which Snakemake knows nothing


def count_jobs(study: Study) -> Counter[str]:
    """Return how many jobs of each rule a study has, as Snakemake counts them, in the order of the graph."""
    return _counts(graph.jobs(study))


def _counts(jobs: Iterable[graph.Job]) -> Counter[str]:
    counts = Counter(job.rule for job in jobs)
    return Counter({rule: counts[rule] for rule in graph.RULES if counts[rule]})


# --- what they take --------------------------------------------------------------------------------


@dataclasses.dataclass
class Stage:
    """What the jobs of a stage take together, and the longest of them; times in seconds.

    ``expected`` is what to expect of a GPU, the others are at most.
    """

    jobs: int = 0
    expected: float = 0.0
    gpu: float = 0.0
    cpu: float = 0.0
    longest: float = 0.0
    disk_mb: float = 0.0


class Part(NamedTuple):
    """The shards of a defense on one data set and network at one SPC; empty where they are taken together."""

    method: str
    dataset: str
    architecture: str
    spc: int | str


class Seconds(NamedTuple):
    """What jobs take: as to be expected, and at most."""

    expected: float = 0.0
    most: float = 0.0

    def plus(self, expected: float, most: float) -> "Seconds":
        """Return these and others together."""
        return Seconds(self.expected + expected, self.most + most)


@dataclasses.dataclass
class Plan:
    """What a study takes.

    Attributes:
        jobs: how many of each rule.
        cells: rows of the table of cells.
        stages: what each takes, by its key in the table of costs.
        files: how many there are in the end, by folder.
        defended_mb: repaired weights of each shard.
        kept: whether these stay.
        parts: seconds of shards, evaluation included.
        machines: seconds of all jobs that use a GPU, by the name of a machine, if that did them; measured
            rows count on their own device.
        longest_shard: the shard whose defense takes longest, in words; empty without shards.
        job_s: what a job takes on a cluster besides its script's work.
        assumed: share of the seconds that nobody has measured.
    """

    jobs: Counter[str]
    cells: int
    stages: dict[str, Stage]
    files: dict[str, int]
    defended_mb: list[float]
    kept: bool
    parts: dict[Part, Seconds]
    machines: dict[str, Seconds]
    longest_shard: str
    job_s: float
    assumed: float

    def by(self, axes: Sequence[str]) -> dict[Part, Seconds]:
        """Return the seconds of shards by some of the fields of :class:`Part`, the largest bound first."""
        found: dict[Part, Seconds] = {}
        for part, taken in self.parts.items():
            named = Part(*(value if axis in axes else "" for axis, value in part._asdict().items()))
            found[named] = found.get(named, Seconds()).plus(*taken)
        return dict(sorted(found.items(), key=lambda item: item[1].most, reverse=True))

    @property
    def total(self) -> Stage:
        """All stages together; the longest job is a shard's, which is defended and evaluated in one."""
        stages = self.stages.values()
        return Stage(
            self.jobs.total() - self.jobs["all"],
            sum(stage.expected for stage in stages),
            sum(stage.gpu for stage in stages),
            sum(stage.cpu for stage in stages),
            max(self._shard_s, *(stage.longest for stage in stages)),
            sum(stage.disk_mb for stage in stages),
        )

    @property
    def _shard_s(self) -> float:
        return sum(self.stages[name].longest for name in graph.grouped_with("defend") if name in self.stages)

    @property
    def slurm_jobs(self) -> int:
        """How many jobs SLURM gets: a shard is one, and the targets of the study are none."""
        # A group has one job of each of its rules.
        last = {own.group or name: name for name, own in graph.RULES.items() if own.unit}
        return sum(self.jobs[name] for name in last.values())

    @property
    def disk_mb(self) -> float:
        """What lies there in the end, each file rounded up to a block."""
        kept = sum(self.defended_mb) if self.kept else 0.0
        return self.total.disk_mb + kept + sum(self.files.values()) * BLOCK_BYTES / 1e6

    def waiting_mb(self, gpus: int) -> float:
        """Return the most that repaired weights take while ``gpus`` shards at once are under way."""
        return sum(heapq.nlargest(gpus, self.defended_mb))

    def expected_s(self, gpus: int) -> float:
        """Return the seconds that the work to be expected takes, if no one of ``gpus`` ever waits."""
        return (self.total.expected + self.job_s * self._num_started) / gpus

    def most_s(self, gpus: int) -> float:
        """Return the seconds that the study takes at most, if ``gpus`` are free for it all the time.

        Graham's bound for jobs that wait for others: however they are ordered, a GPU is without a job
        only while the longest chain goes on. That chain, in turn, is at most the longest job of every
        stage, and one more training: some triggers are learned against a clean model.
        """
        work = self.total.gpu + self.job_s * self._num_started
        longest = [stage.longest + self.job_s for stage in self.stages.values()]
        chain = sum(longest) + self.stages["train"].longest + self.job_s
        return work / gpus + chain * (1 - 1 / gpus)

    @property
    def _num_started(self) -> int:
        """How many jobs start on a GPU."""
        later = graph.grouped_with("defend")[1:]  # in the job of the first
        return sum(stage.jobs for name, stage in self.stages.items() if stage.gpu and name not in later)


def make(study: Study, costs: Costs) -> Plan:
    """Return what a study takes, by a table of costs."""
    costs = costs.of(study)
    parts: dict[Part, Seconds] = defaultdict(Seconds)
    machines = {machine.name: Seconds() for machine in MACHINES}
    elsewhere: dict[Hashable, dict[str, Row]] = {}  # of equal jobs, by the name of a machine
    defended_mb: list[float] = []
    longest_shard = (0.0, "")
    jobs = list(graph.jobs(study))
    counts = _counts(jobs)
    stages = {
        name: Stage() for name in dict.fromkeys(graph.RULES[rule].stage_name for rule in counts) if name
    }
    cells, num_shards = 0, sum(1 for _ in grid.shards(study))
    seconds = {True: 0.0, False: 0.0}  # by whether they were measured
    for rule, axes in jobs:
        name = graph.RULES[rule].stage_name
        if not name:
            continue
        row, stage = costs.row(name, axes), stages[name]
        units = _units(study, name, axes, num_shards)
        taken, expected = units * row.estimate.seconds, units * row.expected_s
        seconds[row.measured] += taken
        stage.jobs += 1
        stage.longest = max(stage.longest, taken)
        if row.device == CPU:
            stage.cpu += taken
        else:
            stage.gpu += taken
            stage.expected += expected
            kind = costs.kind(name, axes)
            if kind not in elsewhere:
                elsewhere[kind] = {machine.name: _on(machine, row, costs, name, axes) for machine in MACHINES}
            for machine, on_it in elsewhere[kind].items():
                more = units * on_it.expected_s, units * on_it.estimate.seconds
                machines[machine] = machines[machine].plus(*more)
        if "defense" in axes:
            part = Part(axes["defense"], axes["dataset"], axes["architecture"], axes["spc"])
            parts[part] = parts[part].plus(expected, taken)
        if name == "defend":
            longest_shard = max(longest_shard, (taken, _shard_text(axes)))
            cells += len(axes["draws"])
            defended_mb.append(units * row.estimate.disk_mb)
        else:
            # All epochs of a training leave one model.
            stage.disk_mb += row.estimate.disk_mb * (1 if name == "train" else units)
    return Plan(
        jobs=counts,
        cells=cells + counts["evaluate_untouched"],
        stages=stages,
        files=count_files(study),
        defended_mb=defended_mb,
        kept=study.keep_defended,
        parts=parts,
        machines=machines,
        longest_shard=longest_shard[1],
        job_s=costs.estimate("job", {}).seconds,
        assumed=seconds[False] / sum(seconds.values()),
    )


def _on(machine: Machine, row: Row, costs: Costs, stage: str, axes: Mapping[str, Any]) -> Row:
    """Return what a job takes on a machine: as measured, if that was on such a one."""
    measured_on = machine.name.partition(",")[0]
    return row if row.measured and measured_on in row.device else costs.by_formula(stage, axes, machine)


def seconds_a_job(study: Study, costs: Costs) -> dict[str, float]:
    """Return what to expect of a job of each rule, on average, by a table of costs."""
    plan = make(study, costs)
    stages = {rule: plan.stages.get(graph.RULES[rule].stage_name) for rule in plan.jobs}
    return {rule: (stage.expected + stage.cpu) / stage.jobs for rule, stage in stages.items() if stage}


def _shard_text(axes: Mapping[str, Any]) -> str:
    names = f"{axes['defense']} on {axes['dataset']} and {axes['architecture']}"
    return f"{names}, spc {axes['spc']}, draws {axes['draws']}"


def _units(study: Study, stage: str, axes: Mapping[str, Any], num_shards: int) -> float:
    if UNITS[stage] == "epoch":
        return int(study.optimization(axes)["epochs"])
    return num_shards / 1000 if UNITS[stage] == "thousand shards" else num_units(stage, axes)


def count_files(study: Study) -> dict[str, int]:
    """Return how many files a study leaves when it is done, by folder.

    Snakemake keeps a record of each output, of those too that were temporary.
    """
    left: Counter[str] = Counter()
    temporary = kept = 0
    for rule, count in count_jobs(study).items():
        own = graph.RULES[rule]
        outputs = sum(len(graph.listed(made)) for made in own.outputs_for(study.grid.datasets).values())
        left["logs"] += count * own.has_log
        left[".snakemake/metadata"] += count * outputs
        temporary += count * outputs * own.temporary
    if study.keep_defended:  # the repaired models of a shard and its runs; one that diverged has no model
        kept = sum(len(job.axes["draws"]) + 1 for job in graph.jobs(study) if job.rule == "defend")
    return {"results": left[".snakemake/metadata"] - temporary + kept + KEPT_STUDY, **left}


class LeftOut(NamedTuple):
    """What a filter takes out of the grid: whole models, and cells of the models that stay."""

    filter: str
    why: str
    models: int
    cells: int


def left_out(study: Study) -> list[LeftOut]:
    """Return what the filters of a study take out, in their order; first what no ``include`` lets in."""
    bare = study.model_copy(update={"grid": study.grid.model_copy(update={"include": [], "exclude": []})})
    stays = set(grid.models(study))
    models: Counter[int] = Counter()
    cells: Counter[int] = Counter()
    for model in set(grid.models(bare)) - stays:
        models[_taken_out_by(study, model._asdict())] += 1
    planned = set(grid.shards(study))
    for shard in grid.shards(bare):
        if shard.model in stays and shard not in planned:
            cells[_taken_out_by(study, shard.axes)] += len(shard.draws)
    return [
        LeftOut(_filter_text(study, place), _why(study, place), models[place], cells[place])
        for place in sorted(models.keys() | cells.keys())
    ]


NOT_INCLUDED = -1


def _taken_out_by(study: Study, axes: Mapping[str, Any]) -> int:
    """Return the place of the filter that excludes what ``axes`` name."""
    matching = (place for place, f in enumerate(study.grid.exclude) if f.matches(axes))
    return next(matching, NOT_INCLUDED)


def _filter_text(study: Study, place: int) -> str:
    if place == NOT_INCLUDED:
        return "grid.include names none of it"
    conditions = study.grid.exclude[place].conditions.items()
    return ", ".join(f"{axis} {_condition_text(condition)}" for axis, condition in conditions)


def _condition_text(condition: object) -> str:
    return (
        " or ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in condition)
        if isinstance(condition, list)
        else str(condition)
    )


def _why(study: Study, place: int) -> str:
    return "" if place == NOT_INCLUDED else study.grid.exclude[place].why


# --- the command -----------------------------------------------------------------------------------


def report(study: Study, plan: Plan, gpus: Sequence[int], by: Sequence[str] = ()) -> list[str]:
    """Return the lines that say what a study takes.

    Args:
        study: the study.
        plan: what it takes.
        gpus: numbers of GPUs, one a column.
        by: fields of :class:`Part`, whose parts are all listed; the largest by method and data set if none.
    """
    clean = sum(model.attack == NO_METHOD for model in grid.models(study))
    attacked = plan.jobs["evaluate_untouched"] - clean
    defended = f"{plan.cells - attacked - clean:,} of them defended, in {plan.jobs['defend']:,} shards"
    lines = [f"{attacked:,} attacked models and {clean:,} clean ones; {plan.cells:,} cells, {defended}."]
    for part in left_out(study):
        counts = [f"{part.models:,} models"] * bool(part.models) + [f"{part.cells:,} cells"] * bool(
            part.cells
        )
        text = f"Left out: {' and '.join(counts)} ({part.filter}){': ' if part.why else ''}{part.why}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    for line in grid.undeclared(study):
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ")
    rules = ", ".join(f"{rule} {count:,}" for rule, count in plan.jobs.items())
    text = f"Jobs: {plan.jobs.total():,} of Snakemake, {plan.slurm_jobs:,} of SLURM ({rules})."
    lines += ["", *textwrap.wrap(text, WIDTH, subsequent_indent="  "), ""]
    lines += _stages(plan)
    lines += ["", *_parts(plan, by)]
    if plan.longest_shard:
        text = f"The longest shard: {plan.longest_shard}. Shorter ranges of grid.draws make shorter jobs."
        lines += textwrap.wrap(text, WIDTH)
    lines.append("")
    lines.append(
        f"Files in the end: {sum(plan.files.values()):,} ("
        + ", ".join(f"{folder} {count:,}" for folder, count in plan.files.items())
        + ")."
    )
    lines.append(
        f"Disk in the end: {_gb(plan.disk_mb)} GB, repaired models {'kept' if plan.kept else 'deleted'}."
    )
    if plan.total.gpu:
        lines += ["", *_columns(plan, gpus), "", *_machines(plan)]
    share = f"{plan.assumed:.0%} of the hours are assumed"
    return [*lines, "", f"{share}; detrojan costs learn replaces that by what runs took."]


def _stages(plan: Plan) -> list[str]:
    rows = {**plan.stages, "total": plan.total}
    heads = f"{'expected':>10} {'at most':>10} {'CPU-hours':>10} {'longest, h':>11} {'disk, GB':>9}"
    lines = [f"{'':<28} {'GPU-hours':>21}", f"{'stage':<19} {'jobs':>8} {heads}"]
    for name, stage in rows.items():
        hours = " ".join(f"{value / 3600:>10,.1f}" for value in (stage.expected, stage.gpu, stage.cpu))
        longest = f"{stage.longest / 3600:>11,.2f}"
        lines.append(f"{name:<19} {stage.jobs:>8,} {hours} {longest} {_gb(stage.disk_mb):>9}")
    return lines


def _parts(plan: Plan, by: Sequence[str]) -> list[str]:
    """Return the lines of a table of shards by what is asked for; else of the largest."""
    axes = [axis for axis in Part._fields if axis in (by or ("method", "dataset"))]
    rows = plan.by(axes)
    if not rows:
        return []
    widths = [max(map(len, [axis, *(str(getattr(part, axis)) for part in rows)])) for axis in axes]

    def line(words: Sequence[str], expected: str, most: str) -> str:
        named = "  ".join(f"{word:<{width}}" for word, width in zip(words, widths, strict=True))
        return f"{named} {expected:>12} {most:>12}"

    shown = list(rows.items()) if by else list(rows.items())[:MOST_PARTS]
    lines = [line(axes, "expected, h", "at most, h")]
    lines += [
        line([str(getattr(part, axis)) for axis in axes], _hours(taken.expected), _hours(taken.most))
        for part, taken in shown
    ]
    rest = [taken for part, taken in rows.items() if part not in dict(shown)]
    if rest:
        words = [f"{len(rest)} others", *[""] * (len(axes) - 1)]
        sums = (sum(taken.expected for taken in rest), sum(taken.most for taken in rest))
        lines.append(line(words, *map(_hours, sums)) + "  (all with --by method,dataset)")
    return lines


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}" if seconds >= 360 else f"{seconds / 3600:.2g}"


def _columns(plan: Plan, gpus: Sequence[int]) -> list[str]:
    def row(title: str, values: Sequence[str]) -> str:
        return f"{title:<48}" + "".join(f"{value:>12}" for value in values)

    return [
        row("GPUs", [f"{count:,}" for count in gpus]),
        row("expected, if none of them ever waits", [duration(plan.expected_s(count)) for count in gpus]),
        row("at most", [duration(plan.most_s(count)) for count in gpus]),
        row("repaired models that wait, at most, GB", [_gb(plan.waiting_mb(count)) for count in gpus]),
    ]


def _machines(plan: Plan) -> list[str]:
    """Return the lines of a table of what the GPUs' work takes on one machine of each kind."""
    lines = [f"{'the work of GPUs, on one such machine':<48}{'expected':>12}{'at most':>12}"]
    for machine in MACHINES:
        name, rate = machine.name.partition(",")[0], machine.multiply_adds_per_s
        title = f"{name}: {rate / 1e12:g}e12 multiply-adds/s, {machine.launch_s * 1e6:.0f} µs a module"
        taken = plan.machines[machine.name]
        shown = (_machine_time(machine, value) for value in taken)
        lines.append(f"{title:<48}" + "".join(f"{text:>12}" for text in shown))
    text = (
        "These are assumptions, until benchmarks/gpu.py has measured them. 6 µs need CUDA graphs or several "
        "processes a GPU; see docs/scale.md."
    )
    return [*lines, *textwrap.wrap(text, WIDTH)]


def _machine_time(machine: Machine, seconds: float) -> str:
    """Return GPU-hours, which one pays for, or of a laptop the days that one waits."""
    long = machine is not LAPTOP and seconds >= 3600
    return f"{seconds / 3600:,.0f} h" if long else duration(seconds)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: seconds, minutes, hours, or days from two days on."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.{0 if unit != 'h' else 1}f} {unit}"
    return f"{seconds / 86_400:,.1f} d"


def _gb(mb: float) -> str:
    return f"{mb / 1000:,.2f}" if mb < 10_000 else f"{mb / 1000:,.0f}"


def main(files: Sequence[Path], gpus: Sequence[int], table: Path, by: Sequence[str] = ()) -> None:
    """Print what a study takes.

    Args:
        files: study files, of which later ones win; the Snakefile's own if there are none.
        gpus: how many are free, for a column each.
        table: of costs.
        by: what to list all shards by, fields of :class:`Part`.

    Raises:
        ValueError: the study or the table has a mistake, or there is no such field.
    """
    if unknown := [axis for axis in by if axis not in Part._fields]:
        raise ValueError(f"--by {','.join(unknown)}: there are {', '.join(Part._fields)}")
    study = load_study(read(files or [DEFAULT_STUDY]))
    click.echo("\n".join(report(study, make(study, Costs.load(table)), gpus, by)))
