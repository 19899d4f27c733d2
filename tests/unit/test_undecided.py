"""What a look at a study decides: known verdicts, and by simulation how often repeated looks err."""

import itertools

import numpy as np
import pytest

from detrojan.analysis.statistics import undecided
from detrojan.analysis.statistics.crossed import Crossed, Design, Part, Spread

BAND = 0.005
SURE, VAGUE = Spread((Part(1e-8, 50),), "models"), Spread((Part(1e-4, 50),), "models")


@pytest.mark.parametrize(
    ("mean", "spread", "state"),
    [
        (0.05, SURE, "apart"),
        (0.05, VAGUE, "apart"),
        (0.004, SURE, "tied"),  # a sure difference within the band is none that matters
        (0.004, VAGUE, "undecided"),
        (0.0, VAGUE, "undecided"),
        (0.006, VAGUE, "undecided"),
        (0.2, Spread(), "undecided"),  # nothing to judge by
    ],
)
def test_a_difference_alone(mean, spread, state):
    assert undecided.judged([(mean, spread)], BAND, looks=1) == [state]


def test_more_looks_and_more_pairs_ask_for_more():
    spread = Spread((Part(1e-4, 50),), "models")
    mean = 0.025  # p = 0.016
    assert undecided.judged([(mean, spread)], BAND, looks=1) == ["apart"]
    assert undecided.judged([(mean, spread)], BAND, looks=4) == ["undecided"]
    assert undecided.judged([(mean, spread)] * 4, BAND, looks=1) == ["undecided"] * 4


DEFENSES, SEEDS, DRAWS, STUDIES = 5, 4, 3, 120


def studies(truth):
    """Yield the DER of studies, (defenses, settings, seeds, 1, draws); settings share effects of defenses."""
    generator = np.random.default_rng(3)
    design = Design(*(codes.reshape(-1) for codes in np.indices((2, 2, 3))))
    number = len(design.dataset)
    for _ in range(STUDIES):
        models = generator.normal(0, 0.03, (DEFENSES, number, SEEDS, 1, 1))
        draws = generator.normal(0, 0.03, (DEFENSES, number, SEEDS, 1, DRAWS))
        yield design, np.asarray(truth).reshape(-1, 1, 1, 1, 1) + models + draws


def looks(design, values):
    """Yield the states of all pairs after each round: two seeds, then one more at a time."""
    rounds = range(2, SEEDS + 1)
    pairs = list(itertools.combinations(range(DEFENSES), 2))
    for seeds in rounds:
        some = values[:, :, :seeds]
        crossed = [Crossed(design, some[first] - some[second]) for first, second in pairs]
        states = undecided.judged([(pair.mean, pair.grid) for pair in crossed], BAND, len(rounds))
        yield dict(zip(pairs, states, strict=True))


def test_looking_after_every_round_makes_a_false_claim_in_a_study_of_twenty_at_most():
    """Equal means; three looks at ten pairs each, and any of them may err."""
    wrong = sum(
        any("apart" in states.values() for states in looks(design, values))
        for design, values in studies([0.8] * DEFENSES)
    )
    assert wrong / STUDIES <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / STUDIES)


def test_a_difference_beyond_the_band_is_seldom_called_a_tie_and_a_large_one_is_found():
    truth = [0.8, 0.8, 0.8, 0.8 - 1.2 * BAND, 0.6]
    wrong, found = 0, 0
    for design, values in studies(truth):
        states = list(looks(design, values))
        wrong += any(look[pair] == "tied" for look in states for pair in look if 3 in pair)
        found += all(states[-1][pair] == "apart" for pair in states[-1] if 4 in pair)
    assert wrong / STUDIES <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / STUDIES)
    assert found == STUDIES
