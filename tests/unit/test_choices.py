"""How far methods may go: losses of accuracy in whole images, and the points of a sweep."""

import re
from pathlib import Path

import pytest

from detrojan.defenses._parts.choices import accepted, allowed_errors, before_refusal, last_accepted

DEFENSES = Path(__file__).parents[2] / "src" / "detrojan" / "defenses"
TOLERANT = ("fp", "anp", "rnp", "awn", "mm_bd")
# A share is taken from another, or from a limit: `before - after`, `max_drop -`, `- self.tolerance`.
FLOATING = re.compile(r"max_drop -|- self\.(max_drop|tolerance)|(before|first) - (after|accuracy)")


@pytest.mark.parametrize(
    ("right_before", "right", "base", "tolerance", "accept"),
    [
        # Absolute: of the images judged on.
        (10, 9, 10, 0.1, True),
        (10, 8, 10, 0.1, False),
        (43, 39, 43, 0.1, True),
        (43, 38, 43, 0.1, False),
        (100, 98, 100, 0.02, True),
        (20, 19, 20, 0.02, False),
        (100, 95, 100, 0.05, True),
        (100, 94, 100, 0.05, False),
        # In shares, 0.8 - 0.7 is less than 0.1 and 1.0 - 0.9 is not.
        (8, 7, 10, 0.1, True),
        # Relative: of those that were right before.
        (9, 9, 9, 0.1, True),
        (9, 8, 9, 0.1, False),
        # A gain.
        (9, 10, 10, 0.0, True),
    ],
)
def test_a_loss_of_exactly_the_tolerance_is_accepted(right_before, right, base, tolerance, accept):
    assert accepted(right, right_before, allowed_errors(tolerance, base)) == accept


def test_allowed_errors_are_whole_however_a_share_rounds():
    for base in range(1, 300):
        for errors in range(base + 1):
            assert allowed_errors(errors / base, base) == errors


@pytest.mark.parametrize(
    ("right", "last"),
    [
        ([10, 10, 9, 5, 10], 2),  # what comes after the first refusal doesn't count
        ([10, 9, 8], 1),
        ([5, 9, 6, 5, 4, 3], 4),  # a gain never stops a sweep, nor moves what losses count from
        ([0, 0, 5], 0),  # nothing to lose: nothing but the model as it came
        ([8, 8, 8], 2),
        ([8], 0),
    ],
)
def test_a_sweep_ends_before_the_first_refusal(right, last):
    assert last_accepted(right, 1) == last
    asked = []
    kept = list(before_refusal((asked.append(point) or point for point in right), 1))
    assert kept == right[: last + 1]
    # What comes after the refusal is not computed.
    assert len(asked) <= last + 2


@pytest.mark.parametrize("name", TOLERANT)
def test_no_method_takes_one_share_from_another(name):
    """They all go by whole images."""
    text = (DEFENSES / "clean_data" / f"{name}.py").read_text(encoding="utf-8")
    assert not [line for line in text.splitlines() if FLOATING.search(line)]
    assert "choices.allowed_errors(" in text
