"""Running a part of a study: each command of docs/reruns.md runs the jobs that the page says."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from detrojan.commands import status
from detrojan.storage import records
from detrojan.storage.columns import METRICS
from detrojan.study import files as study_files
from detrojan.study import grid
from detrojan.workflow import graph
from detrojan.workflow.attempts import FOLDER, Diary
from tests.command import exit_code

from .conftest import ROOT, TIMINGS, Workshop

PAGE = (ROOT / "docs" / "reruns.md").read_text()
ROW = re.compile(r"^\| ([^|]*) \| `([^|]*)` \| \*\*(\d+)\*\*(?:: ([^|]*))? \| [^|]*\|$", re.M)
TABLES = ("aggregate", "report", "all")
MODEL = "digits/preactresnet18/{attack}/ratio-0.1/seed-0"
# In place of the real ones: a dry run on this machine, by the interpreter that runs the tests.
COMMANDS = {
    "snakemake": '[ "$1 $2" = "--profile slurm" ] || exit 64\n'
    'shift 2\nexec "$PYTHON" -m snakemake --dry-run --quiet rules --cores 2 "$@"',
    "detrojan": 'exec "$PYTHON" -m detrojan "$@"',
}


def rows():
    """Yield section, what is wanted, command, number of jobs and which, for each row of the page."""
    for section, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S):
        for what, command, number, which in ROW.findall(text):
            yield pytest.param(section, command, int(number), which, id=f"{section}: {what}")


# --- the quickstart, as if it had been run ---------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The quickstart study, finished as far as Snakemake can tell: all its files are there, and empty."""
    workshop = Workshop.make(tmp_path_factory.mktemp("quick start") / "finished")
    raw = yaml.safe_load((workshop.folder / "config/config.yaml").read_text())
    (workshop.folder / "study.yaml").write_text(yaml.safe_dump(raw))
    study_files.keep(raw, workshop.folder / "results")
    (workshop.folder / "there.yaml").write_text(re.search(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)[1])
    for name, script in COMMANDS.items():
        path = workshop.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    for line in workshop.snakemake("--summary").splitlines():
        path = workshop.folder / line.partition("\t")[0]
        if line.startswith("results/") and not line.startswith("results/defended/"):  # which is temporary
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    # Snakemake then notes the code and the settings that made them.
    workshop.snakemake("--touch", "--forceall", "--quiet", "all")
    return workshop


def metrics(attack, rest):
    return f"results/metrics/{MODEL.format(attack=attack)}/{rest}/metrics.parquet"


def dies(workshop, spc):
    """Leave what a job leaves that failed while Grad-Prune repaired BadNets' model."""
    axes = {"dataset": "digits", "architecture": "preactresnet18", "attack": "badnets", "ratio": 0.1}
    axes |= {"seed": 0, "defense": "grad_prune", "protocol": "paper", "spc": spc, "draws": "0-2"}
    diary = Diary("defend", axes, "logs/x.log", workshop.folder / FOLDER)
    diary.start(mem_mb=None, runtime_min=None)
    diary.end("failed", "ValueError: no")


def finish(workshop):
    pass


def let_some_die(workshop):
    for spc in (2, 10):
        dies(workshop, spc)
        (workshop.folder / metrics("badnets", f"grad_prune/paper/spc-{spc}/draws-0-2")).unlink()
    (workshop.folder / metrics("blended", "clp/paper/spc-0/draws-0-0")).unlink()
    for folder in ("tables", "report"):
        shutil.rmtree(workshop.folder / "results" / folder)


def let_a_rerun_die(workshop):
    dies(workshop, 10)


def edit(workshop):
    method = "src/detrojan/defenses/clean_data/ft.py"
    workshop.edit(method, "images = clean.everything", "images = clean.train")


def remove_all(workshop):
    for folder in ("results", ".snakemake"):
        shutil.rmtree(workshop.folder / folder)


STATES = {
    "A finished study": finish,
    "Some jobs died": let_some_die,
    "A rerun in a finished study died": let_a_rerun_die,
    "Code has changed": edit,
    "A slice here, another there": remove_all,
}


@pytest.fixture(scope="module")
def states():
    """The workshops of the sections, each made when it is first asked for: dry runs change nothing."""
    return {}


@pytest.fixture
def in_state(quickstart, states):
    """Return a function that returns a workshop in the state that a section supposes."""

    def find(section):
        if section not in states:
            folder = quickstart.folder.with_name(f"{len(states)} of section")
            shutil.copytree(quickstart.folder, folder)
            states[section] = Workshop(folder, folder)
            STATES[section](states[section])
        return states[section]

    return find


@pytest.mark.parametrize(("section", "command", "number", "which"), [*rows()])
def test_jobs_of_the_page(in_state, section, command, number, which):
    workshop = in_state(section)
    search = os.pathsep.join([str(workshop.folder / "bin"), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=workshop.folder,
        env=workshop.environment | {"PATH": search, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    jobs = {rule: int(count) for rule, count in re.findall(r"^([a-z_]+) +(\d+)$", done.stdout, re.M)}
    if not number:
        assert "Nothing to be done" in done.stdout
    assert jobs.pop("total", 0) == number, jobs
    if which:
        promised = {rule: int(count) for rule, count in re.findall(r"(\w+) (\d+)", which)}
        found = {rule: count for rule, count in jobs.items() if rule not in TABLES}
        tables = {"tables": len(jobs) - len(found)} if len(found) < len(jobs) else {}
        assert found | tables == promised


def test_every_command_of_the_page_is_counted():
    commands = [line for line in PAGE.splitlines() if line.startswith("|") and "snakemake" in line]
    assert len(commands) == len(ROW.findall(PAGE)) > 15
    assert {row.values[0] for row in rows()} == set(STATES)


def test_a_mistyped_condition_names_what_there_is_and_runs_nothing(in_state):
    workshop = in_state("Some jobs died")
    # The page's form: without paths there is no run.
    command = 'paths=$("$0" -m detrojan select --missing defense=ftt) && echo "runs $paths"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "no cell of the study has defense=ftt; there are clp, fp, ft, grad_prune, mm_bd, none" in done.stderr
    )


# --- real runs -------------------------------------------------------------------------------------


def test_a_cell_by_its_own_path_is_that_of_its_shard(workshop):
    folder = workshop.folder / "results/metrics/tiny/preactresnet18/badnets/ratio-0.1/seed-0/ft/survey/spc-2"
    tables = workshop.folder / "results/tables/cells.parquet"
    before = tables.stat().st_mtime_ns
    path = (folder / "draws-1-1/metrics.parquet").relative_to(workshop.folder)
    assert jobs_run(workshop.snakemake(path)) == ["sample", "defend", "evaluate"]
    (alone,) = records.read_rows(folder / "draws-1-1/metrics.parquet", METRICS)
    _, in_shard = records.read_rows(folder / "draws-0-1/metrics.parquet", METRICS)
    assert without_timings(alone) == without_timings(in_shard)
    assert tables.stat().st_mtime_ns == before


def test_status_and_select_know_a_finished_study(finished):
    found = status.look(finished.folder / "results", time.time())
    assert found.over
    assert found.cells == (12, 12)
    assert (found.models.done, found.shards.done, found.tables.done) == (2, 8, 2)
    assert sum(found.endings.values()) == 12
    files = selected(finished, "--stage", "evaluate") + selected(finished, "--stage", "train")
    assert len(files) == 8 + 2
    assert all((finished.folder / file).is_file() for file in files)


def jobs_run(output):
    return re.findall(r"^(?:local)?rule (\w+):", output, re.M)


def without_timings(row):
    return {name: value for name, value in row.items() if name not in TIMINGS}


def test_what_died_in_a_rerun_is_found_and_run_again(workshop):
    sample = workshop.folder / "results/samples/tiny/spc-2/draws-0-1.parquet"
    whole, times = sample.read_bytes(), sample.stat()

    def write(content):
        # With the time that it had: to Snakemake nothing has changed.
        sample.write_bytes(content)
        os.utime(sample, ns=(times.st_atime_ns, times.st_mtime_ns))

    write(whole[:1000])
    workshop.snakemake("-R", *selected(workshop, "attack=badnets", "defense=ft"), check=False)
    assert workshop.returncode != 0
    write(whole)
    assert workshop.planned() == {}
    (died,) = selected(workshop, "--failed")
    assert died == "results/defended/tiny/preactresnet18/badnets/ratio-0.1/seed-0/ft/survey/spc-2/draws-0-1"
    assert workshop.planned("-R", died) == {"defend": 1, "evaluate": 1} | dict.fromkeys(TABLES, 1)


def selected(workshop, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "detrojan", "select", *arguments],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_slices_of_two_sites_make_the_whole_study(finished, tmp_path, capsys):
    sites = []
    for site, defenses in (("here", "[ft]"), ("there", "[clp, grad_prune]")):
        shutil.copytree(finished.folder, tmp_path / site)
        workshop = Workshop(tmp_path / site, tmp_path / site)
        slice_ = f"grid={{include: [{{defense: {defenses}}}]}}"
        output = workshop.snakemake("--until", "aggregate", "--config", slice_)
        assert jobs_run(output) == ["aggregate"]  # of what the slice needs, its tables alone aren't there
        assert workshop.table("cells").num_rows < finished.table("cells").num_rows
        sites.append(workshop.folder / "results")
    merged = Workshop(finished.code, tmp_path / "merged")
    into = merged.folder / "results"
    assert exit_code("merge", *map(str, sites), "--into", into) == 0
    for name in ("cells", "models", "summary"):
        assert merged.table(name).equals(finished.table(name)), name
    whole, study = (study_files.load_study(study_files.kept(f)) for f in (finished.folder / "results", into))
    assert set(map(graph.metrics, grid.shards(study))) == set(map(graph.metrics, grid.shards(whole)))
    capsys.readouterr()
    assert exit_code("show", "--results", into) == 0
    assert "grad_prune" in capsys.readouterr().out
