"""Records of jobs under way or dead, and what they let a study give up."""

import errno
import os
import socket
import subprocess
import sys
import time

import pytest

from detrojan.cells import Draws, Model, Shard, untouched
from detrojan.workflow import attempts
from detrojan.workflow.attempts import Attempt, Diary, Record
from detrojan.workflow.closing import closed

MODEL = Model("digits", "preactresnet18", "badnets", 0.1, 0)
SHARD = Shard(MODEL, "ft", 10, Draws(0, 2))
AXES = MODEL._asdict() | {"defense": "ft", "protocol": "survey", "spc": 10, "draws": "0-2"}


def attempt(**changes):
    values = {
        "started": time.time() - 100,
        "host": "elsewhere",
        "pid": 1,
        "slurm_job": "7",
        "mem_mb": 2000,
        "runtime_s": 600.0,
    }
    return Attempt(**values | changes)


def record(*tries, rule="defend", axes=AXES):
    return Record(rule, axes, "logs/x.log", list(tries))


def test_a_job_that_ends_well_leaves_nothing(tmp_path):
    diary = Diary("train", MODEL._asdict(), "logs/train.log", tmp_path)
    diary.start(mem_mb=2000, runtime_min=10)
    (found,) = attempts.read(tmp_path)
    assert (found.rule, found.axes, found.log) == ("train", MODEL._asdict(), "logs/train.log")
    (only,) = found.attempts
    assert (only.pid, only.host, only.mem_mb, only.runtime_s) == (
        os.getpid(),
        socket.gethostname(),
        2000,
        600,
    )
    diary.done()
    assert attempts.read(tmp_path) == []


def test_attempts_of_a_job_add_up(tmp_path):
    for number in range(3):
        diary = Diary("defend", AXES | {"draws": Draws(0, 2)}, "logs/x.log", tmp_path)
        diary.start(mem_mb=1000 * 2**number, runtime_min=None)
        diary.end("failed", "ValueError: no")
    Diary("defend", AXES | {"spc": 2}, "logs/y.log", tmp_path).start(mem_mb=None, runtime_min=None)
    other, found = sorted(attempts.read(tmp_path), key=lambda r: len(r.attempts))
    assert len(other.attempts) == 1
    assert [a.mem_mb for a in found.attempts] == [1000, 2000, 4000]
    assert found.states({}) == ["failed"] * 3
    assert found.attempts[-1].reason == "ValueError: no"


def test_a_line_cut_off_by_a_crash_is_passed_over(tmp_path):
    diary = Diary("train", MODEL._asdict(), "l", tmp_path)
    diary.start(mem_mb=None, runtime_min=None)
    with diary.path.open("a") as file:
        file.write('{"event": "en')
    (found,) = attempts.read(tmp_path)
    assert found.attempts[0].how is None


def test_what_follows_a_line_that_was_cut_off_is_not_lost_with_it(tmp_path, caplog):
    for _ in range(2):
        diary = Diary("train", MODEL._asdict(), "l", tmp_path)
        diary.start(mem_mb=None, runtime_min=None)
        with diary.path.open("ab") as file:
            file.write(b'{"event": "en\xff')
    (found,) = attempts.read(tmp_path)
    assert len(found.attempts) == 2
    assert f"{diary.path}, line 2: cut off, or of another version: passed over" in caplog.text


@pytest.mark.parametrize("line", ["[1]", "7", '{"time": 1}', '{"event": "start", "rule": "train"}'])
def test_lines_of_another_version_are_passed_over_with_a_word(tmp_path, line, caplog):
    diary = Diary("train", MODEL._asdict(), "l", tmp_path)
    diary.start(mem_mb=5, runtime_min=None)
    diary.path.write_text(f"{line}\n{diary.path.read_text()}")
    (found,) = attempts.read(tmp_path)
    assert [one.mem_mb for one in found.attempts] == [5]
    assert "line 1: cut off, or of another version" in caplog.text


def test_more_than_this_version_knows_is_left_out(tmp_path):
    diary = Diary("train", MODEL._asdict(), "l", tmp_path)
    diary.start(mem_mb=5, runtime_min=None)
    diary.path.write_text(diary.path.read_text().replace("{", '{"node": "n1", ', 1) + '{"event": "pause"}\n')
    (found,) = attempts.read(tmp_path)
    assert [one.mem_mb for one in found.attempts] == [5]


def test_a_full_disk_does_not_hide_the_error_that_a_job_ends_with(tmp_path, monkeypatch):
    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    diary = Diary("train", MODEL._asdict(), "l", tmp_path)
    diary.start(mem_mb=None, runtime_min=None)
    monkeypatch.setattr(os, "fsync", full)
    diary.end("failed", "ValueError: no")
    with pytest.raises(OSError, match="No space"):
        diary.start(mem_mb=None, runtime_min=None)


def test_no_folder_is_no_record(tmp_path):
    assert attempts.read(tmp_path / "none") == []


def test_a_process_is_running_until_it_ends():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = {"host": socket.gethostname(), "slurm_job": None, "started": time.time()}
    try:
        assert attempt(pid=child.pid, **here).state({}) == "running"
    finally:
        child.kill()
        child.wait()
    assert attempt(pid=child.pid, **here).state({}) == "killed"


def test_a_number_given_anew_is_no_running_job():
    # This very process, but it started after the attempt did.
    here = {"host": socket.gethostname(), "slurm_job": None, "pid": os.getpid()}
    assert attempt(started=time.time() - 100_000, **here).state({}) in ("killed", "interrupted")


@pytest.mark.parametrize(
    ("slurm", "state"),
    [
        ("RUNNING", "running"),
        ("PENDING", "running"),
        ("OUT_OF_MEMORY", "out_of_memory"),
        ("TIMEOUT", "timed_out"),
        ("CANCELLED", "interrupted"),
        ("PREEMPTED", "interrupted"),
        ("NODE_FAIL", "interrupted"),
        ("FAILED", "killed"),
    ],
)
def test_the_scheduler_knows_what_a_killed_job_cannot_say(slurm, state):
    assert attempt().state({"7": slurm}) == state
    assert attempt().state({"8": slurm}) == "killed"


@pytest.mark.parametrize(("seconds", "state"), [(599, "timed_out"), (541, "timed_out"), (300, "interrupted")])
def test_told_to_stop_near_its_limit_a_job_has_run_out_of_time(seconds, state):
    assert attempt(started=0.0, ended=seconds, how="stopped").state({}) == state
    assert attempt(started=0.0, ended=seconds, how="stopped", runtime_s=None).state({}) == "interrupted"
    assert attempt(started=0.0, ended=300.0, how="stopped").state({"7": "TIMEOUT"}) == "timed_out"


def test_what_was_started_again_under_the_same_number_was_requeued():
    again = record(attempt(started=1.0), attempt(started=2.0))
    assert again.states({"7": "OUT_OF_MEMORY"}) == ["interrupted", "out_of_memory"]
    anew = record(attempt(started=1.0), attempt(started=2.0, slurm_job="8"))
    assert anew.states({"7": "OUT_OF_MEMORY", "8": "TIMEOUT"}) == ["out_of_memory", "timed_out"]


def test_asking_slurm_is_no_error_where_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert attempts.slurm_states([record(attempt())]) == {}


def test_slurms_answers_are_read(monkeypatch, tmp_path):
    for name, line in (("sacct", "7|CANCELLED by 0\\n9|TIMEOUT"), ("squeue", "8|RUNNING\\n7|CANCELLED")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nprintf '{line}\\n'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = [record(attempt(slurm_job="7"), attempt(slurm_job="8"))]
    assert attempts.slurm_states(asked) == {"7": "CANCELLED", "8": "RUNNING"}


# --- giving up ---------------------------------------------------------------------------------------


def kills(number, state="OUT_OF_MEMORY"):
    """Return attempts that ended so, and SLURM's word on them."""
    return [attempt(slurm_job=str(n)) for n in range(number)], {str(n): state for n in range(number)}


def test_three_kills_close_a_shard_and_two_do_not():
    tries, slurm = kills(3)
    found = closed([record(*tries)], slurm, 3)
    assert found.of_shard(SHARD) == (
        "out_of_memory",
        "defend ran out of memory 3 times: 2000, 2000, 2000 MB",
    )
    assert found.of_shard(SHARD._replace(spc=2)) is None
    assert found.of_shard(SHARD._replace(draws=Draws(3, 9))) is None
    assert found.of_shard(untouched(MODEL)) is None
    assert found.of_model(MODEL) is None
    assert closed([record(*tries[:2])], slurm, 3).of_shard(SHARD) is None


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "NODE_FAIL"])
def test_what_was_no_limit_does_not_count(state):
    tries, slurm = kills(5, state)
    assert closed([record(*tries)], slurm, 1).of_shard(SHARD) is None


def test_an_error_of_its_own_does_not_count():
    tries = [attempt(ended=1.0, how="failed", reason="KeyError: x")] * 5
    assert closed([record(*tries)], {}, 1).of_shard(SHARD) is None


def test_a_job_that_runs_is_not_given_up():
    tries, slurm = kills(4)
    assert closed([record(*tries)], slurm | {"3": "RUNNING"}, 3).of_shard(SHARD) is None


def test_a_model_that_is_given_up_takes_its_shards_along():
    tries, slurm = kills(3, "TIMEOUT")
    found = closed([record(*tries, rule="train", axes=MODEL._asdict())], slurm, 3)
    assert found.of_model(MODEL) == ("timed_out", "train ran out of time 3 times: 10, 10, 10 min")
    assert found.of_shard(SHARD) == found.of_shard(untouched(MODEL)) == found.of_model(MODEL)
    other = MODEL._replace(ratio=0.05)
    assert found.open_models([MODEL, other]) == [other]
    left, given_up = found.split([SHARD, SHARD._replace(model=other)])
    assert left == [SHARD._replace(model=other)]
    assert [cell["draw"] for cell in given_up] == [0, 1, 2]
    assert given_up[0] == MODEL._asdict() | {
        "defense": "ft",
        "protocol": "survey",
        "spc": 10,
        "draw": 0,
        "status": "timed_out",
        "reason": "train ran out of time 3 times: 10, 10, 10 min",
    }


def test_a_clean_model_takes_along_the_attacks_that_learn_against_it():
    tries, slurm = kills(3)
    clean = MODEL._replace(attack="none", ratio=0.0)
    found = closed([record(*tries, rule="train", axes=clean._asdict())], slurm, 3)
    assert found.of_model(clean)
    assert found.of_model(MODEL._replace(attack="lf"))
    assert found.of_model(MODEL) is None
    assert found.of_model(MODEL._replace(attack="lf", seed=1)) is None


@pytest.mark.parametrize(
    ("rule", "attack"),
    [("stamp", "badnets"), ("stamp_own", "lf"), ("detrojan_stamp_own", "lf")],  # in another's workflow
)
def test_stamped_samples_matter_only_to_methods_that_know_the_trigger(rule, attack):
    tries, slurm = kills(3)
    shard = SHARD._replace(model=MODEL._replace(attack=attack))
    axes = {**shard.model._asdict(), "spc": 10, "draws": "0-2"}
    found = closed([record(*tries, rule=rule, axes=axes)], slurm, 3)
    assert found.of_shard(shard) is None
    assert found.of_shard(shard._replace(defense="grad_prune"))


def test_kills_without_a_word_count_as_memory_and_say_so():
    tries, _ = kills(3)
    verdict = closed([record(*tries)], {}, 3).of_shard(SHARD)
    assert verdict.status == "out_of_memory"
    assert "without a warning" in verdict.reason
