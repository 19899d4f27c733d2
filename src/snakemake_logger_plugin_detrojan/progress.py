"""Counts what a run has done and estimates what is left, from the events that Snakemake logs."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from detrojan.cells import Draws

# The last ones take seconds and run once: not to know how long they take says nothing of the rest.
LAST_RULES = ("aggregate", "report", "all")
MINUTE, HOUR, DAY = 60, 3600, 86400


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


def num_cells(rule: str, wildcards: Mapping[str, str]) -> int:
    """Return how many cells a job evaluates."""
    if rule == "evaluate_untouched":
        return 1
    return len(Draws.parse(wildcards["draws"])) if rule == "evaluate" else 0


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
        self._running: dict[int, _Job] = {}
        self._failed: dict[int, str] = {}
        self._began: float | None = None
        self._cells = 0

    def plan(self, num_jobs: Mapping[str, int]) -> None:
        """Set how many jobs each rule has, in the order of the stages."""
        with self._lock:
            self._total = {rule: count for rule, count in num_jobs.items() if rule not in ("total", "all")}

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
        """Return the time left, as far as the jobs that have finished tell.

        What a rule's jobs took on average, times those that are left, by the average number that ran
        at the same time. While a rule has no finished job the time is a lower bound; while none of
        the rules that are left has one, nobody knows.
        """
        with self._lock:
            work, unknown = 0.0, False
            for rule, total in self._total.items():
                remaining = total - self._done[rule]
                if remaining and self._done[rule]:
                    work += remaining * self._mean(rule)
                elif remaining and rule not in LAST_RULES:
                    unknown = True
            busy = sum(self._seconds.values())
            for job in self._running.values():
                ran = now - job.started
                busy += ran
                work -= min(ran, self._mean(job.rule)) if self._done[job.rule] else 0.0
            elapsed = now - (now if self._began is None else self._began)
        if not work or not elapsed:
            return "…" if unknown else duration(0)
        seconds = work / max(1.0, busy / elapsed)
        return f"at least {duration(seconds)}" if unknown else f"about {duration(seconds)}"

    def _mean(self, rule: str) -> float:
        return self._seconds[rule] / self._done[rule]

    def line(self, now: float) -> str:
        """Return all that matters now, on one line: stages under way, cells done, time left."""
        stages = self.stages()
        done, total = sum(stage.done for stage in stages), sum(stage.total for stage in stages)
        under_way = [str(s) for s in stages if s.running or 0 < s.done < s.total]
        parts = [f"{done}/{total} jobs", "  ".join(under_way), self.cells(), f"{self.left(now)} left"]
        return " | ".join(part for part in parts if part)

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
