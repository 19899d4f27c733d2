"""Who leads without one level, by hand."""

import pytest

from detrojan.analysis.tables.leads import make
from tests.unit.tables import cell, of_rows, untouched


def study(asr):
    """Return the table of a study; ``asr`` is that after ``anp`` and after ``ft``, by data set and attack."""
    rows = []
    for (dataset, attack), (anp, ft) in asr.items():
        axes = {"dataset": dataset, "attack": attack}
        rows += [untouched(**axes), cell("anp", 0.95, anp, **axes), cell("ft", 0.95, ft, **axes)]
    return {(row["axis"], row["level_left_out"]): row for row in make(of_rows(*rows)).to_pylist()}


def test_a_lead_that_rests_on_one_data_set():
    found = study({("a", "p"): (0.1, 0.5), ("a", "q"): (0.1, 0.5), ("b", "p"): (0.5, 0.1)})
    assert set(found) == {("dataset", "a"), ("dataset", "b"), ("attack", "p"), ("attack", "q")}
    without = found["dataset", "a"]
    assert (without["leader"], without["mean_rank"], without["num_settings"]) == ("ft", 1, 1)
    assert (without["second"], without["second_rank"]) == ("anp", 2)
    assert found["dataset", "b"]["leader"] == "anp"
    tie = found["attack", "q"]
    assert (tie["mean_rank"], tie["second_rank"]) == (pytest.approx(1.5), pytest.approx(1.5))


def test_without_two_that_are_ranked_nobody_leads():
    assert make(of_rows(untouched(), cell("ft"))).num_rows == 0
    assert make(of_rows(untouched(attack="none"))).num_rows == 0
