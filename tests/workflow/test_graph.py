"""The graph of jobs is Snakemake's own, and whatever follows it follows an edit of it alone."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from detrojan import registry
from detrojan.cells import NO_METHOD, axes_text
from detrojan.study import files, grid
from detrojan.workflow import graph

from . import forked

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "config" / "smoke.yaml"


def inputs(job):
    """Return the paths that a job of the graph reads, but for those of the whole study."""
    attack, defense = job.axes.get("attack", NO_METHOD), job.axes.get("defense", NO_METHOD)
    own = graph.RULES[job.rule].needs
    patterns = [graph.input_pattern(job.rule, name, attack, defense) for name in own if not own[name].each]
    return {job.at(pattern) for pattern in patterns if pattern}


def test_jobs_and_files_are_those_of_a_dry_run(tmp_path):
    study = files.load_study(yaml.safe_load(SMOKE.read_text()))
    options = ["--snakefile", ROOT / "Snakefile", "--configfile", SMOKE, "--dry-run", "--cores", "1"]
    done = forked.snakemake(options, tmp_path, os.environ)
    text = done.stdout
    assert done.returncode == 0, text[-3000:]
    found = {}
    for name, job in re.findall(r"^(?:local)?rule (\w+):\n((?: +.*\n)+)", text, re.M):
        told = dict(re.findall(r"^ +(input|output|log|wildcards): (.*)$", job, re.M))
        key = (name, frozenset(told.get("wildcards", "").split(", ")) - {""})
        found[key] = {kind: {w.split(" ")[0] for w in value.split(", ")} for kind, value in told.items()}
    planned = {(j.rule, frozenset(axes_text(j.axes).split(" ")) - {""}): j for j in graph.jobs(study)}
    assert set(planned) == set(found)
    pool = f"/{study.pool}.parquet"
    for key, job in planned.items():
        rule, told = graph.RULES[job.rule], found[key]
        made = rule.outputs_for(study.grid.datasets).values()
        assert told.get("output", set()) == {job.at(path) for paths in made for path in graph.listed(paths)}
        assert told.get("log", set()) == ({job.log} if rule.has_log else set())
        read = {
            path.replace("/train.parquet", pool) if job.rule == "sample" else path for path in inputs(job)
        }
        assert read <= told.get("input", set())
        if not any(need.each for need in rule.needs.values()):
            assert read == told.get("input", set())


def test_the_profile_of_a_cluster_and_the_rules_agree_on_gpus_and_groups():
    profile = yaml.safe_load((ROOT / "slurm" / "config.yaml").read_text())
    gpu = {name for name, rule in graph.RULES.items() if rule.gpu}
    assert set(profile["set-resources"]) == gpu
    assert "groups" not in profile  # the rules have their own
    asking, grouped = set(), set()
    for file in (ROOT / "rules").glob("*.smk"):
        for name, body in re.findall(r"^rule (\w+):\n((?: .*\n|\n)+)", file.read_text() + "\n", re.M):
            asking |= {name} if "gpu=GPUS_A_JOB" in body else set()
            grouped |= {name} if f'group_of("{name}")' in body else set()
    assert grouped == {name for name, rule in graph.RULES.items() if rule.group}
    assert asking == {name for name in gpu if graph.RULES[name].script in ("", name)}


TELL = """
import json, sys
from pathlib import Path
from detrojan.commands import plan, status, why
from detrojan.study.files import kept, load_study
from detrojan.workflow.site import Site
results = Path("results")
looked = status.look(results, 0)
facts = why.explain(Site(results), ["attack=badnets", "defense=ft", "draw=0"])
count = plan.count_files(load_study(kept(results)))["results"]
print(json.dumps([looked.models.done, looked.cells[0], [file["path"] for file in facts["files"]], count]))
"""


def test_another_place_of_models_is_one_edit(workshop):
    def told():
        done = subprocess.run(
            [sys.executable, "-c", TELL],
            cwd=workshop.folder,
            env=workshop.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    models, cells, paths, count = told()
    assert models == 2
    assert cells > 0
    workshop.edit("src/detrojan/workflow/graph.py", 'MODEL = "{dataset}/', 'MODEL = "each/{dataset}/')
    # Nothing lies where it should any more, for the rules as for those who tell of them.
    assert workshop.planned()["train"] == 2
    moved = re.compile(r"(results/(?:models|metrics|defended)/)")
    others = [moved.sub(r"\1each/", path) for path in paths]
    assert others != paths
    assert told() == [0, 0, others, count]
    plan = workshop.snakemake("--dry-run")
    assert "results/models/each/tiny/preactresnet18/badnets" in plan
    assert "logs/train/each/tiny" in plan


AUDIT = """
_audit = Rule(
    "audit",
    "audits",
    SHARD,
    needs={"defended": read("defended.defended")},
    files={"audit": "/audit.json"},
    defenses=DEFENDED,
    log="audit",
    methods={"defenses": "defense"},
    unit="draw",
    group="shard",
)
"""
AUDIT_RULE = """

rule audit:
    input:
        **needs("audit"),
    output:
        **makes("audit"),
    group:
        group_of("audit")
    log:
        log_of("audit"),
    resources:
        mem_mb=memory("audit"),
        runtime=runtime("audit"),
    params:
        code=code("audit"),
    script:
        "../scripts/audit.py"
"""
AUDIT_SCRIPT = """
from typing import TYPE_CHECKING
from detrojan.storage import records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    records.write_card({"defense": cell.defense}, snakemake.output.audit)
"""
TELL_OF_AUDIT = """
import json, os
from pathlib import Path
from detrojan.cells import Draws, Model
from detrojan.commands import costs, plan, status, why
from detrojan.study import grid
from detrojan.study.files import kept, load_study
from detrojan.workflow import closing, graph
from detrojan.workflow.attempts import Diary
from detrojan.workflow.job_costs import TABLE, Costs, mem_mb, runtime_min
from detrojan.workflow.site import Site

results = Path("results")
study = load_study(kept(results))
of_ft = (shard for shard in grid.shards(study) if shard.defense == "ft")
shard = next(shard for shard in of_ft if shard.model.attack == "badnets")
planned = plan.make(study, Costs.load())
axes = graph.shard_axes(shard)
asked = [mem_mb("audit", axes, 1), runtime_min("audit", axes, 1)]
facts = why.explain(Site(results), ["attack=badnets", "defense=ft", "draw=0"])
before = status.look(results, 0).shards
diary = Diary("audit", axes, "logs/x.log")
diary.start(mem_mb=None, runtime_min=None)
running = status.look(results, 0).shards
diary.path.write_text(diary.path.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194304'))
lost = closing.find(1).of_shard(shard)
print(json.dumps({
    "jobs": planned.jobs["audit"], "defend": planned.jobs["defend"], "slurm": planned.slurm_jobs,
    "all": planned.jobs.total(), "stage": planned.stages["audit"].cpu, "asked": asked,
    "files": [file["path"] for file in facts["files"]],
    "costs": "\\n".join(costs.show(["defense=ft"], TABLE)),
    "running": running.running - before.running, "lost": lost and lost.reason,
}))
"""


def test_another_rule_is_one_edit(workshop):
    """Besides the rule itself and its script; what it takes is assumed until the table of costs says more."""
    graph_file = "src/detrojan/workflow/graph.py"
    workshop.edit(graph_file, "\n_evaluate = Rule(", AUDIT + "\n_evaluate = Rule(")
    need = '        "defended": read("defended.defended"),\n        "test"'
    workshop.edit(graph_file, need, need.replace('"test"', '"audit": read("audits.audit"),\n        "test"'))
    workshop.edit(graph_file, "*(_defend, _evaluate,", "*(_defend, _audit, _evaluate,")
    with (workshop.code / "rules/evaluate.smk").open("a") as rules:
        rules.write(AUDIT_RULE)
    (workshop.code / "scripts/audit.py").write_text(AUDIT_SCRIPT)

    done = subprocess.run(
        [sys.executable, "-c", TELL_OF_AUDIT],
        cwd=workshop.folder,
        env=workshop.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["jobs"] == told["defend"] > 0
    assert told["slurm"] == told["all"] - 2 * told["jobs"] - 1  # a shard is one, the targets are none
    assert told["stage"] == 60 * 10  # two draws in each of four shards, and one in each of CLP's
    assert told["asked"] == [5500, 10]
    place = "tiny/preactresnet18/badnets/ratio-0.1/seed-0/ft/survey/spc-2/draws-0-1"
    assert f"results/audits/{place}/audit.json" in told["files"]
    assert re.search(r"^audit +60 ", told["costs"], re.M)
    assert told["running"] == 1
    assert told["lost"].startswith("audit was killed")

    shutil.rmtree(workshop.folder / "logs/attempts")
    assert workshop.planned()["audit"] == told["jobs"]


def test_no_path_below_results_or_logs_is_written_elsewhere():
    """Docstrings and messages to people may name one."""
    found = []
    for file in [*registry.PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        if file != registry.PACKAGE / "workflow" / "graph.py":
            found += [f"{file}: {text}" for text in texts(file) if re.match(r"(results|logs)/\w", text)]
    for file in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:
        found += [f"{file}: {line}" for line in re.findall(r".*[\"'](?:results|logs)/.*", file.read_text())]
    assert found == []


def test_the_folders_of_tables_and_figures_are_named_once():
    files = [*registry.PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    by_hand = re.compile(r"""/ ["'](?:tables|figures)["']|f["'](?:tables|figures)/""")
    assert [str(file) for file in files if by_hand.search(file.read_text())] == []


def texts(file):
    """Return the strings of a Python file."""
    tree = ast.parse(file.read_text())
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_paths_name_the_axes_of_their_jobs():
    study = files.load_study(yaml.safe_load(SMOKE.read_text()))
    needs = [need for need in graph.RULES["aggregate"].needs.values() if need.each]
    for need in needs:
        name = need.files[0].partition(".")[2]
        jobs = list(graph.study_jobs(need, grid.models(study), grid.shards(study)))
        assert jobs
        for folder in ("", "results/", "/a/results of/"):
            named = graph.placed(folder + job.file(name) for job in jobs)
            pairs = zip(jobs, named.values(), strict=True)
            assert all(job.axes.items() <= axes.items() for job, axes in pairs)
    # A data set may have the name of a folder.
    (axes,) = graph.placed(["results/triggered/results/badnets/seed-3/card.json"]).values()
    assert axes == {"dataset": "results", "attack": "badnets", "seed": 3}
    with pytest.raises(ValueError, match=r"a/card\.json: not where an artifact lies"):
        graph.placed(["results/triggered/a/card.json"])
