"""Part 4, what defenses cost: at three SPC, on the first network, then the others; rows for a table of costs.

The models are those of part 3, or for the other networks ones that are trained here, a quarter as long:
what a defense costs hardly depends on how well a model is trained. What part 3 has measured counts too.
"""

import math
from collections.abc import Iterator

from detrojan.cells import NO_METHOD, Model
from detrojan.commands.costs import Run, learned
from detrojan.workflow import job_costs
from detrojan.workflow.job_costs import Costs, Key, of_draw
from gpu_parts.study import FIRST, SPC, Work, defend_all, train

PART = "costs"
SPCS = (2, 100)  # SPC 10 is part 3's
TABLE = "costs.csv"
# Training images of the whole data sets: an epoch of part of them is scaled to as many.
WHOLE = {"cifar10": 50_000, "gtsrb": 39_209}


def run(work: Work) -> None:
    """Defend at further SPC, then on further networks, and write the table."""
    if not work.trained:
        return
    first = _subject(work)
    if first:
        further = [(first, spc, 0) for spc in SPCS]
        defend_all(work, PART, further[:1] if work.bench.tiny else further)
        if not work.bench.tiny:
            defend_all(work, PART, _others(work, first))
    write(work)


def _subject(work: Work) -> Model | None:
    """Return the model to defend: one with BadNets if there is any, whether or not it took."""
    attacked = [name for name in work.trained if name.attack != NO_METHOD]
    return next((name for name in attacked if name.attack == "badnets"), next(iter(attacked), None))


def _others(work: Work, first: Model) -> Iterator[tuple[Model, int, int]]:
    for architecture in work.bench.architectures:
        if architecture != FIRST:
            model = first._replace(architecture=architecture)
            epochs = max(1, math.ceil(work.epochs[model.dataset] / 4))
            if train(work, model, epochs, work.bench.budget.left):
                yield from ((model, spc, 0) for spc in (SPC, *SPCS))


def write(work: Work) -> int:
    """Write what was measured as rows of a table of costs; return how many there are."""
    found = [*_defended(work), *_epochs(work)]
    if not found:
        return 0
    known = learned(job_costs.default(), found)
    rows = [known.rows[key] for key in dict.fromkeys(run.key for run in found)]
    Costs(rows, work.bench.record.folder / TABLE).write()
    return len(rows)


def _defended(work: Work) -> Iterator[Run]:
    for row in work.rows:
        if row["defense"] != NO_METHOD and row["status"] == "ok":
            yield Run(of_draw(row), row["seconds"], row["peak_memory_bytes"] / 1e6, row["device"])


def _epochs(work: Work) -> Iterator[Run]:
    for name, row in work.models.items():
        if name.dataset in WHOLE:
            seconds = WHOLE[name.dataset] / row["images_per_second"]
            key = Key("train", name.attack, name.architecture, name.dataset)
            yield Run(key, seconds, row["peak_memory_bytes"] / 1e6, row["device"])
