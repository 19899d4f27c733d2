"""A study on a real SLURM gives what it gives on one machine, and its jobs ask for what they need."""

import collections
import re
import subprocess
import sys

import pytest

from detrojan.workflow import attempts

from .conftest import ClusterWorkshop

pytestmark = pytest.mark.cluster

# Rules that compute with a GPU. A shard is defended and evaluated in one job.
ON_GPU = {"trigger", "train", "evaluate_untouched", "check_trigger", "shard_defend_evaluate"}
ON_CPU = {"dataset", "sample", "poison", "triggered", "aggregate", "report"}


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """A workshop whose study has been run on the cluster, once for all tests here; don't change it."""
    workshop = ClusterWorkshop.make(tmp_path_factory.mktemp("cluster") / "a study")
    workshop.snakemake()
    return workshop


def rule(job):
    """Return the rule or the group that the plugin says a job is of."""
    return re.fullmatch("rule_(.+?)(_wildcards_.*)?", job.comment)[1]


@pytest.mark.parametrize("name", ["cells", "models", "summary"])
def test_tables_are_those_of_one_machine(run, undisturbed, name):
    table = run.table(name)
    assert table.num_rows
    assert table.equals(undisturbed.table(name))


@pytest.mark.parametrize("pattern", ["models/**/model.safetensors", "metrics/**/predictions.parquet"])
def test_files_are_those_of_one_machine(run, undisturbed, pattern):
    ours = {path.relative_to(run.folder): path.read_bytes() for path in run.folder.glob(f"results/{pattern}")}
    folder = undisturbed.folder
    theirs = {path.relative_to(folder): path.read_bytes() for path in folder.glob(f"results/{pattern}")}
    assert len(ours) >= 2
    assert ours == theirs


def test_slurm_gives_gpus_to_the_rules_that_compute(cluster, run):
    jobs = cluster.jobs(run.folder)
    found = collections.defaultdict(set)
    for job in jobs:
        found[job.partition, job.gpus].add(rule(job))
    assert found == {("gpu", 1): ON_GPU, ("cpu", 0): ON_CPU}
    charged = cluster.accounted("AllocTRES", jobs)
    assert {job.number for job in jobs if job.gpus} == {n for n in charged if "gres/gpu=1" in charged[n]}


def test_every_job_ends_at_its_first_start(cluster, run):
    jobs = cluster.jobs(run.folder)
    assert {(job.state, job.restarts) for job in jobs} == {("COMPLETED", 0)}
    assert {job.account for job in jobs} == {"study"}
    # One job a shard; nothing twice, nothing that is not in the plan.
    planned = collections.Counter(rule(job) for job in jobs)
    models = run.table("models").num_rows
    assert (
        planned["train"] == planned["evaluate_untouched"] == planned["shard_defend_evaluate"] == models == 2
    )
    assert planned["check_trigger"] == 1
    assert sum(planned.values()) == 3 * models + 1 + len(ON_CPU) + 1
    assert cluster.ask("squeue", "--noheader") == ""


def test_a_second_run_has_nothing_to_do(cluster, run):
    jobs = cluster.jobs(run.folder)
    # Word for word what a user types, without what the tests add to make haste.
    plain = [sys.executable, "-m", "snakemake", "--profile", "slurm", "--configfile", "study.yaml"]
    done = subprocess.run(
        plain, cwd=run.folder, env=run.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout + done.stderr
    assert cluster.jobs(run.folder) == jobs


def test_the_cluster_does_to_jobs_what_clusters_do(cluster, tmp_path):
    """The tests of breakage lean on this: what SLURM does, and that both of its commands tell."""

    def submit(script, *options):
        log = ("--chdir", tmp_path, "-o", tmp_path / "%j.log")
        return int(cluster.ask("sbatch", "--parsable", *log, *options, "--wrap", script))

    def states():
        return {job.number: job.state for job in cluster.jobs(tmp_path)}

    greedy = submit("""python3 -c 'import time; kept = bytearray(300 << 20); time.sleep(60)'""", "--mem=100")
    failing = submit("exit 3")
    stopped = submit("sleep 60")
    cluster.until(lambda: states()[stopped] == "RUNNING")
    cluster.ask("scancel", stopped)
    cluster.until(lambda: not cluster.waiting(tmp_path))

    node = ("-N1", "--exclusive")
    kept = submit("sleep 60", "-p", "cpu", *node)
    preempted = submit('test -n "$SLURM_RESTART_COUNT" || sleep 60', "-p", "low", *node)
    cluster.until(lambda: [states()[kept], states()[preempted]] == ["RUNNING", "RUNNING"])
    urgent = submit("true", "-p", "high", *node)
    cluster.until(lambda: states()[urgent] == "COMPLETED")
    assert states()[kept] == "RUNNING"  # only jobs in `low` give way
    cluster.ask("scancel", kept)
    cluster.until(lambda: not cluster.waiting(tmp_path))

    expected = {
        greedy: "FAILED",  # with cgroups OUT_OF_MEMORY
        failing: "FAILED",
        stopped: "CANCELLED",
        kept: "CANCELLED",
        preempted: "COMPLETED",
        urgent: "COMPLETED",
    }
    assert states() == expected
    assert "exceeded memory limit" in (tmp_path / f"{greedy}.log").read_text()
    assert {job.number: job.restarts for job in cluster.jobs(tmp_path) if job.restarts} == {preempted: 1}

    def charged():
        states = cluster.accounted("State", cluster.jobs(tmp_path))
        return {number: state.split()[0] for number, state in states.items()}  # "CANCELLED by 0"

    cluster.until(lambda: charged() == expected)
    record = attempts.Record("train", {}, "", [attempt(number) for number in expected])
    assert attempts.slurm_states([record]) == {str(number): state for number, state in expected.items()}


def attempt(number):
    """Return a start of a job under a SLURM job's number."""
    return attempts.Attempt(started=0, host="n1", pid=1, slurm_job=str(number), mem_mb=None, runtime_s=None)
