"""What is known of jobs that are under way, or that died before they could finish.

A job leaves a small file in ``logs/attempts/`` when it starts, adds a line when it fails or is told to
stop, and deletes the file when it is done. So the files that lie there are the jobs that run now and
those that never ended well, with all their attempts; a job that was killed without a warning has an
attempt without an end, and then the scheduler is asked. Free of torch: the Snakefile reads it too.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from detrojan.storage import processes
from detrojan.workflow import graph

logger = logging.getLogger(__name__)

FOLDER = Path(graph.ATTEMPTS)
NEAR_LIMIT = 0.9  # of the time limit: told to stop later than this, a job has run out of time

How = Literal["failed", "stopped"]
# ``killed``: without a warning, and nobody knows by whom. That is how memory limits strike.
State = Literal["running", "failed", "interrupted", "timed_out", "out_of_memory", "killed"]
# How SLURM ends jobs that did nothing wrong themselves, and those that hit a limit.
_ENDED: dict[str, State] = {
    "BOOT_FAIL": "interrupted",
    "CANCELLED": "interrupted",
    "NODE_FAIL": "interrupted",
    "PREEMPTED": "interrupted",
    "REVOKED": "interrupted",
    "DEADLINE": "timed_out",
    "TIMEOUT": "timed_out",
    "OUT_OF_MEMORY": "out_of_memory",
}
_WAITING = ("COMPLETING", "CONFIGURING", "PENDING", "REQUEUED", "RUNNING", "STAGE_OUT", "SUSPENDED")


@dataclasses.dataclass
class Attempt:
    """One start of a job.

    Attributes:
        started: when, seconds since 1970.
        host: name of the machine.
        pid: of the process there.
        slurm_job: the number of the SLURM job; None outside of SLURM.
        mem_mb: memory that was asked for, MB; None if nothing was.
        runtime_s: time limit, seconds; None if there is none.
        ended: when it said that it failed or was told to stop; None if it said neither.
        how: ``failed`` by an error, or ``stopped`` by a signal; None if it said neither.
        reason: the error or the signal, one line.
    """

    started: float
    host: str
    pid: int
    slurm_job: str | None
    mem_mb: int | None
    runtime_s: float | None
    ended: float | None = None
    how: How | None = None
    reason: str = ""

    def state(self, slurm: Mapping[str, str]) -> State:
        """Return what became of the attempt.

        Args:
            slurm: the states of SLURM jobs by number, as :func:`slurm_states` returns them.
        """
        scheduler = slurm.get(self.slurm_job or "")
        if self.how == "failed":
            return "failed"
        if self.how == "stopped":
            seconds = (self.ended or self.started) - self.started
            if self.runtime_s and seconds >= NEAR_LIMIT * self.runtime_s:
                return "timed_out"
            return _ENDED.get(scheduler or "", "interrupted")
        at_work = scheduler is None and processes.is_at_work(self.host, self.pid, self.started)
        if scheduler in _WAITING or at_work:
            return "running"
        if scheduler is None and self.host == socket.gethostname() and processes.booted() > self.started:
            return "interrupted"
        return _ENDED.get(scheduler or "", "killed")


@dataclasses.dataclass
class Record:
    """The attempts of one job.

    Attributes:
        rule: by its name in the graph, whatever another workflow that uses ours calls it.
        axes: the axes that its wildcards name, texts and numbers; ``draws`` as text.
        log: path of its log file.
        attempts: the first one first.
    """

    rule: str
    axes: dict[str, Any]
    log: str
    attempts: list[Attempt]

    def states(self, slurm: Mapping[str, str]) -> list[State]:
        """Return what became of each attempt; see :meth:`Attempt.state`."""
        found = [attempt.state(slurm) for attempt in self.attempts]
        for place, attempt in enumerate(self.attempts[:-1]):
            later = {other.slurm_job for other in self.attempts[place + 1 :]}
            if attempt.slurm_job in later - {None}:
                found[place] = "interrupted"  # SLURM put the job into its queue again
            elif found[place] == "running":
                found[place] = "killed"  # its number serves another process by now
        return found


class Diary:
    """Where the running job keeps its own record."""

    def __init__(self, rule: str, axes: Mapping[str, Any], log: str, folder: Path = FOLDER) -> None:
        self.job = {"rule": rule, "axes": {name: plain(value) for name, value in axes.items()}, "log": log}
        key = hashlib.sha256(json.dumps(self.job, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{rule}-{key[:20]}.jsonl"

    def start(self, *, mem_mb: int | None, runtime_min: float | None) -> None:
        """Note that the job starts, here and now."""
        attempt = Attempt(
            started=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            mem_mb=mem_mb,
            runtime_s=None if runtime_min is None else 60.0 * runtime_min,
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._add({"event": "start"} | self.job | dataclasses.asdict(attempt))

    def end(self, how: How, reason: str) -> None:
        """Note that the job fails, or was told to stop; in vain if the disk is full, say."""
        with contextlib.suppress(OSError):  # it has an error of its own to tell
            self._add({"event": "end", "ended": time.time(), "how": how, "reason": reason})

    def done(self) -> None:
        """Forget all attempts: the job has ended well."""
        self.path.unlink(missing_ok=True)

    def _add(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, sort_keys=True) + "\n"
        with self.path.open("a+b") as file:
            # A line that was cut off would take the next one with it.
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())  # what it tells of may be a power cut


def read(folder: Path = FOLDER) -> list[Record]:
    """Return the jobs that are under way or died, by rule and axes; none if the folder is not there."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # it ended well while we read
            record = _record(path)
            if record:
                found.append(record)
    return sorted(found, key=lambda record: (record.rule, str(record.axes)))


def _record(path: Path) -> Record | None:
    record: Record | None = None
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = _with(record, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s, line %d: cut off, or of another version: passed over", path, number)
    return record


def _with(record: Record | None, event: dict[str, Any]) -> Record | None:
    """Return ``record`` with what a line says; what another version may say besides is left out."""
    known = {field.name: event[field.name] for field in dataclasses.fields(Attempt) if field.name in event}
    if event["event"] == "start":
        attempt = Attempt(**known)
        record = record or Record(_known(event["rule"]), _axes(event), event["log"], attempts=[])
        record.attempts.append(attempt)
    elif record and event["event"] == "end":
        record.attempts[-1] = dataclasses.replace(record.attempts[-1], **known)
    return record


def _axes(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes of a job.

    Raises:
        KeyError: an earlier version had no such axis, so that nothing is known of the job's place.
    """
    axes, rule = dict(event["axes"]), graph.RULES.get(_known(event["rule"]))
    if rule and not axes.keys() >= set(rule.axes):
        raise KeyError(rule.name)
    return axes


def _known(rule: str) -> str:
    """Return the name that a rule has in the graph; its own if it has none, as one of other code."""
    with contextlib.suppress(KeyError):
        return graph.known(rule)
    return rule


def slurm_states(records: Sequence[Record]) -> dict[str, str]:
    """Return the state of each SLURM job that ``records`` name, as far as SLURM still knows it."""
    jobs = sorted({a.slurm_job for record in records for a in record.attempts if a.slurm_job})
    if not jobs:
        return {}
    asked = _answer("sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", "JobID,State")
    asked |= _answer("squeue", "-h", "-t", "all", "--me", "-o", "%A|%T")
    return {job: asked[job] for job in jobs if job in asked}


def _answer(*command: str) -> dict[str, str]:
    """Return states by job from a command that prints ``job|STATE`` lines; nothing if it can't be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    return {job: state.split()[0] for job, state in pairs if state.strip()}  # "CANCELLED by 1000"


def plain(value: Any) -> Any:
    """Return the value of an axis as records have it: ``draws`` as text."""
    return value if isinstance(value, str | int | float) else str(value)
