"""Ranks by hand and by loops, Friedman's test and critical differences against other implementations."""

import numpy as np
import pandas as pd
import pytest
import scikit_posthocs
from scipy import stats

from detrojan.analysis.tables import ranks
from detrojan.analysis.tables.ranks import make as rank
from tests.unit.tables import cell, of_rows, random_study, untouched


def ranked(table, measure="asr", spc=None):
    return chosen(rank(table).to_pandas(), measure, spc)


def chosen(frame, measure="asr", spc=None):
    """Return the rows of a measure and budget by defense."""
    pooled = frame["spc"].isna() if spc is None else frame["spc"] == spc
    return frame[(frame["measure"] == measure) & pooled].set_index("defense")


def settings(*asrs, **more):
    """Return cells of one setting after another: the ASR of each defense, by its name."""
    rows = []
    for number, asr in enumerate(asrs):
        axes = {"dataset": f"set {number}"} | more
        rows += [untouched(**axes), *(cell(name, asr=value, **axes) for name, value in asr.items())]
    return rows


def test_mean_ranks_by_hand():
    table = of_rows(
        *settings(
            {"ft": 0.5, "fp": 0.2, "anp": 0.1},
            {"ft": 0.5, "fp": 0.5, "anp": 0.1},  # ft and fp share the ranks 2 and 3
            {"ft": 0.0, "fp": 0.2, "anp": 0.1},
        )
    )
    found = ranked(table)
    assert found["mean_rank"].to_dict() == pytest.approx({"anp": 4 / 3, "fp": 7.5 / 3, "ft": 6.5 / 3})
    assert list(found.index) == ["anp", "ft", "fp"]
    assert (found["num_settings"] == 3).all()
    assert (found["num_defenses"] == 3).all()
    assert found["single_seed"].all()
    # Of ACC, which is higher is better, all are tied.
    assert (ranked(table, "acc")["mean_rank"] == 2).all()
    assert ranked(table, "acc")["friedman_p"].isna().all()


@pytest.mark.parametrize(("measure", "best"), [("acc", "fp"), ("asr", "ft"), ("ra", "fp"), ("der", "ft")])
def test_each_measure_has_its_direction(measure, best):
    table = of_rows(untouched(), cell("ft", 0.8, 0.1, 0.1), cell("fp", 0.9, 0.9, 0.9))
    assert ranked(table, measure).index[0] == best


def test_what_has_no_result_ranks_last():
    rows = settings({"ft": 0.9, "fp": 0.8, "anp": 0.0, "nc": 0.0})
    rows[-2:] = [
        cell("anp", status="diverged", dataset="set 0"),
        cell("nc", status="not_applicable", dataset="set 0"),
    ]
    found = ranked(of_rows(*rows))
    assert found["mean_rank"].to_dict() == {"fp": 1, "ft": 2, "anp": 3.5, "nc": 3.5}
    assert found["num_without_result"].to_dict() == {"fp": 0, "ft": 0, "anp": 1, "nc": 1}


@pytest.mark.parametrize(("num_ok", "first"), [(2, "anp"), (1, "ft")])
def test_a_result_takes_half_of_the_draws(num_ok, first):
    draws = [cell("anp", asr=0.0, draw=n, status="ok" if n < num_ok else "diverged") for n in range(4)]
    others = [cell("ft", asr=0.5, draw=n) for n in range(4)]
    assert ranked(of_rows(untouched(), *draws, *others)).index[0] == first


def test_models_whose_attack_failed_are_not_ranked():
    took = settings({"ft": 0.5, "fp": 0.2})
    failed = settings({"ft": 0.0, "fp": 0.2}, attack_took=False, attack="sig")
    unknown = settings({"ft": 0.0, "fp": 0.2}, attack_took=None, attack="lf")
    found = ranked(of_rows(*took, *failed, *unknown))
    assert found["mean_rank"].to_dict() == {"fp": 1, "ft": 2}
    assert (found["num_settings"] == 1).all()
    assert rank(of_rows(*failed)).num_rows == 0


def test_a_defense_that_knows_the_trigger_is_not_ranked():
    rows = settings({"grad_prune": 0.0, "ft": 0.5, "fp": 0.6})
    rows.append(cell("abl", asr=0.0, threat_model="training_data", dataset="set 0"))
    found = ranked(of_rows(*rows))
    assert list(found.index) == ["ft", "fp"]
    assert "none" not in found.index


def test_a_defense_without_data_stands_at_every_budget():
    rows = [untouched(), cell("clp", asr=0.3)]
    for spc, asr in ((2, 0.5), (100, 0.1)):
        rows.append(cell("ft", asr=asr, spc=spc))
    table = of_rows(*rows)
    assert ranked(table, spc=2)["mean_rank"].to_dict() == {"clp": 1, "ft": 2}
    assert ranked(table, spc=100)["mean_rank"].to_dict() == {"ft": 1, "clp": 2}
    # Once first and once second: pooled, they share.
    assert ranked(table)["mean_rank"].to_dict() == {"ft": 1.5, "clp": 1.5}


def test_settings_where_a_defense_was_not_planned_are_left_out_and_counted():
    rows = settings({"ft": 0.5, "fp": 0.2, "anp": 0.1}, {"ft": 0.1, "fp": 0.2})
    found = ranked(of_rows(*rows))
    assert found["mean_rank"].to_dict() == {"anp": 1, "fp": 2, "ft": 3}
    assert (found[["num_settings", "num_incomplete"]] == 1).all(axis=None)
    assert (ranked(of_rows(*rows), spc=10)["num_incomplete"] == 1).all()


def test_a_value_that_nobody_published_is_no_failure():
    rows = settings({"ft": 0.5, "fp": 0.2}, {"ft": 0.1, "fp": 0.2})
    rows[-1] = cell("fp", status="missing", dataset="set 1")
    found = ranked(of_rows(*rows))
    assert found["mean_rank"].to_dict() == {"fp": 1, "ft": 2}
    assert (found[["num_settings", "num_incomplete"]] == 1).all(axis=None)
    assert (found["num_without_result"] == 0).all()


def test_a_measure_that_nobody_published_is_no_last_rank():
    rows = settings({"ft": 0.5, "fp": 0.2}, {"ft": 0.1, "fp": 0.2})
    rows[-1] |= {"ra": None}
    found = ranked(of_rows(*rows), "ra")
    assert (found[["num_settings", "num_incomplete"]] == 1).all(axis=None)
    assert (ranked(of_rows(*rows), "asr")["num_settings"] == 2).all()


def test_several_seeds_are_averaged_before_ranking():
    rows = []
    for seed, (ft, fp) in enumerate([(0.0, 0.1), (0.9, 0.2)]):
        rows += [untouched(seed=seed), cell("ft", asr=ft, seed=seed), cell("fp", asr=fp, seed=seed)]
    found = ranked(of_rows(*rows))
    assert found["mean_rank"].to_dict() == {"fp": 1, "ft": 2}
    assert (found["num_models"] == 2).all()
    assert not found["single_seed"].any()


def by_loops(table, measure, spc):
    """Return the mean rank of each defense, computed one number after another."""
    frame = table.to_pandas()
    frame = frame[(frame["attack_took"] == True) & ~frame["defense"].isin(["none", "grad_prune"])]  # noqa: E712
    defenses, blocks = sorted(frame["defense"].unique()), []
    for _, setting in frame.groupby(["dataset", "architecture", "attack", "ratio"]):
        scores = []
        for defense in defenses:
            rows = setting[(setting["defense"] == defense) & setting["spc"].isin([0, spc])]
            models = [model[measure].mean() for _, model in rows.groupby("seed")]
            enough = (rows["status"] == "ok").mean() >= 0.5
            score = np.nanmean(models) if enough else np.nan
            scores.append(score if measure == "asr" else -score)
        blocks.append(stats.rankdata([np.inf if np.isnan(score) else score for score in scores]))
    return defenses, np.array(blocks)


@pytest.fixture(scope="module")
def random_tables():
    """Return random tables, each with its ranks."""
    defenses = ("ft", "fp", "clp", "anp", "nc", "grad_prune")
    tables = [random_study(seed, defenses) for seed in range(3)]
    return [(table, rank(table).to_pandas()) for table in tables]


@pytest.mark.parametrize("measure", ["acc", "asr", "ra", "der"])
@pytest.mark.parametrize("number", range(3))
def test_random_tables_give_what_loops_give(random_tables, number, measure):
    table, of_table = random_tables[number]
    per_budget = []
    for spc in (2, 10):
        defenses, blocks = by_loops(table, measure, spc)
        per_budget.append(blocks)
        found = chosen(of_table, measure, spc).loc[defenses]
        np.testing.assert_allclose(found["mean_rank"], blocks.mean(0))
        chi2, p = stats.friedmanchisquare(*blocks.T)
        assert found["friedman_chi2"].iloc[0] == pytest.approx(chi2)
        assert found["friedman_p"].iloc[0] == pytest.approx(p)
        # Nemenyi's test calls two defenses different where their mean ranks are further apart than this.
        critical = found["critical_difference"].iloc[0]
        theirs = scikit_posthocs.posthoc_nemenyi_friedman(blocks).to_numpy()
        apart = np.abs(blocks.mean(0)[:, None] - blocks.mean(0))
        assert ((apart > critical) == (theirs < 0.05)).all()
    again = np.array([stats.rankdata(block) for block in np.mean(per_budget, axis=0)])
    np.testing.assert_allclose(chosen(of_table, measure).loc[defenses, "mean_rank"], again.mean(0))


@pytest.mark.parametrize(
    ("num_defenses", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)]
)
def test_critical_differences_have_the_quantiles_that_demsar_tabulates(num_defenses, quantile):
    expected = quantile * np.sqrt(num_defenses * (num_defenses + 1) / (6 * 14))
    assert ranks.critical_difference(num_defenses, 14) == pytest.approx(expected, abs=2e-3)


def test_critical_differences_decide_like_another_implementation():
    """The distance at which scikit-posthocs' p value crosses 0.05 is ours."""
    blocks = np.array([[1, 2, 3, 4], [1, 2, 4, 3], [1, 3, 2, 4], [2, 1, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    theirs = scikit_posthocs.posthoc_nemenyi_friedman(blocks).to_numpy()
    critical = ranks.critical_difference(*blocks.shape[::-1])
    apart = np.abs(blocks.mean(0)[:, None] - blocks.mean(0))
    assert ((apart > critical) == (theirs < 0.05)).all()
    assert 0 < (theirs < 0.05).sum() < theirs.size  # so that both sides are tested


def test_too_little_to_test():
    assert ranks.friedman(np.array([[1.0, 2.0], [1.0, 2.0]])) == (None, None)
    assert ranks.friedman(np.array([[1.0, 2.0, 3.0]])) == (None, None)
    assert ranks.critical_difference(3, 1) is None
    assert ranks.critical_difference(1, 9) is None


def test_intervals_of_ranks_resample_settings():
    asrs = [{"ft": 0.5, "fp": 0.2, "anp": 0.1}] * 4 + [{"ft": 0.0, "fp": 0.1, "anp": 0.2}] * 2
    found = ranked(of_rows(*settings(*asrs)))
    assert found.loc["fp", ["rank_low", "mean_rank", "rank_high"]].tolist() == [2, 2, 2]
    low, mean, high = found.loc["anp", ["rank_low", "mean_rank", "rank_high"]]
    student = stats.t.interval(0.95, 5, mean, stats.sem([1, 1, 1, 1, 3, 3]))
    assert mean == pytest.approx(10 / 6)
    assert low == 1  # clipped: no rank is better
    assert high == pytest.approx(student[1], abs=0.15)
    (one,) = ranked(of_rows(*settings(asrs[0])))["rank_low"].unique()
    assert pd.isna(one)
