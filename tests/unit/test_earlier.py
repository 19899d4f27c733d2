"""A run does not begin on what jobs of an earlier one are still making."""

import os
import socket
import subprocess
import time
import types

import pytest
from snakemake.exceptions import WorkflowError

from detrojan.workflow import attempts, earlier
from detrojan.workflow.attempts import Diary

AXES = {"dataset": "toy", "spc": 2, "draws": "0-1"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A working folder without records, outside of SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def workflow(**axes):
    """Return a workflow of Snakemake's that is about to run one job."""
    texts = {name: str(value) for name, value in (AXES | axes).items()}
    # As where another workflow uses ours as a module.
    job = types.SimpleNamespace(rule=types.SimpleNamespace(name="detrojan_sample"), wildcards=texts)
    return types.SimpleNamespace(dag=types.SimpleNamespace(needrun_jobs=lambda: [job]))


def started(**axes):
    """Leave the record of a job that this very process runs."""
    diary = Diary("sample", AXES | axes, "logs/x.log")
    diary.start(mem_mb=None, runtime_min=None)
    return diary


def test_a_job_that_still_runs_holds_up_the_run(caplog):
    started()
    with pytest.raises(WorkflowError) as caught:
        earlier.wait(workflow(), patience=0.1)
    said = str(caught.value)
    assert said.startswith("jobs of an earlier run are still at work")
    assert "sample dataset=toy spc=2 draws=0-1" in said
    assert f"end them (kill {os.getpid()})" in said
    assert "waiting for them" in caplog.text


def test_one_that_ends_meanwhile_does_not(monkeypatch):
    diary = started()
    monkeypatch.setattr(earlier.time, "sleep", lambda seconds: diary.done())
    earlier.wait(workflow(), patience=60)


def test_nor_do_jobs_of_other_cells_and_dead_ones(monkeypatch):
    monkeypatch.setattr(earlier.time, "sleep", lambda seconds: pytest.fail("waited"))
    started(spc=10)
    Diary("samples", AXES, "logs/x.log").start(mem_mb=None, runtime_min=None)  # another version's
    Diary("sample", {"dataset": "toy"}, "logs/x.log").start(mem_mb=None, runtime_min=None)
    earlier.wait(workflow())
    process = subprocess.Popen(["true"])
    process.wait()
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    started()
    earlier.wait(workflow())


@pytest.mark.parametrize(
    ("host", "state", "held"),
    [
        ("elsewhere", "RUNNING", True),
        ("elsewhere", "TIMEOUT", False),
        # The driver lives in the SLURM job in which the job has died.
        (socket.gethostname(), "RUNNING", False),
        (socket.gethostname(), "PENDING", True),
    ],
)
def test_slurm_is_asked(monkeypatch, host, state, held):
    one = attempts.Attempt(time.time(), host, 2**22 + 1, "7", None, None)
    monkeypatch.setattr(attempts, "read", lambda: [attempts.Record("sample", AXES, "l", [one])])
    monkeypatch.setattr(attempts, "slurm_states", lambda records: {"7": state})
    if held:
        with pytest.raises(WorkflowError, match=r"end them \(scancel 7\)"):
            earlier.wait(workflow(), patience=0)
    else:
        earlier.wait(workflow(), patience=0)
