"""What is edited while a study runs: its jobs keep to the study and the code that it began with."""

import json
import re

import pyarrow.parquet as pq
import pytest

from detrojan.cells import Draws, Model, Shard
from detrojan.workflow import graph

FT = Shard(Model("tiny", "preactresnet18", "badnets", 0.1, 0), "ft", 2, Draws(0, 1))
METHOD = "src/detrojan/defenses/clean_data/ft.py"


def job(workshop, path):
    """Make a file as a job of a cluster does, by the command that Snakemake gives it; return what it says."""
    (handed,) = (workshop.folder / ".snakemake" / "runs").glob("*.yaml")
    return workshop.snakemake(
        *("--configfile", handed, "--force", "--nolock", "--no-hooks", "--mode", "subprocess"),
        *("--target-files-omit-workdir-adjustment", "--allowed-rules", "defend", "--", path),
        check=False,
    )


def test_a_job_runs_the_study_that_its_run_began_with(workshop):
    study = workshop.study()
    study["defenses"]["ft"]["epochs"] = 2
    workshop.write(study)
    output = job(workshop, graph.defended(FT))
    assert workshop.returncode == 0, output
    runs = pq.read_table(workshop.folder / graph.defended(FT) / "runs.parquet").to_pylist()
    assert {json.loads(run["hyperparameters"])["epochs"] for run in runs} == {1}


def test_a_job_whose_code_was_edited_refuses(workshop):
    workshop.edit(METHOD, "images = clean.everything", "images = clean.train")
    output = job(workshop, graph.defended(FT))
    assert workshop.returncode != 0
    said = re.findall(r"the code was edited since the run began: it is (\w+), .* with (\w+); start", output)
    assert said
    assert said[0][0] != said[0][1]
    assert not (workshop.folder / graph.defended(FT)).exists()


def test_a_job_goes_on_whatever_becomes_of_the_record_of_equal_code(workshop):
    (workshop.code / "config" / "equal_code.csv").write_text("<<<<<<< ours\n")
    output = job(workshop, graph.defended(FT))
    assert workshop.returncode == 0, output


@pytest.mark.parametrize(
    ("section", "name", "setting"),
    [("defenses", "ft", {"epochs": 2}), ("architectures", "preactresnet18", {"width": 8})],
)
def test_rows_of_other_settings_are_refused(workshop, section, name, setting):
    study = workshop.study()
    study[section][name] |= setting
    workshop.write(study)
    # As if Snakemake had not seen it: without its trigger, only the tables are made again.
    output = workshop.snakemake("--rerun-triggers", "mtime", "-R", "aggregate", check=False)
    assert workshop.returncode != 0
    assert "results have other settings than the study" in output
    (key,) = setting
    assert re.search(rf"preactresnet18.*{key} was \d, is {setting[key]}", output)
