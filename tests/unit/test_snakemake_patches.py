"""What the project changes in Snakemake is still there to be changed, and is called."""

import inspect
import subprocess
import sys

import snakemake.common
import snakemake.jobs
import snakemake.resources
import snakemake.script

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
