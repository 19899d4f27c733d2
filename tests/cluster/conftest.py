"""A SLURM cluster on this machine, and a workshop whose studies run on it."""

import copy
import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import pytest

from tests.workflow import conftest as local

HERE = Path(__file__).parent
# Debian: slurm-wlm, slurmdbd, munge and mariadb-server.
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "slurmdbd", "munged", "mariadbd", "mariadb-install-db")
DAEMONS = "/usr/sbin:/usr/local/sbin"  # a user's PATH may lack them
CONFIGURATION = Path("/etc/slurm/slurm.conf")
LOCK = Path(tempfile.gettempdir(), "detrojan-cluster.lock")
PATIENCE_S = 60
# Once a job has ended, and not after the 40 seconds that suit a cluster.
QUICK = (
    *("--slurm-init-seconds-before-status-checks", "1"),
    *("--max-status-checks-per-second", "1"),
    *("--latency-wait", "10"),
)
# One model, one defense, one draw: each SLURM job takes three Python starts.
STUDY = copy.deepcopy(local.STUDY)
STUDY["training"] = {"epochs": 2, "batch_size": 32}
STUDY["grid"] |= {"attacks": ["badnets"], "defenses": ["none", "ft"], "draws": ["0-0"]}


def obstacle():
    """Return why no cluster can be started here; None if one can."""
    path = os.pathsep.join([os.environ["PATH"], DAEMONS])
    missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if missing:
        return (
            f"not installed: {', '.join(missing)} (Debian: slurm-wlm slurmdbd munge mariadb-server, "
            "with --no-install-recommends)"
        )
    if os.geteuid() != 0:
        return "starting a SLURM cluster takes root"
    if CONFIGURATION.exists() and "tests/cluster/slurm-up" not in CONFIGURATION.read_text():
        return f"{CONFIGURATION} belongs to another cluster"
    return None


@dataclasses.dataclass(frozen=True)
class Job:
    """A job that SLURM knows.

    Attributes:
        number: SLURM's number.
        state: such as ``RUNNING``.
        restarts: how often it was requeued.
        partition: where it was sent.
        comment: what the plugin says of it: ``rule_X_wildcards_...``.
        tres: what it was given; empty if nothing yet.
        limit: of its time.
        memory: that it asked for.
        account: that it is charged to.
    """

    number: int
    state: str
    restarts: int
    partition: str
    comment: str
    tres: str
    limit: str
    memory: str
    account: str

    @property
    def gpus(self):
        """Return how many GPUs it was given."""
        given = dict(item.split("=") for item in self.tres.split(",") if item)
        return int(given.get("gres/gpu", 0))


class Cluster:
    """SLURM's commands, for tests."""

    # In this order they make a Job, but for the last.
    FIELDS = (
        "JobID:|,State:|,RestartCnt:|,Partition:|,Comment:|,tres-alloc:|,"
        "TimeLimit:|,MinMemory:|,Account:|,WorkDir:|"
    )

    def ask(self, *command):
        """Run a command of SLURM; return what it prints."""
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def jobs(self, folder, *, rule=""):
        """Return the jobs that were submitted from ``folder``, ended ones too, the first one first.

        Args:
            rule: keep those whose comment has it, such as ``train``; all if empty.
        """
        lines = self.ask("squeue", "--noheader", "--states=all", "-O", self.FIELDS).splitlines()
        found = []
        for line in lines:
            number, state, restarts, *others, workdir, _ = line.split("|")
            if workdir == str(folder) and rule in others[1]:
                found.append(Job(int(number), state, int(restarts), *others))
        return sorted(found, key=lambda job: job.number)

    def accounted(self, field, jobs):
        """Return what the accounting database says of jobs, by their numbers: a column of ``sacct``."""
        numbers = ",".join(str(job.number) for job in jobs)
        lines = self.ask("sacct", "-X", "-n", "-P", "-j", numbers, "-o", f"JobID,{field}").splitlines()
        return {int(number): value for number, value in (line.split("|") for line in lines)}

    def waiting(self, folder):
        """Return the jobs of ``folder`` that have not ended."""
        ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"}
        return [job for job in self.jobs(folder) if job.state not in ended]

    def until(self, what, seconds=PATIENCE_S):
        """Call ``what`` until it returns something true; return that."""
        end = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < end, f"nothing after {seconds} s; {self.ask('squeue', '--states=all')}"
            time.sleep(0.2)
        return found


@pytest.fixture(scope="session")
def cluster():
    """Start SLURM for the tests of this run, and stop it after them; skip them where it can't be."""
    reason = obstacle()
    if reason:
        # Where a cluster is promised, a skipped test must not pass for one that has been run.
        (pytest.fail if os.environ.get("DETROJAN_CLUSTER") == "required" else pytest.skip)(reason)
    with LOCK.open("w") as lock:
        _take(lock)
        folder = Path(tempfile.mkdtemp(prefix="detrojan-cluster-"))
        up = subprocess.run([HERE / "slurm-up", folder], capture_output=True, text=True, check=False)
        try:
            assert up.returncode == 0, f"{up.stderr}\n{_logs(folder)}"
            yield Cluster()
        finally:
            down = subprocess.run([HERE / "slurm-down"], capture_output=True, text=True, check=False)
            shutil.rmtree(folder)
        assert down.returncode == 0, down.stderr


def _take(lock, seconds=1200):
    """Wait for other test runs of this machine: it has one configuration of SLURM."""
    end = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert time.monotonic() < end, f"another test run has kept {LOCK} for {seconds} s"
            time.sleep(1)


def _logs(folder):
    """Return the ends of the daemons' logs."""
    logs = sorted((folder / "log").glob("*.log"))
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in logs)


@dataclasses.dataclass
class ClusterWorkshop(local.Workshop):
    """A workshop whose Snakemake sends its jobs to the cluster."""

    drivers: list = dataclasses.field(default_factory=list)

    # What a user of the cluster sets.
    SITE: ClassVar = {"SBATCH_PARTITION": "cpu", "DETROJAN_GPU_PARTITION": "gpu", "SBATCH_ACCOUNT": "study"}

    @classmethod
    def make(cls, folder):
        """Copy the code into ``folder`` and write the study file beside it."""
        workshop = super().make(folder)
        workshop.write(STUDY)
        return workshop

    def study(self):
        """Return a copy of the study file's content that may be changed."""
        return copy.deepcopy(STUDY)

    def command(self, *arguments):
        """Return the command that runs Snakemake on the study."""
        driver = [sys.executable, str(HERE / "driver.py"), "--profile", "slurm", *QUICK]
        return [*driver, "--configfile", "study.yaml", *map(str, arguments)]

    def ended(self, *arguments):
        """Run Snakemake to its end, as a driver of the cluster; return what became of it."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    @property
    def environment(self):
        """What a user of the cluster sets, besides."""
        own = {name: value for name, value in super().environment.items() if not name.startswith("SLURM_")}
        return own | self.SITE

    def start(self, *arguments):
        """Start Snakemake and return its process; what it prints goes into ``driver.log``."""
        with (self.folder / "driver.log").open("a") as log:
            driver = subprocess.Popen(
                self.command(*arguments), cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )
        self.drivers.append(driver)
        return driver

    def stop(self, cluster):
        """End what is under way: a test that fails must not leave it to the next one."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        for job in cluster.waiting(self.folder):
            cluster.ask("scancel", "--quiet", job.number)

    def locally(self, *arguments):
        """Run the study on this machine, without the cluster; return the output."""
        return local.Workshop(self.code, self.folder).snakemake(*arguments)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A workshop whose study has been run on this machine, once for all tests: don't change it."""
    workshop = ClusterWorkshop.make(tmp_path_factory.mktemp("local") / "study")
    workshop.locally()
    return workshop


@pytest.fixture
def workshop(cluster, tmp_path):
    """A workshop in which nothing has been run."""
    # A space in the path, as in all tests of the workflow.
    made = ClusterWorkshop.make(tmp_path / "on cluster")
    yield made
    made.stop(cluster)
