"""On one machine jobs are forks of one process, and nobody can tell by what they leave."""

import re

import pyarrow.parquet as pq
import torch

from detrojan.storage.artifacts import read_tensors
from detrojan.workflow.fork_server import SWITCH

COSTS = ["seconds", "peak_memory_bytes"]


MODEL = "tiny/preactresnet18/badnets/ratio-0.1/seed-0"
METRICS = f"results/metrics/{MODEL}/ft/survey/spc-2/draws-0-1/metrics.parquet"
WEIGHTS = f"results/models/{MODEL}/model.safetensors"


def test_a_job_that_starts_anew_makes_what_a_forked_one_made(workshop, finished, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    output = workshop.snakemake(METRICS, "-R", "train", "defend", "evaluate")
    assert len(re.findall("^Finished jobid", output, re.MULTILINE)) == 3, output
    ours, theirs = (read_tensors(w.folder / WEIGHTS)[0] for w in (workshop, finished))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (pq.read_table(w.folder / METRICS).drop_columns(COSTS) for w in (workshop, finished))
    assert ours.equals(theirs)


def test_a_failing_job_fails_with_its_reason(workshop):
    workshop.edit("scripts/sample.py", "with job.run", "raise RuntimeError('planted')\nwith job.run")
    output = workshop.snakemake("-R", "sample", "--until", "sample", check=False)
    assert workshop.returncode == 1
    assert "RuntimeError: planted" in output
