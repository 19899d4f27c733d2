# Path patterns, and the functions that give a rule its inputs and params. One wildcard an axis.
import functools

import snakemake.resources

from detrojan import cells, paths, registry
from detrojan.paths import CLEAN_MODEL, MODEL, OWN_TRIGGER, POISONED, SHARD, TRIGGER, UNTOUCHED
from detrojan.storage import provenance
from detrojan.workflow import closing, gpus, job_costs, snakemake_patches
from detrojan.workflow.snakemake_patches import known_parameters

snakemake_patches.apply()

# On one machine a job takes one of its GPUs if it has any; on a cluster the profile asks for one. A run
# with --jobs is a cluster's: its driver's own GPUs, if any, must not hold it up.
GPUS_A_JOB = 1 if gpus.visible() else 0
if workflow.global_resources["_nodes"].value is None and "gpu" not in workflow.global_resources:
    workflow.global_resources["gpu"] = snakemake.resources.Resource("gpu", gpus.slots())

# Attacks by whom a trigger belongs to: all models of a data set and seed, those of an architecture, or
# the one that it was trained with. Shared artifacts lie once, the others once a model.
OWNERS = {name: registry.trigger_owner(name) for name in registry.names("attacks")}


def attacks_of(*owners):
    """Return a wildcard's pattern: the attacks whose triggers belong to ``owners``."""
    return "|".join(name for name, owner in OWNERS.items() if owner in owners)


wildcard_constraints:
    dataset="[A-Za-z0-9_-]+",
    architecture="[a-z0-9_]+",
    attack="[a-z0-9_]+",
    ratio=r"[0-9.]+",
    seed="[0-9]+",
    defense="(?!none/)[a-z0-9_]+",
    spc="[0-9]+",
    draws="[0-9]+-[0-9]+",


def code(script, *, beside=(), **methods):
    """Return a param: the digest of all our code that the rule's job runs, and of the files ``beside`` it.

    ``methods`` names the wildcard of each kind of method that the job loads.
    """

    # Beside this file, where `script:` looks too: another workflow may use ours as a module.
    path = workflow.source_path(f"../scripts/{script}.py")

    def digest(wildcards):
        files = [registry.path(kind, wildcards[axis]) for kind, axis in methods.items()]
        return provenance.code_digest(path, *files, *beside)

    return known_parameters(digest)


def axes(wildcards):
    """Return the wildcards of a rule as axes of the grid, numbers as numbers."""
    return cells.Cell.from_wildcards(dict(wildcards.items())).axes


def dataset_code(wildcards):
    source = study.datasets[wildcards.dataset].source
    script = workflow.source_path("../scripts/dataset.py")
    return provenance.code_digest(script, registry.path("datasets", source))


def defender_pool(wildcards):
    return f"results/datasets/{wildcards.dataset}/{study.pool}.parquet"


def attack_settings(wildcards):
    return study.method("attacks", wildcards.attack, axes(wildcards))


def architecture_settings(wildcards):
    return study.method("models", wildcards.architecture, axes(wildcards))


@known_parameters
def defense_settings(wildcards):
    return study.method("defenses", wildcards.defense, axes(wildcards))


def training_settings(wildcards):
    return study.optimization(axes(wildcards))


def memory(rule):
    """Return a resource: the memory that a job of ``rule`` asks for, MB, by the table of costs."""
    return known_parameters(lambda wildcards, attempt: job_costs.mem_mb(rule, axes(wildcards), attempt))


def runtime(rule, units=lambda wildcards: None):
    """Return a resource: the time limit of a job of ``rule``, minutes; see :mod:`detrojan.workflow.job_costs`."""
    return known_parameters(
        lambda wildcards, attempt: job_costs.runtime_min(rule, axes(wildcards), attempt, units(wildcards))
    )


def epochs(wildcards):
    return training_settings(wildcards)["epochs"]


def thousand_shards(wildcards):
    return len(metrics_files()) / 1000


def is_clean(wildcards):
    return wildcards.attack == cells.NO_METHOD


def poisoned_rows(wildcards):
    """A clean model is trained on nothing but the training set."""
    if is_clean(wildcards):
        return []
    return f"results/poisoned/{shared_or_own(wildcards.attack, POISONED)}/train.parquet"


def shared_or_own(attack, shared):
    """Return the pattern of an artifact's folder: ``shared``, or the model's where the trigger is its own."""
    return shared if OWNERS[attack] == "all" else MODEL


def own_trigger(wildcards):
    if OWNERS[wildcards.attack] == "model":
        return f"results/models/{MODEL}/trigger.safetensors"
    return f"results/triggers/{OWN_TRIGGER}/trigger.safetensors"


@known_parameters
def defender_sample(wildcards):
    """What a method may be given is decided by its folder."""
    if registry.threat_model("defenses", wildcards.defense) == "data_free":
        return []
    return "results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet"


@known_parameters
def defender_triggered_sample(wildcards):
    if registry.threat_model("defenses", wildcards.defense) != "known_trigger" or is_clean(wildcards):
        return []
    folder = shared_or_own(wildcards.attack, TRIGGER)
    return f"results/stamped/{folder}/spc-{{spc}}/draws-{{draws}}.parquet"


@known_parameters
def triggered_test(wildcards):
    if is_clean(wildcards):
        return []
    return f"results/triggered/{shared_or_own(wildcards.attack, TRIGGER)}/test.parquet"


def temporary_unless_kept(path):
    return path if study.keep_defended else temp(path)


# What time and memory limits killed for good.
CLOSED = closing.find(study.kills)


@functools.cache
def shards():
    """Return the shards that have metrics, and the cells of those that are given up."""
    return CLOSED.split(grid.shards(study))


@functools.cache
def models():
    return CLOSED.open_models(grid.models(study))


@functools.cache
def metrics_files():
    return [paths.metrics(shard) for shard in shards()[0]]


def all_metrics(wildcards):
    return metrics_files()


def given_up_cells(wildcards):
    return shards()[1]


def all_model_cards(wildcards):
    return [paths.model_card(model) for model in models()]


def attacked_models():
    return [model for model in models() if model.attack != cells.NO_METHOD]


def all_trigger_cards(wildcards):
    patterns = {"all": TRIGGER, "architecture": OWN_TRIGGER, "model": TRIGGER}
    folders = {paths.of_model(patterns[OWNERS[model.attack]], model) for model in attacked_models()}
    return sorted(f"results/triggers/{path}/card.json" for path in folders)


def all_poisoned_cards(wildcards):
    """Attacks that control training poison no set."""
    attacked = [model for model in attacked_models() if OWNERS[model.attack] != "model"]
    folders = {paths.of_model(shared_or_own(model.attack, POISONED), model) for model in attacked}
    return sorted(f"results/poisoned/{path}/card.json" for path in folders)


def all_triggered(file):
    """Return an input function: this file of every triggered test set of the study."""

    def files(wildcards):
        attacked = attacked_models()
        folders = {paths.of_model(shared_or_own(model.attack, TRIGGER), model) for model in attacked}
        return sorted(f"results/triggered/{path}/{file}" for path in folders)

    return files
