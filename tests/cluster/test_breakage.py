"""Jobs run out of time and memory, are cancelled, preempted, lost; the driver dies: the tables stay."""

import re
import signal
from collections import Counter

import pytest

from detrojan.storage.columns import OK, OUT_OF_MEMORY
from detrojan.workflow import attempts

pytestmark = pytest.mark.cluster

CLEAN = "*/*/none/ratio-0/seed-0"
# Keeps training in the state in which a test wants to meet it; it changes no result.
SAVED = "        artifacts.write_tensors(tensors, self.path, fingerprint=self.fingerprint, history=rows)\n"
HOLD = """        logger.info("%d epochs are saved", len(history))
        while Path("hold").exists():
            time.sleep(0.1)
"""
# Takes so much memory, and holds it until SLURM has looked.
HUNGRY = '''"""A defense that needs memory."""

import copy
import time
from typing import ClassVar

import torch

from detrojan.defenses.base import Defense


class Hungry(Defense):
    """Does nothing with many bytes."""

    smoke: ClassVar[dict[str, object]] = {{}}

    def __call__(self, model, clean, *, rng):
        """Return a copy."""
        kept = torch.ones({}, dtype=torch.uint8)
        time.sleep(4)
        return copy.deepcopy(model) if kept[-1] else model
'''


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The same study as the tests below, undisturbed on this machine."""
    from .conftest import ClusterWorkshop

    workshop = prepared(ClusterWorkshop.make(tmp_path_factory.mktemp("expected") / "study"))
    workshop.locally()
    return workshop


def prepared(workshop, *, defenses=("none", "ft")):
    """Return ``workshop`` with a training that waits after each epoch while there is a file ``hold``."""
    study = workshop.study()
    study["training"] = {"epochs": 4, "batch_size": 32}
    study["grid"]["defenses"] = list(defenses)
    workshop.write(study)
    workshop.edit("src/detrojan/learning/training.py", SAVED, SAVED + HOLD)
    return workshop


def assert_undisturbed(workshop, expected):
    """Check that all that a study leaves is what it leaves where nothing happens."""
    for name in ("cells", "models", "summary"):
        found, right = workshop.table(name), expected.table(name)
        if "code" in right.column_names:  # the pause is code
            found, right = found.drop_columns("code"), right.drop_columns("code")
        assert found.equals(right), name
    for model in expected.folder.glob("results/models/**/model.safetensors"):
        again = workshop.folder / model.relative_to(expected.folder)
        assert again.read_bytes() == model.read_bytes(), model
    assert not list((workshop.folder / "logs/attempts").iterdir())


def training(workshop):
    """Return the log of the clean model's training, empty if there is none yet."""
    return "\n".join(log.read_text() for log in workshop.folder.glob(f"logs/train/{CLEAN}.log"))


def started(cluster, workshop, *arguments):
    """Start the study; return its driver and the job of the clean model's training, which waits."""
    (workshop.folder / "hold").touch()
    driver = workshop.start(*arguments)
    return driver, waiting_job(cluster, workshop, 1)


def waiting_job(cluster, workshop, epochs):
    """Return the clean model's job of training once it has saved so many epochs."""

    def job():
        running = [j for j in cluster.jobs(workshop.folder, rule="rule_train_") if j.state == "RUNNING"]
        return running and f"{epochs} epochs are saved" in training(workshop) and running[0]

    return cluster.until(job, 180)


def release(workshop):
    """Let training go on, now or when it is started again."""
    (workshop.folder / "hold").unlink()


def end(driver, workshop, seconds=300):
    """Wait for a driver; it must end well."""
    assert driver.wait(seconds) == 0, (workshop.folder / "driver.log").read_text()[-3000:]


def test_cancelled_preempted_and_on_a_lost_node_training_goes_on_where_it_was(
    cluster, workshop, expected, monkeypatch
):
    monkeypatch.setitem(workshop.SITE, "DETROJAN_GPU_PARTITION", "low")
    driver, cancelled = started(cluster, prepared(workshop))
    cluster.ask("scancel", cancelled.number)
    preempted = waiting_job(cluster, workshop, 2)
    assert preempted.number != cancelled.number
    cluster.ask("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    lost = waiting_job(cluster, workshop, 3)
    assert (lost.number, lost.restarts) == (preempted.number, 1)
    node = cluster.ask("squeue", "-h", "-j", lost.number, "-o", "%N").strip()
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        cluster.until(lambda: lost not in cluster.jobs(workshop.folder))
        release(workshop)
        end(driver, workshop)
    finally:
        if "down" in cluster.ask("sinfo", "-h", "-n", node, "-o", "%T"):
            cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    (last,) = [job for job in cluster.jobs(workshop.folder) if job.number == lost.number]
    assert last.restarts == 2
    assert "resuming after epoch 3" in training(workshop)
    assert_undisturbed(workshop, expected)


def test_a_driver_that_is_interrupted_or_killed_is_started_again(cluster, workshop, expected):
    driver, _ = started(cluster, prepared(workshop))
    driver.send_signal(signal.SIGINT)
    assert driver.wait(120) != 0
    cluster.until(lambda: not cluster.waiting(workshop.folder), 120)
    driver = workshop.start()
    waiting_job(cluster, workshop, 2)
    driver.kill()
    driver.wait()
    release(workshop)
    # SLURM's jobs are not the driver's children: they go on and end.
    cluster.until(lambda: not cluster.waiting(workshop.folder), 120)
    workshop.snakemake("--unlock")
    workshop.snakemake()
    assert_undisturbed(workshop, expected)


def test_limits_grow_with_each_attempt_and_what_they_kill_for_good_can_be_closed(cluster, workshop):
    prepared(workshop, defenses=("none", "hungry", "starving"))
    for name, size in (("hungry", 1_500_000_000), ("starving", 9_000_000_000)):
        defense = HUNGRY.format(size).replace("Hungry", name.title())
        (workshop.code / f"src/detrojan/defenses/clean_data/{name}.py").write_text(defense)
    limits = ["train:runtime=attempt*attempt", "defend:mem_mb=1800*attempt", "evaluate:mem_mb=1800*attempt"]
    driver, _ = started(cluster, workshop, "--set-resources", *limits)
    # Limits are whole minutes, and SLURM looks every half a minute.
    waiting_job(cluster, workshop, 2)
    release(workshop)
    assert driver.wait(400) != 0
    jobs = cluster.jobs(workshop.folder)
    trained = [job for job in jobs if "rule_train_" in job.comment and "none" in job.comment]
    assert [(job.state, job.limit) for job in trained] == [("TIMEOUT", "1:00"), ("COMPLETED", "4:00")]
    # Without cgroups SLURM kills a job that outgrows its memory, but calls it failed.
    shards = Counter((job.state, job.memory) for job in jobs if "shard" in job.comment)
    assert shards == {
        ("FAILED", "1800M"): 4,
        ("COMPLETED", "3600M"): 2,
        ("FAILED", "3600M"): 2,
        ("FAILED", "5400M"): 2,
    }
    assert not (workshop.folder / "results/tables/cells.parquet").exists()
    records = attempts.read(workshop.folder / attempts.FOLDER)
    states = [record.states(attempts.slurm_states(records)) for record in records]
    assert states == [["killed"] * 3] * 2, records

    workshop.snakemake("--config", "close=true")
    rows = workshop.table("cells").to_pylist()
    assert {row["defense"] for row in rows} == {"none", "hungry", "starving"}
    given_up = [row for row in rows if row["defense"] == "starving"]
    assert {row["status"] for row in rows if row not in given_up} == {OK}
    assert {(row["status"], row["reason"]) for row in given_up} == {
        (OUT_OF_MEMORY, "defend was killed without a warning, as for memory, 3 times: 1800, 3600, 5400 MB")
    }
    # A run without the word tries again what was given up.
    assert re.search("^defend +2 ", workshop.snakemake("--dry-run"), re.MULTILINE)


def test_a_partition_that_there_is_not_is_said_once_and_ends_the_run(workshop, monkeypatch):
    monkeypatch.setitem(workshop.SITE, "SBATCH_PARTITION", "nowhere")
    ended = workshop.ended()
    assert ended.returncode == 1
    assert ended.stdout.count("invalid partition specified: nowhere") == 1, ended.stdout
    assert (
        "SBATCH_PARTITION and DETROJAN_GPU_PARTITION, or `slurm_partition` in slurm/config.yaml, line "
        in (ended.stdout)
    )
    assert "Trying to restart" not in ended.stdout
    assert not list(workshop.folder.glob("results/datasets/*"))


def test_a_job_that_slurm_holds_is_named(cluster, workshop, expected):
    prepared(workshop)
    workshop.edit("src/detrojan/workflow/slurm_words.py", "LOOK_EVERY = 300.0", "LOOK_EVERY = 2.0")
    driver, job = started(cluster, workshop)
    cluster.ask("scontrol", "requeuehold", job.number)
    said = workshop.folder / "driver.log"
    cluster.until(lambda: f"SLURM holds job {job.number} (" in said.read_text(), 60)
    # A job that is requeued may not start again at once.
    cluster.ask("scontrol", "release", job.number)
    release(workshop)
    end(driver, workshop)
    assert_undisturbed(workshop, expected)
