"""Studies for the tests of the page: tables, what is said beside them, and the page itself."""

import pyarrow as pa

from detrojan.analysis import derived
from detrojan.analysis.report import listings, report, views
from detrojan.analysis.report.figures import base
from detrojan.analysis.statistics import gate
from detrojan.analysis.statistics.collect import MODELS
from detrojan.settings import Gate
from tests.unit import tables as made

EVIL = "</script><script>alert('x')</script> & co"
SHEETS = {"digits": "<svg>the triggers</svg>", "untouched-set": "<svg>nothing</svg>"}
ORIGIN = {
    "device": "cpu",
    "code": "c0de",
    "versions": '{"torch": "2.13.0"}',
    "git_commit": "abc123",
    "hyperparameters": '{"lr": 0.01}',
    "chosen": '{"epoch": 3}',
}
PLAIN = {pa.string(): "", pa.float64(): 0.0, pa.int32(): 0, pa.int64(): 0, pa.int16(): 0, pa.bool_(): True}


def of_rows(*rows):
    """Return rows as a table of cells that know where they come from."""
    return made.of_rows(*(row | ORIGIN for row in rows))


def small():
    """Return the cells of a clean and an attacked model; one cell failed for an evil reason."""
    sig = {"dataset": "digits", "architecture": "net", "attack": "sig", "ratio": 0.05}
    sig |= {"num_test": 1000, "num_triggered": 900}
    clean = sig | {"attack": "none"}
    return of_rows(
        made.untouched(0.987, 0.963, 0.031, **sig),
        made.cell("ft", 0.913, 0.117, 0.521, spc=2, draw=0, seconds=1800.0, **sig),
        made.cell("ft", spc=2, draw=1, status="diverged", reason=EVIL, **sig),
        made.cell("clp", 0.9, 0.5, 0.4, spc=0, seconds=0.25, **sig),
        made.cell("grad_prune", 0.95, 0.01, 0.9, spc=2, **sig),
        made.untouched(0.991, **clean),
        made.cell("ft", 0.981, spc=2, **clean),
    )


def models_of(cells):
    """Return a table of the models of ``cells``."""
    rows = []
    for row in cells.to_pylist():
        if row["defense"] == "none":
            plain = {field.name: None if field.nullable else PLAIN[field.type] for field in MODELS}
            same = {name: value for name, value in row.items() if name in MODELS.names}
            trained = {"num_train": 1000, "num_poisoned": 50, "epochs": 10, "num_parameters": 12345}
            trained |= {"train_accuracy": 0.99, "effective_ratio": 0.05, "seconds": 1800.0}
            if row["attack"] != "none":
                trained |= {"psnr": 21.25, "ssim": 0.876, "linf": 51, "acc_loss": 0.004}
            rows.append(plain | same | trained)
    return models_table(rows)


def models_table(rows):
    """Return rows as a table of models."""
    return pa.Table.from_pylist(rows, schema=MODELS)


def random_study(**axes):
    """Return the tables of a random study, see :func:`made.random_study`."""
    return tables_of(of_rows(*made.random_study(**axes).to_pylist()))


def tables_of(cells, models=None):
    """Return all tables of a study."""
    models = models_of(cells) if models is None else models
    judged = gate.table(models.to_pylist(), Gate())
    return views.Tables(cells, models, derived.make({"cells": cells, "models": models, "gate": judged}))


def without_models(cells):
    """Return the tables that other people's results have."""
    return views.Tables(cells, None, derived.make({"cells": cells}))


def values(figure):
    """Return the rows that a figure draws."""
    return [row for rows in figure.spec["datasets"].values() for row in rows]


def about(tables):
    return report.of_study(tables, Gate(), ["0-1", "2-9"])


def page(tables, said=None, sheets=SHEETS):
    """Return the page, with pictures that take no time to draw."""
    figures = base.on_paper(tables)
    pictures = dict.fromkeys(figures, "<svg>drawn</svg>")
    return report.page(tables, said or about(tables), figures, pictures, listings.of_tables(tables), sheets)
