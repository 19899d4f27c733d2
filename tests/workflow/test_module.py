"""Another workflow uses ours as a module: rules by another name, files in its own folder."""

import subprocess
import sys

import yaml

from .conftest import ROOT, STUDY

OUTER = f"""\
configfile: "config.yaml"

module detrojan:
    snakefile: {str(ROOT / "Snakefile")!r}
    config: config["backdoors"]

use rule * from detrojan as detrojan_*

rule own:
    default_target: True
    input: rules.detrojan_aggregate.output.cells
    output: "own.txt"
    shell: "touch {{output}}"
"""


def snakemake(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def test_our_rules_run_in_another_workflow(tmp_path):
    (tmp_path / "Snakefile").write_text(OUTER)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"backdoors": STUDY}))
    ran = snakemake(tmp_path, "--until", "detrojan_sample")
    assert "detrojan_sample" in ran
    assert (tmp_path / "results/datasets/tiny/train.parquet").is_file()
    assert (tmp_path / "results/samples/tiny/spc-2/draws-0-1.parquet").is_file()

    # All that is left is planned, once, and none of what has run is planned again.
    planned = snakemake(tmp_path, "--dry-run", "--quiet", "rules")
    for rule in ("train", "defend", "evaluate_untouched", "aggregate"):
        assert f"detrojan_{rule} " in planned
    assert "detrojan_dataset" not in planned
