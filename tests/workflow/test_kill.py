"""Kill -9 while jobs are at work, run again to the end: the tables are those of an undisturbed run.

`benchmarks/kills.py` does so for hours, at any moment.
"""

import os
import random
import signal
import subprocess
import time

from detrojan.workflow import attempts

from .conftest import Workshop

KILLS = 10
MOST_STARTED = 5  # jobs of a run that have begun when it is killed: so the study comes on in between


def test_tables_survive_being_killed(finished, tmp_path):
    workshop = Workshop.make(tmp_path / "killed")
    chance = random.Random(0)
    hit = 0
    with (tmp_path / "log").open("w") as log:
        for _ in range(KILLS):
            process = subprocess.Popen(
                workshop.command("--nolock"),
                cwd=workshop.folder,
                env=workshop.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            wait_for_jobs(process, workshop, chance.randint(1, MOST_STARTED))
            time.sleep(chance.uniform(0, 0.3))
            hit += len(at_work(workshop))
            if process.poll() is None:
                # The whole group: driver and jobs at once, as a node that loses power.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert hit >= KILLS / 2, (tmp_path / "log").read_text()[-3000:]
    workshop.snakemake("--nolock")
    for name in ("cells", "models", "summary"):
        assert workshop.table(name).equals(finished.table(name)), name
    for model in finished.folder.glob("results/models/**/model.safetensors"):
        survivor = workshop.folder / model.relative_to(finished.folder)
        assert survivor.read_bytes() == model.read_bytes(), model
    assert files(workshop) == files(finished)


def wait_for_jobs(process, workshop, number):
    """Return when so many jobs of a run have begun, or when it has ended."""
    before, seen = started(workshop), set()
    while len(seen) < number and process.poll() is None:
        seen |= started(workshop) - before
        time.sleep(0.02)


def started(workshop):
    """Return the starts that have left a record, which goes when a job is done."""
    found = attempts.read(workshop.folder / attempts.FOLDER)
    return {(record.log, attempt.started) for record in found for attempt in record.attempts}


def at_work(workshop):
    """Return the jobs that run."""
    found = attempts.read(workshop.folder / attempts.FOLDER)
    return [record for record in found if record.states({})[-1] == "running"]


def files(workshop):
    """Return the paths of all results, relative to the working folder."""
    paths = (workshop.folder / "results").rglob("*")
    return sorted(str(path.relative_to(workshop.folder)) for path in paths if path.is_file())
