"""What a defense has changed, against values worked out by hand."""

import math

import pytest

from detrojan.analysis.statistics.relative import RELATIVE, relative
from tests.unit.tables import cell, of_rows, untouched


def changes(defended, before=None):
    """Return what has changed in the first row."""
    rows = [defended] if before is None else [defended, before]
    return relative(of_rows(*rows).to_pandas()).iloc[0].to_dict()


def test_differences_ratios_and_der():
    found = changes(cell(acc=0.9, asr=0.2, ra=0.7), untouched(acc=0.95, asr=0.8, ra=0.15))
    assert found == pytest.approx(
        {
            "acc_drop": 0.05,
            "asr_reduction": 0.6,
            "ra_recovery": 0.55,
            "acc_drop_ratio": 0.05 / 0.95,
            "asr_reduction_ratio": 0.75,
            "ra_recovery_ratio": 0.55 / 0.8,  # of what triggers had cost: 0.95 - 0.15
            "der": (0.6 - 0.05 + 1) / 2,
            "net": 0.6 - 0.05,
        }
    )


@pytest.mark.parametrize(
    ("acc", "asr", "der"),
    [
        (0.95, 1.0, 0.5),  # nothing has changed
        (0.95, 0.0, 1.0),  # all of it gone, at no cost
        (0.99, 0.5, 0.75),  # accuracy won counts for nothing
        (0.45, 1.0, 0.25),  # half of the accuracy gone, for nothing
        (0.45, 0.5, 0.5),  # as much lost as removed
    ],
)
def test_der_counts_what_is_removed_against_what_it_costs(acc, asr, der):
    assert changes(cell(acc=acc, asr=asr), untouched(0.95, 1.0))["der"] == pytest.approx(der)


def test_an_asr_that_rose_is_no_negative_merit():
    found = changes(cell(acc=0.95, asr=0.9), untouched(0.95, 0.8))
    assert found["asr_reduction"] == pytest.approx(-0.1)
    assert found["der"] == pytest.approx(0.5)
    assert found["net"] == pytest.approx(-0.1)  # and no harm is hidden


def test_what_cannot_be_divided_is_missing():
    found = changes(cell(acc=0.1, asr=0.0, ra=0.2), untouched(acc=0.0, asr=0.0, ra=0.0))
    ratios = ("acc_drop_ratio", "asr_reduction_ratio", "ra_recovery_ratio")
    assert all(math.isnan(found[name]) for name in ratios)
    # Triggered images that do better than clean ones leave nothing to win back.
    found = changes(cell(ra=0.9), untouched(acc=0.8, ra=0.85))
    assert math.isnan(found["ra_recovery_ratio"])
    assert found["ra_recovery"] == pytest.approx(0.05)


def test_a_clean_model_can_only_lose_accuracy():
    found = changes(cell(acc=0.9, attack="none"), untouched(acc=0.95, attack="none"))
    known = {name for name, value in found.items() if not math.isnan(value)}
    assert known == {"acc_drop", "acc_drop_ratio"}
    assert found["acc_drop"] == pytest.approx(0.05)


@pytest.mark.parametrize("before", [None, untouched(seed=1), untouched(status="timed_out")])
def test_without_its_own_untouched_model_nothing_is_known(before):
    assert all(math.isnan(value) for value in changes(cell(), before).values())


def test_a_cell_without_a_result_has_changed_nothing_known():
    assert all(math.isnan(value) for value in changes(cell(status="diverged"), untouched()).values())


def test_each_model_is_compared_with_itself():
    table = of_rows(cell(seed=1), untouched(), untouched(acc=0.85, seed=1), cell())
    assert table["acc_drop"].to_pylist() == pytest.approx([-0.05, 0, 0, 0.05])
    assert table.select(RELATIVE).to_pylist()[1] == {
        **dict.fromkeys(RELATIVE, 0.0),
        "der": 0.5,
    }


def test_a_model_has_one_untouched_row():
    with pytest.raises(ValueError, match=r"attack=badnets.*two rows of the untouched model"):
        of_rows(untouched(), untouched())
