"""What SLURM says that would otherwise be lost: why ``sbatch`` refuses a job, and which jobs it holds.

Snakemake's plugin tries a refused job again with doubled limits, and takes a held one for one that waits.
A wrong account or partition is what a first day on a cluster fails at; no second attempt mends that.
"""

import functools
import logging
import re
import subprocess
import threading
import time
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from snakemake_interface_executor_plugins.executors.base import AbstractExecutor

from detrojan.registry import CHECKOUT

logger = logging.getLogger("snakemake.logging")  # Snakemake's own, for its handlers show it

PROFILE = CHECKOUT / "slurm" / "config.yaml"
REFUSED = re.compile(r"SLURM sbatch failed\. The error message was '(?P<said>.*?)'\.\n", re.DOTALL)
HELD = re.compile("held", re.IGNORECASE)
LOOK_EVERY = 300.0  # seconds between two looks at the queue
PATIENCE = 60.0  # seconds that squeue may take


class Kind(NamedTuple):
    """A kind of refusal.

    Attributes:
        words: a pattern that SLURM's message has.
        key: in the profile.
        advice: what to do; ``{line}`` is where the key stands.
        then: whether the run ends, the job is given up, or it is tried again as any other.
    """

    words: str
    key: str
    advice: str
    then: Literal["stop", "give up", "retry"]


KINDS = (
    Kind(
        "timed out|unable to contact|connection refused|temporarily|try again",
        "retries:",
        "SLURM's controller does not answer well; the job is tried again ({line}).",
        "retry",
    ),
    Kind(
        "submit limit|maxsubmit",
        "jobs:",
        "Your site allows fewer jobs in the queue, or less for a job: see {line}.",
        "retry",
    ),
    Kind(
        "account",
        "slurm_account:",
        "Set SBATCH_ACCOUNT, or {line}, to an account that may use the partition; "
        "`sacctmgr show associations user=$USER` lists yours.",
        "stop",
    ),
    Kind(
        "partition",
        "slurm_partition:",
        "Set SBATCH_PARTITION and DETROJAN_GPU_PARTITION, or {line}; `sinfo --summarize` lists yours.",
        "stop",
    ),
    Kind("qos", "default-resources:", "Write a line `qos: NAME` below {line}.", "stop"),
    Kind(
        r"gres|generic resource|\bgpus?\b",
        "gpu:",
        "Your site wants another form for GPUs: change {line}, as the lines above it say.",
        "stop",
    ),
    Kind(
        "time limit",
        "slurm_partition:",
        "Set DETROJAN_MAX_RUNTIME to the longest limit that the partition allows, minutes, or take another "
        "({line}).",
        "give up",
    ),
    Kind(
        "memory|node configuration",
        "slurm_partition:",
        "Set DETROJAN_MAX_MEM_MB to what the largest node has, or take another partition ({line}).",
        "give up",
    ),
)
OTHER = Kind("", "default-resources:", "What jobs ask for stands in {line}.", "stop")


def advice(kind: Kind) -> str:
    """Return what to do about a refusal, with the line of the profile."""
    lines = PROFILE.read_text(encoding="utf-8").splitlines()
    number = next(number for number, text in enumerate(lines, 1) if text.strip().startswith(kind.key))
    place = f"{PROFILE.parent.name}/{PROFILE.name}, line {number}"
    return kind.advice.format(line=f"`{kind.key.rstrip(':')}` in {place}")


def kind_of(said: str) -> Kind:
    """Return the kind of refusal that a message of ``sbatch`` is."""
    return next((kind for kind in KINDS if re.search(kind.words, said, re.IGNORECASE)), OTHER)


class Listener:
    """Follows what an executor reports of its jobs.

    Attributes:
        jobs: SLURM's numbers of jobs that it took.
    """

    def __init__(self) -> None:
        self.jobs: set[str] = set()
        self._said: set[str] = set()

    def refused(self, executor: Any, job: Any, message: str | None) -> str | None:
        """Say once why ``sbatch`` refused a job, and see that it is not tried in vain.

        Returns:
            What the job's own message should be.
        """
        match = REFUSED.match(message or "")
        if match is None:
            return message
        said = match["said"].replace("sbatch: error: ", "").strip()
        kind = kind_of(said)
        # A message that nobody knows: if SLURM took other jobs, it is about this one.
        then = "give up" if kind is OTHER and self.jobs else kind.then
        if said not in self._said:
            self._said.add(said)
            logger.error("sbatch refuses a job: %s\n  %s", said, advice(kind))
            if then == "stop":
                logger.error("The run ends, as no other job would fare better. What runs is waited for.")
        if then != "retry":
            job.attempt = job.restart_times + 1
        if then == "stop":
            executor.workflow.scheduler.keepgoing = False
        return "sbatch refused it"

    def held(self) -> None:
        """Say once which of the jobs SLURM holds."""
        for number, reason in held(self.jobs):
            if (place := f"{number}: {reason}") not in self._said:
                self._said.add(place)
                logger.warning(
                    "SLURM holds job %s (%s) and won't start it. When the cause is mended: "
                    "scontrol release %s; to give it up: scancel %s",
                    number,
                    reason,
                    number,
                    number,
                )


def held(jobs: Collection[str]) -> list[tuple[str, str]]:
    """Return which of these jobs SLURM holds, with its reason; none where ``squeue`` does not answer."""
    command = ["squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%r"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    pairs = [line.partition("|") for line in said.splitlines()]
    return [(number, reason) for number, _, reason in pairs if number in jobs and HELD.search(reason)]


def listen(every: float = LOOK_EVERY) -> None:
    """Have this process's Snakemake tell a listener of its SLURM jobs, which looks at the queue now and then.

    Args:
        every: seconds between two looks.
    """
    report_error, report_submission = (
        AbstractExecutor.report_job_error,
        AbstractExecutor.report_job_submission,
    )
    if getattr(report_error, "__wrapped__", None) is not None:  # a Snakefile is parsed more than once
        return
    listener = Listener()

    @functools.wraps(report_error)
    def on_error(self: Any, job_info: Any, msg: str | None = None, **more: Any) -> None:
        report_error(self, job_info, listener.refused(self, job_info.job, msg), **more)

    @functools.wraps(report_submission)
    def on_submission(self: Any, job_info: Any) -> None:
        if job_info.external_jobid:
            if not listener.jobs:
                threading.Thread(target=look, daemon=True).start()
            listener.jobs.add(str(job_info.external_jobid))
        report_submission(self, job_info)

    def look() -> None:
        while True:
            time.sleep(every)
            listener.held()

    AbstractExecutor.report_job_error = on_error
    AbstractExecutor.report_job_submission = on_submission
