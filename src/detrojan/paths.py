"""Where artifacts lie, below the working directory. One wildcard an axis; no script takes a path apart."""

from typing import Any

from detrojan.cells import NO_METHOD, NO_SAMPLES, ONE_DRAW, Model, Shard, ratio_text

RESULTS, LOGS = "results", "logs"

MODEL = "{dataset}/{architecture}/{attack}/ratio-{ratio}/seed-{seed}"
SHARD = f"{MODEL}/{{defense}}/spc-{{spc}}/draws-{{draws}}"
UNTOUCHED = f"{MODEL}/{NO_METHOD}/spc-{NO_SAMPLES}/draws-{ONE_DRAW}"
CLEAN_MODEL = f"{{dataset}}/{{architecture}}/{NO_METHOD}/ratio-0/seed-{{seed}}"
# A trigger that all models of a data set and seed share, and one of an architecture.
TRIGGER = "{dataset}/{attack}/seed-{seed}"
OWN_TRIGGER = "{dataset}/{architecture}/{attack}/seed-{seed}"
POISONED = "{dataset}/{attack}/ratio-{ratio}/seed-{seed}"


def of_model(pattern: str, model: Model, **axes: Any) -> str:
    """Return ``pattern`` with the axes of ``model``, and any others, filled in."""
    return pattern.format(**model._asdict() | {"ratio": ratio_text(model.ratio)} | axes)


def of_shard(shard: Shard) -> str:
    """Return the part of a path that names ``shard``."""
    return of_model(SHARD, shard.model, defense=shard.defense, spc=shard.spc, draws=shard.draws)


def metrics(shard: Shard) -> str:
    """Return the path of a shard's table of metrics."""
    return f"{RESULTS}/metrics/{of_shard(shard)}/metrics.parquet"


def defended(shard: Shard) -> str:
    """Return the path of the folder that a shard's repaired models wait in to be evaluated."""
    return f"{RESULTS}/defended/{of_shard(shard)}"


def model_card(model: Model) -> str:
    """Return the path of a model's card, which is there once it is trained."""
    return f"{RESULTS}/models/{of_model(MODEL, model)}/card.json"
