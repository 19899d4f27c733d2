"""How surely a mean over a crossed study is known: over more seeds and samples, and over other settings.

A study crosses data sets, architectures, attacks and ratios (a *setting*); each setting has models of some
seeds, each model repaired copies by budget and draw. All are crossed, not nested: the architectures and
ratios of a seed share its trigger, the models of a data set share its draws. So two intervals, for two
questions, and neither is ever shown without its name:

``grid``
    These settings, with other seeds and other samples: what repeating the study would give. The sum of two
    cluster-robust variances, of seeds by data set and attack, and of draws by data set. With one seed the
    first can't be told from what data sets and attacks do together, which bounds it from above.
``beyond``
    Other data sets, architectures and attacks, if those at hand were drawn at random from those of interest:
    the sum of the three one-way cluster-robust variances (no overlap is subtracted, as inclusion-exclusion
    does: Cameron, Gelbach, Miller, "Robust Inference With Multiway Clustering", JBES 2011; with few levels
    its degrees of freedom are unknown).

Both are Student's, with degrees of freedom after Satterthwaite (Biometrics Bulletin 1946). They are closed
forms: no resampling, and the same cells give the same digits. docs/statistics.md has their coverage.
Ratios and budgets are chosen amounts, no sample of amounts: no interval speaks of others.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

CONFIDENCE = 0.95
LEAST_DF = 1.0  # of Student's t; what the formula may fall below
LEAST_BOUND_DF = 2  # under which the bound of one seed is too wild to be shown
# Strata with two seeds that speak for those without, unless half of all have them.
LEAST_STRATA = 4
NOTHING = 1e-18  # a variance of rounding
FACTORS = ("dataset", "architecture", "attack")

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]


class Part(NamedTuple):
    """A part of the variance of a mean, and its degrees of freedom."""

    variance: float
    df: float


@dataclasses.dataclass(frozen=True)
class Spread:
    """The variance of a mean.

    Attributes:
        parts: of which it is the sum; none where nothing is known.
        basis: on what it rests; empty if on nothing.
    """

    parts: tuple[Part, ...] = ()
    basis: str = ""

    @functools.cached_property
    def variance(self) -> float:
        """The sum; NaN without a part."""
        total = sum(part.variance for part in self.parts) if self.parts else math.nan
        return 0.0 if total < NOTHING else total

    @functools.cached_property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom, at least 1; NaN without a part, or where nothing varies."""
        below = sum(part.variance**2 / part.df for part in self.parts)
        return max(self.variance**2 / below, LEAST_DF) if below and self.variance else math.nan

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; NaN where none can be given: without parts, or a spread."""
        if not self.variance > 0:
            return math.nan
        return float(quantile(self.df)) * math.sqrt(self.variance)

    def interval(self, mean: float) -> tuple[float, float]:
        """Return both ends of the 95 % interval around ``mean``; NaN where none can be given."""
        return mean - self.half, mean + self.half

    def p_value(self, mean: float) -> float:
        """Return the two-sided p of a true mean of 0; NaN where there is no spread to judge by."""
        if self.variance > 0:
            return 2 * float(special.stdtr(self.df, -abs(mean) / math.sqrt(self.variance)))
        return 1.0 if self.variance == 0 and abs(mean) < 1e-9 else math.nan


class Design(NamedTuple):
    """The levels of each setting, as numbers from 0: three arrays of (settings,)."""

    dataset: Codes
    architecture: Codes
    attack: Codes

    def taken(self, settings: npt.NDArray[np.bool_]) -> "Design":
        """Return the design of some of the settings."""
        return Design(*(codes[settings] for codes in self))


class Crossed:
    """A measure of one defense, or a difference of two, over a study.

    Means go from the lowest level up, each over what is there: draws, budgets, models, settings. A model
    counts only where every planned budget of it has a result: else what fails would take a bad budget away.

    Args:
        design: of the settings.
        values: (settings, seeds, budgets, draws), NaN where there is none.
        planned: (settings, seeds, budgets), which budgets a model should have; those with a value if None.

    Attributes:
        means: the mean of each setting, (settings,), NaN where it has none.
        by_setting: the same of those that have one.
        design: of these.
    """

    def __init__(self, design: Design, values: Array, planned: npt.NDArray[np.bool_] | None = None) -> None:
        counts = (~np.isnan(values)).sum(3)
        by_budget = mean_of(values, 3)
        planned = counts > 0 if planned is None else planned
        whole = planned.any(2) & ~(planned & (counts == 0)).any(2)
        by_model = np.where(whole, mean_of(np.where(planned, by_budget, np.nan), 2), np.nan)
        has = np.asarray(~np.isnan(by_model).all(1))
        self.design = design.taken(has)
        self._by_model = by_model[has]
        self.means = mean_of(by_model, 1)
        self.by_setting = self.means[has]
        counted = planned[has] & ~np.isnan(self._by_model)[:, :, None]
        self._residuals = np.where(counted[..., None], values[has] - by_budget[has][..., None], np.nan)
        self._draws = np.where(counted, counts[has], 0)

    @property
    def num_settings(self) -> int:
        """How many settings have a mean."""
        return len(self.by_setting)

    @functools.cached_property
    def num_models(self) -> int:
        """How many models have a mean."""
        return int((~np.isnan(self._by_model)).sum())

    @functools.cached_property
    def fewest_models(self) -> int:
        """The fewest models with a mean in one of the settings; 0 without a setting."""
        return int((~np.isnan(self._by_model)).sum(1).min()) if self.num_settings else 0

    @functools.cached_property
    def num_cells(self) -> int:
        """How many values the mean is over."""
        return int(self._draws.sum())

    @functools.cached_property
    def num_strata(self) -> int:
        """How many pairs of data set and attack the settings are of."""
        return len(np.unique(_codes(self.design.dataset, self.design.attack))) if self.num_settings else 0

    @property
    def mean(self) -> float:
        """The mean over settings; NaN without one."""
        return float(self.by_setting.mean()) if self.num_settings else math.nan

    # --- these settings, other seeds and samples ---------------------------------------------------

    @functools.cached_property
    def grid(self) -> Spread:
        """How the mean would vary with other seeds and samples, on the same settings."""
        draws = self._draw_parts
        seeds = self._seed_parts
        names = ["seeds"]
        if not seeds and (bound := self._bound):
            seeds, names = [bound], ["bound"]
        basis = "_".join([*(names if seeds else ()), *(["draws"] if draws else ())])
        return Spread((*seeds, *draws), basis)

    @functools.cached_property
    def _seed_parts(self) -> list[Part]:
        """A part a pair of data set and attack, whose settings share the triggers of a seed."""
        models = (~np.isnan(self._by_model)).sum(1)
        several = models >= 2
        if not several.any():
            return []
        strata = _codes(self.design.dataset, self.design.attack)
        residuals = np.nan_to_num(self._by_model - self.by_setting[:, None])
        residuals /= self.num_settings * np.maximum(models, 1)[:, None]
        found, shares, single = [], [], []
        for stratum in np.unique(strata):
            inside = strata == stratum
            share = inside.sum() / self.num_settings
            clusters = ~np.isnan(self._by_model[inside & several]).all(0) if (inside & several).any() else []
            if np.sum(clusters) < 2:
                single.append(share)
                continue
            # Settings that the gate has left one model take the spread of the others.
            alone = (1 / models[inside]).sum() / (1 / models[inside & several]).sum()
            part = _cluster(residuals[inside].sum(0)[np.asarray(clusters)])
            found.append(Part(alone * part.variance, part.df))
            shares.append(share)
        if not found or (single and len(found) < LEAST_STRATA and len(found) < len(single)):
            return []
        if single:
            # One model in place of two: twice the variance; degrees of freedom are the others'.
            usual = np.mean([part.variance / share**2 for part, share in zip(found, shares, strict=True)])
            more = 2 * usual * sum(share**2 for share in single)
            known = Spread(tuple(found))
            found.append(Part(float(more), known.df if known.variance else 1.0))
        return found

    @functools.cached_property
    def _draw_parts(self) -> list[Part]:
        """A part a data set, whose models share its draws."""
        models = (~np.isnan(self._by_model)).sum(1)
        budgets = (self._draws > 0).sum(2)
        with np.errstate(divide="ignore"):
            weights = 1 / (self.num_settings * models[:, None, None] * budgets[..., None] * self._draws)
        weights = np.where(self._draws > 0, weights, 0.0)
        shares = weights**2 * self._draws
        several = self._draws >= 2
        if not several.any():
            return []
        alone = shares.sum() / shares[several].sum()
        scores = np.nan_to_num(self._residuals) * weights[..., None]
        found = []
        for dataset in np.unique(self.design.dataset):
            inside = self.design.dataset == dataset
            there = ~np.isnan(self._residuals[inside][several[inside]])
            if there.any(0).sum() >= 2:
                part = _cluster(scores[inside].sum((0, 1, 2))[there.any(0)])
                found.append(Part(alone * part.variance, part.df))
        return found

    @functools.cached_property
    def _bound(self) -> Part | None:
        """The most that seeds can make, where each setting has one: what data set and attack do together.

        The scores are divided by what least squares leaves of independent noise, of single settings and
        of pairs of data set and attack, whichever is less.
        """
        crossing = (self.design.dataset, self.design.attack)
        additive = _additive(*(np.asarray(codes, np.intp).tobytes() for codes in crossing))
        if additive.df < LEAST_BOUND_DF:
            return None
        rest = self.by_setting - additive.basis @ (additive.basis.T @ self.by_setting)
        scores = additive.members.T @ rest / self.num_settings
        return Part(_zero((scores**2).sum() / additive.kept), additive.df)

    # --- other data sets, architectures and attacks ------------------------------------------------

    @functools.cached_property
    def by_factor(self) -> dict[str, Part]:
        """The part of each factor that varies: how the mean would move with other levels of it."""
        scores = (self.by_setting - self.mean) / max(self.num_settings, 1)
        levels = {
            name: codes for name, codes in zip(FACTORS, self.design, strict=True) if len(np.unique(codes)) > 1
        }
        return {name: _cluster(_indicators(codes).T @ scores) for name, codes in levels.items()}

    @functools.cached_property
    def beyond(self) -> Spread:
        """How the mean would vary with other data sets, architectures and attacks.

        Nothing where there are too few: some factor needs three levels, or two factors two each.
        """
        parts = self.by_factor
        if len(parts) < 2 and not any(part.df >= 2 for part in parts.values()):
            return Spread()
        # With several data sets their own part holds what their draws do.
        draws = [] if "dataset" in parts else self._draw_parts
        return Spread((*parts.values(), *draws), ", ".join(parts))


class _Additive(NamedTuple):
    """What is needed to fit effects of data set and attack, without their interaction, to settings.

    Attributes:
        basis: of the space of these effects, (settings, effects).
        members: which pair of data set and attack a setting is of, (settings, pairs).
        df: pairs that are free.
        kept: of independent noise of settings, or of pairs, what the fit leaves; whichever is less.
    """

    basis: Array
    members: Array
    df: int
    kept: float


# The defenses of a study have few designs, and each many measures.
@functools.lru_cache(1024)
def _additive(dataset: bytes, attack: bytes) -> _Additive:
    """Return what a fit to settings of these data sets and attacks takes, their codes as bytes."""
    datasets, attacks = (np.frombuffer(codes, np.intp) for codes in (dataset, attack))
    number = len(datasets)
    one = len(np.unique(datasets)) < 2
    effects = [np.ones((number, 1))]
    effects += [] if one else [_indicators(datasets), _indicators(attacks)]
    left, singular, _ = np.linalg.svd(np.hstack(effects), full_matrices=False)
    basis = left[:, singular > singular[:1].sum() * 1e-10]
    members = _indicators(_codes(datasets, attacks))
    left_over = members - basis @ (basis.T @ members)
    of_settings = (left_over**2).sum() / max(number, 1)
    of_pairs = ((members.T @ left_over) ** 2).sum() / max(((members.T @ members) ** 2).sum(), 1)
    return _Additive(basis, members, members.shape[1] - basis.shape[1], float(min(of_settings, of_pairs)))


def mean_of(values: Array, axis: int) -> Array:
    """Return the mean over an axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    counts = there.sum(axis)
    sums = np.where(there, values, 0.0).sum(axis)
    means: Array = np.divide(sums, counts, out=np.full(counts.shape, np.nan), where=counts > 0)
    return means


def _codes(*columns: Codes) -> Codes:
    """Return a number for each combination of levels."""
    codes: Codes = np.unique(np.stack(columns), axis=1, return_inverse=True)[1].reshape(-1)
    return codes


def _indicators(codes: Codes) -> Array:
    """Return (rows, levels), 1 where the row has the level; only levels that occur."""
    return np.asarray(codes[:, None] == np.unique(codes), float)


def _cluster(scores: Array) -> Part:
    """Return the cluster-robust variance of a sum of scores, one a cluster; two clusters or more."""
    number = len(scores)
    return Part(_zero(number / (number - 1) * float((scores**2).sum())), number - 1)


def _zero(variance: float) -> float:
    return 0.0 if variance < NOTHING else float(variance)


# --- what is made of them --------------------------------------------------------------------------


def share_interval(share: float, spread: Spread, clusters: int) -> tuple[float, float]:
    """Return the interval of a share such as the probability of improvement, within [0, 1].

    On the logit scale; where all agree, Clopper and Pearson's for as many independent trials as there are
    clusters.

    Args:
        share: the mean of values in [0, 1].
        spread: its variance.
        clusters: the fewest levels of a factor that varies; strata of data set and attack for ``grid``.
    """
    if math.isnan(share) or not spread.parts:
        return math.nan, math.nan
    if spread.variance == 0 or share <= 0 or share >= 1:
        hits, tail = share * clusters, (1 - CONFIDENCE) / 2
        low = special.betaincinv(hits, clusters - hits + 1, tail) if hits > 0 else 0.0
        high = special.betaincinv(hits + 1, clusters - hits, 1 - tail) if hits < clusters else 1.0
        return float(low), float(high)
    middle = math.log(share / (1 - share))
    half = spread.half / (share * (1 - share))
    return _logistic(middle - half), _logistic(middle + half)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p of a family, adjusted so that 5 % bounds any false claim in it (Holm, 1979).

    A missing one stays missing, and is none of the family.
    """
    known = [place for place, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = list(p_values)
    most = 0.0
    for rank, place in enumerate(sorted(known, key=lambda place: (p_values[place], place))):
        most = max(most, min(1.0, (len(known) - rank) * p_values[place]))
        adjusted[place] = most
    return adjusted


class OfSettings(NamedTuple):
    """Means of single settings and what is known of them: arrays of (settings,), NaN where nothing is.

    ``basis`` says what varies within the interval: ``models_draws``, ``models``, ``draws`` (of one model,
    which says nothing of others), or None. Where all values are alike the interval is missing, the basis not.
    """

    mean: Array
    low: Array
    high: Array
    basis: npt.NDArray[np.object_]


def of_settings(values: Array) -> OfSettings:
    """Return the mean of each setting and its 95 % interval, of models and draws that are crossed.

    Args:
        values: (settings, models, draws), NaN where there is none.
    """
    by_model = mean_of(values, 2)
    mean = mean_of(by_model, 1)
    parts = [_variance(by_model), _variance(mean_of(values, 1))]
    variance = np.nansum([part for part, _ in parts], 0)
    variance = np.where(variance < NOTHING, 0.0, variance)
    below = np.nansum([part**2 / np.maximum(df, 1) for part, df in parts], 0)
    df = np.divide(variance**2, below, out=np.ones_like(variance), where=below > 0)
    half = np.where(variance > 0, quantile(np.maximum(df, LEAST_DF)) * np.sqrt(variance), np.nan)
    models, draws = (~np.isnan(part) for part, _ in parts)
    basis = np.full(len(mean), None, object)
    basis[models], basis[draws], basis[models & draws] = "models", "draws", "models_draws"
    return OfSettings(mean, mean - half, mean + half, basis)


def _variance(means: Array) -> tuple[Array, Array]:
    """Return the variance of the mean of each row, NaN of fewer than two values, and its df."""
    counts = (~np.isnan(means)).sum(1)
    squares = np.nansum((means - mean_of(means, 1)[:, None]) ** 2, 1)
    return np.where(counts >= 2, squares / np.maximum(counts * (counts - 1), 1), np.nan), counts - 1.0


def quantile(df: Any) -> Any:
    """Return Student's quantile for 95 % intervals; of an array, an array."""
    return special.stdtrit(df, (1 + CONFIDENCE) / 2)
