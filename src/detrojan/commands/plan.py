"""Says what a study will take before anyone starts it.

Jobs, files, disk, GPU-hours and days follow from the study file and the table of costs alone, so this
needs no data and takes seconds where Snakemake's dry run takes a minute. What a job takes is as good as
the table: see :mod:`detrojan.workflow.job_costs`.
"""

import dataclasses
import heapq
import operator
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from detrojan.cells import NO_METHOD
from detrojan.study import grid
from detrojan.study.files import load_study, read
from detrojan.study.schema import Study
from detrojan.workflow import graph
from detrojan.workflow.job_costs import CPU, UNITS, Costs, num_units

DEFAULT_STUDY = Path("config/config.yaml")  # the Snakefile's
BLOCK_BYTES = 4096  # of a file system: what the smallest file takes
WIDTH = 100  # of what is printed

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
    """What the jobs of a stage take together, and the longest of them; times in seconds."""

    jobs: int = 0
    gpu: float = 0.0
    cpu: float = 0.0
    longest: float = 0.0
    disk_mb: float = 0.0


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
        by_defense: seconds by defense and data set, evaluation included.
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
    by_defense: dict[tuple[str, str], float]
    longest_shard: str
    job_s: float
    assumed: float

    @property
    def total(self) -> Stage:
        """All stages together; the longest job is a shard's, which is defended and evaluated in one."""
        stages = self.stages.values()
        return Stage(
            self.jobs.total() - self.jobs["all"],
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

    def days(self, gpus: int) -> float:
        """Return how many days the study takes at most, if ``gpus`` are free for it all the time.

        Graham's bound for jobs that wait for others: however they are ordered, a GPU is without a job
        only while the longest chain goes on. That chain, in turn, is at most the longest job of every
        stage, and one more training: some triggers are learned against a clean model.
        """
        later = graph.grouped_with("defend")[1:]  # in the job of the first
        on_gpu = [stage for name, stage in self.stages.items() if stage.gpu and name not in later]
        work = self.total.gpu + self.job_s * sum(stage.jobs for stage in on_gpu)
        longest = [stage.longest + self.job_s for stage in self.stages.values()]
        chain = sum(longest) + self.stages["train"].longest + self.job_s
        return (work / gpus + chain * (1 - 1 / gpus)) / 86_400


def make(study: Study, costs: Costs) -> Plan:
    """Return what a study takes, by a table of costs."""
    by_defense: dict[tuple[str, str], float] = defaultdict(float)
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
        taken = units * row.estimate.seconds
        seconds[row.measured] += taken
        stage.jobs += 1
        stage.longest = max(stage.longest, taken)
        if row.device == CPU:
            stage.cpu += taken
        else:
            stage.gpu += taken
        if "defense" in axes:
            by_defense[axes["defense"], axes["dataset"]] += taken
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
        by_defense=by_defense,
        longest_shard=longest_shard[1],
        job_s=costs.estimate("job", {}).seconds,
        assumed=seconds[False] / sum(seconds.values()),
    )


def seconds_a_job(study: Study, costs: Costs) -> dict[str, float]:
    """Return what a job of each rule takes on average, by a table of costs."""
    plan = make(study, costs)
    stages = {rule: plan.stages.get(graph.RULES[rule].stage_name) for rule in plan.jobs}
    return {rule: (stage.gpu + stage.cpu) / stage.jobs for rule, stage in stages.items() if stage}


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


def report(study: Study, plan: Plan, gpus: Sequence[int]) -> list[str]:
    """Return the lines that say what a study takes.

    Args:
        study: the study.
        plan: what it takes.
        gpus: numbers of GPUs, one a column.
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
    lines += ["", *_dearest(plan)]
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
        lines += ["", *_columns(plan, gpus)]
    share = f"{plan.assumed:.0%} of the hours are assumed"
    return [*lines, "", f"{share}; detrojan costs learn replaces that by what runs took."]


def _stages(plan: Plan) -> list[str]:
    rows = {**plan.stages, "total": plan.total}
    lines = [
        f"{'stage':<20} {'jobs':>8} {'GPU-hours':>10} {'CPU-hours':>10} {'longest, h':>11} {'disk, GB':>9}"
    ]
    for name, stage in rows.items():
        hours = f"{stage.gpu / 3600:>10,.1f} {stage.cpu / 3600:>10,.1f} {stage.longest / 3600:>11,.2f}"
        lines.append(f"{name:<20} {stage.jobs:>8,} {hours} {_gb(stage.disk_mb):>9}")
    return lines


def _dearest(plan: Plan) -> list[str]:
    hours = plan.total.gpu + plan.total.cpu
    dearest = heapq.nlargest(5, plan.by_defense.items(), key=operator.itemgetter(1))
    parts = [f"{defense} on {dataset} {taken / hours:.0%}" for (defense, dataset), taken in dearest]
    return textwrap.wrap(f"Of all hours: {', '.join(parts)}.", WIDTH) if parts else []


def _columns(plan: Plan, gpus: Sequence[int]) -> list[str]:
    def row(title: str, values: Sequence[str]) -> str:
        return f"{title:<48}" + "".join(f"{value:>12}" for value in values)

    return [
        row("GPUs", [f"{count:,}" for count in gpus]),
        row("days, at most", [f"{plan.days(count):,.1f}" for count in gpus]),
        row("repaired models that wait, at most, GB", [_gb(plan.waiting_mb(count)) for count in gpus]),
    ]


def _gb(mb: float) -> str:
    return f"{mb / 1000:,.2f}" if mb < 10_000 else f"{mb / 1000:,.0f}"


def main(files: Sequence[Path], gpus: Sequence[int], table: Path) -> None:
    """Print what a study takes.

    Args:
        files: study files, of which later ones win; the Snakefile's own if there are none.
        gpus: how many are free, for a column each.
        table: of costs.

    Raises:
        ValueError: the study or the table has a mistake.
    """
    study = load_study(read(files or [DEFAULT_STUDY]))
    click.echo("\n".join(report(study, make(study, Costs.load(table)), gpus)))
