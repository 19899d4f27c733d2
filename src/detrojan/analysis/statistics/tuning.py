"""What trials say: which one to choose, what that gains and costs, and how much hangs on settings.

A search has one defense, data set and number of samples, and all its trials met the same cells: attacked
models, whose attack took, and draws. A cell that diverged or does not apply counts as a DER of 0 and as all
accuracy lost: a setting that often fails is a bad one.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from detrojan.analysis.statistics.frames import frame_of
from detrojan.analysis.statistics.relative import UNCHANGED
from detrojan.cells import NO_METHOD
from detrojan.storage.columns import OK
from detrojan.study import trials

Array = npt.NDArray[np.float64]

OF_SEARCH = ["dataset", "defense", "spc"]
OF_CELL = ["architecture", "attack", "ratio", "seed", "draw"]
MOST_LOST = 0.05  # mean ACC that a trial may cost
ROUNDING = 9  # decimals; means that differ by less are a tie
LEAST_WON = 0.02  # of DER over one half, below which nothing was won that could be shared
RESAMPLES = 1000
BUDGETS = (1, 2, 4, 8, 16, trials.NUM_TRIALS)


@dataclasses.dataclass(frozen=True)
class Search:
    """The trials of one defense on one data set, with one number of samples.

    Attributes:
        dataset: the data set.
        defense: the method.
        spc: samples a class; 0 of a method without data.
        numbers: of the trials that every cell has.
        attacks: of each cell.
        seeds: of each cell.
        der: (cells, trials).
        acc_loss: (cells, trials).
        rows: what it was made of, of the columns of ``CELLS``, and ``trial``.
    """

    dataset: str
    defense: str
    spc: int
    numbers: npt.NDArray[np.int64]
    attacks: npt.NDArray[np.str_]
    seeds: npt.NDArray[np.int64]
    der: Array
    acc_loss: Array
    rows: pd.DataFrame

    @functools.cached_property
    def families(self) -> npt.NDArray[np.str_]:
        """The family of each cell's attack."""
        return np.array([trials.family(attack) for attack in self.attacks])

    def first(self, budget: int) -> "Search":
        """Return the search that stops after so many trials."""
        kept = self.numbers < budget
        return dataclasses.replace(
            self,
            numbers=self.numbers[kept],
            der=self.der[:, kept],
            acc_loss=self.acc_loss[:, kept],
            rows=self.rows[self.rows["trial"] < budget],
        )

    def chosen(self, family: str = NO_METHOD) -> int | None:
        """Return the place of the trial that all attacks but those of a family choose; None without any."""
        seen = self.families != family
        return choose(self.der[seen], self.acc_loss[seen]) if seen.any() else None

    @property
    def tuned(self) -> Array:
        """DER of each cell under the trial that the other families choose; NaN without others."""
        found = np.full(len(self.der), math.nan)
        for family in np.unique(self.families):
            at = self.chosen(family)
            if at is not None:
                found = np.where(self.families == family, self.der[:, at], found)
        return found

    @property
    def oracle(self) -> Array:
        """DER of each cell under the trial that is best there: what no choice can exceed."""
        best: Array = self.der.max(axis=1)
        return best

    def of_trial(self, number: int) -> Array:
        """Return the DER of each cell under one trial; nothing if there is none of this number."""
        return self.der[:, self.numbers == number].ravel()


def choose(der: Array, acc_loss: Array) -> int:
    """Return the place of the trial to choose, by cells that have no part in what it is chosen for.

    That is the one with the highest mean DER among those that cost at most 5 points of ACC; if all cost more,
    the one that costs least. Of equal ones the first.

    Args:
        der: (cells, trials), both at least 1.
        acc_loss: likewise, fractions.
    """
    won, lost = der.mean(axis=0).round(ROUNDING), acc_loss.mean(axis=0).round(ROUNDING)
    allowed = lost <= MOST_LOST
    return int(np.where(allowed, won, -np.inf).argmax() if allowed.any() else lost.argmin())


def searches(of_trials: pa.Table) -> Iterator[Search]:
    """Yield the searches whose rows are in a table of trials, with the columns of ``CELLS``.

    Models whose attack did not take are left out, and clean ones; a search has at least a cell and a trial.
    """
    frame = frame_of(of_trials)
    frame = frame[frame["attack_took"].fillna(False).astype(bool)]
    ended = frame["status"] == OK
    frame = frame.assign(
        trial=[trials.NAMES.index(protocol) for protocol in frame["protocol"]],
        der=frame["der"].where(ended, 0.0),
        acc_drop=frame["acc_drop"].where(ended, 1.0),
    )
    for key, rows in frame.groupby(OF_SEARCH, observed=True):
        assert isinstance(key, tuple)
        dataset, defense, spc = map(str, key)
        der, lost = (rows.pivot(index=OF_CELL, columns="trial", values=v) for v in ("der", "acc_drop"))
        whole = der.notna().all()
        cells = der.index.to_frame(index=False)
        if whole.any():
            yield Search(
                dataset,
                defense,
                int(spc),
                der.columns[whole].to_numpy(),
                cells["attack"].to_numpy(str),
                cells["seed"].to_numpy(),
                der.loc[:, whole].to_numpy(),
                lost.loc[:, whole].to_numpy(),
                rows,
            )


# --- stability -------------------------------------------------------------------------------------


class Stability(NamedTuple):
    """What a setting that is drawn blindly earns of what the best one earns; NaN where nothing is won.

    Attributes:
        typical: mean over attacks of the median over trials, of DER over one half.
        best: mean over attacks of the maximum.
        score: their ratio, cut to [0, 1].
        low: of the 95 % interval of the score, over attacks, then seeds.
        high: likewise.
        transfer: what the settings that other families choose earn of the best.
    """

    typical: float
    best: float
    score: float
    low: float
    high: float
    transfer: float


def stability(search: Search) -> Stability | None:
    """Return how much hangs on the settings of a search; None if it drew none."""
    won = search.der[:, search.numbers >= trials.FIRST_DRAWN] - UNCHANGED
    if not won.shape[1]:
        return None
    names = np.unique(search.attacks)
    by_attack = [_by_seed(won, search.seeds, search.attacks == name) for name in names]
    means = np.array([values.mean(axis=0) for values in by_attack])
    typical, best, score = (float(value) for value in scores(means[None])[:, 0])
    low, high = _interval(by_attack) if not math.isnan(score) else (math.nan, math.nan)
    tuned = search.tuned - UNCHANGED
    of_tuned = np.mean([tuned[search.attacks == name].mean() for name in names])
    transfer = math.nan if math.isnan(score) else float(of_tuned) / best
    return Stability(typical, best, score, low, high, transfer)


def _by_seed(won: Array, seeds: npt.NDArray[np.int64], cells: npt.NDArray[np.bool_]) -> Array:
    """Return the mean gains (seeds, trials) of some cells, of gains (cells, trials)."""
    return np.array([won[cells & (seeds == seed)].mean(axis=0) for seed in np.unique(seeds[cells])])


def scores(won: Array) -> Array:
    """Return typical and best gain and their ratio, (3, samples), of gains (samples, attacks, trials)."""
    typical, best = np.median(won, axis=2).mean(axis=1), won.max(axis=2).mean(axis=1)
    known = best >= LEAST_WON
    ratio = np.where(known, typical / np.where(known, best, 1.0), math.nan)
    return np.stack([typical, best, ratio.clip(0, 1)])


def _interval(by_attack: list[Array]) -> tuple[float, float]:
    """Return the 95 % interval of a score, by attacks drawn with replacement, and seeds of each.

    NaN where there is nothing to draw from, or most samples win nothing.

    Args:
        by_attack: gains (seeds, trials) of each attack.
    """
    counts = np.array([len(values) for values in by_attack])
    if len(counts) == 1 and counts[0] == 1:
        return math.nan, math.nan
    padded = np.zeros((len(counts), counts.max(), by_attack[0].shape[1]))
    for place, values in enumerate(by_attack):
        padded[place, : len(values)] = values
    rng = np.random.default_rng(0)  # the same cells give the same interval
    attacks = rng.integers(len(counts), size=(RESAMPLES, len(counts)))
    of_attacks = counts[attacks][..., None]
    seeds = (rng.random((RESAMPLES, len(counts), counts.max())) * of_attacks).astype(int)
    drawn = (np.arange(counts.max()) < of_attacks)[..., None]
    means = (padded[attacks[..., None], seeds] * drawn).sum(axis=2) / of_attacks
    found = scores(means)[2]
    found = found[~np.isnan(found)]
    if 2 * len(found) < RESAMPLES:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
