"""A wheel has all that the commands and the workflow read from a checkout."""

import os
import subprocess
import sys

import pytest
import yaml

from detrojan.analysis.statistics.collect import CELLS
from detrojan.storage import records

from .conftest import ROOT, STUDY

ASK = """
import detrojan
from detrojan import registry
from detrojan.storage import provenance
print(detrojan.__file__)
print(registry.CHECKOUT)
print(provenance.git_commit())
print(list(detrojan.read_cells("results", columns=["acc", "asr"])))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the project installed from a wheel, beside it none of its packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("detrojan-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True)
    return folder / "site"


def run(installed, folder, *arguments):
    """Return what Python prints for ``arguments``, with the wheel before this checkout's package."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_tables_are_read_from_a_wheel(installed, tmp_path):
    records.write_table(CELLS.empty_table(), tmp_path / "results/tables/cells.parquet", CELLS)
    package, checkout, commit, columns = run(installed, tmp_path, "-c", ASK).splitlines()
    assert package == str(installed / "detrojan" / "__init__.py")
    assert checkout == str(installed / "detrojan" / "_checkout")
    assert (commit, columns) == ("detrojan 0.1.0", "['acc', 'asr']")


def test_a_wheel_in_a_repository_of_others_names_no_commit_of_theirs(installed):
    git = ["git", "-C", installed, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    ask = "from detrojan.storage import provenance; print(provenance.git_commit())"
    assert run(installed, installed, "-c", ask) == "detrojan 0.1.0\n"


def test_a_study_is_planned_from_a_wheel(installed, tmp_path):
    # NAD's settings come from config/defenses/, the times from slurm/costs.csv.
    study = STUDY | {"grid": STUDY["grid"] | {"defenses": ["none", "ft", "nad"]}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    plan = run(installed, tmp_path, "-m", "detrojan", "plan", "--configfile", "study.yaml")
    assert "defend" in plan

    snakefile = installed / "detrojan" / "_checkout" / "Snakefile"
    options = ("--configfile", "study.yaml", "--cores", "1", "--dry-run", "--quiet", "rules")
    planned = run(installed, tmp_path, "-m", "snakemake", "--snakefile", snakefile, *options)
    assert "aggregate" in planned
