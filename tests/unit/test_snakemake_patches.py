"""What the project changes in Snakemake is still there to be changed, and is called."""

import inspect
import subprocess
import sys
import types

import pytest
import snakemake.common
import snakemake.jobs
import snakemake.persistence
import snakemake.resources
import snakemake.script

from detrojan.workflow import equal_code, snakemake_patches
from detrojan.workflow.equal_code import Proof, Record
from detrojan.workflow.snakemake_patches import known_parameters

# Counts how often a planned study reads a script's source.
PROGRAM = """
import snakemake.script
read = snakemake.script.get_source
paths = []
def counted(path, *arguments, **named):
    paths.append(str(path))
    return read(path, *arguments, **named)
snakemake.script.get_source = counted
from snakemake.cli import main
try:
    main(["--snakefile", sys.argv[1], "--dry-run", "--quiet", "all", "--configfile", sys.argv[2]])
finally:
    print(len(paths), len(set(paths)))
"""


def test_a_script_is_read_once_however_many_jobs_it_has(tmp_path, pytestconfig):
    root = pytestconfig.rootpath
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + PROGRAM, root / "Snakefile", root / "config/config.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    reads, scripts = map(int, done.stdout.split()[-2:])
    assert reads == scripts > 5, done.stderr


def test_noted_parameters_are_those_that_snakemake_would_find():
    def function(wildcards, attempt=1):
        return attempt

    plain = snakemake.common.get_function_params(function)
    assert known_parameters(lambda wildcards, attempt=1: attempt)
    noted = snakemake.common.get_function_params(known_parameters(function))
    assert dict(noted) == dict(plain) == dict(inspect.signature(function).parameters)


def test_what_is_replaced_is_there():
    assert callable(snakemake.jobs.get_script_mtime)
    assert callable(snakemake.resources.Resource.evaluate)


# --- code that is recorded to give the same numbers -------------------------------------------------

NEW, OLD, OTHER = "a" * 16, "b" * 16, "c" * 16


@pytest.fixture
def changes(monkeypatch):
    """Return a function: what Snakemake finds changed in the params of a job of today's code, NEW.

    NEW is recorded to give the numbers of OLD for FT alone, and for data sets from digits.
    """
    base = snakemake.persistence.PersistenceBase
    monkeypatch.setattr(base, "params_changed", base.params_changed)
    values = dict.fromkeys(Proof._fields, "") | {"code": NEW, "equals": OLD}
    proofs = [
        equal_code.made(values | {"rule": rule, "methods": method})
        for rule, method in (("defend", "ft"), ("dataset", "digits"))
    ]
    monkeypatch.setattr(equal_code, "record", lambda: Record(enumerate(proofs, 2)))
    snakemake_patches.know_equal_code()
    snakemake_patches.know_equal_code()  # as often as the Snakefile is parsed

    def find(*recorded, rule="defend", defense="ft", code=NEW, file=None, **more):
        params = {"settings": {"epochs": 1}, "code": code, **more}
        by_file = {f"file {place}": list(map(repr, old)) for place, old in enumerate(recorded)}
        persistence = types.SimpleNamespace(
            _params=lambda job: list(map(repr, params.values())),
            record_format_version=lambda file: 6,
            params=by_file.get,
        )
        job = types.SimpleNamespace(
            rule=types.SimpleNamespace(name=rule),
            wildcards_dict={"defense": defense},
            params=params,
            output=list(by_file),
        )
        return base.params_changed(persistence, job, file)

    return find


def test_a_result_of_equal_code_is_unchanged(changes):
    settings = {"epochs": 1}
    assert not changes([settings, NEW])
    assert not changes([settings, OLD])
    assert not changes([settings, OLD], [settings, NEW])
    assert not changes([settings, OLD], file="file 0")
    # What the newer code has made, when the older one is checked out again.
    assert not changes([settings, NEW], code=OLD)
    assert not changes([settings, OLD], rule="their_prefix_defend")
    assert not changes([settings, OLD, "digits"], rule="dataset", source="digits")


def test_a_result_of_other_code_is_changed(changes):
    settings = {"epochs": 1}
    assert changes([settings, OTHER])
    assert changes([settings, OLD], [settings, OTHER]).files == {"file 1"}
    assert changes([settings])
    assert changes([settings, OLD], [settings])
    assert changes([settings, OLD], defense="fp")
    assert changes([settings, OLD], rule="evaluate")
    assert changes([settings, OLD], rule="of_others")
    assert changes([settings, OLD, "image_folder"], rule="dataset", source="image_folder")


def test_other_changes_stay_beside_equal_code(changes):
    found = changes([{"epochs": 2}, OLD])
    assert (found.only_old, found.only_new) == ({repr({"epochs": 2})}, {repr({"epochs": 1})})
