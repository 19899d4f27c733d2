"""How a job ends: faults of the machine and bad input on one line, bugs with their traceback."""

import contextlib
import errno
import logging
import os
import signal
import types
from pathlib import Path

import pytest

from detrojan.errors import FAULTS
from detrojan.workflow import attempts, job

LOG = "logs/sample/toy.log"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A job of the rule ``sample``, as Snakemake starts it, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "_check_code", lambda snakemake: None)
    monkeypatch.setattr(job.determinism, "configure", lambda threads: None)
    handlers = {number: signal.getsignal(number) for number in job.STOP_SIGNALS}
    root, level = logging.root.handlers[:], logging.root.level
    yield types.SimpleNamespace(
        config={},
        wildcards={"dataset": "toy", "spc": "2", "draws": "0-1"},
        log=[LOG],
        threads=1,
        rule="sample",
        resources={"mem_mb": 100},
        output=["results/samples/toy/spc-2/draws-0-1.parquet"],
    )
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.root.handlers[:] = root
    logging.root.setLevel(level)


def ended(snakemake, error):
    """Return the last line of the log of a job that met ``error``, and whether it was taken for a bug."""
    bug = False
    try:
        with contextlib.suppress(SystemExit), job.run(snakemake):
            raise error
    except type(error):
        bug = True
    return Path(LOG).read_text().splitlines()[-1], bug


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_a_fault_of_the_machine_is_a_line_and_no_bug(started, number):
    line, bug = ended(started, OSError(number, os.strerror(number), "some/file"))
    assert not bug
    assert line.endswith(f"some/file: {os.strerror(number)}; {FAULTS[number]}, and run the workflow again")
    assert "rule sample, dataset=toy" in line
    (record,) = attempts.read()
    assert record.attempts[0].reason.startswith("FaultError: some/file: ")


def test_another_error_of_the_system_is_a_bug(started):
    line, bug = ended(started, OSError(errno.EINVAL, "Invalid argument"))
    assert bug
    assert "(rule sample, " in line  # the note below its traceback


def test_what_a_killed_job_left_is_swept_when_it_starts_again(started, tmp_path):
    folder = tmp_path / "results/samples/toy/spc-2"
    folder.mkdir(parents=True)
    left = folder / f".draws-0-1.parquet.{os.uname().nodename}.{2**22 + 1}.partial"  # more than there can be
    left.write_text("half")
    with job.run(started):
        assert not left.exists()


def test_a_log_on_a_full_disk_does_not_end_the_job(started, monkeypatch, capsys):
    with job.run(started):
        stream = logging.root.handlers[0].stream
        # Writing to no file at all is an error of the system's, as a full disk is.
        full = types.SimpleNamespace(
            write=lambda text: os.write(-1, b""), flush=stream.flush, close=stream.close
        )
        monkeypatch.setattr(logging.root.handlers[0], "stream", full)
        logging.getLogger("detrojan").warning("lost in the log")
    captured = capsys.readouterr().err
    assert "lost in the log" in captured
    assert "Traceback" not in captured


def test_a_folder_of_logs_that_may_not_be_written_is_a_line(started, monkeypatch):
    def forbidden(*_args, **_options):
        raise PermissionError(errno.EACCES, "Permission denied", "logs")

    monkeypatch.setattr(job.Path, "mkdir", forbidden)
    with pytest.raises(SystemExit, match="ERROR: logs: Permission denied; give yourself"), job.run(started):
        pass
