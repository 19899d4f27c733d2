"""Spreads, worst tenths and harm, by hand and by loops."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats

from detrojan.analysis.statistics import arrays, scores
from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.statistics.frames import frame_of
from detrojan.analysis.tables.consistency import make as consistency
from detrojan.analysis.tables.consistency import worst_tenth
from tests.unit.tables import cell, of_rows, random_study, untouched


def of(table, spc=None):
    frame = consistency(table).to_pandas()
    return frame[frame["spc"].isna() if spc is None else frame["spc"] == spc].set_index("defense")


def test_worst_tenths():
    values = np.array([0.1 * n for n in range(11)])
    assert worst_tenth(values, lower_is_better=True) == pytest.approx(0.95)  # two of eleven
    assert worst_tenth(values, lower_is_better=False) == pytest.approx(0.05)
    assert worst_tenth(values[:10], lower_is_better=True) == pytest.approx(0.9)  # one of ten
    assert worst_tenth(np.array([0.3, np.nan]), lower_is_better=True) == 0.3
    assert np.isnan(worst_tenth(np.array([np.nan]), lower_is_better=True))


def test_spreads_wins_and_harm_by_hand():
    # DER 0.9, 0.7, 0.5 and 0.4: the last loses accuracy and removes nothing.
    rows = []
    for (attack, ratio), asr, acc in [
        (("badnets", 0.1), 0.2, 0.95),
        (("badnets", 0.05), 0.6, 0.95),
        (("sig", 0.1), 1.0, 0.95),
        (("sig", 0.05), 1.0, 0.75),
    ]:
        axes = {"attack": attack, "ratio": ratio}
        rows += [untouched(**axes), cell("anp", acc, asr, **axes)]
        rows += [cell("ft", 0.95, 0.8, **axes), cell("fp", 0.95, 0.5 if ratio == 0.1 else 1.0, **axes)]
    row = of(of_rows(*rows)).loc["anp"]
    assert row["der_mean"] == pytest.approx(0.625)
    assert row["der_worst_tenth"] == pytest.approx(0.4)
    assert row["asr_worst_tenth"] == pytest.approx(1.0)
    assert row["acc_worst_tenth"] == pytest.approx(0.75)
    assert row["der_spread_attack"] == pytest.approx(np.std([0.8, 0.45], ddof=1))
    assert row["der_spread_ratio"] == pytest.approx(np.std([0.7, 0.55], ddof=1))
    assert np.isnan(row["der_spread_dataset"])
    assert np.isnan(row["der_spread_spc"])
    # ft has DER 0.6 everywhere, fp 0.75 at ratio 0.1 and 0.5 below: beaten in the first two settings.
    assert (row["share_beats_baselines"], row["num_beats_settings"]) == (0.5, 4)
    assert (row["share_harmful"], row["share_unchanged"], row["share_repaired"]) == (0.25, 0.25, 0.5)
    assert row["harm_single_run"]
    assert (row["num_settings"], row["num_without_result"], row["share_failed"]) == (4, 0, 0)
    # Two attacks are too few to speak of others, or to bound what seeds do.
    assert row[["grid_basis", "beyond_over", "der_grid_low", "der_beyond_low"]].isna().all()
    # Of the baselines themselves, nothing is asked.
    assert of(of_rows(*rows)).loc[["ft", "fp"], "share_beats_baselines"].isna().all()
    assert of(of_rows(*rows)).loc["none", "der_mean"] == 0.5


def test_without_both_baselines_nobody_beats_them():
    table = of_rows(untouched(), cell("ft"), cell("anp", asr=0.0))
    assert np.isnan(of(table).loc["anp", "share_beats_baselines"])
    table = of_rows(untouched(), cell("ft"), cell("fp", status="diverged"), cell("anp", asr=0.0))
    assert np.isnan(of(table).loc["anp", "share_beats_baselines"])


def test_what_has_no_result_is_counted_and_not_averaged():
    rows = [untouched(), cell("anp", asr=0.0), untouched(attack="sig")]
    rows.append(cell("anp", attack="sig", status="not_applicable"))
    row = of(of_rows(*rows)).loc["anp"]
    assert (row["num_settings"], row["num_without_result"]) == (1, 1)
    assert row["asr_mean"] == 0
    assert row["seconds"] == 2.0
    only = of(of_rows(untouched(), cell("anp", status="diverged"))).loc["anp"]
    assert (only["num_settings"], only["num_models"], only["single_seed"]) == (0, 0, False)
    assert np.isnan(only["der_mean"])


def test_harm_to_clean_models():
    rows = [untouched(), cell("anp"), cell("ft")]
    for dataset, lost in (("a", 0.05), ("b", 0.15)):
        axes = {"attack": "none", "dataset": dataset}
        rows += [untouched(0.95, **axes), cell("anp", 0.95 - lost, **axes)]
    row = of(of_rows(*rows)).loc["anp"]
    assert row["num_clean_settings"] == 2
    assert row["clean_acc_drop_mean"] == pytest.approx(0.1)
    assert row["clean_acc_drop_worst_tenth"] == pytest.approx(0.15)
    assert of(of_rows(*rows)).loc["ft", "num_clean_settings"] == 0


def test_budgets_apart_and_pooled():
    rows = [untouched(), cell("clp", asr=0.4), cell("ft", asr=0.8, spc=2), cell("ft", asr=0.2, spc=10)]
    found = consistency(of_rows(*rows)).to_pandas()
    ft = found[found["defense"] == "ft"]
    assert ft["spc"].tolist() == pytest.approx([np.nan, 2, 10], nan_ok=True)
    assert ft["asr_mean"].tolist() == pytest.approx([0.5, 0.8, 0.2])
    assert ft["der_spread_spc"].tolist() == pytest.approx(
        [np.std([0.6, 0.9], ddof=1), np.nan, np.nan], nan_ok=True
    )
    clp = found[found["defense"] == "clp"]
    assert clp["asr_mean"].tolist() == [0.4] * 3
    assert clp["der_spread_spc"].iloc[0] == 0


def test_attacks_that_failed_do_not_count():
    rows = [untouched(), cell("ft", asr=0.5)]
    rows += [untouched(attack="sig", attack_took=False), cell("ft", asr=0.0, attack="sig", attack_took=False)]
    assert of(of_rows(*rows)).loc["ft", "asr_mean"] == 0.5
    assert consistency(of_rows(*rows[2:])).num_rows == 0


@pytest.mark.parametrize("seed", range(2))
def test_random_tables_give_what_loops_give(seed):
    table = random_study(seed)
    frame = table.to_pandas()
    frame = frame[(frame["attack_took"] == True) & (frame["spc"].isin([0, 10]))]  # noqa: E712
    key = ["attack", "ratio"]
    for defense, row in of(table, 10).iterrows():
        rows = frame[frame["defense"] == defense]
        der = rows.groupby([*key, "seed"])["der"].mean().groupby(key).mean()
        assert row["der_mean"] == pytest.approx(der.mean())
        assert row["der_worst_tenth"] == pytest.approx(der.min())
        by_attack = [der[attack].mean() for attack in der.index.get_level_values("attack").unique()]
        assert row["der_spread_attack"] == pytest.approx(np.std(by_attack, ddof=1))
        net = rows.groupby([*key, "seed"])["net"].mean().groupby(key).mean()
        cells = rows.groupby(key)["net"]
        # Six cells of a defense, or the one run of each of two models.
        noise = stats.t.ppf(0.975, cells.count() - 1) * cells.std() / np.sqrt(cells.count())
        noise = noise.where(cells.count() >= 3, 0.0)
        assert row["share_harmful"] == pytest.approx((net < -noise.clip(lower=0.01)).mean())
        assert row["share_repaired"] == pytest.approx((net > noise.clip(lower=0.01)).mean())
        assert row["share_failed"] == pytest.approx((rows["status"] != "ok").mean())


# --- both intervals --------------------------------------------------------------------------------


def test_the_intervals_are_those_of_the_crossed_study():
    table = random_study(attacks=("badnets", "blended", "sig", "lf"))
    study = arrays.of_cells(scores.attacked(frame_of(table)))
    row = of(table).loc["anp"]
    for measure in ("der", "net", "acc_drop"):
        crossed = study.crossed("anp", measure)
        for scope, spread in (("grid", crossed.grid), ("beyond", crossed.beyond)):
            low, high = crossed.mean - spread.half, crossed.mean + spread.half
            if measure == "der":
                low, high = max(low, 0), min(high, 1)
            assert row[f"{measure}_{scope}_low"] == pytest.approx(low)
            assert row[f"{measure}_{scope}_high"] == pytest.approx(high)
    assert (row["grid_basis"], row["beyond_over"]) == ("seeds_draws", "attack")
    assert row["beyond_df"] == pytest.approx(study.crossed("anp", "der").beyond.df)
    shares = row[[f"beyond_share_{factor}" for factor in ("dataset", "architecture", "attack")]]
    assert shares.tolist() == [0, 0, 1]
    assert row[["num_datasets", "num_architectures", "num_attacks"]].tolist() == [1, 1, 4]


def test_another_defense_and_the_order_of_rows_change_no_interval():
    few, more = (random_study(defenses=names).to_pandas() for names in (("ft", "fp"), ("ft", "fp", "anp")))
    both = pd.concat([few, more[more["defense"] == "anp"]])
    shuffled = pa.Table.from_pandas(both.sample(frac=1, random_state=1), CELLS, preserve_index=False)
    alone = consistency(pa.Table.from_pandas(few, CELLS, preserve_index=False)).to_pandas()
    beside = consistency(shuffled).to_pandas()
    beside = beside[beside["defense"] != "anp"].reset_index(drop=True)
    pd.testing.assert_frame_equal(beside, alone, check_exact=True)


# --- pooling and failures --------------------------------------------------------------------------


def at_two_budgets(failed):
    """Return a model that SPC 2 leaves as it is and SPC 100 repairs; so many draws at SPC 2 diverged."""
    rows = [untouched(acc=0.9, asr=1.0)]
    for draw in range(10):
        status = "diverged" if draw < failed else "ok"
        rows.append(cell("anp", 0.9, 1.0, spc=2, draw=draw, status=status))
        rows.append(cell("anp", 0.9, 0.0, spc=100, draw=draw))
    return of(of_rows(*rows)).loc["anp"]


def test_a_failure_takes_no_bad_budget_away():
    row = at_two_budgets(failed=8)
    assert (row["asr_mean"], row["der_mean"]) == pytest.approx((0.5, 0.75))
    assert row["der_all_mean"] == pytest.approx(0.75)
    assert (row["num_settings"], row["num_without_result"]) == (1, 1)
    assert row["share_failed"] == pytest.approx(0.4)


def test_a_model_without_a_planned_budget_has_no_pooled_value():
    row = at_two_budgets(failed=10)
    assert np.isnan(row["der_mean"])
    assert row["der_all_mean"] == pytest.approx(0.75)
    assert (row["num_settings"], row["num_without_result"]) == (0, 1)


def test_what_was_not_published_was_not_planned():
    rows = [untouched(), cell("anp", asr=0.2, spc=2), cell("anp", status="missing", spc=10)]
    row = of(of_rows(*rows)).loc["anp"]
    assert (row["asr_mean"], row["num_without_result"], row["share_failed"]) == (pytest.approx(0.2), 0, 0)


def test_a_defense_of_some_settings_stands_beside_the_untouched_model_of_these():
    rows = [untouched(0.9, dataset="a"), cell("anp", 0.9, 1.0, dataset="a"), untouched(0.6, dataset="b")]
    row = of(of_rows(*rows)).loc["anp"]
    assert (row["num_settings"], row["acc_before_mean"]) == (1, 0.9)
    assert row["acc_drop_mean"] == pytest.approx(0)
    assert row["asr_before_mean"] == 1


def test_a_run_that_stands_at_several_budgets_is_one_run():
    rows = [untouched(0.95, num_test=400, num_triggered=360), cell("clp", 0.92, 1.0)]
    rows += [cell("ft", spc=spc) for spc in (2, 10, 100)]
    for row in rows:
        row |= {"num_test": 400, "num_triggered": 360}
    row = of(of_rows(*rows)).loc["clp"]
    # Three runs alike would have no noise, and harm of three points would be sure.
    assert (row["share_harmful"], row["harm_single_run"]) == (0, True)


def test_clean_models_of_several_architectures_share_no_trigger():
    rows = [untouched(), cell("anp")]
    for architecture in "xy":
        for seed, lost in enumerate((0.0, 0.02)):
            axes = {"attack": "none", "architecture": architecture, "seed": seed}
            rows += [untouched(0.95, **axes), cell("anp", 0.95 - lost, **axes)]
    row = of(of_rows(*rows)).loc["anp"]
    # Each architecture's mean has the variance .0001; the two are independent, with one df each.
    half = stats.t.ppf(0.975, 2) * (2 * 0.0001 / 4) ** 0.5
    assert row["clean_acc_drop_grid_high"] - 0.01 == pytest.approx(half)
    assert row["share_clean_harmed"] == 0
