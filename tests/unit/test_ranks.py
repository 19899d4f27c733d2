"""Mean ranks from pairs, and which two can be told apart: by hand, by loops, and by simulation."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from detrojan.analysis.statistics import arrays, ranking, scores
from detrojan.analysis.statistics.crossed import holm
from detrojan.analysis.statistics.frames import frame_of
from detrojan.analysis.tables import comparisons, pairs, ranks
from tests.unit.tables import cell, of_rows, random_study, untouched


def rank(table):
    return ranks.make(table, pairs.make(table))


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
    assert ranked(table, "acc")["leader_apart_beyond"].dropna().tolist() == [False, False]


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


def test_a_hole_takes_no_setting_from_others():
    rows = settings({"a": 0.1, "b": 0.2, "c": 0.3}, {"a": 0.4, "b": 0.3})
    # Of c one setting of two is enough, if two defenses must share only as many as there are.
    found = chosen(rank(of_rows(*rows)).to_pandas())
    assert found.loc["c", "why_not"] == "fewer than 2 settings in common with another that is ranked"
    assert found["mean_rank"].dropna().to_dict() == {"a": 1.5, "b": 1.5}
    study = arrays.of_cells(scores.attacked(frame_of(of_rows(*rows))))
    whole = dataclasses.replace(ranking.of_study(study, "asr", None), names=["a", "b", "c"])
    values = [np.array([[-0.1], [-0.4]]), np.array([[-0.2], [-0.3]]), np.array([[-0.3], [np.nan]])]
    whole = dataclasses.replace(whole, wins=ranking._wins(values))
    assert [whole.mean_rank(place) for place in range(3)] == [1.5, 1.5, 3]


def test_who_is_planned_in_few_settings_is_not_ranked():
    many = [{"ft": 0.5, "fp": 0.2} | ({"anp": 0.1} if n < 4 else {}) for n in range(10)]
    found = ranked(of_rows(*settings(*many)))
    assert found["ranked"].to_dict() == {"fp": True, "ft": True, "anp": False}
    assert found.loc["anp", "why_not"].startswith("planned in 4 of 10 settings")
    assert found.loc["anp", ["num_settings", "num_defenses", "num_shared_all"]].tolist() == [4, 2, 10]
    assert found.loc[["fp", "ft"], "num_shared_least"].tolist() == [10, 10]
    half = [{"ft": 0.5, "fp": 0.2} | ({"anp": 0.1} if n < 5 else {}) for n in range(10)]
    found = ranked(of_rows(*settings(*half)))
    assert found["mean_rank"].to_dict() == {"anp": 1, "fp": pytest.approx(2), "ft": pytest.approx(3)}
    assert found.loc["anp", "num_shared_least"] == 5


def test_a_value_that_nobody_published_is_no_failure():
    rows = settings({"ft": 0.5, "fp": 0.2}, {"ft": 0.1, "fp": 0.2})
    rows[-1] = cell("fp", status="missing", dataset="set 1")
    found = ranked(of_rows(*rows))
    # One setting in common is too few, as there are two.
    assert found["ranked"].to_dict() == {"ft": False, "fp": False} or not len(found)


def test_a_measure_that_nobody_published_is_no_last_rank():
    rows = settings({"ft": 0.5, "fp": 0.2}, {"ft": 0.1, "fp": 0.2})
    rows[-1] |= {"ra": None}
    assert ranked(of_rows(*rows), "ra").empty
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
            score = round(np.nanmean(models), 9) if enough else np.nan  # rounding breaks no tie
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
    # Pooled, each budget of a setting counts the same, and nothing is ranked twice.
    pooled = chosen(of_table, measure).loc[defenses, "mean_rank"]
    np.testing.assert_allclose(pooled, np.mean(per_budget, axis=0).mean(0))


def test_intervals_of_ranks():
    """One run a cell: on attacks alone, both intervals are Student's of the ranks in them."""
    asrs = [{"ft": 0.5, "fp": 0.2, "anp": 0.1}] * 4 + [{"ft": 0.0, "fp": 0.1, "anp": 0.2}] * 2
    rows = [row | {"dataset": "x", "attack": row["dataset"]} for row in settings(*asrs)]
    found = ranked(of_rows(*rows))
    assert found.loc["fp", "mean_rank"] == 2
    assert found.loc["fp", ["rank_grid_low", "rank_beyond_low"]].isna().all()  # no spread was seen
    student = stats.t.interval(0.95, 5, 10 / 6, stats.sem([1, 1, 1, 1, 3, 3]))
    for scope in ("grid", "beyond"):
        low, high = found.loc["anp", [f"rank_{scope}_low", f"rank_{scope}_high"]]
        assert low == 1  # clipped: no rank is better
        assert high == pytest.approx(student[1])
    assert found.loc["anp", "grid_basis"] == "bound"


def test_the_untouched_model_stands_beside_each_rank():
    rows = settings({"ft": 1.0, "fp": 1.0}, {"ft": 0.999, "fp": 0.5})
    assert ranked(of_rows(*rows))["beats_untouched"].to_dict() == {"fp": 0.75, "ft": 0.5}


# --- pairs -----------------------------------------------------------------------------------------


def paired(table, measure="asr"):
    frame = chosen(
        pairs.make(table).to_pandas().rename(columns={"defense": "first"}).assign(defense=0), measure
    )
    return frame.set_index(["first", "other"])


def test_pairs_are_those_of_the_comparisons():
    table = random_study(defenses=("ft", "fp", "anp", "clp"), attacks=("badnets", "blended", "sig", "lf"))
    found = pairs.make(table).to_pandas()
    against = comparisons.make(table).to_pandas()
    against = against[(against["baseline"] == "ft") & against["spc"].isna() & (against["measure"] == "der")]
    of_anp = against.set_index("defense").loc["anp"]
    row = paired(table, "der").loc[("anp", "ft")]
    for column in ("difference", "difference_grid_low", "difference_beyond_high", "p_grid", "p_beyond"):
        assert row[column] == pytest.approx(of_anp[column], nan_ok=True)
    # Adjusted over all pairs: six of four defenses.
    for _, family in found.groupby(["measure", "spc"], dropna=False):
        assert len(family) == 6
        assert family["p_grid_holm"].tolist() == pytest.approx(holm(family["p_grid"].tolist()), nan_ok=True)
    assert (found["defense"] < found["other"]).all()


def far_apart(gap):
    rng = np.random.default_rng(0)
    asrs = [
        {"ft": 0.5 + noise, "fp": 0.5 - gap + other} for noise, other in 0.001 * rng.standard_normal((6, 2))
    ]
    rows = [row | {"dataset": "x", "attack": row["dataset"]} for row in settings(*asrs)]
    return of_rows(*rows)


@pytest.mark.parametrize(("gap", "apart"), [(0.2, True), (0.008, False)])  # sure, but less than a point
def test_told_apart_takes_a_small_p_and_more_than_a_point(gap, apart):
    row = paired(far_apart(gap)).loc[("fp", "ft")]
    assert row["p_grid_holm"] < 0.001
    assert (row["apart_grid"], row["apart_beyond"], row["win_share"]) == (apart, apart, 1)
    found = ranked(far_apart(gap))
    assert found.loc["ft", ["leader_apart_grid", "leader_apart_beyond"]].tolist() == [apart, apart]
    assert found.loc["fp", "leader_apart_grid"] is None


def test_equal_defenses_are_seldom_told_apart():
    rng = np.random.default_rng(1)
    false_claims = 0
    for _ in range(40):
        values = rng.normal(0.5, 0.1, (3, 4, 4)).clip(0, 1)
        rows = []
        for (data, attack), own in zip(np.ndindex(3, 4), values.reshape(12, 4), strict=True):
            axes = {"dataset": f"{data}", "attack": f"{attack}"}
            rows += [untouched(**axes), *(cell(n, asr=v, **axes) for n, v in zip("abcd", own, strict=True))]
        found = paired(of_rows(*rows))
        false_claims += found[["apart_grid", "apart_beyond"]].fillna(False).any(axis=None)
    assert false_claims <= 6  # of 40: 5 % and three standard errors
