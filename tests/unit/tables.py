"""Tables of cells for the tests of what is made of them."""

import numpy as np
import pyarrow as pa

from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.statistics.relative import RELATIVE, relative

PLAIN = {pa.string(): "x", pa.float64(): 1.0, pa.int32(): 0, pa.int64(): 0, pa.bool_(): True}
THREAT_MODELS = {"none": "none", "clp": "data_free", "grad_prune": "known_trigger"}


def cell(defense="ft", acc=0.9, asr=0.1, ra=0.8, **more):
    """Return a row of a table of cells: one draw with ten images a class, on a model whose attack took."""
    plain = {field.name: None if field.nullable else PLAIN[field.type] for field in CELLS}
    row = plain | {"attack": "badnets", "ratio": 0.1, "attack_took": True, "status": "ok", "seconds": 2.0}
    row |= {"defense": defense, "threat_model": THREAT_MODELS.get(defense, "clean_data")}
    row |= {"protocol": "none" if defense == "none" else "survey", "deviates": False}
    row |= {"spc": 0 if defense in ("none", "clp") else 10, "acc": acc, "asr": asr, "ra": ra} | more
    if row["attack"] == "none":
        row |= {"ratio": 0.0, "attack_took": None, "asr": None, "ra": None}
    if row["status"] != "ok":
        row |= {"acc": None, "asr": None, "ra": None}
    return row


def untouched(acc=0.95, asr=1.0, ra=0.0, **more):
    return cell("none", acc, asr, ra, seconds=0.0, **more)


def of_rows(*rows):
    """Return the rows as a table of the schema ``CELLS``, with what has changed worked out."""
    table = pa.Table.from_pylist(list(rows), schema=CELLS)
    changes = relative(table.to_pandas())
    for name in RELATIVE:
        column = pa.array(changes[name], pa.float64(), from_pandas=True)
        table = table.set_column(CELLS.get_field_index(name), CELLS.field(name), column)
    return table


def random_study(
    seed=0,
    defenses=("ft", "fp", "clp", "anp", "grad_prune"),
    attacks=("badnets", "blended", "sig"),
    ratios=(0.05, 0.1),
    seeds=(0, 1),
    spc=(2, 10),
    draws=3,
):
    """Return a table of clean and attacked models with random measures, a tenth of the cells diverged."""
    rng = np.random.default_rng(seed)
    rows = []
    for attack, ratio in [("none", 0.0), *((attack, ratio) for attack in attacks for ratio in ratios)]:
        for model in seeds:
            axes = {"attack": attack, "ratio": ratio, "seed": model, "dataset": "digits"}
            rows.append(untouched(0.95, 0.9 + 0.1 * rng.random(), 0.05, **axes))
            for defense in defenses:
                data_free = THREAT_MODELS.get(defense) == "data_free"
                for budget in (0,) if data_free else spc:
                    for draw in range(1 if data_free else draws):
                        measures = np.round(rng.random(3), 2)  # so that some are tied
                        status = "diverged" if rng.random() < 0.1 else "ok"
                        rows.append(cell(defense, *measures, spc=budget, draw=draw, status=status, **axes))
    return of_rows(*rows)
