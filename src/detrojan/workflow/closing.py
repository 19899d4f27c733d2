"""Lets a study end: what time or memory limits killed again and again becomes rows that say so.

Only with ``close`` in the study file or on the command line. The jobs that are given up leave the
graph, and ``aggregate`` writes their cells' rows: status ``timed_out`` or ``out_of_memory``, with the
reason. A run without ``close`` tries them again.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from detrojan.cells import Cell, Model, Shard, untouched
from detrojan.workflow import attempts, graph
from detrojan.workflow.attempts import Record, State
from detrojan.workflow.graph import Job

COUNTED: tuple[State, ...] = ("timed_out", "out_of_memory", "killed")


class Verdict(NamedTuple):
    """Why a job was given up: a status of the table of cells, and the reason beside it."""

    status: str
    reason: str


class GivenUp(NamedTuple):
    """A job that is given up, and why."""

    job: Job
    verdict: Verdict


class Closed:
    """What a study does without, because the jobs that would make it are given up."""

    def __init__(self, jobs: Sequence[GivenUp] = ()) -> None:
        self._verdicts = {job.job.key: job.verdict for job in jobs}

    def of_model(self, model: Model) -> Verdict | None:
        """Return why there is no such model, or why nothing can be measured on it; None if all is well."""
        return self.of_job(graph.shard_job(untouched(model)))

    def of_shard(self, shard: Shard) -> Verdict | None:
        """Return why there is no result of ``shard``, or None; for its model's sake, or its own."""
        return self.of_job(graph.shard_job(shard)) or self.of_model(shard.model)

    def of_job(self, job: Job) -> Verdict | None:
        """Return why there will be no ``job``, or None; it may be given up, or one on the way to it."""
        if not self._verdicts:
            return None
        found = (self._verdicts.get(step.key) for step in graph.steps(job))
        return next(filter(None, found), None)

    def open_models(self, models: Iterable[Model]) -> list[Model]:
        """Return those of ``models`` that are not given up."""
        return [model for model in models if self.of_model(model) is None]

    def split(self, shards: Iterable[Shard]) -> tuple[list[Shard], list[dict[str, Any]]]:
        """Return the shards that are not given up, and the cells of the others, as plain mappings."""
        left, given_up = [], []
        for shard in shards:
            verdict = self.of_shard(shard)
            if verdict is None:
                left.append(shard)
            else:
                given_up += list(_cells(shard, verdict))
        return left, given_up


def _cells(shard: Shard, verdict: Verdict) -> Iterator[dict[str, Any]]:
    for draw in shard.draws.numbers():
        yield shard.axes | {"draw": draw, **verdict._asdict()}


def closed(records: Iterable[Record], slurm: Mapping[str, str], kills: int) -> Closed:
    """Return what to give up: the jobs that ``records`` say were killed at least ``kills`` times.

    Only kills by a time or memory limit count, or without a warning, as memory limits strike. An
    error, a cancelled job, a preemption or a lost node doesn't: those jobs are run again.

    Args:
        records: of jobs under way or dead.
        slurm: states of SLURM jobs by number, see :func:`detrojan.workflow.attempts.slurm_states`.
        kills: how many times are enough, at least 1.
    """
    jobs = []
    for record in records:
        states = record.states(slurm)
        counted = [state for state in states if state in COUNTED]
        if len(counted) >= kills and "running" not in states:
            axes = Cell.from_wildcards({name: str(value) for name, value in record.axes.items()}).axes
            jobs.append(GivenUp(graph.job(graph.known(record.rule), axes), _verdict(record, counted, states)))
    return Closed(jobs)


def find(kills: int) -> Closed:
    """Return what the attempts below the working directory let give up; nothing if ``kills`` is 0."""
    if not kills:
        return Closed()
    records = attempts.read()
    return closed(records, attempts.slurm_states(records), kills)


def _verdict(record: Record, counted: Sequence[State], states: Sequence[State]) -> Verdict:
    last = counted[-1]
    kills = [a for a, state in zip(record.attempts, states, strict=True) if state in COUNTED]
    times = f"{len(counted)} time{'' if len(counted) == 1 else 's'}"
    if last == "timed_out":
        asked = _listed(kill.runtime_s and kill.runtime_s / 60 for kill in kills)
        return Verdict("timed_out", f"{record.rule} ran out of time {times}: {asked} min")
    asked = _listed(kill.mem_mb for kill in kills)
    how = "ran out of memory" if last == "out_of_memory" else "was killed without a warning, as for memory,"
    return Verdict("out_of_memory", f"{record.rule} {how} {times}: {asked} MB")


def _listed(limits: Iterable[float | None]) -> str:
    return ", ".join("no limit" if limit is None else f"{limit:g}" for limit in limits)
