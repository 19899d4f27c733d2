"""How often the 95 % intervals of crossed studies hold the truth, where it is known: by simulation.

Effects are crossed, as in a study: seeds share triggers over architectures and ratios, models share draws.
docs/statistics.md has these numbers. Bounds leave room for three standard errors of so many studies.
"""

import math

import numpy as np
import pytest
from scipy import stats

from detrojan.analysis.statistics.crossed import Crossed, Design

STUDIES = 200


class Grid:
    """The settings of a study: three data sets, four architectures, eight attacks, three ratios, or fewer."""

    def __init__(self, datasets=3, architectures=4, attacks=8, ratios=3, hole=True):
        axes = np.indices((datasets, architectures, attacks, ratios)).reshape(4, -1)
        if hole:  # SIG can't poison so much of the data sets with small classes
            axes = axes[:, ~((axes[2] == attacks - 1) & (axes[0] > 0))]
        self.dataset, self.architecture, self.attack, self.ratio = axes
        self.design = Design(self.dataset, self.architecture, self.attack)
        self.number = axes.shape[1]

    def effects(self, generator, over, deviation, *more):
        """Return an effect for each combination of the levels of ``over``, at each setting."""
        codes = np.unique(np.stack(over), axis=1, return_inverse=True)[1].reshape(-1)
        return generator.normal(0, deviation, (codes.max() + 1, *more))[codes]


SURVEY = Grid()


def coverage(studies, scope):
    """Return the share of studies, pairs of a crossed study and the truth, whose interval holds it."""
    hits = []
    for found, truth in studies:
        spread = getattr(found, scope)
        hits.append(abs(found.mean - truth) <= spread.half)
    return np.mean(hits)


# --- these settings --------------------------------------------------------------------------------


def repeated(grid, *, seeds, draws=3, trigger=0.0, shared_draw=0.0, interaction=0.05, model=0.05, lost=0.0):
    """Yield studies whose settings stay the same while seeds and draws vary; the truth is 0."""
    generator = np.random.default_rng(1)
    settings = grid.effects(generator, (grid.dataset, grid.attack), interaction)
    settings = settings - settings.mean()
    for _ in range(STUDIES):
        own = generator.normal(0, model, (grid.number, seeds))
        own = own + grid.effects(generator, (grid.dataset, grid.attack), trigger, seeds)
        values = generator.normal(0, 0.05, (grid.number, seeds, 1, draws)) + own[..., None, None]
        sample = grid.effects(generator, (grid.dataset,), shared_draw, draws)
        values = values + settings[:, None, None, None] + sample[:, None, None]
        if lost:
            values[generator.random(values.shape) < lost] = math.nan
            values[generator.random(values.shape[:2]) < lost] = math.nan
        yield Crossed(grid.design, values), 0.0


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("shared", [{"trigger": 0.04}, {"trigger": 0.04, "shared_draw": 0.03}])
def test_other_seeds_and_samples(seeds, shared):
    assert 0.92 <= coverage(repeated(SURVEY, seeds=seeds, **shared), "grid") <= 0.99


def test_one_seed_bounds_what_it_cannot_tell():
    noise = {"seeds": 1, "interaction": 0.0, "draws": 1}
    assert 0.91 <= coverage(repeated(SURVEY, **noise), "grid") <= 0.985
    assert coverage(repeated(SURVEY, seeds=1), "grid") >= 0.97


def test_what_failed_or_did_not_take():
    assert (
        0.89 <= coverage(repeated(SURVEY, seeds=3, trigger=0.04, shared_draw=0.03, lost=0.2), "grid") <= 0.98
    )


def test_settings_taken_as_independent_would_not_do():
    hits = []
    for found, truth in repeated(SURVEY, seeds=2, trigger=0.04, shared_draw=0.05, interaction=0.0):
        half = stats.t.ppf(0.975, found.num_settings - 1) * stats.sem(found.by_setting)
        hits.append(abs(found.mean - truth) <= half)
    assert np.mean(hits) < 0.85


# --- other settings --------------------------------------------------------------------------------


def redrawn(grid, *, datasets=0.05, architectures=0.05, attacks=0.05, pairs=0.05, rest=0.05):
    """Yield studies of other data sets, architectures and attacks each time; the truth is 0."""
    generator = np.random.default_rng(2)
    axes = {"dataset": datasets, "architecture": architectures, "attack": attacks}
    for _ in range(STUDIES):
        values = generator.normal(0, rest, grid.number)
        for name, deviation in axes.items():
            values = values + grid.effects(generator, (getattr(grid, name),), deviation)
        for one, other in (("dataset", "architecture"), ("dataset", "attack"), ("architecture", "attack")):
            values = values + grid.effects(generator, (getattr(grid, one), getattr(grid, other)), pairs)
        yield Crossed(grid.design, values[:, None, None, None]), 0.0


def test_others_where_everything_varies():
    assert 0.92 <= coverage(redrawn(SURVEY), "beyond") <= 0.995


def test_others_where_only_data_sets_vary():
    only = {"datasets": 0.1, "architectures": 0.0, "attacks": 0.0, "pairs": 0.0, "rest": 0.01}
    assert 0.91 <= coverage(redrawn(SURVEY, **only), "beyond") <= 0.985


def test_others_with_two_data_sets():
    assert 0.91 <= coverage(redrawn(Grid(2, 2, 4, 2, hole=False)), "beyond") <= 0.998


def test_settings_taken_as_independent_say_nothing_of_others():
    hits = []
    for found, truth in redrawn(SURVEY):
        half = stats.t.ppf(0.975, found.num_settings - 1) * stats.sem(found.by_setting)
        hits.append(abs(found.mean - truth) <= half)
    assert np.mean(hits) < 0.5
