"""Nested means and their intervals: by hand, against scipy, and by how often they hold the truth."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from detrojan.analysis.statistics import bootstrap

LEVELS = {"settings": ["setting"], "models": ["seed"], "draws": ["draw"]}


def frame_of(rows, measure="y"):
    return pd.DataFrame(rows, columns=["group", "setting", "seed", "draw", measure])


def intervals(rows):
    return bootstrap.intervals(frame_of(rows), ["group"], ["y"], LEVELS)


def flat(values, level="draw"):
    """Return rows of one group in which only ``level`` varies."""
    axes = [dict.fromkeys(("group", "setting", "seed", "draw"), 0) | {level: n} for n in range(len(values))]
    return [(*axis.values(), value) for axis, value in zip(axes, values, strict=True)]


def test_every_setting_weighs_the_same_and_in_it_every_model():
    rows = [
        ("a", "s", 0, 0, 0.0),
        ("a", "s", 0, 1, 0.2),
        ("a", "s", 1, 0, 0.5),
        ("a", "t", 0, 0, 0.9),
    ]
    (row,) = intervals(rows).to_dict("records")
    # Setting s: models 0.1 and 0.5, so 0.3. Setting t: 0.9. The mean of the four rows would be 0.4.
    assert row["y_mean"] == pytest.approx(0.6)
    assert row["y_over"] == "settings"
    # Two units: Student's interval around 0.6 with a standard error of 0.3.
    reach = stats.t.ppf(0.975, 1) * 0.3
    assert (row["y_low"], row["y_high"]) == pytest.approx((0.6 - reach, 0.6 + reach))


@pytest.mark.parametrize(("level", "over"), [("setting", "settings"), ("seed", "models"), ("draw", "draws")])
def test_the_highest_level_that_varies_is_resampled(level, over):
    (row,) = intervals(flat([0.1, 0.2, 0.4], level)).to_dict("records")
    assert row["y_over"] == over
    assert row["y_low"] < row["y_mean"] < row["y_high"]


def test_one_value_has_a_mean_and_no_interval():
    (row,) = intervals(flat([0.25])).to_dict("records")
    assert row["y_mean"] == 0.25
    assert np.isnan(row["y_low"])
    assert np.isnan(row["y_high"])
    assert row["y_over"] is None


def test_equal_values_have_an_interval_of_no_width():
    (row,) = intervals(flat([0.1] * 7)).to_dict("records")
    assert row["y_low"] == row["y_high"] == pytest.approx(0.1, abs=1e-15)


def test_missing_values_do_not_count():
    (row,) = intervals(flat([0.1, np.nan, 0.3])).to_dict("records")
    (other,) = intervals(flat([0.1, 0.3])).to_dict("records")
    assert row == other
    (none,) = intervals(flat([np.nan, np.nan])).to_dict("records")
    assert np.isnan(none["y_mean"])
    assert none["y_over"] is None


def test_a_group_whose_key_is_missing_is_a_group():
    rows = [(None, *row[1:]) for row in flat([0.1, 0.3])] + flat([0.5, 0.7])
    frame = frame_of(rows)
    frame["group"] = frame["group"].astype("boolean")
    found = bootstrap.intervals(frame, ["group"], ["y"], LEVELS)
    assert found["y_mean"].tolist() == pytest.approx([0.6, 0.2])
    assert found["group"].isna().tolist() == [False, True]


def test_a_group_is_the_same_whoever_stands_beside_it():
    rng = np.random.default_rng(0)
    rows = [(group, s, 0, 0, y) for group in range(5) for s, y in enumerate(rng.random(6))]
    together = intervals(rows)
    alone = intervals([row for row in rows if row[0] == 3])
    for column in ("y_mean", "y_low", "y_high"):
        assert together.loc[3, column] == pytest.approx(alone.loc[0, column], rel=1e-12)


def test_nothing_gives_nothing():
    assert intervals([]).empty


@pytest.mark.parametrize("number", [5, 12, 60])
def test_of_normal_units_the_interval_is_nearly_students(number):
    units = np.random.default_rng(1).standard_normal((1, number))
    low, high = bootstrap.bounds(units)
    student = stats.t.interval(0.95, number - 1, units.mean(), stats.sem(units[0]))
    assert high[0] - low[0] == pytest.approx(student[1] - student[0])
    assert abs(low[0] - student[0]) < 0.1 * (student[1] - student[0])


def test_ends_lie_where_another_bootstrap_puts_them():
    units = np.random.default_rng(2).exponential(size=(1, 80))
    low, high = bootstrap.bounds(units)
    theirs = stats.bootstrap(
        (units[0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert (low[0], high[0]) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_an_interval_reaches_further_to_the_side_of_rare_failures():
    low, high = bootstrap.bounds(np.array([[0.0] * 9 + [1.0]]))
    assert high[0] - 0.1 > 1.5 * (0.1 - low[0]) > 0


@pytest.mark.parametrize("shape", [(8, 3, 5), (24, 1, 10), (4, 2, 3), (1, 5, 4), (1, 2, 5), (1, 1, 10)])
def test_intervals_hold_the_truth_as_often_as_they_say(shape):
    """Settings, models and draws vary, each level with a spread of its own; the true mean is 0."""
    settings, models, draws = shape
    rng, number = np.random.default_rng(3), 2000
    effects = rng.standard_normal((number, settings, 1, 1)) * (settings > 1)
    effects = effects + 0.7 * rng.standard_normal((number, settings, models, 1)) * (settings * models > 1)
    values = effects + 0.5 * rng.standard_normal((number, *shape))
    axes = np.indices(values.shape).reshape(4, -1)
    found = intervals(np.column_stack([*axes, values.ravel()]))
    held = ((found["y_low"] <= 0) & (found["y_high"] >= 0)).mean()
    assert 0.93 <= held <= 0.97
    # Rows taken for independent of each other claim too much.
    if settings * models > 1 and draws > 1:
        flat_values = values.reshape(number, -1)
        error = stats.sem(flat_values, axis=1) * stats.t.ppf(0.975, flat_values.shape[1] - 1)
        assert (np.abs(flat_values.mean(1)) <= error).mean() < 0.9
