"""The README's code works as it stands there."""

import re
import subprocess
import sys

import pytest
import yaml

from detrojan.study import files

from .conftest import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
(DEFENSE,) = (snippet for snippet in SNIPPETS if "class HeadTuning" in snippet)


def test_reading_snippets_run_on_a_finished_study(finished):
    code = "\n".join(snippet for snippet in SNIPPETS if snippet != DEFENSE)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=finished.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"grad_prune +2 +0\.\d", done.stdout)
    assert re.search(r"\bft +\d\.\d", done.stdout)


def test_the_example_defense_runs_and_keeps_the_contract(workshop):
    assert len(DEFENSE.splitlines()) <= 30
    (workshop.code / "src/detrojan/defenses/clean_data/head_tuning.py").write_text(DEFENSE)
    study = workshop.study()
    study["grid"]["defenses"] = ["none", "head_tuning"]
    workshop.write(study)
    workshop.snakemake("--until", "aggregate")
    rows = workshop.table("cells").to_pylist()
    assert [r["status"] for r in rows if r["defense"] == "head_tuning"] == ["ok"] * 4
    contract = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-k", "head_tuning and not vgg and not 200", ROOT / "tests/contract/test_defenses.py"),
        ],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert contract.returncode == 0, contract.stdout
    assert re.search(r"\d+ passed", contract.stdout)


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S))
def test_study_files_are_valid(text):
    files.load_study(yaml.safe_load(text))


def test_the_diagram_shows_the_workflow(finished):
    rules = set(
        re.findall(r"^rule (\w+):", "".join(p.read_text() for p in (ROOT / "rules").glob("*.smk")), re.M)
    )
    (diagram,) = re.findall(r"^```mermaid\n(.*?)^```", README, re.M | re.S)
    assert rules - {"evaluate_untouched"} <= set(re.findall(r"\w+", diagram))
