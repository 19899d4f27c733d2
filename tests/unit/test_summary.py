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
    # Where nothing varies there is no spread to be seen, and no interval.
    assert (row["asr_low"], row["asr_mean"], row["asr_high"]) == (None, pytest.approx(0.2), None)
    assert row["ra_mean"] is row["ra_low"] is row["ra_high"] is None


def test_models_count_alike_however_many_draws_they_have():
    draws_of_first = [cell(0, draw, 0.4, 0.1) for draw in range(9)]
    (row,) = summarized(*draws_of_first, cell(1, 0, 0.6, 0.1))
    assert (row["num_models"], row["interval_over"]) == (2, "models_draws")
    assert row["acc_mean"] == pytest.approx(0.5)  # and not 0.42, the mean of ten rows


def test_models_and_draws_are_crossed():
    values = {(0, 0): 0.50, (0, 1): 0.52, (1, 0): 0.51, (1, 1): 0.55}
    (row,) = summarized(*(cell(seed, draw, acc, 0.1) for (seed, draw), acc in values.items()))
    # Means of models .51 and .53, of draws .505 and .535; the variance of each pair's mean is a part.
    parts = [0.0002 / 2, 0.00045 / 2]
    df = sum(parts) ** 2 / sum(part**2 for part in parts)
    assert row["acc_mean"] == pytest.approx(0.52)
    assert row["acc_high"] - 0.52 == pytest.approx(stats.t.ppf(0.975, df) * sum(parts) ** 0.5)


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


@pytest.mark.parametrize(
    ("acc", "asr", "images", "expected"),
    [
        (0.915, 0.97, (10_000, 9_000), "harmful"),  # noise .0091
        (0.915, 0.97, (400, 360), "unchanged"),  # noise .0456
        (0.93, 0.99, (10_000, 9_000), "harmful"),  # the backdoor has become stronger: DER is 0.5
        (0.92, 0.97, (0, 0), "unchanged"),  # a point is not more than a point
        (0.919, 0.97, (0, 0), "harmful"),
        (0.93, 0.90, (10_000, 9_000), "repaired"),
    ],
)
def test_harm_is_more_than_a_point_and_than_noise(acc, asr, images, expected):
    num_test, num_triggered = images
    lost, removed = 0.93 - acc, 0.97 - asr
    more = {"acc_drop": lost, "asr_reduction": removed, "net": removed - lost}
    more |= {"num_test": num_test, "num_triggered": num_triggered}
    (row,) = summarized(cell(0, 0, acc, asr, **more))
    assert row["verdict"] == expected


def test_several_runs_tell_themselves_how_much_they_vary():
    images = {"num_test": 400, "num_triggered": 360}
    alike = [cell(0, draw, 0.9, 0.9, net=net, **images) for draw, net in enumerate((-0.03, -0.032, -0.028))]
    apart = [cell(0, draw, 0.9, 0.9, net=net, **images) for draw, net in enumerate((-0.09, 0.03, -0.03))]
    assert [summarized(*rows)[0]["verdict"] for rows in (alike, apart)] == ["harmful", "unchanged"]


def test_without_a_result_or_a_backdoor_there_is_no_verdict():
    (row,) = summarized(cell(0, 0, 0.9, 0.9, net=None))
    assert row["verdict"] is None
