"""Counts what a run has done and estimates what is left, from the events that Snakemake logs."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from detrojan.cells import SURVEY, Draws

# The last ones take seconds and run once: not to know how long they take says nothing of the rest.
LAST_RULES = ("aggregate", "report", "all")
MINUTE, HOUR, DAY = 60, 3600, 86400
SHOWN_RUNNING = 3  # jobs that a line names


class Stage(NamedTuple):
    """How far the jobs of a stage are."""

    name: str
    done: int
    running: int
    total: int

    def __str__(self) -> str:
        return f"{self.name} {self.done}/{self.total}"


class _Job(NamedTuple):
    rule: str
    wildcards: Mapping[str, str]
    started: float

    def __str__(self) -> str:
        named = [self.wildcards.get(axis) for axis in ("attack", "defense", "protocol")]
        named = [name for name in named if name != SURVEY]  # what most studies run
        spc = f"spc-{self.wildcards['spc']}" if "spc" in self.wildcards else None
        return " ".join([self.rule, "/".join(filter(None, (*named, spc)))]).rstrip()


def num_cells(rule: str, wildcards: Mapping[str, str]) -> int:
    """Return how many cells a job evaluates; a prefix before our rule's name is no matter."""
    if f"_{rule}".endswith("_evaluate_untouched"):
        return 1
    draws = wildcards.get("draws")
    return len(Draws.parse(draws)) if draws and f"_{rule}".endswith("_evaluate") else 0


def duration(seconds: float) -> str:
    """Return a time as people say it, rounded to what matters."""
    seconds = round(seconds)
    if seconds < 2 * MINUTE:
        return f"{seconds} s"
    if seconds < HOUR:
        return f"{round(seconds / MINUTE)} min"
    if seconds < DAY:
        return f"{seconds // HOUR} h {seconds % HOUR // MINUTE} min"
    return f"{seconds // DAY} d {seconds % DAY // HOUR} h"


class Progress:
    """The state of a run. One thread tells it of events, others ask; times are seconds of one clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total: dict[str, int] = {}
        self._done: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._expected: Mapping[str, float] = {}
        self._running: dict[int, _Job] = {}
        self._failed: dict[int, str] = {}
        self._began: float | None = None
        self._cells = 0

    def plan(self, num_jobs: Mapping[str, int]) -> None:
        """Set how many jobs each rule has, in the order of the stages."""
        with self._lock:
            self._total = {rule: count for rule, count in num_jobs.items() if rule not in ("total", "all")}

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Set what a job of each rule should take, for as long as none of the rule has finished."""
        with self._lock:
            self._expected = seconds

    def start(self, job: int, rule: str, wildcards: Mapping[str, str], now: float) -> None:
        """Note that a job was started, or handed to a cluster; maybe again, after it failed."""
        with self._lock:
            self._began = now if self._began is None else self._began
            self._failed.pop(job, None)
            if rule in self._total:
                self._running[job] = _Job(rule, wildcards, now)

    def finish(self, job: int, now: float) -> None:
        """Note that a job ended well."""
        with self._lock:
            ended = self._running.pop(job, None)
            if ended is not None:
                self._done[ended.rule] += 1
                took = now - ended.started
                self._seconds[ended.rule] = self._seconds.get(ended.rule, 0.0) + took
                self._cells += num_cells(ended.rule, ended.wildcards)

    def fail(self, job: int, rule: str) -> Mapping[str, str]:
        """Note that a job failed; return its wildcards."""
        with self._lock:
            self._failed[job] = rule
            ended = self._running.pop(job, None)
            return ended.wildcards if ended is not None else {}

    def jobs(self) -> dict[str, int]:
        """Return how many jobs each rule has."""
        return self._total

    def stages(self) -> list[Stage]:
        """Return all stages; the two rules that evaluate are one."""
        with self._lock:
            running = Counter(job.rule for job in self._running.values())
            found: dict[str, Stage] = {}
            for rule, total in self._total.items():
                name = rule.removesuffix("_untouched")
                before = found.get(name, Stage(name, 0, 0, 0))
                found[name] = Stage(
                    name, before.done + self._done[rule], before.running + running[rule], before.total + total
                )
            return list(found.values())

    def left(self, now: float) -> str:
        """Return the time left, and what it goes by.

        What a rule's jobs took on average, times those that are left, by the average number that ran
        at the same time. A rule that has no finished job takes what :meth:`expect` was told. Without
        that the time is a lower bound; while nothing is known of all that is left, nobody knows.
        """
        with self._lock:
            work, unknown, expected = 0.0, False, False
            for rule, total in self._total.items():
                remaining = total - self._done[rule]
                mean = self._mean(rule)
                if remaining and mean is not None:
                    work += remaining * mean
                    expected |= not self._done[rule] and rule not in LAST_RULES
                elif remaining and rule not in LAST_RULES:
                    unknown = True
            busy = sum(self._seconds.values())
            for job in self._running.values():
                ran = now - job.started
                busy += ran
                work -= min(ran, self._mean(job.rule) or 0.0)
            elapsed = now - (now if self._began is None else self._began)
        if not work:
            return "… left" if unknown else f"{duration(0)} left"
        text = duration(work / max(1.0, busy / elapsed if elapsed else 1.0))
        if unknown:
            return f"at least {text} left"
        return f"about {text} left{' by the table of costs' if expected else ''}"

    def _mean(self, rule: str) -> float | None:
        """Return what a job of ``rule`` takes: as finished ones did, else as expected, if anything was."""
        done = self._done[rule]
        return self._seconds[rule] / done if done else self._expected.get(rule)

    def line(self, now: float) -> str:
        """Return all that matters now, on one line: stages under way, what runs, cells done, time left."""
        stages = self.stages()
        done, total = sum(stage.done for stage in stages), sum(stage.total for stage in stages)
        under_way = [str(s) for s in stages if s.running or 0 < s.done < s.total]
        parts = [f"{done}/{total} jobs", "  ".join(under_way), self.running(), self.cells(), self.left(now)]
        return " | ".join(part for part in parts if part)

    def running(self) -> str:
        """Return which jobs run now, those that started first, or nothing."""
        with self._lock:
            jobs = [str(job) for job in self._running.values()]
        more = [f"{len(jobs) - SHOWN_RUNNING} more"] if len(jobs) > SHOWN_RUNNING else []
        return f"now {', '.join([*jobs[:SHOWN_RUNNING], *more])}" if jobs else ""

    def cells(self) -> str:
        """Return how many cells this run has evaluated."""
        return f"{self._cells} cell{'' if self._cells == 1 else 's'} done"

    def end(self, now: float) -> str:
        """Return how the run ended."""
        stages = self.stages()
        done, total = sum(stage.done for stage in stages), sum(stage.total for stage in stages)
        with self._lock:
            took = duration(now - (now if self._began is None else self._began))
            failed = Counter(self._failed.values())
        if failed:
            which = ", ".join(f"{count} {rule}" for rule, count in failed.items())
            return f"Failed: {which}. {done} of {total} jobs done in {took}, {self.cells()}."
        how = (
            f"Done: {total} job{'' if total == 1 else 's'}"
            if done == total
            else f"Stopped: {done} of {total} jobs done"
        )
        return f"{how} in {took}, {self.cells()}."
