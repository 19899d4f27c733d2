"""Jobs run out of time and memory, are cancelled, preempted, lost; the driver dies: the tables stay."""

import signal

import pytest

from detrojan import attempts
from detrojan.tables import OK, OUT_OF_MEMORY

pytestmark = pytest.mark.cluster

CLEAN = "*/*/none/ratio-0/seed-0"
# Keeps training in the state in which a test wants to meet it; it changes no result.
SAVED = "        artifacts.write_tensors(tensors, self.path, fingerprint=self.fingerprint, history=rows)\n"
HOLD = """        logger.info("%d epochs are saved", len(history))
        while len(history) == 2 and Path("hold").exists():
            time.sleep(0.1)
"""
# Takes more memory than a job has that asks for 1,800 MB, and less than one that asks for 3,600.
HUNGRY = '''"""A defense that needs memory."""

import copy

from typing import ClassVar

import torch

from detrojan.defenses.base import Defense


class Hungry(Defense):
    """Does nothing with 1.5 GB."""

    smoke: ClassVar[dict[str, object]] = {}

    def __call__(self, model, clean, *, rng):
        """Return a copy."""
        kept = torch.ones(1_500_000_000, dtype=torch.uint8)
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
    """Return ``workshop`` with a training that stops after two epochs while there is a file ``hold``."""
    study = workshop.study()
    study["training"] = {"epochs": 4, "batch_size": 32}
    study["grid"]["defenses"] = list(defenses)
    workshop.write(study)
    workshop.edit("src/detrojan/training.py", SAVED, SAVED + HOLD)
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

    def job():
        running = [j for j in cluster.jobs(workshop.folder, rule="rule_train_") if j.state == "RUNNING"]
        return running and "2 epochs are saved" in training(workshop) and running[0]

    return driver, cluster.until(job, 180)


def stopped(workshop):
    """Return whether a job has noted that it was told to stop."""
    records = attempts.read(workshop.folder / attempts.FOLDER)
    return any(attempt.reason == "told to stop by SIGTERM" for r in records for attempt in r.attempts)


def release(workshop):
    """Let training go on, now or when it is started again."""
    (workshop.folder / "hold").unlink()


def end(process, seconds=240):
    """Wait for a driver; return its exit code."""
    return process.wait(seconds)


def test_a_cancelled_job_goes_on_where_it_was(cluster, workshop, expected):
    driver, job = started(cluster, prepared(workshop))
    cluster.ask("scancel", job.number)
    cluster.until(lambda: stopped(workshop))
    release(workshop)
    assert end(driver) == 0, (workshop.folder / "driver.log").read_text()[-3000:]
    assert "resuming after epoch" in training(workshop)
    assert_undisturbed(workshop, expected)


def test_a_preempted_job_is_queued_again_and_goes_on(cluster, workshop, expected, monkeypatch):
    monkeypatch.setitem(workshop.SITE, "DETROJAN_GPU_PARTITION", "low")
    driver, job = started(cluster, prepared(workshop))
    cluster.ask("sbatch", "-p", "high", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2")
    cluster.until(lambda: stopped(workshop))
    release(workshop)
    assert end(driver) == 0, (workshop.folder / "driver.log").read_text()[-3000:]
    (after,) = [other for other in cluster.jobs(workshop.folder) if other.number == job.number]
    assert after.restarts == 1
    assert "resuming after epoch" in training(workshop)
    assert_undisturbed(workshop, expected)


def test_a_lost_node_costs_no_more_than_its_job(cluster, workshop, expected):
    driver, job = started(cluster, prepared(workshop))
    node = cluster.ask("squeue", "-h", "-j", job.number, "-o", "%N").strip()
    cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    release(workshop)
    try:
        assert end(driver) == 0, (workshop.folder / "driver.log").read_text()[-3000:]
    finally:
        cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    assert "resuming after epoch" in training(workshop)
    assert_undisturbed(workshop, expected)


def test_a_driver_that_is_interrupted_or_killed_is_started_again(cluster, workshop, expected):
    driver, _ = started(cluster, prepared(workshop))
    driver.send_signal(signal.SIGINT)
    assert end(driver) != 0
    cluster.until(lambda: not cluster.waiting(workshop.folder), 120)
    driver = workshop.start()
    cluster.until(lambda: "resuming after epoch" in training(workshop), 120)
    driver.kill()
    driver.wait()
    release(workshop)
    # SLURM's job is not the driver's child: it goes on and ends.
    cluster.until(lambda: not cluster.waiting(workshop.folder), 120)
    workshop.snakemake("--unlock")
    workshop.snakemake()
    assert_undisturbed(workshop, expected)


def test_jobs_out_of_time_and_memory_get_more(cluster, workshop):
    prepared(workshop, defenses=("none", "hungry"))
    (workshop.code / "src/detrojan/defenses/clean_data/hungry.py").write_text(HUNGRY)
    limits = ["train:runtime=attempt*attempt", "defend:mem_mb=1800*attempt", "evaluate:mem_mb=1800*attempt"]
    driver, _ = started(cluster, workshop, "--set-resources", *limits)
    # Limits are whole minutes, and SLURM looks every half a minute.
    cluster.until(lambda: stopped(workshop), 120)
    release(workshop)
    assert end(driver) == 0, (workshop.folder / "driver.log").read_text()[-3000:]
    jobs = cluster.jobs(workshop.folder)
    trained = [job for job in jobs if "rule_train_" in job.comment and "none" in job.comment]
    assert [(job.state, job.limit) for job in trained] == [("TIMEOUT", "1:00"), ("COMPLETED", "4:00")]
    shards = [job for job in jobs if "shard" in job.comment and "badnets" in job.comment]
    # Without cgroups SLURM kills a job that outgrows its memory, but calls it failed.
    assert [(job.state, job.memory) for job in shards] == [("FAILED", "1800M"), ("COMPLETED", "3600M")]
    assert "resuming after epoch" in training(workshop)
    assert {row["status"] for row in workshop.table("cells").to_pylist()} == {OK}


def test_a_study_can_be_closed(cluster, workshop, expected):
    prepared(workshop, defenses=("none", "ft", "hungry"))
    (workshop.code / "src/detrojan/defenses/clean_data/hungry.py").write_text(HUNGRY)
    limits = ["--set-resources", "defend:mem_mb=1800", "evaluate:mem_mb=1800"]
    workshop.snakemake(*limits, check=False)
    assert workshop.returncode != 0
    assert not (workshop.folder / "results/tables/cells.parquet").exists()
    records = attempts.read(workshop.folder / attempts.FOLDER)
    states = [record.states(attempts.slurm_states(records)) for record in records]
    assert states == [["killed"] * 3] * 2, records
    workshop.snakemake(*limits, "--config", "close=true")
    rows = workshop.table("cells").to_pylist()
    hungry = [row for row in rows if row["defense"] == "hungry"]
    assert {row["status"] for row in hungry} == {OUT_OF_MEMORY}
    (reason,) = {row["reason"] for row in hungry}
    assert reason == "defend was killed without a warning, as for memory, 3 times: 1800, 1800, 1800 MB"
    rest = [row for row in rows if row["defense"] != "hungry"]
    code = [row | {"code": ""} for row in expected.table("cells").to_pylist()]
    assert [row | {"code": ""} for row in rest] == code
    # With enough memory, a plain run does what was given up.
    workshop.snakemake("--set-resources", "defend:mem_mb=3600", "evaluate:mem_mb=3600")
    assert {row["status"] for row in workshop.table("cells").to_pylist()} == {OK}
