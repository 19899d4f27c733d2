"""Differences to the baselines and probabilities of improvement: by hand and by loops."""

import numpy as np
import pytest

from detrojan.analysis.tables.comparisons import make as compare
from tests.unit.tables import cell, of_rows, random_study, untouched


def compared(table, measure="asr", baseline="ft", spc=None):
    return chosen(compare(table).to_pandas(), measure, baseline, spc)


def chosen(frame, measure="asr", baseline="ft", spc=None):
    """Return the rows of a measure, baseline and budget by defense."""
    pooled = frame["spc"].isna() if spc is None else frame["spc"] == spc
    return frame[(frame["measure"] == measure) & (frame["baseline"] == baseline) & pooled].set_index(
        "defense"
    )


def draws(defense, *asrs, **axes):
    return [cell(defense, asr=asr, draw=draw, **axes) for draw, asr in enumerate(asrs)]


def test_differences_and_improvements_by_hand():
    table = of_rows(untouched(), *draws("ft", 0.4, 0.5, 0.9), *draws("anp", 0.1, 0.5, 1.0))
    row = compared(table).loc["anp"]
    assert row["difference"] == pytest.approx((-0.3 + 0.0 + 0.1) / 3)
    assert row["improvement"] == pytest.approx(0.5)  # better, tied, worse
    assert (row["num_pairs"], row["num_models"], row["num_settings"]) == (3, 1, 1)
    assert row["interval_over"] == "draws"
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert 0 <= row["improvement_low"] < 0.5 < row["improvement_high"] <= 1
    assert row["single_seed"]
    # The other way round, the same with the other sign; where nothing differs there's no interval's width.
    table = of_rows(untouched(), *draws("fp", 0.4, 0.5, 0.9), *draws("ft", 0.1, 0.5, 1.0))
    assert compared(table).loc["fp", "difference"] == pytest.approx(0.2 / 3)
    assert compared(table, "acc").loc["fp", ["difference_low", "difference_high"]].tolist() == [0, 0]


def test_a_pair_is_one_sample_of_one_model():
    """What makes a draw hard for both falls out: the difference is the same in all, and certain."""
    hard = np.array([0.0, 0.3, 0.6])
    table = of_rows(untouched(), *draws("ft", *(hard + 0.2)), *draws("anp", *hard))
    row = compared(table).loc["anp"]
    assert row["difference"] == pytest.approx(-0.2)
    assert row["difference_high"] - row["difference_low"] == pytest.approx(0, abs=1e-12)
    assert row["improvement"] == 1


def test_higher_is_better_but_for_asr():
    table = of_rows(untouched(), cell("ft", 0.8, 0.5, 0.1), cell("anp", 0.9, 0.6, 0.2))
    found = compare(table).to_pandas()
    better = {measure: chosen(found, measure).loc["anp", "improvement"] for measure in ("acc", "asr", "ra")}
    assert better == {"acc": 1, "asr": 0, "ra": 1}


def test_settings_weigh_the_same_and_in_them_models():
    rows = [untouched(), *draws("ft", 0.5, 0.5), *draws("anp", 0.3, 0.1)]  # -0.3
    rows += [untouched(seed=1), cell("ft", asr=0.5, seed=1), cell("anp", asr=0.4, seed=1)]  # -0.1
    rows += [untouched(attack="sig"), cell("ft", asr=0.5, attack="sig"), cell("anp", asr=1.0, attack="sig")]
    row = compared(of_rows(*rows)).loc["anp"]
    assert row["difference"] == pytest.approx((-0.2 + 0.5) / 2)
    assert row["improvement"] == pytest.approx(0.5)
    assert (row["num_pairs"], row["num_models"], row["num_settings"]) == (4, 3, 2)
    assert row["interval_over"] == "settings"
    assert not row["single_seed"]


def test_a_run_without_data_stands_beside_every_draw_and_budget():
    rows = [untouched(), cell("clp", asr=0.4), *draws("ft", 0.1, 0.6, spc=2), *draws("ft", 0.5, 0.6, spc=10)]
    found = compare(of_rows(*rows)).to_pandas()
    at_two = chosen(found, spc=2).loc["clp"]
    assert (at_two["num_pairs"], at_two["improvement"]) == (2, 0.5)
    assert at_two["difference"] == pytest.approx(0.05)
    assert chosen(found, spc=10).loc["clp", "improvement"] == 1
    assert chosen(found).loc["clp", "difference"] == pytest.approx((0.05 - 0.15) / 2)


def test_a_table_without_budgets_is_compared_run_by_run():
    rows = [untouched(), *draws("ft", 0.5, 0.5, spc=0), *draws("anp", 0.4, 0.6, spc=0)]
    row = compared(of_rows(*rows)).loc["anp"]
    assert (row["num_pairs"], row["improvement"]) == (2, 0.5)


def test_pairs_without_a_result_are_counted():
    rows = [untouched(), *draws("ft", 0.5, 0.5, 0.5), *draws("anp", 0.4, 0.4)]
    rows.append(cell("anp", draw=2, status="diverged"))
    row = compared(of_rows(*rows)).loc["anp"]
    assert (row["num_pairs"], row["num_unpaired"]) == (2, 1)


def test_what_does_not_count():
    rows = [untouched(), cell("ft"), cell("grad_prune", asr=0.0)]
    rows += [untouched(attack="sig", attack_took=False), cell("ft", attack="sig", attack_took=False)]
    rows += [untouched(attack="none"), cell("ft", attack="none"), cell("anp", attack="none")]
    found = compared(of_rows(*rows))
    # Who knows the trigger is compared, and told by the threat model; neither ft nor the untouched model is.
    assert found["threat_model"].to_dict() == {"grad_prune": "known_trigger"}
    assert compare(of_rows(untouched(), cell("anp"))).num_rows == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_tables_give_what_loops_give(seed):
    table = random_study(seed)
    frame, found = table.to_pandas(), compare(table).to_pandas()
    frame = frame[frame["attack_took"] == True]  # noqa: E712
    key = ["attack", "ratio", "seed", "draw"]
    for measure, sign in (("acc", 1), ("asr", -1), ("ra", 1), ("der", 1)):
        for baseline in ("ft", "fp"):
            of_baseline = frame[(frame["defense"] == baseline) & (frame["spc"] == 10)].set_index(key)[measure]
            of_defense = frame[(frame["defense"] == "anp") & (frame["spc"] == 10)].set_index(key)[measure]
            gaps = (of_defense - of_baseline).dropna()
            wins = np.sign(sign * gaps) / 2 + 0.5
            nested = [
                values.groupby(key[:3]).mean().groupby(key[:2]).mean().mean() for values in (gaps, wins)
            ]
            row = chosen(found, measure, baseline, 10).loc["anp"]
            assert [row["difference"], row["improvement"]] == pytest.approx(nested)
            assert row["num_pairs"] == len(gaps)
