"""The Snakefile stays light: every cluster job parses it again."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import yaml

from detrojan.study import feasibility
from detrojan.study.files import load_study
from detrojan.study.grid import models, shards

ROOT = Path(__file__).parents[2]
DRY_RUN = [
    "--snakefile",
    str(ROOT / "Snakefile"),
    "--dry-run",
    "--configfile",
    str(ROOT / "config/config.yaml"),
]

# Snakemake leaves by SystemExit; what it has imported by then is the answer.
TELL_MODULES = f"""
import json, sys
from snakemake.cli import main
try:
    main({DRY_RUN!r})
except SystemExit as left:
    code = left.code
print(json.dumps([code, sorted(sys.modules)]))
"""


def test_parsing_and_planning_import_neither_torch_nor_methods(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TELL_MODULES], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, None), done.stderr[-3000:]
    assert "detrojan.study.feasibility" in modules
    heavy = ("torch", "torchvision", "sklearn", "matplotlib")
    ours = (
        "detrojan.attacks",
        "detrojan.defenses",
        "detrojan.models",
        "detrojan.learning",
        "detrojan.storage.artifacts",
        "detrojan.storage.records",
    )
    assert [name for name in modules if name.partition(".")[0] in heavy or name.startswith(ours)] == []


def test_parsing_alone_needs_no_numpy():
    # Counting images does, in the main process alone.
    program = (
        "import sys, detrojan.study.grid, detrojan.study.feasibility, detrojan.storage.provenance\n"
        "print([name for name in sys.modules if name in ('numpy', 'PIL', 'pyarrow', 'pandas', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_dry_run_of_the_quickstart_takes_under_three_seconds(tmp_path):
    # Processor time, and the better of two: on a shared machine a clock says little. Where it is so busy
    # that its processors are slow too, three times what Snakemake takes to load: a second elsewhere.
    taken = min(processor_seconds(tmp_path, "-m", "snakemake", *DRY_RUN) for _ in range(2))
    assert taken < 3 or taken < 3 * processor_seconds(tmp_path, "-c", "import snakemake.cli")


def processor_seconds(folder, *program):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *program], cwd=folder, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_study_of_the_surveys_size_is_enumerated_in_under_five_seconds():
    raw = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    raw["grid"] |= {
        "seeds": list(range(60)),
        "ratios": [0.01, 0.05, 0.1],
        "spc": [2, 5, 10],
        "draws": [f"{first}-{first + 9}" for first in range(0, 100, 10)],
        "include": [{"attack": ["badnets", "blended"]}],
        "exclude": [{"attack": "blended", "ratio": "> 0.05", "defense": "fp"}, {"seed": "> 50", "spc": 10}],
    }
    started = time.process_time()
    study = load_study(raw)
    found = list(shards(study))
    feasibility.check(study)
    assert time.process_time() - started < 5
    assert len(found) == len(set(found)) >= 30_000
    assert len(models(study)) == 60 * (1 + 2 * 3)
