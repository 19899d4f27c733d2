"""Jobs of an earlier run that are still at work when a run begins: two must not make one file.

Snakemake's own lock is gone once a user has removed it, as after a driver was killed; but its jobs may go on,
on a cluster and on this machine.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

from snakemake.exceptions import WorkflowError

from detrojan.cells import Cell, axes_text
from detrojan.storage import processes
from detrojan.workflow import attempts, graph
from detrojan.workflow.attempts import Record

logger = logging.getLogger(__name__)

# Seconds. Jobs of a driver that has died are told to stop, and a node that is busy takes its time.
PATIENCE = 120.0
POLL_SECONDS = 0.5
MOST_NAMED = 3
STARTS_AGAIN = ("CONFIGURING", "PENDING", "REQUEUED")  # of SLURM's states


def wait(workflow: Any, patience: float = PATIENCE) -> None:
    """Wait a moment for jobs of earlier runs that make what Snakemake's ``workflow`` is about to make.

    Raises:
        WorkflowError: they go on; the message says which, and what to do.
    """
    found = _at_work()
    if not found:
        return
    planned = _planned(workflow)
    end, told = time.monotonic() + patience, False
    while others := [record for record in found if _key(record) in planned]:
        if time.monotonic() >= end:
            raise WorkflowError(_said(others))
        if not told:
            logger.warning("jobs of an earlier run are still at work (%d): waiting for them", len(others))
            told = True
        time.sleep(POLL_SECONDS)
        found = _at_work()


def _key(record: Record) -> tuple[Any, ...] | None:
    """Return the key of a job; None if another version's, whose rule or axes we don't know."""
    try:
        return graph.job(record.rule, record.axes).key
    except KeyError:
        return None


def _planned(workflow: Any) -> set[tuple[Any, ...]]:
    """Return the keys of the jobs that Snakemake is about to run, as records of attempts have them."""
    keys = set()
    for job in workflow.dag.needrun_jobs():
        axes = Cell.from_wildcards(dict(job.wildcards.items())).axes
        axes = {name: attempts.plain(value) for name, value in axes.items()}
        keys.add(graph.job(graph.known(job.rule.name), axes).key)
    return keys


def _at_work() -> list[Record]:
    records = attempts.read()
    slurm = attempts.slurm_states(records)
    return [record for record in records if _is_at_work(record, slurm)]


def _is_at_work(record: Record, slurm: Mapping[str, str]) -> bool:
    """Return whether the last attempt of a job runs, or is about to be started again by SLURM."""
    if record.states(slurm)[-1] != "running":
        return False
    last = record.attempts[-1]
    # A driver's own SLURM job outlives a job that died in it.
    here = processes.is_at_work(last.host, last.pid, last.started)
    return here is not False or slurm.get(last.slurm_job or "") in STARTS_AGAIN


def _said(others: list[Record]) -> str:
    jobs = [graph.job(record.rule, record.axes) for record in others[:MOST_NAMED]]
    named = "; ".join(f"{job.rule} {axes_text(job.axes)}" for job in jobs)
    more = f"; and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    ends = " && ".join(sorted({_ending(record) for record in others}))
    return (
        f"jobs of an earlier run are still at work on what this one would make: {named}{more}. "
        f"Wait until they have ended, or end them ({ends}), and run again"
    )


def _ending(record: Record) -> str:
    last = record.attempts[-1]
    return f"scancel {last.slurm_job}" if last.slurm_job else f"kill {last.pid}"
