"""Differences to the baselines and probabilities of improvement: by hand and by loops."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from detrojan.analysis.statistics.crossed import holm
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
    assert (row["grid_basis"], row["num_tied"]) == ("draws", 1)
    # Draws of one data set: Student's interval of three values.
    half = stats.t.ppf(0.975, 2) * np.std([-0.3, 0.0, 0.1], ddof=1) / 3**0.5
    assert row["difference_grid_high"] - row["difference"] == pytest.approx(half)
    assert 0 <= row["improvement_grid_low"] < 0.5 < row["improvement_grid_high"] <= 1
    t = row["difference"] / half * stats.t.ppf(0.975, 2)
    assert row["p_grid"] == pytest.approx(2 * stats.t.cdf(t, 2))
    assert row[["beyond_over", "difference_beyond_low", "improvement_beyond_low", "p_beyond"]].isna().all()
    assert row["single_seed"]
    # The other way round, the same with the other sign; where nothing differs there's no interval.
    table = of_rows(untouched(), *draws("fp", 0.4, 0.5, 0.9), *draws("ft", 0.1, 0.5, 1.0))
    assert compared(table).loc["fp", "difference"] == pytest.approx(0.2 / 3)
    of_acc = compared(table, "acc").loc["fp"]
    assert of_acc[["difference_grid_low", "difference_grid_high"]].isna().all()
    assert (of_acc["p_grid"], of_acc["num_tied"]) == (1, 3)


def test_a_pair_is_one_sample_of_one_model():
    """What makes a draw hard for both falls out: the difference is the same in all, and certain."""
    hard = np.array([0.0, 0.3, 0.6])
    table = of_rows(untouched(), *draws("ft", *(hard + 0.2)), *draws("anp", *hard))
    row = compared(table).loc["anp"]
    assert row["difference"] == pytest.approx(-0.2)
    assert row["improvement"] == 1
    # No spread was seen, so there's no p for what is surely not 0.
    assert row[["difference_grid_low", "difference_grid_high", "p_grid"]].isna().all()
    assert (row["improvement_grid_low"], row["improvement_grid_high"]) == pytest.approx((0.025, 1))


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
    alone = compare(of_rows(untouched(), cell("anp"))).to_pandas()
    assert set(alone["baseline"]) == {"none"}


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
            ties = gaps.abs().round(9) <= (0.005 if measure == "der" else 0.01)
            wins = (np.sign(sign * gaps) / 2 + 0.5).where(~ties, 0.5)
            nested = [
                values.groupby(key[:3]).mean().groupby(key[:2]).mean().mean() for values in (gaps, wins)
            ]
            row = chosen(found, measure, baseline, 10).loc["anp"]
            assert [row["difference"], row["improvement"]] == pytest.approx(nested)
            assert (row["num_pairs"], row["num_tied"]) == (len(gaps), ties.sum())


# --- what is said of them --------------------------------------------------------------------------


def test_a_point_is_a_tie():
    rows = [untouched(), *draws("ft", 0.5, 0.5, 0.5, 0.5), *draws("anp", 0.49, 0.51, 0.489, 0.511)]
    row = compared(of_rows(*rows)).loc["anp"]
    assert (row["num_tied"], row["improvement"]) == (2, 0.5)
    row = compared(of_rows(untouched(), *draws("ft", 0.5, 0.5), *draws("anp", 0.49, 0.48)), "der").loc["anp"]
    assert (row["num_tied"], row["improvement"]) == (1, 0.75)  # of DER, half a point


def test_the_untouched_model_is_a_baseline():
    rows = [untouched(0.95, 1.0), *draws("ft", 0.4, 0.5), cell("clp", 0.90, 0.2)]
    found = compare(of_rows(*rows)).to_pandas()
    ft = chosen(found, baseline="none").loc["ft"]
    assert (ft["num_pairs"], ft["difference"], ft["improvement"]) == (2, pytest.approx(-0.55), 1)
    assert chosen(found, "acc", "none").loc["clp", "difference"] == pytest.approx(-0.05)
    assert chosen(found, "net", "none").loc["clp", "difference"] == pytest.approx(0.75)


def test_a_failure_takes_no_bad_budget_away():
    rows = [untouched(), *draws("ft", *[0.5] * 10, spc=2), *draws("ft", *[0.5] * 10, spc=100)]
    rows += [cell("anp", asr=1.0, spc=2, draw=draw, status="diverged") for draw in range(8)]
    rows += [cell("anp", asr=1.0, spc=2, draw=draw) for draw in (8, 9)]
    rows += draws("anp", *[0.0] * 10, spc=100)
    row = compared(of_rows(*rows)).loc["anp"]
    assert (row["difference"], row["improvement"], row["num_unpaired"]) == (pytest.approx(0), 0.5, 8)


def test_levels_that_no_pair_is_of():
    rows = [untouched(attack=attack, architecture=net) for attack in ("badnets", "sig") for net in ("a", "b")]
    rows += [
        cell("ft", attack=attack, architecture=net) for attack in ("badnets", "sig") for net in ("a", "b")
    ]
    rows.append(cell("anp", attack="sig", architecture="a"))
    assert compared(of_rows(*rows)).loc["anp", "levels_missing"] == "architecture b, attack badnets"
    assert pd.isna(compared(of_rows(*rows), baseline="none").loc["ft", "levels_missing"])


def test_p_values_are_adjusted_in_their_family():
    table = random_study(attacks=("badnets", "blended", "sig", "lf"))
    found = compare(table).to_pandas()
    for _, family in found.groupby(["measure", "spc", "baseline"], dropna=False):
        for scope in ("grid", "beyond"):
            adjusted = holm(family[f"p_{scope}"].tolist())
            assert family[f"p_{scope}_holm"].tolist() == pytest.approx(adjusted, nan_ok=True)
        assert set(family["num_family"]) == {len(family)}
    assert found["p_beyond"].notna().any()


def test_both_intervals_by_hand():
    """One run a cell: over attacks the difference has the spread of its four values."""
    gaps = dict(zip(("a", "b", "c", "d"), (-0.1, -0.2, -0.4, 0.1), strict=True))
    rows = []
    for attack, gap in gaps.items():
        rows += [untouched(attack=attack), cell("ft", asr=0.5, attack=attack)]
        rows.append(cell("anp", asr=0.5 + gap, attack=attack))
    row = compared(of_rows(*rows)).loc["anp"]
    half = stats.t.ppf(0.975, 3) * stats.sem(list(gaps.values()))
    assert row["difference"] == pytest.approx(-0.15)
    for scope in ("grid", "beyond"):  # the bound of one seed is all that attacks do
        ends = row[[f"difference_{scope}_low", f"difference_{scope}_high"]].tolist()
        assert ends == pytest.approx([-0.15 - half, -0.15 + half])
    assert (row["grid_basis"], row["beyond_over"], row["beyond_df"]) == ("bound", "attack", 3)
    # On the logit: half a width of t times the standard error, over u (1 - u).
    logit, reach = np.log(0.75 / 0.25), stats.t.ppf(0.975, 3) * stats.sem([1, 1, 1, 0]) / (0.75 * 0.25)
    assert row["improvement_beyond_low"] == pytest.approx(1 / (1 + np.exp(reach - logit)))
