# Functions that give a rule its paths, as the graph of jobs has them, and its params.
import functools
import json

import snakemake.resources

from detrojan import cells
from detrojan.study import networks
from detrojan.workflow import (
    closing,
    fork_server,
    gpus,
    graph,
    job_costs,
    slurm_words,
    snakemake_patches,
    sources,
)
from detrojan.workflow.snakemake_patches import known_parameters

snakemake_patches.apply()
if workflow.is_main_process:
    slurm_words.listen()
    # A run plans by the record of equal code; its jobs on other machines never look.
    snakemake_patches.know_equal_code()
    if fork_server.usable():
        snakemake_patches.fork_scripts(graph.SCRIPTS)

# On one machine a job takes one of its GPUs if it has any; on a cluster the profile asks for one. A run
# with --jobs is a cluster's: its driver's own GPUs, if any, must not hold it up.
GPUS_A_JOB = 1 if gpus.visible() else 0
CLUSTER = workflow.global_resources["_nodes"].value is not None
if not CLUSTER and "gpu" not in workflow.global_resources:
    workflow.global_resources["gpu"] = snakemake.resources.Resource("gpu", gpus.slots())


wildcard_constraints:
    **graph.WILDCARDS,


def needs(name):
    """Return the inputs of a rule by name: patterns, or functions where attack or defense decides."""
    return {key: _need(name, key, need) for key, need in graph.RULES[name].needs.items()}


def _need(name, key, need):
    if need.each:
        return lambda wildcards: [job.file(file) for job, file in of_study(need)]
    patterns = graph.input_patterns(name, key)
    if len(patterns) == 1:
        return patterns.pop()

    def chosen(wildcards):
        attack, defense = wildcards.get("attack", "none"), wildcards.get("defense", "none")
        return graph.input_pattern(name, key, attack, defense) or []

    return known_parameters(chosen)


def makes(name):
    """Return the outputs of a rule by name."""
    found = graph.RULES[name]
    outputs = found.outputs_for(study.grid.datasets)
    if found.temporary:
        outputs = {key: directory(path) for key, path in outputs.items()}
        if not study.keep_defended:
            outputs = {key: temp(path) for key, path in outputs.items()}
    return outputs | {key: report(outputs[key], category=head) for key, head in found.shown.items()}


def log_of(name):
    return graph.RULES[name].log_pattern


def group_of(name):
    """Return the group whose jobs a cluster runs as one; None on one machine, where each is a job."""
    return graph.RULES[name].group if CLUSTER and graph.RULES[name].group else None


def attacks_of(name):
    """Return a wildcard's pattern: the attacks that a rule serves."""
    return "|".join(graph.RULES[name].attack_names)


def code(name):
    """Return a param: the digest of all our code that the job of a rule runs."""

    def digest(wildcards):
        named = graph.methods_of(study, dict(wildcards.items()))
        # A cluster's job runs what it was planned with, or refuses.
        return planned.code.get(graph.code_key(name, named)) or graph.code_digest(name, named)

    return known_parameters(digest)


def study_text():
    """Return the study, but for what decides no result, as JSON: the order of its keys means nothing."""
    said = networks.expanded(config)
    said = {key: value for key, value in said.items() if key not in ("keep_defended", "close")}
    return json.dumps(said, sort_keys=True)


def source(wildcards):
    return study.datasets[wildcards.dataset].source


@functools.cache
def images_of(dataset):
    """Return a text that is the same as long as a data set's source holds the same bytes."""
    return planned.images.get(dataset) or sources.Read(dataset).identity(
        sources.load(study.datasets[dataset])
    )


def images(wildcards):
    return images_of(wildcards.dataset)


def axes(wildcards):
    """Return the wildcards of a rule as axes of the grid, numbers as numbers."""
    return cells.Cell.from_wildcards(dict(wildcards.items())).axes


def attack_settings(wildcards):
    return study.method("attacks", wildcards.attack, axes(wildcards))


def architecture_settings(wildcards):
    return study.method("models", wildcards.architecture, axes(wildcards))


@known_parameters
def defense_settings(wildcards):
    return study.method("defenses", wildcards.defense, axes(wildcards))


def defense_sources(wildcards, output):
    """Return whose value each setting of a defense is, and whether its protocol has another.

    As a function that takes outputs, it reruns nothing: the settings themselves do, if they change.
    """
    named = axes(wildcards)
    deviates = study.deviates(wildcards.defense, named)
    return {"sources": study.sources(wildcards.defense, named), "deviates": deviates}


def training_settings(wildcards):
    return study.optimization(axes(wildcards))


COSTS = job_costs.default().of(study)


def memory(rule):
    """Return a resource: the memory that a job of ``rule`` asks for, MB; see :mod:`detrojan.workflow.job_costs`."""
    return known_parameters(
        lambda wildcards, attempt: job_costs.mem_mb(rule, axes(wildcards), attempt, COSTS)
    )


def runtime(rule, units=lambda wildcards: None):
    """Return a resource: the time limit of a job of ``rule``, minutes; see :mod:`detrojan.workflow.job_costs`."""

    def limit(wildcards, attempt):
        return job_costs.runtime_min(rule, axes(wildcards), attempt, units(wildcards), COSTS)

    return known_parameters(limit)


@known_parameters
def tries_left(wildcards, attempt):
    """Return a resource that nobody counts: how often a job will be tried again if it fails."""
    given = getattr(workflow.execution_settings, "retries", 0) if retries is None else retries
    return max(0, given + 1 - attempt)


def epochs(wildcards):
    return training_settings(wildcards)["epochs"]


def thousand_shards(wildcards):
    return len(shards()[0]) / 1000


# What time and memory limits killed for good.
CLOSED = closing.find(study.kills)


@functools.cache
def shards():
    """Return the shards that have metrics, and the cells of those that are given up."""
    return CLOSED.split(grid.shards(study))


@functools.cache
def models():
    return CLOSED.open_models(grid.models(study))


def of_study(need):
    """Return the jobs of the study that make an input of each model or shard, with that output's name."""
    name = need.files[0].partition(".")[2]
    jobs = graph.study_jobs(need, models(), shards()[0])
    return [(job, name) for job in jobs if CLOSED.of_job(job) is None]


def given_up_cells(wildcards):
    return shards()[1]


def triggers_shown(wildcards):
    """Return the axes of each file of examples, in the order of the files."""
    return [job.axes for job, _ in of_study(graph.RULES["report"].needs["examples"])]
