"""Choosing by trials: what is chosen without whom, what that gains, stability, and the two tables."""

import math

import numpy as np
import pytest

from detrojan.analysis import derived, protocols
from detrojan.analysis.statistics import tuning
from detrojan.analysis.statistics.tuning import choose, scores
from detrojan.cells import NO_METHOD
from detrojan.study import trials
from tests.unit import pages
from tests.unit import tables as made


def trial(number, der, attack="badnets", acc_loss=0.0, **more):
    """Return a cell of a trial on a model with ACC 0.95 and ASR 1, after which DER is as said."""
    asr = 1 - (2 * der - 1 + max(0.0, acc_loss))
    row = made.cell(acc=0.95 - acc_loss, asr=asr, attack=attack, seed=100, draw=100, **more)
    return row | {"protocol": trials.name(number)}


def untouched(attack="badnets", **more):
    return made.untouched(attack=attack, seed=100, **more)


def cells(*rows):
    """Return rows as a table, with the untouched model of each attack."""
    took = {(row["dataset"], row["attack"]): row["attack_took"] for row in rows}
    before = [untouched(attack, dataset=name, attack_took=own) for (name, attack), own in took.items()]
    return made.of_rows(*before, *rows)


def search(*rows):
    (found,) = tuning.searches(protocols.of_trials(cells(*rows)))
    return found


def table(name, *rows):
    return derived.make({"cells": cells(*rows)})[name].to_pylist()


# --- the choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("der", "acc_loss", "place"),
    [
        ([0.6, 0.9, 0.8], [0, 0, 0], 1),
        ([0.6, 0.9, 0.8], [0, 0.051, 0.05], 2),
        ([0.6, 0.9, 0.8], [0.08, 0.07, 0.06], 2),  # all cost more: the smallest loss
        ([0.6, 0.9, 0.9], [0, 0, 0], 1),  # a tie: the lower trial
        ([0.6, 0.9, 0.8], [0.07, 0.06, 0.06], 1),
    ],
)
def test_the_best_mean_among_those_that_cost_little(der, acc_loss, place):
    assert choose(np.array([der]), np.array([acc_loss])) == place


def test_an_attacks_own_family_has_no_say():
    """Trial 2 is best on Blended and the two like it, trial 1 on the others: Blended gets trial 1."""
    best = {"badnets": (0.6, 0.9, 0.5), "blended": (0.5, 0.5, 1.0), "sig": (0.5, 0.5, 1.0)}
    rows = [trial(n, der, attack) for attack, own in best.items() for n, der in enumerate(own)]
    found = search(*rows)
    assert found.chosen() == 2
    assert found.chosen("blended") == 1
    assert found.chosen("badnets") == 2
    assert found.tuned.tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert found.oracle.tolist() == pytest.approx([0.9, 1, 1])


def test_an_attack_of_no_family_is_one_by_itself():
    assert trials.left_out("stripes") == "stripes"
    assert trials.left_out("lf") == "blended"
    assert trials.left_out(NO_METHOD) == NO_METHOD


def test_a_cell_without_a_result_is_worth_nothing():
    ended = [trial(0, 0.6), trial(1, 1.0), trial(0, 0.6) | {"draw": 101}]
    failed = trial(1, 1.0, status="diverged") | {"draw": 101}
    found = search(*ended, failed)
    assert found.der[:, 1].tolist() == [1, 0]
    assert found.acc_loss[:, 1].tolist() == [0, 1]
    assert found.chosen() == 0


def test_models_without_a_backdoor_and_clean_ones_do_not_count():
    failed = [trial(number, 1.0, "sig", attack_took=False) for number in (0, 1)]
    clean = [trial(0, 0.5, NO_METHOD), trial(1, 0.5, NO_METHOD)]
    assert set(search(trial(0, 0.6), trial(1, 0.7), *failed, *clean).attacks) == {"badnets"}
    assert not list(tuning.searches(protocols.of_trials(cells(*failed, *clean))))


def test_a_trial_that_some_cells_lack_is_left_out():
    assert search(trial(0, 0.6), trial(1, 0.7), trial(0, 0.6, "sig")).numbers.tolist() == [0]


# --- stability -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("won", "score"),
    [
        ([[0.3] * 22], 1),
        ([[0.4] + [0.0] * 21], 0),
        ([[0.4, 0.2, 0.1], [0.4, 0.1, 0.0]], 0.375),
        ([[0.0] * 22], math.nan),
        ([[0.4, -0.2, -0.3]], 0),
    ],
)
def test_stability_of_known_gains(won, score):
    assert scores(np.array([won]))[2, 0] == pytest.approx(score, nan_ok=True)


def test_stability_is_of_drawn_trials_and_transfer_of_what_others_choose():
    best = {"badnets": (0.9, 0.5, 0.9, 0.7, 0.6), "blended": (0.5, 0.5, 0.9, 0.6, 0.5)}
    rows = [trial(n, der, attack) for attack, own in best.items() for n, der in enumerate(own)]
    found = tuning.stability(search(*rows))
    assert (found.typical, found.best, found.score) == pytest.approx((0.15, 0.4, 0.375))
    # BadNets gets trial 2 from Blended; Blended trial 0, the first of two that are best on BadNets.
    assert found.transfer == pytest.approx((0.4 + 0.0) / 2 / 0.4)


def test_the_interval_is_the_same_again_and_holds_the_score():
    rng = np.random.default_rng(3)
    rows = [
        trial(n, float(rng.uniform(0.5, 1)), attack) | {"seed": seed}
        for attack in ("badnets", "blended", "wanet")
        for seed in (100, 101)
        for n in range(6)
    ]
    rows += [untouched(attack) | {"seed": 101} for attack in ("badnets", "blended", "wanet")]
    found = tuning.stability(search(*rows))
    assert 0 < found.low < found.score < found.high < 1
    assert tuning.stability(search(*rows)) == found
    one = tuning.stability(search(*rows[:6]))
    assert math.isnan(one.low)
    assert not math.isnan(one.score)


# --- the tables ------------------------------------------------------------------------------------


def two_families():
    best = {"badnets": (0.6, 0.7, 0.9), "blended": (0.5, 0.6, 1.0)}
    return [
        trial(n, der, attack, forward_passes=10, backward_passes=n)
        for attack, own in best.items()
        for n, der in enumerate(own)
    ]


def test_a_row_for_each_number_of_trials():
    first, second, third = table("tuning", *two_families())
    assert [row["num_trials"] for row in (first, second, third)] == [1, 2, 3]
    assert first["der_paper"] is None
    assert first["gain"] is None
    assert (first["der_tuned"], second["der_tuned"]) == pytest.approx((0.55, 0.65))
    assert (third["der_survey"], third["der_paper"]) == pytest.approx((0.55, 0.65))
    assert (third["der_tuned"], third["der_oracle"]) == pytest.approx((0.95, 0.95))
    assert (third["gain"], third["cost"]) == pytest.approx((0.3, 0))
    assert (third["num_cells"], third["num_attacks"], third["chosen"]) == (2, 2, 2)
    assert (second["forward_passes"], third["backward_passes"]) == (40, 6)


def test_without_other_families_nothing_is_tuned():
    *_, row = table("tuning", *two_families()[:3])
    assert row["der_tuned"] is None
    assert row["der_oracle"] == pytest.approx(0.9)


def test_trials_are_in_no_other_table():
    own = [made.cell(name, 0.9, asr, seed=100) for name, asr in (("ft", 0.2), ("fp", 0.4))]
    rows = [row | {"attack": name} for name in ("badnets", "blended") for row in own]
    with_trials = derived.make({"cells": cells(*rows, *two_families())})
    without = derived.make({"cells": cells(*rows)})
    searched = ("tuning", "stability")
    assert {name: t for name, t in with_trials.items() if name not in searched} == {
        name: t for name, t in without.items() if name not in searched
    }
    assert not any(len(without[name]) for name in searched)
    assert all(len(with_trials[name]) for name in searched)
    assert protocols.of(cells(*two_families())) == [NO_METHOD]


def test_the_page_shows_tuning_where_trials_were_run():
    rows = cells(*two_families(), made.cell(seed=100)).to_pylist()
    page = pages.page(pages.tables_of(pages.of_rows(*rows)))
    assert '<h2 id="tuning">Tuning</h2>' in page
    assert "1: 55.0, 2: 65.0, 3: 95.0" in page
