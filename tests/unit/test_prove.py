"""What a proof needs, and what it records; the study itself runs in the tests of the workflow."""

import contextlib
import shutil
import subprocess
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from detrojan import registry
from detrojan.cells import NO_METHOD
from detrojan.commands import prove, reproduce
from detrojan.storage import provenance, records
from detrojan.workflow import equal_code, graph, handover
from detrojan.workflow.equal_code import Record
from tests.command import exit_code
from tests.unit.test_schema import minimal

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
OLD = {key: f"{number:016x}" for number, key in enumerate(graph.all_code())}


# --- the old code ----------------------------------------------------------------------------------


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with code in two commits, and a function that asks git something in it."""
    folder = tmp_path / "clone"

    def git(*arguments):
        command = [*GIT, "-C", folder, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (folder / "src" / "detrojan").mkdir(parents=True)
    git("init", "--quiet")
    for number in range(2):
        (folder / "src" / "detrojan" / "code.py").write_text(f"NUMBER = {number}\n")
        git("add", ".")
        git("commit", "--quiet", "--message", str(number))
    monkeypatch.setattr(registry, "CHECKOUT", folder)
    monkeypatch.setattr(registry, "PACKAGE", folder / "src" / "detrojan")
    return SimpleNamespace(folder=folder, git=git)


def test_the_old_code_is_the_last_commits_if_code_was_edited_since_else_its_parents(clone):
    assert prove.old_commit(None) == clone.git("rev-parse", "HEAD~1")
    (clone.folder / "README.md").write_text("no code")
    assert prove.old_commit(None) == clone.git("rev-parse", "HEAD~1")
    (clone.folder / "src" / "detrojan" / "more.py").write_text("")
    assert prove.old_commit(None) == clone.git("rev-parse", "HEAD")
    assert prove.old_commit("HEAD~1") == clone.git("rev-parse", "HEAD~1")


@pytest.mark.parametrize("revision", ["nothing", "--help", "HEAD~7", "HEAD:src"])
def test_a_revision_that_is_no_commit_is_refused(clone, revision):
    with pytest.raises(ValueError, match="names no commit"):
        prove.old_commit(revision)


def test_code_that_is_in_no_repository_of_its_own_is_refused(clone, monkeypatch):
    monkeypatch.setattr(registry, "CHECKOUT", clone.folder / "src")
    with pytest.raises(ValueError, match="is no clone of the repository"):
        prove.old_commit(None)


# --- the study -------------------------------------------------------------------------------------


def test_all_methods_means_those_that_both_codes_have(tmp_path):
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(minimal(attacks="all", defenses="all")))
    lacking = {key: code for key, code in OLD.items() if "/ft" not in key and not key.endswith("/wanet")}
    grid = prove.study_of([tmp_path / "study.yaml"], lacking)["grid"]
    attacks = [name for name in registry.names("attacks") if name != "wanet"]
    defenses = [name for name in registry.names("defenses") if not name.startswith("ft")]
    assert (grid["attacks"], grid["defenses"]) == ([NO_METHOD, *attacks], [NO_METHOD, *defenses])


def test_jobs_are_counted_by_the_code_that_they_run():
    raw = minimal(attacks=["badnets", "wanet"], defenses=["none", "ft"], controls=False)
    jobs = prove.jobs_of(raw)
    assert "train_controlled/preactresnet18/wanet" in jobs
    assert "dataset/digits" in jobs
    assert "defend/ft" in jobs
    assert not {"defend/fp", "report", "all"} & jobs.keys()
    assert {job.axes["attack"] for job in jobs["train/preactresnet18"]} == {"none", "badnets"}


def test_the_study_that_is_run_by_default_lacks_other_architectures_and_data_sources_alone():
    jobs = prove.jobs_of(prove.study_of([prove.STUDY], OLD))
    others = {*registry.names("datasets"), *registry.names("models")} - {"digits", "preactresnet18"}
    lacking = {key for key in OLD if prove._has_jobs(key)} - jobs.keys()
    assert {key for key in lacking if not others & set(key.split("/"))} == {"report"}


# --- what is recorded ------------------------------------------------------------------------------


@pytest.fixture
def proving(tmp_path, monkeypatch):
    """A folder with a study, where a code's run leaves files at once: the command, and its record."""
    study = minimal(attacks=["badnets"], defenses=["none", "ft"], controls=False)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(equal_code, "TABLE", tmp_path / "equal_code.csv")
    monkeypatch.setattr(prove, "old_commit", lambda revision: "0ld")
    monkeypatch.setattr(prove, "_checked_out", lambda commit, folder: contextlib.nullcontext(folder))
    monkeypatch.setattr(prove, "_run", lambda folder, checkout, raw, extra, code: leave(folder, raw))
    found = SimpleNamespace(folder=tmp_path, old=graph.all_code())
    monkeypatch.setattr(prove, "code_of", lambda checkout: found.old)
    found.run = lambda: exit_code("prove", "--configfile", "study.yaml")
    found.record = lambda: {proof.key: proof for proof in Record.load(equal_code.TABLE).proofs.values()}
    return found


def leave(folder, raw):
    """Leave a file for each output of a study's jobs."""
    outputs = {job.at(path) for jobs in prove.jobs_of(raw).values() for job in jobs for path in paths(job)}
    for output in outputs:
        path = folder / output
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"versions": ['{"torch": "2.9"}'], "device": ["cpu"]}), path)
        elif path.suffix:
            path.write_bytes(b"{}" if path.suffix == ".json" else (2).to_bytes(8, "little") + b"{}")
        else:  # repaired models
            path.mkdir()
            for name in ("runs", "more"):
                pq.write_table(pa.table({"draw": [0]}), path / f"{name}.parquet")


def paths(job):
    return graph.RULES[job.rule].outputs_for(job.axes.get("dataset", "")).values()


def test_a_row_is_written_for_each_changed_code_that_the_study_has_run(proving, capsys):
    changed = ["defend/ft", "defend/fp", "train/preactresnet18", "aggregate", "report"]
    changed += ["poison/wanet", "train_controlled/preactresnet18/badnets"]  # no study has these
    today = dict(proving.old)
    proving.old |= {key: OLD[key] for key in changed}
    del proving.old["evaluate"]  # a rule that the old code doesn't have
    assert proving.run() == 0
    record = proving.record()
    assert list(record) == sorted(record, key=list(proving.old).index)
    assert record.keys() == {"defend/ft", "train/preactresnet18", "aggregate"}
    row = record["defend/ft"]
    assert (row.code, row.equals) == (today["defend/ft"], OLD["defend/ft"])
    # A clean model and an attacked one; of each, two files of repaired models.
    assert (row.jobs, row.files) == (2, 4)
    assert (row.study, row.equals_commit, row.device, row.versions) == (
        "study.yaml",
        "0ld",
        "cpu",
        "torch=2.9",
    )
    assert row.commit == provenance.git_commit()
    said = capsys.readouterr().out
    assert "3 rows more" in said
    assert "doesn't run it, and so made again: defend/fp, report\n" in said
    assert not (proving.folder / "proof").exists()


def test_what_is_recorded_already_is_not_proved_again(proving, capsys):
    proving.old |= {"defend/ft": OLD["defend/ft"]}
    assert proving.run() == 0
    text = equal_code.TABLE.read_text()
    assert proving.run() == 0
    assert "Nothing to prove: all code is that of 0ld" in capsys.readouterr().out
    assert equal_code.TABLE.read_text() == text


def test_results_that_differ_are_told_and_nothing_is_recorded(proving, monkeypatch, capsys):
    proving.old |= {"defend/ft": OLD["defend/ft"], "aggregate": OLD["aggregate"]}

    def other(folder, checkout, raw, extra, code):
        leave(folder, raw)
        if code == proving.old:
            (found,) = folder.rglob("triggers/**/card.json")
            found.write_text('{"norm": 1.5}')

    monkeypatch.setattr(prove, "_run", other)
    assert proving.run() == 1
    said = capsys.readouterr().err
    assert "nothing is recorded, for the results differ; proof has both" in said
    assert "triggers/digits/badnets/seed-0/card.json: norm: 1.5 became nothing" in said
    assert not equal_code.TABLE.exists()
    assert (proving.folder / "proof" / prove.OLD / "results").exists()
    assert proving.run() == 1
    assert "proof: the folder isn't empty" in capsys.readouterr().err


def test_a_study_that_runs_nothing_of_what_changed_proves_nothing(proving, capsys):
    proving.old |= {"defend/fp": OLD["defend/fp"]}
    assert proving.run() == 1
    assert "runs nothing of the code that has changed: defend/fp" in capsys.readouterr().err
    assert not equal_code.TABLE.exists()


def test_a_job_that_left_nothing_is_a_bug(proving, monkeypatch):
    proving.old |= {"defend/ft": OLD["defend/ft"]}

    def lacking(folder, checkout, raw, extra, code):
        leave(folder, raw)
        shutil.rmtree(folder / "results" / "defended")

    monkeypatch.setattr(prove, "_run", lacking)
    with pytest.raises(AssertionError, match="not there, though the study ran to its end"):
        list(prove.prove([proving.folder / "study.yaml"], None, proving.folder / "proof", []))


def test_a_damaged_table_of_cells_proves_nothing(proving, monkeypatch, capsys):
    proving.old |= {"defend/ft": OLD["defend/ft"]}

    def damaging(folder, checkout, raw, extra, code):
        leave(folder, raw)
        table = folder / graph.table("cells")
        # As a disk might, after the table was written whole.
        rows = pa.table({"versions": ['{"torch": "2.9"}'], "device": ["cpu"]})
        records.write_table(rows, table, rows.schema)
        table.write_bytes(table.read_bytes()[:-1] + b"?")

    monkeypatch.setattr(prove, "_run", damaging)
    monkeypatch.setattr(prove, "differences", lambda before, after: iter(()))
    assert proving.run() == 1
    assert "cells.parquet: not a whole Parquet table (damaged" in capsys.readouterr().err
    assert not equal_code.TABLE.exists()


@pytest.mark.parametrize(
    ("ended", "planned", "said"),
    [
        (0, OLD | {"defend/ft": "0"}, "the code was edited while this command began"),
        (0, {}, "Snakemake ran nothing"),
        (3, OLD, "Snakemake ended with exit code 3"),
        (0, OLD, None),
    ],
)
def test_a_run_counts_if_it_comes_to_its_end_with_the_code_that_is_compared(
    tmp_path, monkeypatch, ended, planned, said
):
    monkeypatch.setattr(reproduce, "run", lambda line, environment: ended)
    monkeypatch.setattr(handover, "given", lambda folder: planned)
    refused = pytest.raises(ValueError, match=said) if said else contextlib.nullcontext()
    with refused:
        prove._run(tmp_path / "today", registry.CHECKOUT, minimal(), [], OLD)


def test_arguments_that_mean_nothing_are_refused(capsys):
    assert exit_code("prove", "HEAD~1") == 2
    assert "options of Snakemake follow after --" in capsys.readouterr().err
