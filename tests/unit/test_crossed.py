"""Intervals of crossed studies: known answers by hand, and what must not matter."""

import math

import numpy as np
import pytest
from scipy import stats

from detrojan.analysis.statistics import crossed
from detrojan.analysis.statistics.crossed import Crossed, Design, Part, Spread, holm, share_interval


def study(rows):
    """Make a study of rows (data set, attack, seed, values of the draws), of one architecture."""
    return _study([((data, "net", attack, seed), draws) for data, attack, seed, draws in rows])


def _study(rows):
    keys = list(dict.fromkeys((d, a, t) for (d, a, t, _), _ in rows))
    seeds = sorted({seed for (*_, seed), _ in rows})
    most = max(len(draws) for _, draws in rows)
    values = np.full((len(keys), len(seeds), 1, most), np.nan)
    for (d, a, t, seed), draws in rows:
        values[keys.index((d, a, t)), seeds.index(seed), 0, : len(draws)] = draws
    columns = [np.unique(column, return_inverse=True)[1] for column in zip(*keys, strict=True)]
    return Crossed(Design(*columns), values)


def one_seed(cells):
    return study([(data, attack, 0, [value]) for data, attack, value in cells])


def test_beyond_by_hand():
    found = one_seed([("a", "p", 0.9), ("a", "q", 0.7), ("b", "p", 0.6), ("b", "q", 0.2)])
    assert found.mean == pytest.approx(0.6, abs=1e-12)
    assert [part.variance for part in found.by_factor.values()] == pytest.approx([0.04, 0.0225], abs=1e-12)
    assert math.sqrt(found.beyond.variance) == pytest.approx(0.25)
    assert found.beyond.df == pytest.approx(1.8545994, abs=1e-7)
    assert found.beyond.half == pytest.approx(1.1606605, abs=1e-7)
    assert found.beyond.basis == "dataset, attack"


def test_beyond_with_a_hole_by_hand():
    found = one_seed([("a", "p", 0.9), ("a", "q", 0.7), ("b", "p", 0.6), ("b", "q", 0.2), ("c", "p", 0.8)])
    assert found.mean == pytest.approx(0.64)
    assert [part.variance for part in found.by_factor.values()] == pytest.approx([0.021504, 0.023104])
    assert found.beyond.df == pytest.approx(2.6011222, abs=1e-7)
    assert found.beyond.half == pytest.approx(0.7343977, abs=1e-7)


def test_beyond_needs_levels():
    assert not one_seed([("a", "p", 0.9), ("a", "q", 0.7)]).beyond.parts
    assert one_seed([("a", "p", 0.9), ("a", "q", 0.7), ("a", "r", 0.1)]).beyond.parts


def test_seeds_by_hand():
    found = study([("a", "p", 0, [0.8]), ("a", "p", 1, [0.6]), ("b", "q", 0, [0.55]), ("b", "q", 1, [0.45])])
    assert math.sqrt(found.grid.variance) == pytest.approx(0.0559017, abs=1e-7)
    assert found.grid.df == pytest.approx(1.4705882, abs=1e-7)
    assert found.grid.half == pytest.approx(0.3459262, abs=1e-7)
    assert found.grid.basis == "seeds"


def test_architectures_share_the_trigger_of_a_seed():
    rows = [
        *((("a", "x", "p", 0), [0.8]), (("a", "x", "p", 1), [0.6])),
        *((("a", "y", "p", 0), [0.55]), (("a", "y", "p", 1), [0.45])),
    ]
    found = _study(rows).grid
    assert math.sqrt(found.variance) == pytest.approx(0.075)
    assert found.df == 1


def test_draws_by_hand():
    found = study([("a", "p", 0, [0.9, 0.7]), ("a", "q", 0, [0.6, 0.4])]).grid
    assert math.sqrt(found.variance) == pytest.approx(0.1)
    assert (found.df, found.basis) == (1, "draws")
    found = study([("a", "p", 0, [0.9, 0.7]), ("a", "q", 0, [0.4, 0.6])]).grid
    assert found.variance == 0
    assert math.isnan(found.half)


def test_draws_of_two_data_sets_are_not_the_same():
    found = study([("a", "p", 0, [0.9, 0.7]), ("b", "p", 0, [0.4, 0.6])]).grid
    assert found.variance == pytest.approx(0.005)
    assert found.df == pytest.approx(2)


def test_one_seed_is_a_bound():
    square = [("a", "p", 0.9), ("a", "q", 0.7), ("b", "p", 0.6), ("b", "q", 0.2)]
    assert one_seed(square).grid.basis == ""  # one degree of freedom is none to speak of
    rows = [
        *((("a", "x", "p", 0), [0.9]), (("a", "y", "p", 0), [0.8])),
        *((("a", "x", "q", 0), [0.7]), (("a", "x", "r", 0), [0.5])),
        *((("b", "x", "p", 0), [0.6]), (("b", "x", "q", 0), [0.2]), (("b", "x", "r", 0), [0.4])),
        *((("c", "x", "p", 0), [0.8]), (("c", "x", "q", 0), [0.5])),
    ]
    found = _study(rows)
    assert found.mean == pytest.approx(0.6)
    assert math.sqrt(found.grid.variance) == pytest.approx(0.0396680, abs=1e-7)
    assert (found.grid.df, found.grid.basis) == (3, "bound")
    assert found.grid.half == pytest.approx(0.1262413, abs=1e-7)


def test_without_an_interaction_the_bound_is_zero():
    rows = [(d, t, 0.1 * d + 0.2 * t) for d in range(3) for t in range(3)]
    assert one_seed(rows).grid.variance == 0


def test_one_data_set_has_a_bound_by_its_attacks():
    found = one_seed([("a", t, v) for t, v in zip("pqr", (0.1, 0.2, 0.6), strict=True)])
    assert found.grid.basis == "bound"
    assert found.grid.df == 2


def test_a_model_without_a_planned_budget_has_no_mean():
    design = Design(*(np.zeros(1, int) for _ in range(3)))
    failed = np.array([[[[math.nan] * 10, [0.0] * 10]]])
    assert Crossed(design, failed).mean == 0
    assert math.isnan(Crossed(design, failed, np.ones((1, 1, 2), bool)).mean)
    some = np.array([[[[math.nan] * 8 + [1.0] * 2, [0.0] * 10]]])
    assert Crossed(design, some, np.ones((1, 1, 2), bool)).mean == 0.5


def test_the_order_of_rows_and_the_names_of_levels_change_no_digit():
    generator = np.random.default_rng(0)
    rows = [
        ((d, a, t, seed), list(generator.normal(size=3)))
        for d in "ab"
        for a in "xy"
        for t in "pqr"
        for seed in (0, 1)
    ]
    found = _study(rows)
    order = generator.permutation(len(rows))
    names = {"a": "z", "b": "c", "p": "v", "q": "u", "r": "t", "x": "x", "y": "w"}
    other = _study([((*(names[n] for n in rows[i][0][:3]), rows[i][0][3]), rows[i][1]) for i in order])
    assert other.mean == pytest.approx(found.mean, abs=1e-15)
    for scope in ("grid", "beyond"):
        assert getattr(other, scope).half == pytest.approx(getattr(found, scope).half, rel=1e-12)


def test_a_share_stays_within_its_range():
    spread = Spread((Part(0.01, 5.0),), "grid")
    assert share_interval(0.75, spread, 3) == pytest.approx((0.4323267, 0.9219822), abs=1e-7)
    alike = Spread((Part(0.0, 2.0),), "beyond")
    assert share_interval(1.0, alike, 3) == pytest.approx((0.2924018, 1.0), abs=1e-7)
    assert share_interval(0.0, alike, 3) == pytest.approx((0.0, 1 - 0.2924018), abs=1e-7)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([math.nan, 0.04]) == pytest.approx([math.nan, 0.04], nan_ok=True)


def test_p_values():
    assert Spread((Part(0.0, 3.0),)).p_value(0.0) == 1
    assert math.isnan(Spread((Part(0.0, 3.0),)).p_value(0.1))
    assert math.isnan(Spread().p_value(0.1))
    assert Spread((Part(0.01, 3.0),)).p_value(0.3) == pytest.approx(0.0577, abs=1e-3)


def of_setting(models):
    """Return what is known of one setting: mean, low, high, basis."""
    return tuple(column[0] for column in crossed.of_settings(np.array([models], float)))


def test_one_setting_crosses_models_and_draws():
    mean, low, high, basis = of_setting([[0.9, 0.7], [0.6, 0.4]])
    assert basis == "models_draws"
    assert mean == pytest.approx(0.65)
    variances = (0.045 / 2, 0.02 / 2)
    df = sum(variances) ** 2 / sum(variance**2 for variance in variances)
    assert high - mean == pytest.approx(stats.t.ppf(0.975, df) * sum(variances) ** 0.5)
    assert mean - low == pytest.approx(high - mean)
    _, _, high, basis = of_setting([[0.9, 0.7]])
    assert (high, basis) == (pytest.approx(0.8 + 12.7062047 * 0.1), "draws")
    assert of_setting([[0.9], [0.7]])[-1] == "models"


def test_one_setting_without_a_spread_has_no_interval():
    assert of_setting([[0.9]]) == pytest.approx((0.9, math.nan, math.nan, None), nan_ok=True)
    assert of_setting([[0.9, 0.9]]) == pytest.approx((0.9, math.nan, math.nan, "draws"), nan_ok=True)
    assert of_setting([[math.nan]]) == pytest.approx((math.nan,) * 3 + (None,), nan_ok=True)


def test_settings_do_not_touch_each_other():
    values = np.array([[[0.9, 0.7], [0.6, math.nan]], [[0.1, 0.2], [math.nan, math.nan]]])
    together = crossed.of_settings(values)
    for place in range(2):
        alone = of_setting(values[place])
        assert tuple(column[place] for column in together) == pytest.approx(alone)


def test_a_study_without_a_setting_has_nothing_to_say():
    design = Design(*(np.zeros(2, int) for _ in range(3)))
    found = Crossed(design, np.full((2, 1, 1, 3), math.nan))
    assert (found.num_settings, found.fewest_models, found.num_cells, found.num_strata) == (0, 0, 0, 0)
    assert math.isnan(found.mean)
    assert not found.grid.parts
    assert not found.beyond.parts
