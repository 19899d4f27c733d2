"""Jobs on one machine spread over its GPUs: never two on one unless asked."""

import os
import subprocess
import sys
import time

import pytest

from detrojan.workflow import gpus

# Takes a GPU, says which and when, works a moment.
JOB = """
import sys, time
from pathlib import Path
from detrojan.workflow import gpus
name = gpus.claim(Path(sys.argv[1]))
begun = time.monotonic()
time.sleep(0.6)
print(name, begun, time.monotonic())
"""


def run_jobs(number, folder, environment):
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(number)
    ]
    lines = [job.communicate(timeout=60)[0].split() for job in jobs]
    return [(name, float(begun), float(ended)) for name, begun, ended in lines]


def most_at_once(stays):
    return max(sum(b <= begun < e for _, b, e in stays) for _, begun, _ in stays)


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv(gpus.JOBS_PER_GPU, raising=False)
    return {
        name: value for name, value in os.environ.items() if name not in ("SLURM_JOB_ID", gpus.JOBS_PER_GPU)
    }


def test_five_jobs_on_two_gpus(tmp_path, environment):
    stays = run_jobs(5, tmp_path, environment | {gpus.VISIBLE: "0,1"})
    assert {name for name, _, _ in stays} == {"0", "1"}
    for gpu in "01":
        assert most_at_once([stay for stay in stays if stay[0] == gpu]) == 1


def test_two_jobs_on_a_gpu_if_asked(tmp_path, environment):
    stays = run_jobs(4, tmp_path, environment | {gpus.VISIBLE: "0", gpus.JOBS_PER_GPU: "2"})
    assert most_at_once(stays) == 2


def test_a_lock_that_a_killed_job_left_is_free(tmp_path, environment):
    job = subprocess.Popen(
        [sys.executable, "-c", JOB.replace("0.6", "60"), str(tmp_path)], env=environment | {gpus.VISIBLE: "0"}
    )
    while not (tmp_path / "0.0.lock").exists():
        time.sleep(0.02)
    job.kill()
    job.wait()
    ((name, _, _),) = run_jobs(1, tmp_path, environment | {gpus.VISIBLE: "0"})
    assert name == "0"


@pytest.mark.parametrize("fault", ["another's", "open to all", "a link", "a link to nothing", "a file"])
def test_a_folder_of_locks_that_is_not_ours_is_refused(tmp_path, environment, monkeypatch, fault):
    folder = tmp_path / "locks"
    if fault == "a link":
        folder.symlink_to(tmp_path)
    elif fault == "a link to nothing":
        folder.symlink_to(tmp_path / "nothing")
    elif fault == "a file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
    if fault == "open to all":
        folder.chmod(0o777)
    if fault == "another's":
        mine = os.getuid()
        monkeypatch.setattr(gpus.os, "getuid", lambda: mine + 1)
    monkeypatch.setenv(gpus.VISIBLE, "0")
    with pytest.raises(ValueError, match="should be a folder of your own that nobody else"):
        gpus.claim(folder)


def test_a_scheduler_is_not_interfered_with(tmp_path, environment, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv(gpus.VISIBLE, "3")
    assert gpus.claim(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "found"), [("0,2", ["0", "2"]), ("", []), ("-1", []), ("1,-1,0", ["1"]), ("GPU-a", ["GPU-a"])]
)
def test_cuda_devices_are_read_as_cuda_reads_them(monkeypatch, given, found):
    monkeypatch.setenv(gpus.VISIBLE, given)
    assert gpus.visible() == found


def test_without_the_variable_the_driver_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "DRIVER", tmp_path)
    assert gpus.visible() == []
    for card in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / card).mkdir()
    assert gpus.visible() == ["0", "1"]
    monkeypatch.setenv(gpus.JOBS_PER_GPU, "3")
    assert gpus.slots() == 6


def test_a_wrong_number_of_jobs_is_refused(monkeypatch):
    monkeypatch.setenv(gpus.JOBS_PER_GPU, "two")
    with pytest.raises(ValueError, match="DETROJAN_JOBS_PER_GPU"):
        gpus.slots()
