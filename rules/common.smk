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
POISONED = "{dataset}/{attack}/ratio-{ratio}/seed-{seed}"


wildcard_constraints:
    dataset="[A-Za-z0-9_-]+",
    architecture="[a-z0-9_]+",
    attack="[a-z0-9_]+",
    ratio=r"[0-9.]+",
    seed="[0-9]+",
    defense="(?!none/)[a-z0-9_]+",
    spc="[0-9]+",
    draws="[0-9]+-[0-9]+",


def code(script, kind=None, axis=None, beside=()):
    """Return a param: the digest of all our code that the rule's job runs, and of the files ``beside`` it."""

    def digest(wildcards):
        methods = [registry.path(kind, wildcards[axis])] if kind else []
        return provenance.code_digest(f"{workflow.basedir}/scripts/{script}.py", *methods, *beside)

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
    return [] if is_clean(wildcards) else f"results/poisoned/{POISONED}/train.parquet"


def defender_sample(wildcards):
    """What a method may be given is decided by its folder."""
    if registry.threat_model("defenses", wildcards.defense) == "data_free":
        return []
    return "results/samples/{dataset}/spc-{spc}/draws-{draws}.parquet"


def defender_triggered_sample(wildcards):
    if registry.threat_model("defenses", wildcards.defense) != "known_trigger" or is_clean(wildcards):
        return []
    return f"results/stamped/{TRIGGER}/spc-{{spc}}/draws-{{draws}}.parquet"


def triggered_test(wildcards):
    return [] if is_clean(wildcards) else f"results/triggered/{TRIGGER}/test.parquet"


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


def all_poisoned(file):
    """Return an input function: this file of every poisoned set of the study, which architectures share."""

    def files(wildcards):
        attacked = [model for model in grid.models(study) if model.attack != cells.NO_METHOD]
        return sorted({f"results/poisoned/{path_of(POISONED, model)}/{file}" for model in attacked})

    return files
