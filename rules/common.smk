# Path patterns, and the functions that give a rule its inputs and params. One wildcard an axis.
import functools
import shlex
import sys

import snakemake.jobs

from detrojan import cells, provenance, registry

# Each rule's `code` param covers its script. Snakemake also reruns what is older than the script's
# file, and every checkout makes files anew; there is no setting for that but one on the command line.
snakemake.jobs.get_script_mtime = lambda path: 0.0

# Snakemake puts the interpreter's path into shell commands as it is; a clone may lie in "my projects".
sys.executable = shlex.quote(sys.executable)

MODEL = "{dataset}/{architecture}/{attack}/ratio-{ratio}/seed-{seed}"
SHARD = f"{MODEL}/{{defense}}/spc-{{spc}}/draws-{{draws}}"
UNTOUCHED = f"{MODEL}/{cells.NO_METHOD}/spc-{cells.NO_SAMPLES}/draws-{cells.ONE_DRAW}"
TRIGGER = "{dataset}/{attack}/seed-{seed}"
OWN_TRIGGER = "{dataset}/{architecture}/{attack}/seed-{seed}"
POISONED = "{dataset}/{attack}/ratio-{ratio}/seed-{seed}"
CLEAN_MODEL = f"{{dataset}}/{{architecture}}/{cells.NO_METHOD}/ratio-0/seed-{{seed}}"

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

    def digest(wildcards):
        files = [registry.path(kind, wildcards[axis]) for kind, axis in methods.items()]
        return provenance.code_digest(f"{workflow.basedir}/scripts/{script}.py", *files, *beside)

    return digest


def axes(wildcards):
    """Return the wildcards of a rule as axes of the grid, numbers as numbers."""
    return cells.Cell.from_wildcards(dict(wildcards.items())).axes


def dataset_code(wildcards):
    source = study.datasets[wildcards.dataset].source
    script = f"{workflow.basedir}/scripts/dataset.py"
    return provenance.code_digest(script, registry.path("datasets", source))


def defender_pool(wildcards):
    return f"results/datasets/{wildcards.dataset}/{study.pool}.parquet"


def attack_settings(wildcards):
    return study.method("attacks", wildcards.attack, axes(wildcards))


def architecture_settings(wildcards):
    return study.method("models", wildcards.architecture, axes(wildcards))


def defense_settings(wildcards):
    return study.method("defenses", wildcards.defense, axes(wildcards))


def training_settings(wildcards):
    return study.optimization(axes(wildcards))


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


def defender_sample(wildcards):
    """What a method may be given is decided by its folder."""
    if registry.threat_model("defenses", wildcards.defense) == "data_free":
        return []
    return "results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet"


def defender_triggered_sample(wildcards):
    if registry.threat_model("defenses", wildcards.defense) != "known_trigger" or is_clean(wildcards):
        return []
    folder = shared_or_own(wildcards.attack, TRIGGER)
    return f"results/stamped/{folder}/spc-{{spc}}/draws-{{draws}}.parquet"


def triggered_test(wildcards):
    if is_clean(wildcards):
        return []
    return f"results/triggered/{shared_or_own(wildcards.attack, TRIGGER)}/test.parquet"


def temporary_unless_kept(path):
    return path if study.keep_defended else temp(path)


def path_of(pattern, model, **axes):
    return pattern.format(**model._asdict() | {"ratio": cells.ratio_text(model.ratio)} | axes)


@functools.cache
def metrics_files():
    return [
        "results/metrics/{}/metrics.parquet".format(
            path_of(SHARD, shard.model, defense=shard.defense, spc=shard.spc, draws=shard.draws)
        )
        for shard in grid.shards(study)
    ]


def all_metrics(wildcards):
    return metrics_files()


def all_model_cards(wildcards):
    return [f"results/models/{path_of(MODEL, model)}/card.json" for model in grid.models(study)]


def attacked_models():
    return [model for model in grid.models(study) if model.attack != cells.NO_METHOD]


def all_trigger_cards(wildcards):
    patterns = {"all": TRIGGER, "architecture": OWN_TRIGGER, "model": TRIGGER}
    paths = {path_of(patterns[OWNERS[model.attack]], model) for model in attacked_models()}
    return sorted(f"results/triggers/{path}/card.json" for path in paths)


def all_poisoned_cards(wildcards):
    """Attacks that control training poison no set."""
    models = [model for model in attacked_models() if OWNERS[model.attack] != "model"]
    paths = {path_of(shared_or_own(model.attack, POISONED), model) for model in models}
    return sorted(f"results/poisoned/{path}/card.json" for path in paths)


def all_triggered(file):
    """Return an input function: this file of every triggered test set of the study."""

    def files(wildcards):
        models = attacked_models()
        paths = {path_of(shared_or_own(model.attack, TRIGGER), model) for model in models}
        return sorted(f"results/triggered/{path}/{file}" for path in paths)

    return files
