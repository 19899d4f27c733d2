"""Means and intervals, against values worked out by hand."""

import pyarrow as pa
import pytest
from scipy import stats

from detrojan.analysis.statistics.collect import CELLS
from detrojan.analysis.tables.summary import make as summarize

PLAIN = {
    pa.string(): "x",
    pa.float64(): 0.1,
    pa.int32(): 2,
    pa.int64(): 1,
    pa.bool_(): True,
}


def cell(seed, draw, acc, asr, status="ok", **more):
    row = {field.name: PLAIN[field.type] for field in CELLS}
    ended = status == "ok"
    measures = {"acc": acc if ended else None, "asr": asr if ended else None, "ra": None}
    return row | {"seed": seed, "draw": draw, "status": status, "seconds": 4.0} | measures | more


def summarized(*rows):
    return summarize(pa.Table.from_pylist(list(rows), schema=CELLS)).to_pylist()


def test_one_model_varies_over_its_draws():
    (row,) = summarized(cell(0, 0, 0.7, 0.2), cell(0, 1, 0.8, 0.2), cell(0, 2, 0.9, 0.2))
    assert (row["num_models"], row["num_ok"], row["interval_over"]) == (1, 3, "draws")
    assert row["acc_mean"] == pytest.approx(0.8)
    # Standard deviation 0.1, three draws: 4.303 times 0.1 / sqrt(3).
    assert row["acc_high"] - row["acc_mean"] == pytest.approx(min(4.30265 * 0.1 / 3**0.5, 0.2), rel=1e-4)
    assert row["acc_low"] == pytest.approx(0.8 - 4.30265 * 0.1 / 3**0.5, rel=1e-4)
    assert (row["asr_low"], row["asr_mean"], row["asr_high"]) == pytest.approx((0.2, 0.2, 0.2))
    assert row["ra_mean"] is row["ra_low"] is row["ra_high"] is None


def test_models_count_alike_however_many_draws_they_have():
    draws_of_first = [cell(0, draw, 0.4, 0.1) for draw in range(9)]
    (row,) = summarized(*draws_of_first, cell(1, 0, 0.6, 0.1))
    assert (row["num_models"], row["interval_over"]) == (2, "models")
    assert row["acc_mean"] == pytest.approx(0.5)  # and not 0.42, the mean of ten rows
    reach = stats.t.interval(0.95, 1, loc=0.5, scale=0.1)[1] - 0.5
    assert row["acc_high"] == pytest.approx(min(1.0, 0.5 + reach))


def test_a_single_value_has_no_interval():
    (row,) = summarized(cell(0, 0, 0.5, 0.5))
    assert (row["acc_mean"], row["acc_low"], row["acc_high"], row["interval_over"]) == (0.5, None, None, None)


def test_cells_without_a_result_are_counted_and_left_out_of_the_means():
    (row,) = summarized(cell(0, 0, 0.5, 0.5), cell(0, 1, None, None, status="diverged", seconds=100.0))
    assert (row["num_cells"], row["num_ok"]) == (2, 1)
    assert (row["acc_mean"], row["seconds"]) == (0.5, 4.0)


def test_settings_are_kept_apart():
    rows = summarized(cell(0, 0, 0.5, 0.5), cell(0, 0, 0.9, 0.1, spc=10), cell(0, 0, 0.7, 0.1, attack="y"))
    assert [(row["attack"], row["spc"], row["acc_mean"]) for row in rows] == [
        ("x", 2, 0.5),
        ("x", 10, 0.9),
        ("y", 2, 0.7),
    ]


def test_attacks_that_took_and_those_that_failed_are_never_averaged_together():
    rows = summarized(
        cell(0, 0, 0.9, 0.9),
        cell(1, 0, 0.8, 0.1, attack_took=False),
        cell(2, 0, 0.7, 1.0),
        cell(0, 0, 0.6, None, attack="none", attack_took=None),
    )
    found = {(row["attack"], row["attack_took"]): (row["num_models"], row["acc_mean"]) for row in rows}
    assert found == {
        ("none", None): (1, pytest.approx(0.6)),
        ("x", False): (1, pytest.approx(0.8)),
        ("x", True): (2, pytest.approx(0.8)),
    }


@pytest.mark.parametrize("took", [True, False, None])
def test_a_verdict_that_all_cells_share_stays_what_it_is(took):
    (row,) = summarized(cell(0, 0, 0.5, 0.5, attack_took=took), cell(0, 1, 0.5, 0.5, attack_took=took))
    assert row["attack_took"] is took
    assert row["num_cells"] == 2
