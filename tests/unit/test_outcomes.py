"""Every cell is counted once, with the reason why it is in no mean."""

from detrojan.analysis.tables.outcomes import make as outcomes
from tests.unit.tables import cell, of_rows, random_study, untouched


def counted(*rows):
    found = outcomes(of_rows(*rows)).to_pylist()
    return {(row["defense"], row["outcome"], row["reason"]): row["num_cells"] for row in found}


def test_outcomes_and_reasons():
    failed = {"attack": "sig", "attack_took": False}
    unknown = {"attack": "lf", "attack_took": None}
    found = counted(
        untouched(),
        cell("ft"),
        cell("ft", draw=1),
        cell("ft", draw=2, status="diverged", reason="the loss is not finite"),
        cell("ft", draw=3, status="diverged", reason="the loss is not finite"),
        cell("ft", draw=4, status="diverged", reason="a weight is not finite"),
        untouched(**failed),
        cell("ft", **failed),
        cell("ft", **failed, draw=1, status="out_of_memory", reason="24 GB were not enough"),
        cell("ft", **unknown),
        untouched(attack="none"),
        cell("ft", attack="none"),
    )
    assert found == {
        ("none", "ok", None): 2,
        ("none", "gate_failed", "the attack did not take: there is no backdoor to remove"): 1,
        ("ft", "ok", None): 3,
        ("ft", "diverged", "the loss is not finite"): 2,
        ("ft", "diverged", "a weight is not finite"): 1,
        ("ft", "gate_failed", "the attack did not take: there is no backdoor to remove"): 1,
        ("ft", "out_of_memory", "24 GB were not enough"): 1,
        (
            "ft",
            "no_verdict",
            "the untouched model has no result, so whether its attack took is not known",
        ): 1,
    }


def test_every_cell_counts_once():
    table = random_study(4)
    found = outcomes(table)
    assert sum(found["num_cells"].to_pylist()) == table.num_rows
    by_outcome = found.to_pandas().groupby("outcome")["num_cells"].sum()
    assert by_outcome.to_dict() == table.to_pandas()["status"].value_counts().to_dict()
