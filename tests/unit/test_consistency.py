"""Spreads, worst tenths and harm, by hand and by loops."""

import numpy as np
import pandas as pd
import pytest

from detrojan.analysis.tables.consistency import make as consistency
from detrojan.analysis.tables.consistency import worst_tenth
from tests.unit.tables import cell, of_rows, random_study, untouched


def of(table, spc=None):
    frame = consistency(table).to_pandas()
    return frame[frame["spc"].isna() if spc is None else frame["spc"] == spc].set_index("defense")


def test_worst_tenths():
    values = pd.Series([0.1 * n for n in range(11)])
    assert worst_tenth(values, lower_is_better=True) == pytest.approx(0.95)  # two of eleven
    assert worst_tenth(values, lower_is_better=False) == pytest.approx(0.05)
    assert worst_tenth(values[:10], lower_is_better=True) == pytest.approx(0.9)  # one of ten
    assert worst_tenth(pd.Series([0.3, np.nan]), lower_is_better=True) == 0.3
    assert np.isnan(worst_tenth(pd.Series([np.nan]), lower_is_better=True))


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
    assert row["share_beats_baselines"] == 0.5
    assert row["share_harmful"] == 0.25
    assert (row["num_settings"], row["num_without_result"]) == (4, 0)
    assert row["interval_over"] == "settings"
    assert row["der_low"] < 0.625 < row["der_high"]
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
        assert row["share_harmful"] == pytest.approx((der < 0.5 - 1e-9).mean())
