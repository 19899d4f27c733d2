"""Every defense at the settings that it declares, under each protocol: what it leaves of a kept model.

What takes longer than ``QUICK`` runs by hand: `pytest -m pins`. Where a number moves on purpose,
`python -m tests.unit.pins METHOD` writes it anew, and CHANGELOG.md says why.
"""

import json

import pytest

from tests.unit.pins import FILE, measured, names

PINS = json.loads(FILE.read_text())
QUICK = 3  # seconds of a processor, as they were measured
ACC_SLACK, ASR_SLACK = 0.015, 0.05  # another processor rounds otherwise


WHOLE = 0.9  # ACC below which steps have broken the model, and every rounding shows


def marked(name):
    slow = PINS[name]["seconds"] > QUICK or PINS[name]["acc"] < WHOLE
    return pytest.param(name, marks=pytest.mark.pins if slow else ())


def test_pins_are_of_protocols_that_are_declared():
    assert set(PINS) <= set(names())


@pytest.mark.parametrize("name", [*map(marked, PINS)])
def test_it_leaves_what_it_left(name):
    found, pinned = measured(name), PINS[name]
    assert found["steps"] == pinned["steps"]
    assert found["acc"] == pytest.approx(pinned["acc"], abs=ACC_SLACK)
    assert found["asr"] == pytest.approx(pinned["asr"], abs=ASR_SLACK)
