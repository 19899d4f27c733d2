"""A number is recomputed from scratch and held against the study's; and what it stands on is told right."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from detrojan.cells import Draws, Model, Shard, axes_text, untouched
from detrojan.commands import reproduce
from detrojan.commands.reproduce import Agreement
from detrojan.storage import records
from detrojan.study import files
from detrojan.workflow import graph
from detrojan.workflow.site import Site

from . import forked
from .conftest import ROOT, STUDY

MODEL = Model("tiny", "preactresnet18", "badnets", 0.1, 0)
CELL = ["attack=badnets", "defense=ft", "draw=1"]
RECOMPUTED = f"reproduced/{graph.metrics(Shard(MODEL, 'ft', 2, Draws(1, 1)))}"
MODEL_FILE = f"results/models/{graph.of_model(MODEL)}/model.safetensors"


def run(workshop, *arguments):
    """Run the command in a workshop; return its exit code, what it said, and what Snakemake said."""
    done = subprocess.run(
        [sys.executable, "-m", "detrojan", "reproduce", *arguments],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def alter(path, axes, **values):
    """Change values of the row of a table that has ``axes``."""
    table = records.read_table(path)
    rows = table.to_pylist()
    (row,) = (row for row in rows if axes.items() <= row.items())
    row |= values
    records.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, table.schema)


def test_a_number_is_reproduced_and_a_wrong_one_is_not(workshop):
    code, said, log = run(workshop, *CELL)
    assert code == 0, said + log[-3000:]
    assert said.splitlines()[-1] == "equal: the same bits"
    assert "100 of 100 clean images: the same class" in said
    assert "90 of 90 triggered images: the same class" in said
    assert "Note:" not in said
    # From scratch: a model of its own, though with the same bits.
    again = workshop.folder / "reproduced" / MODEL_FILE
    assert again.read_bytes() == (workshop.folder / MODEL_FILE).read_bytes()
    assert again.stat().st_mtime_ns > (workshop.folder / MODEL_FILE).stat().st_mtime_ns
    assert len(pq.read_table(workshop.folder / RECOMPUTED)) == 1
    # Repaired weights stay, for whoever wants to look into it.
    assert list(workshop.folder.glob("reproduced/results/defended/**/draw-1.safetensors"))

    trained = again.stat().st_mtime_ns
    cells = workshop.folder / "results/tables/cells.parquet"
    acc = pq.read_table(workshop.folder / RECOMPUTED)["acc"][0].as_py()
    alter(cells, MODEL._asdict() | {"defense": "ft", "draw": 1}, acc=acc + 0.01)
    code, said, _ = run(workshop, *CELL)
    assert code == 1
    assert "NOT reproduced: a measure differs by 0.01 (0 allowed)" in said
    assert said.count("the same class") == 2
    code, said, _ = run(workshop, *CELL, "--tolerance", "0.02")
    assert code == 0
    assert said.splitlines()[-1].startswith("within tolerance: the measures differ by at most 0.01")
    alter(cells, MODEL._asdict() | {"defense": "ft", "draw": 1}, acc=acc + 0.01, device="Another GPU")
    code, said, _ = run(workshop, *CELL)
    assert code == 0
    assert "The device or the versions are others" in said
    assert said.splitlines()[-1].startswith("within tolerance")
    assert again.stat().st_mtime_ns == trained

    code, said, log = run(workshop, "attack=badnets", "defense=ft", "draw=9")
    assert (code, said) == (1, "")
    assert log == "detrojan: no cell has draw=9, in the study or its tables; there are 0, 1\n"


def test_other_code_and_settings_are_told_first(workshop):
    workshop.edit(
        "src/detrojan/defenses/clean_data/ft.py", "images = clean.everything", "images = clean.train"
    )
    files.keep(workshop.study() | {"training": {"epochs": 5, "batch_size": 32}}, workshop.folder / "results")
    code, said, log = run(workshop, *CELL, "--", "--dry-run")
    unwrapped = said.replace("\n  ", " ")
    notes = [line for line in unwrapped.splitlines() if line.startswith("Note:")]
    assert len(notes) == 2
    assert "rule defend has other code" in notes[0]
    assert 'training SGD has other settings: {"epochs": 3} made the number' in notes[1]
    assert 'now says {"epochs": 5}' in notes[1]
    # A dry run makes no row, which is no success.
    assert code == 1
    assert log.splitlines()[-1].startswith("detrojan: no new row: Snakemake ended with exit code 0")


def planned(shard, site, into):
    """Return the rules of the jobs that Snakemake plans to recompute a cell, with the text of the plan."""
    reproduce.write_study(reproduce.study_of(shard, site), into, site)
    _, _, name, *options = reproduce.command(shard, into, ["--dry-run", "--cores", "1"])
    assert name == "snakemake"
    done = forked.snakemake(options, Path.cwd(), os.environ)
    assert done.returncode == 0, done.stdout
    return re.findall(r"^(?:local)?rule (\w+):$", done.stdout, re.M), done.stdout


@pytest.fixture
def site(tmp_path):
    """Results of which nothing but the study file is there."""
    files.keep(STUDY, tmp_path / "with space" / "results")
    return Site(tmp_path / "with space" / "results")


CLEAN = MODEL._replace(attack="none", ratio=0.0)
EVERY_WAY = {
    "clean data": Shard(MODEL, "ft", 2, Draws(7, 7)),
    "untouched": untouched(MODEL),
    "clean": Shard(CLEAN, "grad_prune", 2, Draws(1, 1)),
    "no data, and a trigger learned against the clean model": Shard(
        MODEL._replace(attack="lf"), "clp", 0, Draws(0, 0)
    ),
    "known trigger, trained with the model": Shard(
        MODEL._replace(attack="iab"), "grad_prune", 2, Draws(3, 3)
    ),
}


@pytest.mark.parametrize("shard", EVERY_WAY.values(), ids=EVERY_WAY)
def test_the_steps_told_are_those_of_the_workflow(shard, site, tmp_path):
    rules, plan = planned(shard, site, tmp_path / "again")
    steps = list(graph.steps(graph.shard_job(shard)))
    assert sorted(rules) == sorted(step.rule for step in steps)
    jobs = {}
    for rule, job in re.findall(r"^(?:local)?rule (\w+):\n((?: +.*\n)+)", plan, re.M):
        jobs.setdefault(rule, []).append(job)
    for step in steps:
        # `train` may stand there twice: for LF, the clean model too.
        # `evaluate` adds to the log of `defend`, which Snakemake must not know.
        told = "output: " if step.rule == "evaluate" else f"log: {step.log}\n"
        (job,) = (job for job in jobs[step.rule] if told in job)
        made = re.search(r"output: (.*)", job)[1].split(", ")
        assert set(step.files) <= {file.split(" ")[0] for file in made}, step
        wildcards = re.search(r"wildcards: (.*)", job)[1].split(", ")
        assert set(wildcards) == set(axes_text(step.axes).split(" "))


def test_digests_of_today_are_those_of_the_rules(finished):
    # In the copy that made the study: the tests run on the other one.
    for asked, rules in {
        ("attack=badnets", "defense=grad_prune", "draw=0"): {"train", "defend"},
        ("attack=none", "defense=none"): {"train", "evaluate_untouched"},
    }.items():
        done = subprocess.run(
            [sys.executable, "-m", "detrojan", "why", *asked],
            cwd=finished.folder,
            env=finished.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert set(re.findall(r"^Made by rule (\w+)$", done.stdout, re.M)) == rules
        assert done.stdout.count("the same as today's") == len(rules)
        assert "not there     logs" not in done.stdout


# --- the study file --------------------------------------------------------------------------------


def test_the_study_file_is_of_one_cell_with_absolute_paths(tmp_path):
    study = STUDY | {
        "datasets": {
            "tiny": {"source": "image_folder", "path": "photos", "image_size": 16, "held_out": 0.3},
            "other": {"source": "image_folder", "path": "gone", "image_size": 16},
        },
        "grid": STUDY["grid"] | {"datasets": ["tiny", "other"], "exclude": [{"dataset": "other"}]},
        # Overrides may name what the cell is not of.
        "attacks": {
            "badnets": {"side": 2, "overrides": [{"when": {"dataset": "other"}, "set": {"side": 1}}]}
        },
    }
    site = Site(tmp_path / "results")
    files.keep(study, site.results)
    path = reproduce.write_study(
        reproduce.study_of(Shard(MODEL, "ft", 2, Draws(5, 5)), site), tmp_path / "a", site
    )
    raw = yaml.safe_load(path.read_text())
    assert raw["datasets"]["tiny"] == study["datasets"]["tiny"] | {"path": str(tmp_path / "photos")}
    assert raw["grid"]["datasets"] == ["tiny"]
    assert raw["grid"]["draws"] == ["5-5"]
    assert raw["attacks"] == study["attacks"]
    loaded = files.load_study(raw)
    assert loaded.keep_defended
    assert not loaded.close
    # An absolute path stays as it is.
    study["datasets"]["tiny"]["path"] = "/elsewhere/photos"
    files.keep(study, site.results)
    again = reproduce.study_of(untouched(MODEL), site)
    assert again["datasets"]["tiny"]["path"] == "/elsewhere/photos"


def test_a_folder_of_someone_else_is_left_alone(site, tmp_path):
    study = reproduce.study_of(untouched(MODEL), site)
    with pytest.raises(ValueError, match="the study itself lies there"):
        reproduce.write_study(study, site.results.parent, site)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "study.yaml").write_text("pool: train\n")
    with pytest.raises(ValueError, match="it holds another study file"):
        reproduce.write_study(study, other, site)
    assert (other / "study.yaml").read_text() == "pool: train\n"


def test_arguments_for_snakemake_come_last(tmp_path):
    shard = untouched(MODEL)
    plain = reproduce.command(shard, tmp_path, [])
    assert plain[3] == graph.metrics(shard)  # before the options: one of them would swallow it
    assert "--cores" in plain
    assert plain[plain.index("--snakefile") + 1] == str(ROOT / "Snakefile")
    # A profile says how much may run at once, on the cluster; so may the user.
    for own in (["--profile", "slurm"], ["-j4"], ["-c", "2"], ["--cores=1"]):
        line = reproduce.command(shard, tmp_path, own)
        assert line[-len(own) :] == own
        assert line.count("--cores") == 0
    for own in (["--jobscript", "x"], ["--notemp"]):
        assert "--cores" in reproduce.command(shard, tmp_path, own)


# --- the comparison --------------------------------------------------------------------------------

ROW = {"status": "ok", "reason": None, "acc": 0.9, "asr": 0.5, "ra": None, "chosen": "{}", "device": "cpu"}
SAME = [Agreement(False, 10, 10), Agreement(True, 9, 9)]


@pytest.mark.parametrize(
    ("after", "predictions", "tolerance", "reproduced", "said"),
    [
        ({}, SAME, 0.0, True, "equal: the same bits"),
        ({}, [], 0.0, True, "equal: the same bits"),
        ({"acc": 0.9 + 1e-12}, SAME, 0.0, False, "NOT reproduced: a measure differs by 1e-12"),
        ({"asr": 0.49}, SAME, 0.02, True, "within tolerance"),
        ({"asr": 0.47}, SAME, 0.02, False, "NOT reproduced: a measure differs by 0.03 .0.02 allowed"),
        # The largest counts, whichever measure it is.
        ({"acc": 0.95, "asr": 0.49}, SAME, 0.02, False, "differs by 0.05"),
        # The same bits are more than the same measures.
        ({}, [Agreement(False, 9, 10)], 0.0, False, "NOT reproduced: the measures are equal, but not"),
        ({"chosen": '{"epoch": 3}'}, SAME, 0.0, False, "NOT reproduced: the measures are equal, but not"),
        ({"chosen": '{"epoch": 3}'}, SAME, 0.02, True, "within tolerance"),
        ({"ra": 0.1}, SAME, 1.0, False, "NOT reproduced: ra is defined on one side only"),
        (
            {"status": "diverged", "acc": None, "asr": None},
            [],
            1.0,
            False,
            "the status was ok, and is diverged",
        ),
    ],
)
def test_the_verdict(after, predictions, tolerance, reproduced, said):
    verdict = reproduce.judge(ROW, ROW | after, predictions, tolerance)
    assert verdict.reproduced is reproduced
    assert re.search(said, verdict.said)


def test_a_row_without_measures_is_reproduced_by_its_status():
    row = ROW | {"status": "not_applicable", "acc": None, "asr": None, "ra": None}
    assert reproduce.judge(row, row, [], 0.0).reproduced
    assert not reproduce.judge(row, row | {"status": "diverged"}, [], 0.0).reproduced


def test_predictions_are_compared_image_by_image(tmp_path):
    def write(name, *rows):
        columns = ("draw", "triggered", "index", "predicted")
        path = tmp_path / name
        table = pa.table(dict(zip(columns, zip(*rows, strict=True), strict=True)))
        records.write_table(table, path, table.schema)
        return path

    before = write("a", (0, False, 4, 9), (1, False, 4, 1), (1, False, 5, 2), (1, True, 4, 0))
    # Another draw is left out, the order means nothing, and image 5 has another class.
    after = write("b", (1, True, 4, 0), (1, False, 5, 3), (1, False, 4, 1))
    assert reproduce.compare_predictions(before, after, 1) == [Agreement(False, 1, 2), Agreement(True, 1, 1)]
    fewer = write("c", (1, False, 4, 1))
    assert reproduce.compare_predictions(before, fewer, 1) == [Agreement(False, 1, 2), Agreement(True, 0, 1)]
    assert reproduce.compare_predictions(fewer, before, 1) == [Agreement(False, 1, 2), Agreement(True, 0, 1)]
    assert reproduce.compare_predictions(before, tmp_path / "gone", 1) == []


def test_a_cell_that_was_given_up_has_no_number(workshop):
    cells = workshop.folder / "results/tables/cells.parquet"
    alter(cells, MODEL._asdict() | {"defense": "ft", "draw": 1}, code="", status="timed_out", acc=None)
    code, said, log = run(workshop, *CELL)
    assert (code, said) == (1, "")
    assert "it was given up when the study was closed" in log
    assert log.count("\n") == 1
    shutil.rmtree(workshop.folder / "results/tables")
    code, said, log = run(workshop, *CELL)
    assert code == 1
    assert "has no row in results/tables/cells.parquet yet" in log
    assert not Path(workshop.folder / "reproduced").exists()


def test_where_two_computations_part(site, tmp_path):
    again = Site(tmp_path / "again" / "results")
    steps = list(graph.steps(graph.shard_job(Shard(MODEL, "ft", 2, Draws(1, 1)))))
    assert reproduce.first_difference(site, again, steps) is None
    poisoned = "results/poisoned/tiny/badnets/ratio-0.1/seed-0/train.parquet"
    for file in (poisoned, MODEL_FILE):
        for place, text in ((site, "one"), (again, "two" if file == MODEL_FILE else "one")):
            place.at(file).parent.mkdir(parents=True, exist_ok=True)
            place.at(file).write_text(text)
    assert reproduce.first_difference(site, again, steps) == MODEL_FILE
    again.at(poisoned).write_text("three")
    assert reproduce.first_difference(site, again, steps) == poisoned
