"""A copy of the project that a test may edit, and a tiny study that has been run in it."""

import copy
import dataclasses
import fcntl
import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from . import forked

ROOT = Path(__file__).parents[2]
TIMINGS = ("seconds", "images_per_second", "peak_memory_bytes")
STUDY = {
    "pool": "held_out",
    "datasets": {
        "tiny": {"source": "digits", "image_size": 16, "held_out": 0.3, "per_class": 10},
    },
    "architectures": {"preactresnet18": {"width": 4}},
    "training": {"epochs": 3, "batch_size": 32},
    # Three epochs teach no backdoor; what is counted only where one took should have something to count.
    "gate": {"min_asr": 0, "max_acc_loss": 1, "min_asr_gain": -1},
    "defenses": {
        "ft": {"epochs": 1},
        "fp": {"epochs": 1},
        "grad_prune": {"max_rounds": 2, "max_epochs": 1},
    },
    "grid": {
        "datasets": ["tiny"],
        "architectures": ["preactresnet18"],
        "attacks": ["none", "badnets"],
        "ratios": [0.1],
        "defenses": ["none", "ft", "clp", "grad_prune"],
        "spc": [2],
        "draws": ["0-1"],
        "controls": False,
    },
}


@dataclasses.dataclass
class Workshop:
    """A copy of the project's code and a working folder."""

    code: Path
    folder: Path

    @classmethod
    def make(cls, folder):
        """Copy the code into ``folder`` and write the study file beside it."""
        for name in ("src", "rules", "scripts", "local", "slurm", "config"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "Snakefile", folder)
        workshop = cls(folder, folder)
        workshop.write(STUDY)
        return workshop

    def write(self, study, comment=""):
        """Write the study file."""
        text = yaml.safe_dump(study, sort_keys=False)
        (self.folder / "study.yaml").write_text(comment + text)

    def study(self):
        """Return a copy of the study file's content that may be changed."""
        return copy.deepcopy(STUDY)

    def _arguments(self, *arguments):
        fixed = ["--configfile", "study.yaml", "--rerun-incomplete", "--cores", "2", "--show-failed-logs"]
        return [*fixed, *map(str, arguments)]

    def command(self, *arguments):
        """Return the command that runs Snakemake on the study."""
        return [sys.executable, "-m", "snakemake", *self._arguments(*arguments)]

    @property
    def environment(self):
        """The environment in which the copy's package comes before the installed one."""
        return os.environ | {"PYTHONPATH": str(self.code / "src"), "OMP_NUM_THREADS": "1"}

    def ended(self, *arguments):
        """Run Snakemake to its end; return what became of it."""
        return forked.snakemake(self._arguments(*arguments), self.folder, self.environment)

    def snakemake(self, *arguments, check=True):
        """Run Snakemake; return its output."""
        done = self.ended(*arguments)
        assert not check or done.returncode == 0, done.stdout[-6000:]
        self.returncode = done.returncode
        return done.stdout

    def planned(self, *arguments):
        """Return how many jobs of each rule a dry run plans; empty if there is nothing to do."""
        output = self.snakemake("--dry-run", "--quiet", "rules", *arguments)
        return {
            rule: int(n) for rule, n in re.findall(r"^([a-z_]+) +(\d+)$", output, re.M) if rule != "total"
        }

    def edit(self, file, old, new):
        """Replace ``old``, which must be there, in a file of the copy."""
        path = self.code / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def table(self, name):
        """Return a table of the study without what differs from run to run: the timings."""
        table = pq.read_table(self.folder / "results" / "tables" / f"{name}.parquet")
        return table.drop_columns([column for column in TIMINGS if column in table.column_names])


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A workshop whose study has been run, once for all tests: copy it, don't change it."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    # A space in the path: whatever quotes carelessly fails in every workflow test.
    first, folder = shared / "first study" / "with space", own / "a study" / "with space"
    with (shared / "first study.lock").open("w") as lock:
        # One of pytest's workers runs it; each has a copy of its own.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not first.with_name("is finished").exists():
            Workshop.make(first).snakemake()
            first.with_name("is finished").touch()
    shutil.copytree(first, folder)
    return Workshop(folder, folder)


@pytest.fixture
def workshop(finished, tmp_path):
    """A copy of the finished workshop, file times included, that a test may change."""
    folder = tmp_path / "copy of study"
    shutil.copytree(finished.folder, folder)
    return Workshop(folder, folder)
