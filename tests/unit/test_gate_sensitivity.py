"""The same study at other gates, by hand."""

import pytest

from detrojan.analysis.statistics import gate
from detrojan.analysis.tables.gate_sensitivity import make
from detrojan.settings import Gate
from tests.unit.tables import cell, of_rows, untouched


def study(*models):
    """Return the table; ``models`` are ASR before, after ``anp`` and after ``ft``, an attack each."""
    rows, untouched_rows = [], []
    for number, (before, anp, ft) in enumerate(models):
        axes = {"attack": f"attack{number}", "attack_took": before >= 0.8}
        untouched_rows.append(untouched(asr=before, **axes) | {"acc_loss": None})
        rows += [untouched(asr=before, **axes), cell("anp", 0.95, anp, **axes), cell("ft", 0.95, ft, **axes)]
    table = make(of_rows(*rows), gate.table(untouched_rows, Gate()))
    return {(row["min_asr"], row["defense"]): row for row in table.to_pylist()}


def test_another_limit_may_have_another_leader():
    found = study((0.9, 0.1, 0.5), (0.6, 0.6, 0.0), (0.55, 0.5, 0.0), (0.4, 0.0, 0.4))
    assert sorted({limit for limit, _ in found}) == [0.5, 0.7, 0.8, 0.9]
    of_study = found[0.8, "anp"]
    assert (of_study["is_study"], of_study["num_models"], of_study["num_settings"]) == (True, 1, 1)
    assert (of_study["der_mean"], of_study["net_mean"]) == (pytest.approx(0.9), pytest.approx(0.8))
    assert (of_study["mean_rank"], of_study["leads"]) == (1, True)
    assert not found[0.8, "ft"]["leads"]
    lower = found[0.5, "ft"]
    assert (lower["is_study"], lower["num_models"], lower["leads"]) == (False, 3, True)
    assert lower["mean_rank"] == pytest.approx(4 / 3)
    assert lower["net_mean"] == pytest.approx((0.4 + 0.6 + 0.55) / 3)


def test_equal_ranks_lead_together():
    found = study((0.9, 0.1, 0.1), (0.95, 0.2, 0.2))
    assert found[0.8, "anp"]["leads"]
    assert found[0.8, "ft"]["leads"]


def test_at_the_studys_own_limit_it_is_the_study():
    found = study((0.8, 0.1, 0.5), (0.79, 0.6, 0.0))
    assert found[0.8, "ft"]["num_models"] == 1
    assert found[0.9, "ft"]["num_models"] == 0
    assert found[0.9, "ft"]["mean_rank"] is None


def test_a_model_that_fails_otherwise_takes_at_no_limit():
    rows = [
        untouched(asr=0.9, attack_took=False),
        cell("anp", attack_took=False),
        cell("ft", attack_took=False),
    ]
    judged = gate.table([rows[0] | {"acc_loss": 0.5}], Gate(min_asr=0.3))
    table = make(of_rows(*rows), judged).to_pylist()
    assert {row["num_models"] for row in table} <= {0}


@pytest.mark.parametrize("asr", [0.85, 0.3])
def test_the_studys_own_limit_stands_among_them(asr):
    judged = gate.table([untouched() | {"acc_loss": None}], Gate(min_asr=asr))
    table = make(of_rows(untouched(), cell("anp"), cell("ft")), judged).to_pylist()
    assert [row["min_asr"] for row in table if row["is_study"]] == [asr, asr]
