"""What sbatch says when it refuses a job is said once, with the line to change; held jobs are named."""

import types

import pytest

from detrojan.workflow import slurm_words

MESSAGE = (
    "SLURM sbatch failed. The error message was 'sbatch: error: {}'.\n    sbatch call:\n        sbatch -p x\n"
)
ACCOUNT = "Batch job submission failed: Invalid account or account/partition combination specified"


class Job:
    attempt, restart_times = 1, 2


@pytest.fixture
def executor():
    return types.SimpleNamespace(
        workflow=types.SimpleNamespace(scheduler=types.SimpleNamespace(keepgoing=True))
    )


@pytest.mark.parametrize(
    ("said", "key", "then"),
    [
        (ACCOUNT, "slurm_account:", "stop"),
        ("invalid partition specified: nowhere", "slurm_partition:", "stop"),
        ("Batch job submission failed: Invalid qos specification", "default-resources:", "stop"),
        ("Batch job submission failed: Invalid generic resource (gres) specification", "gpu:", "stop"),
        ("Memory specification can not be satisfied", "slurm_partition:", "give up"),
        ("Batch job submission failed: Requested time limit is invalid", "slurm_partition:", "give up"),
        (
            "Batch job submission failed: Requested node configuration is not available",
            "slurm_partition:",
            "give up",
        ),
        ("Batch job submission failed: Socket timed out on send/recv operation", "retries:", "retry"),
        ("Job violates accounting/QOS policy (job submit limit, user's size)", "jobs:", "retry"),
        ("Something that nobody knows", "default-resources:", "stop"),
    ],
)
def test_each_kind_of_refusal_has_a_line_of_the_profile(said, key, then):
    kind = slurm_words.kind_of(said)
    assert (kind.key, kind.then) == (key, then)
    text = slurm_words.advice(kind)
    number = int(text.partition("slurm/config.yaml, line ")[2].split(maxsplit=1)[0].rstrip(".,;):"))
    assert slurm_words.PROFILE.read_text().splitlines()[number - 1].strip().startswith(key)


def test_a_wrong_account_is_said_once_and_ends_the_run(executor, caplog):
    listener, jobs = slurm_words.Listener(), [Job(), Job()]
    for job in jobs:
        assert listener.refused(executor, job, MESSAGE.format(ACCOUNT)) == "sbatch refused it"
        assert job.attempt > job.restart_times  # so that Snakemake doesn't try again
    assert not executor.workflow.scheduler.keepgoing
    assert caplog.text.count(ACCOUNT) == 1
    assert "Set SBATCH_ACCOUNT, or `slurm_account` in slurm/config.yaml, line " in caplog.text


def test_what_ails_one_job_leaves_the_others_alone(executor):
    listener, job = slurm_words.Listener(), Job()
    listener.refused(executor, job, MESSAGE.format("Memory specification can not be satisfied"))
    assert job.attempt > job.restart_times
    listener.jobs.add("1")
    listener.refused(executor, job, MESSAGE.format("Something that nobody knows"))
    assert executor.workflow.scheduler.keepgoing


def test_a_controller_that_is_slow_is_asked_again(executor):
    job = Job()
    listener = slurm_words.Listener()
    listener.refused(executor, job, MESSAGE.format("Socket timed out on send/recv operation"))
    assert executor.workflow.scheduler.keepgoing
    assert job.attempt == 1
    assert listener.refused(executor, job, "SLURM status is: 'FAILED'.") == "SLURM status is: 'FAILED'."
    assert listener.refused(executor, job, None) is None


def test_held_jobs_of_ours_are_named_once(tmp_path, monkeypatch, caplog):
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho '7|launch failed requeued held'\necho '8|Resources'\necho '9|JobHeldUser'\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    listener = slurm_words.Listener()
    listener.jobs |= {"7", "8"}
    listener.held()
    listener.held()
    assert caplog.text.count("SLURM holds job 7 (launch failed requeued held)") == 1
    assert "scontrol release 7" in caplog.text
    assert "job 9" not in caplog.text
    monkeypatch.setenv("PATH", "/nowhere")
    listener.held()
