"""Kill -9 at random moments, run again to the end: the tables are those of an undisturbed run."""

import os
import random
import signal
import subprocess

from .conftest import Workshop

KILLS = 20


def test_tables_survive_being_killed(finished, tmp_path):
    workshop = Workshop.make(tmp_path / "killed")
    moments = random.Random(0)
    log = (tmp_path / "log").open("w")
    for _ in range(KILLS):
        process = subprocess.Popen(
            workshop.command("--nolock"),
            cwd=workshop.folder,
            env=workshop.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            process.wait(moments.uniform(1.5, 4.5))
        except subprocess.TimeoutExpired:
            # The whole group: driver and jobs at once, as a node that loses power.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    workshop.snakemake("--nolock")
    for name in ("cells", "models", "summary"):
        assert workshop.table(name).equals(finished.table(name)), name
    for model in finished.folder.glob("results/models/**/model.safetensors"):
        survivor = workshop.folder / model.relative_to(finished.folder)
        assert survivor.read_bytes() == model.read_bytes(), model
    assert files(workshop) == files(finished)


def files(workshop):
    """Return the paths of all results, relative to the working folder."""
    paths = (workshop.folder / "results").rglob("*")
    return sorted(str(path.relative_to(workshop.folder)) for path in paths if path.is_file())
