"""Shows how far a study is, from a second terminal: ``detrojan status``.

Reads files, and asks SLURM about the jobs that should be there; what runs isn't touched. A job counts
as done when its file is there. Whether a change makes Snakemake run it again, only a dry run tells.
"""

import dataclasses
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from detrojan.analysis.report import data_sets
from detrojan.analysis.report.data_sets import DataSet
from detrojan.analysis.report.views import counted, statuses
from detrojan.cells import MODEL_AXES, NO_METHOD, NO_SAMPLES, ONE_DRAW, ratio_text
from detrojan.storage import records
from detrojan.study import files as study_files
from detrojan.study import grid
from detrojan.study.schema import NAMED_AXES
from detrojan.workflow import attempts, closing, graph
from detrojan.workflow.attempts import Record, State
from snakemake_logger_plugin_detrojan.progress import HOUR, duration

WIDTH_WITHOUT_TERMINAL = 100
MOST_SHOWN = 10  # running jobs, and kinds of dead ones
MODEL_RULES = graph.making("models")
SHARD_RULES = [name for name, rule in graph.RULES.items() if rule.defenses]
# What a reader waits for, by rule: the first file of those that look at the whole study.
LAST_FILES = {
    name: next(iter(rule.files)) for name, rule in graph.RULES.items() if rule.files and not rule.axes
}
UNTOUCHED_AXES = {
    "defense": NO_METHOD,
    "protocol": NO_METHOD,
    "spc": NO_SAMPLES,
    "draws": str(ONE_DRAW),
}


class Job(NamedTuple):
    """A job that runs now, or that died.

    Attributes:
        record: its attempts.
        state: what became of the last one.
        place: the part of the grid that it works on, as paths write it.
    """

    record: Record
    state: State
    place: str


class Stage(NamedTuple):
    """How many jobs of a stage are in which state; given up are those that ``close`` leaves out."""

    name: str
    planned: int
    done: int
    running: int
    died: int
    given_up: int

    @property
    def waiting(self) -> int:
        """Jobs that have not begun, and are going to."""
        return self.planned - self.done - self.running - self.died - self.given_up

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.done + self.given_up == self.planned


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        results: the folder that was looked at.
        now: when, seconds since 1970.
        began: when the last run of the study began.
        models: the stage of training.
        shards: the stages of defending and evaluating, as one.
        tables: the last stage, the rules that make tables and report.
        cells: cells whose metrics are there, and all that are planned.
        finished: shards whose metrics were made since ``since``.
        since: an hour ago, or when the run began if that is later.
        endings: how many rows of the table of cells have which status; none without the table.
        tabled: when that table was made.
        jobs: the jobs that run or died.
        data_sets: what was read as data sets, of those that are there.
        undeclared: sentences about defenses that have no cells under some protocol of the study.
    """

    results: Path
    now: float
    began: float
    models: Stage
    shards: Stage
    tables: Stage
    cells: tuple[int, int]
    finished: int
    since: float
    endings: Mapping[str, int]
    tabled: float
    jobs: Sequence[Job]
    data_sets: Sequence[DataSet]
    undeclared: Sequence[str]

    @property
    def over(self) -> bool:
        """Whether nothing runs and nothing is left to do."""
        runs = any(job.state == "running" for job in self.jobs)
        return not runs and self.models.over and self.shards.over and self.tables.over


# --- what the files say ----------------------------------------------------------------------------


def jobs(results: Path) -> list[Job]:
    """Return the jobs of the study in the folder of ``results`` that run or died."""
    return _jobs(*_recorded(results))


def made(results: Path, path: str) -> float | None:
    """Return when a file was made, seconds since 1970; None if it is not there.

    Args:
        results: the study's folder of results, whatever its name.
        path: as :mod:`detrojan.workflow.graph` gives it.
    """
    try:
        # Tens of thousands of them: a Path takes longer to make than to ask for.
        return os.stat(f"{results}{path.removeprefix(graph.RESULTS)}").st_mtime  # noqa: PTH116
    except FileNotFoundError:
        return None


def look(results: Path, now: float) -> Status:
    """Return how far the study in the folder of ``results`` is.

    Raises:
        ValueError: no study was run there, or its table of cells or a data set's card is broken.
    """
    study = study_files.load_study(study_files.kept(results))
    records, slurm = _recorded(results)
    found = _jobs(records, slurm)
    closed = closing.closed(records, slurm, study.kills) if study.kills else closing.Closed()

    models = {graph.of_model(model): model for model in grid.models(study)}
    cards = {place: made(results, graph.model_card(model)) for place, model in models.items()}
    lost_models = {place for place, model in models.items() if closed.of_model(model)}
    shards = {graph.of_shard(shard): shard for shard in grid.shards(study)}
    metrics = {place: made(results, graph.metrics(shard)) for place, shard in shards.items()}
    lost_shards = {place for place, shard in shards.items() if closed.of_shard(shard)}
    measured = _stage("shards", metrics, _states(found, SHARD_RULES), lost_shards)

    times = [finished for finished in metrics.values() if finished is not None]
    began = made(results, f"{graph.RESULTS}/{study_files.KEPT}") or now
    since = max(began, now - HOUR)
    tabled = made(results, graph.table("cells"))
    # A table that lacks shards, or is older than one of them, will be made again.
    newest = max(times, default=0.0) if measured.over else math.inf
    return Status(
        results=results,
        now=now,
        began=began,
        models=_stage("models", cards, _states(found, MODEL_RULES), lost_models),
        shards=measured,
        tables=_stage("tables, report", _up_to_date(results, newest), _states(found, LAST_FILES), ()),
        cells=(
            sum(len(shard.draws) for place, shard in shards.items() if metrics[place] is not None),
            sum(len(shard.draws) for shard in shards.values()),
        ),
        finished=sum(finished >= since for finished in times),
        since=since,
        endings={} if tabled is None else _endings(results),
        tabled=tabled or now,
        jobs=found,
        data_sets=_data_sets(results, study.grid.datasets),
        undeclared=grid.undeclared(study),
    )


def _recorded(results: Path) -> tuple[list[Record], dict[str, str]]:
    records = attempts.read(results.absolute().parent / attempts.FOLDER)
    return records, attempts.slurm_states(records)


def _jobs(records: Iterable[Record], slurm: Mapping[str, str]) -> list[Job]:
    return [Job(record, _last_state(record, slurm), _place(record)) for record in records]


def _last_state(record: Record, slurm: Mapping[str, str]) -> State:
    """Return what became of the last attempt.

    Where there are no SLURM commands, a SLURM job that has said nothing of its end is taken to run.
    """
    state = record.states(slurm)[-1]
    unknown = state == "killed" and record.attempts[-1].slurm_job and not shutil.which("squeue")
    return "running" if unknown else state


def _place(record: Record) -> str:
    # The wildcards of this rule name the model only.
    axes = record.axes | (UNTOUCHED_AXES if record.rule == "evaluate_untouched" else {})
    parts = []
    for axis in (*MODEL_AXES, *UNTOUCHED_AXES):
        if axis in axes:
            value = ratio_text(float(axes[axis])) if axis == "ratio" else f"{axes[axis]}"
            parts.append(value if axis in NAMED_AXES else f"{axis}-{value}")
    return "/".join(parts) or record.rule


def _states(jobs: Iterable[Job], rules: Collection[str]) -> dict[str, State]:
    """Return the state of each place where a job of ``rules`` runs or died; one that runs counts first."""
    states: dict[str, State] = {}
    for job in jobs:
        if job.record.rule in rules and states.get(job.place) != "running":
            states[job.place] = job.state
    return states


def _stage(
    name: str, files: Mapping[str, float | None], states: Mapping[str, State], given_up: Collection[str]
) -> Stage:
    """Count jobs. One that runs again, or died when it ran again, isn't done, whatever file is there."""
    found: Counter[str] = Counter()
    for place, done in files.items():
        if place in given_up:
            found["given up"] += 1
        elif place in states:
            found["running" if states[place] == "running" else "died"] += 1
        elif done is not None:
            found["done"] += 1
    return Stage(name, len(files), *(found[state] for state in ("done", "running", "died", "given up")))


def _up_to_date(results: Path, newest: float) -> dict[str, float | None]:
    """Return when the rules that are run last were done; None where the file is older than its inputs."""
    files: dict[str, float | None] = {}
    for rule, name in LAST_FILES.items():
        done = made(results, graph.job(rule, {}).file(name))
        files[rule] = done if done is not None and done >= newest else None
        newest = files[rule] or math.inf
    return files


def _endings(results: Path) -> dict[str, int]:
    path = graph.below(results, graph.table("cells"))
    with records.readable(path, "Parquet table"):
        return statuses(records.open_table(path).read(["status"]))


def _data_sets(results: Path, names: Iterable[str]) -> list[DataSet]:
    cards = [graph.job("dataset", {"dataset": name}).file("card") for name in names]
    there = [graph.below(results, card) for card in cards if made(results, card) is not None]
    return data_sets.read_all(map(records.read_card, there))


# --- the terminal ----------------------------------------------------------------------------------


def show(status: Status, console: Console) -> None:
    """Print how far a study is."""
    done, planned = status.cells
    share = f" ({100 * done / planned:.0f} %)" if planned else ""
    _print(console, f"The study in {status.results}; its last run began {_date(status.began)}.", "")
    console.print(_stages(status))
    _print(console, "", f"Cells: {done:,} of {planned:,} measured{share}.", _rate(status))
    _print(console, *status.undeclared)
    if status.endings:
        endings = ", ".join(f"{count:,} {ending}" for ending, count in status.endings.items())
        _print(console, f"Table of cells, made {_date(status.tabled)}: {endings}.")
    if status.data_sets:
        _print(console, "", "Data:", *(f"  {found}" for found in status.data_sets))
    running = [job for job in status.jobs if job.state == "running"]
    running.sort(key=lambda job: job.record.attempts[-1].started)
    _print(console, *_running(running, status.now))
    _print(console, *_died([job for job in status.jobs if job.state != "running"], console.width))


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(Text(line), soft_wrap=True)  # a path in two pieces can't be copied


def _stages(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    stages = (status.models, status.shards, status.tables)
    names = ["planned", "done", "running", "died", "given_up", "waiting"]
    if not any(stage.given_up for stage in stages):
        names.remove("given_up")
    table.add_column("")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for stage in stages:
        table.add_row(stage.name, *(f"{getattr(stage, name):,}" for name in names))
    return table


def _rate(status: Status) -> str:
    left = status.shards.planned - status.shards.done - status.shards.given_up
    if not left:
        return "Shards: none is left."
    span = max(1.0, status.now - status.since)
    lately = f"in the last {duration(span)}"
    if not status.finished:
        return f"Shards: none was finished {lately}, {left:,} left."
    rate = status.finished / span
    return (
        f"Shards: {status.finished:,} finished {lately}, {rate * HOUR:,.0f} an hour; "
        f"{left:,} left, at this rate {duration(left / rate)}."
    )


def _running(jobs: Sequence[Job], now: float) -> Iterator[str]:
    """Yield two lines a job, the oldest job first."""
    yield from ("", f"Running: {counted(len(jobs), 'job')}") if jobs else ("", "No job is running.")
    for job in jobs[:MOST_SHOWN]:
        attempt = job.record.attempts[-1]
        where = f"on {attempt.host}" + (f", SLURM job {attempt.slurm_job}" if attempt.slurm_job else "")
        tries = len(job.record.attempts)
        again = f", attempt {tries}" if tries > 1 else ""
        yield f"  {job.record.rule}, for {duration(max(0.0, now - attempt.started))}{again}, {where}"
        yield f"    {job.place}"
    if len(jobs) > MOST_SHOWN:
        yield f"  and {len(jobs) - MOST_SHOWN:,} more"


def _died(jobs: Sequence[Job], width: int) -> Iterator[str]:
    """Yield what jobs died of, the most frequent first; of those alike, the first one is named."""
    alike: dict[tuple[str, str, str], list[Job]] = {}
    for job in jobs:
        kind = (job.record.rule, job.state, job.record.attempts[-1].reason)
        alike.setdefault(kind, []).append(job)
    if jobs:
        yield from ("", f"Died: {counted(len(jobs), 'job')}")
    groups = sorted(alike.items(), key=lambda item: (-len(item[1]), item[0]))
    for (rule, state, reason), group in groups[:MOST_SHOWN]:
        number = f"{len(group):,} × " if len(group) > 1 else ""
        tries = sorted({len(job.record.attempts) for job in group})
        times = f"{tries[0]} to {tries[-1]} attempts" if len(tries) > 1 else counted(tries[0], "attempt")
        yield f"  {number}{rule}, {state}, {times}"
        if reason:
            yield f"    {reason}" if len(reason) <= width - 4 else f"    {reason[: width - 7]}..."
        yield f"    {'first: ' if number else ''}{group[0].place}"
        yield f"    log: {group[0].record.log}"
    if len(groups) > MOST_SHOWN:
        rest = sum(len(group) for _, group in groups[MOST_SHOWN:])
        yield f"  and {counted(rest, 'job')} of {counted(len(groups) - MOST_SHOWN, 'other kind')}"
    if jobs:
        again = "-R $(detrojan select --failed)"
        yield f"  A run tries them again; if it finds nothing to do: {again}"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def main(results: Path, watch: float | None) -> None:
    """Print how far the study in a folder of results is.

    Args:
        results: the folder.
        watch: look again after so many seconds, until the study is done; None for once.

    Raises:
        ValueError: as for :func:`look`.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    try:
        while True:
            status = look(results, time.time())
            if watch is not None:
                console.clear()
            show(status, console)
            if watch is None or status.over:
                return
            time.sleep(watch)
    except KeyboardInterrupt:
        return
