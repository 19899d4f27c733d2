"""The plan of a study against Snakemake's own, and against what a finished study has left."""

import json
from collections import Counter

from detrojan.commands import plan
from detrojan.study.files import load_study
from detrojan.workflow import graph


def test_jobs_are_those_of_a_dry_run(finished):
    assert finished.planned("--forceall") == plan.count_jobs(load_study(finished.study()))


def test_jobs_are_those_of_a_dry_run_with_all_kinds_of_triggers_and_filters(workshop):
    study = workshop.study()
    study["grid"] |= {
        "attacks": ["none", "badnets", "lf", "wanet", "sig"],
        "architectures": ["preactresnet18", "mobilenet_v3_large"],
        "ratios": [0.05, 0.1],
        "seeds": [0, 3],
        "defenses": ["none", "ft", "clp", "grad_prune", "nad"],
        "spc": [1, 2],
        "draws": ["0-1", "2-2"],
        "exclude": [
            {"attack": "sig", "ratio": 0.1},
            {"attack": "lf", "defense": "grad_prune", "spc": 1},
            {"architecture": "mobilenet_v3_large", "attack": "wanet"},
            {"defense": "nad", "spc": 2},
        ],
    }
    workshop.write(study)
    assert workshop.planned("--forceall") == plan.count_jobs(load_study(study))


def test_files_are_those_of_a_finished_study(finished):
    found = {
        folder: sum(path.is_file() for path in (finished.folder / folder).rglob("*"))
        for folder in ("results", "logs", ".snakemake/metadata")
    }
    assert found == plan.count_files(load_study(finished.study()))


def test_outputs_of_each_rule_are_those_of_a_finished_study(finished):
    study = load_study(finished.study())
    records = (finished.folder / ".snakemake/metadata").iterdir()
    found = Counter(json.loads(record.read_text())["rule"] for record in records)
    for rule, jobs in plan.count_jobs(study).items():
        outputs = graph.RULES[rule].outputs_for(study.grid.datasets).values()
        said = jobs * sum(len(graph.listed(made)) for made in outputs)
        assert found[rule] == said, (
            f"{jobs} jobs of rule {rule} left {found[rule]} files and not {said}: mend the graph of jobs, "
            f"then what docs/scale.md says of files"
        )
