"""How many images each defense passes through the network: at most, and as one should expect.

An image pass is one image through the whole network, forward or backward, as
:mod:`detrojan.learning.meter` counts it and ``cells.parquet`` has it. A formula follows from a method's
settings and from the sizes of the defender's sample, by the steps that the method's paper describes and no
cache can spare. Where the run itself decides (early stops, rounds of pruning), the formula takes what a run
has noted; with nothing noted it is an upper bound, and with the counts of ``EXPECTED`` what to expect.

Free of torch: each of a cluster's jobs asks for its time by this.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """How many images of how many classes the defender holds."""

    train: int
    validation: int
    classes: int

    @property
    def all(self) -> int:
        """Training and validation images together."""
        return self.train + self.validation


class Passes(NamedTuple):
    """Image passes; with ``bound`` at most so many."""

    forward: float
    backward: float
    bound: bool = False


# --- what each method should cost -------------------------------------------------------------------
#
# `n` are the sizes, `d` has the method's settings, `c` what its run noted in `clean.chosen`; with nothing
# noted, an entry that needs it gives a bound.

Formula = Callable[[Sizes, Any, Mapping[str, Any]], Passes]


def _steps(count: int, batch_size: int) -> int:
    return math.ceil(count / batch_size)


def num_batches(count: int, batch_size: int) -> int:
    """Return how many batches a pass has; a last one of a single image joins the one before it."""
    batches = _steps(count, batch_size)
    return batches - 1 if batches > 1 and count % batch_size == 1 else batches


def _floored(epochs: int, min_steps: int, count: int, batch_size: int) -> int:
    """Passes over ``count`` images that take so many steps at least."""
    return _over(epochs, min_steps, num_batches(count, batch_size))


def _over(epochs: int, min_steps: int, batches: int) -> int:
    return max(epochs, math.ceil(min_steps / batches))


def _training(epochs: float, images: float) -> Passes:
    """Each image of each epoch, once forward and once backward."""
    return Passes(epochs * images, epochs * images)


def _fp(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """Activity on training images, features of those that judge once for the whole sweep, fine-tuning."""
    tuning = _training(_floored(d.epochs, d.min_steps, n.train, d.batch_size), n.train)
    judges = n.all if d.judge_on == "all" else n.validation
    return Passes(n.train + judges + tuning.forward, tuning.backward)


def _nad(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """Train the teacher; then a pass of each for every image, and the student's backward pass."""
    return Passes(n.all * (d.teacher_epochs + 2 * d.epochs), n.all * (d.teacher_epochs + d.epochs))


def _anp(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """The adversary's steps, then the masks' step on two losses; at the end one pass a threshold.

    It doesn't depend on the number of images: a step draws a whole batch, with replacement.
    """
    masks = d.iterations * d.batch_size * (d.steps + 2)
    thresholds = math.floor(d.max_threshold / d.threshold_step + 1e-9) + 1
    judged = thresholds * n.validation if d.thresholding == "sweep" else 2 * n.all
    return Passes(masks + judged, masks)


def _awn(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """A pass for pseudo-labels, one to perturb, and two losses of the masks; the images of half a round each.

    All of it again with SGD, where Adam has cost too much accuracy.
    """
    if n.all < d.small_sample:
        d = SimpleNamespace(**{**vars(d), "batch_size": d.small_batch_size})
    half = _floored(d.passes, d.min_steps, n.all, d.batch_size) * n.all
    if d.replacement:
        half = max(d.min_steps, d.passes * (n.all // d.batch_size)) * d.batch_size
    runs = 2 if d.optimizer == "adam" and c.get("optimizer") == "sgd" else 1
    rounds = runs * d.epochs * half
    return Passes(4 * rounds, 3 * rounds)


def _ibau(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """Perturb over the images; then for each batch its loss, the first batch's, and products.

    A product with a second derivative passes the output of the first batch's images once more.
    """
    first = min(n.all, d.batch_size, d.inner_images)
    batches = _steps(n.all, d.batch_size)
    products = d.iterations + 1
    forward = 2 * n.all + n.all + batches * first
    backward = n.all + n.all + batches * first * (1 + products)
    times = d.rounds * _over(1, d.min_steps, batches)
    return Passes(times * forward, times * backward)


def _inversion(n: Sizes, d: Any, images: int, steps: int | None = None) -> Passes:
    """Every class a stamped copy of each image of a step, until the class is done, which can be early.

    Then one of each image, to see how often it gets the class. ``steps`` of the longest search, if they
    are known.
    """
    used = min(images, d.max_images)
    batches = num_batches(used, d.inversion_batch_size)
    each_epoch = max(batches, _steps(d.min_steps, d.inversion_epochs))
    if steps is None:
        steps = min(d.max_steps, d.inversion_epochs * each_epoch)
    # An epoch begins a pass anew: the last one that it begins may lack the smallest batch.
    whole, rest = divmod(each_epoch, batches)
    an_epoch = whole * used + min(used, rest * d.inversion_batch_size)
    passed = n.classes * steps / each_epoch * an_epoch
    return Passes(passed + n.classes * used, passed, bound=True)


def _nc(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """The search; then fine-tuning on clean images, a share of them stamped once for each flagged class."""
    search = _inversion(n, d, n.all, c.get("search_steps"))
    flagged = len(c.get("flagged", [0]))
    images = n.all * (1 - d.stamped_share + d.stamped_share * flagged)
    tuning = _training(d.epochs if flagged else 0, images)
    return Passes(search.forward + tuning.forward, search.backward + tuning.backward, bound=True)


def _npd(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """Statistics for the layer; then what is predicted, the attack's steps and checks, and both losses."""
    forward = 1 + 2 * d.attack_steps + 2
    backward = d.attack_steps + 2
    return Passes(n.all + d.epochs * n.all * forward, d.epochs * n.all * backward, bound=True)


def _rnp(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """Unlearn until the accuracy is low, recover the masks, a pass for each threshold that is tried.

    One by one, a pass for each neuron that goes; how many, only the run can tell: here as many as a sweep.
    """
    unlearning = _floored(d.unlearning_epochs, d.unlearning_min_steps, n.all, d.batch_size)
    recovery = _floored(d.recovery_epochs, d.recovery_min_steps, n.all, d.batch_size)
    epochs = c.get("unlearning_epochs", unlearning) + recovery
    one_by_one = d.thresholding == "one_by_one" and "num_pruned" in c
    thresholds = c["num_pruned"] + 2 if one_by_one else _steps(1, d.threshold_step)
    return Passes((epochs + thresholds) * n.all, epochs * n.all, bound=True)


def _mm_bd(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """Logits and largest activations of the model as it is; then the bounds are fitted.

    Varied images need the logits of the model as it is, too. The accuracy is asked for at the end and where
    the norms' weight changes, or after each pass if it says which bounds are kept. With the images that the
    model has right alone, fewer.
    """
    epochs = _floored(d.epochs, d.min_steps, n.all, d.batch_size)
    judged = epochs if d.keep_last_good else len(d.adjust_at) + 1
    forward = 1 + epochs * (1 + d.augment) + judged + d.only_right
    return Passes(forward * n.all, epochs * n.all, bound=d.only_right)


def _sau(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """What the original makes of clean images, once; then an epoch's attack on both models, and its step.

    A step of the attack is a pass of both; besides, a clean pass of the model and a perturbed one of the
    original show which examples are shared, and the loss takes clean and perturbed images.
    """
    forward, backward = 2 * d.steps + 4, 2 * d.steps + 2
    return Passes(n.all * (1 + d.epochs * forward), n.all * d.epochs * backward, bound=True)


def _grad_prune(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """A round scores on triggered images and looks at what it judges by; an epoch fits both sets.

    The method notes how many filters it removed and which epoch was best. Before it stops, as many more
    rounds or epochs go by as it has patience.
    """
    rounds = min(d.max_rounds, c.get("num_pruned", d.max_rounds) + d.patience)
    epochs = min(d.max_epochs, c.get("tuning_epoch", d.max_epochs) + d.tuning_patience)
    judged = n.all if d.accuracy_images == "all" else n.validation
    looked = rounds * (judged + n.validation) + epochs * n.validation * (2 if d.criterion == "joint" else 1)
    scored = min(n.train, d.score_images or n.train)
    backward = rounds * scored + epochs * 2 * n.train
    return Passes(backward + looked, backward, bound=True)


def _grad_prune_inverted(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """In turns: search triggers with the training images, prune and tune. The last search may find none."""
    removed = [0, *c.get("num_pruned", [])]  # in all, after each turn
    turns: list[dict[str, int]] = [
        {"num_pruned": after - before, "tuning_epoch": epoch}
        for before, after, epoch in zip(removed, removed[1:], c.get("tuning_epoch", []), strict=False)
    ] or [{}] * d.max_inversions
    searches = c.get("search_steps", [None] * len(turns))
    parts = [_inversion(n, d, n.train, steps) for steps in searches]
    parts += [_grad_prune(n, d, turn) for turn in turns]
    return Passes(sum(p.forward for p in parts), sum(p.backward for p in parts), bound=True)


FORMULAS: dict[str, Formula] = {
    "ft": lambda n, d, c: _training(d.epochs, n.all),
    "fp": _fp,
    "nad": _nad,
    "anp": _anp,
    "awn": _awn,
    # One pass in which hooks gather the statistics of all layers.
    "bnp": lambda n, d, c: Passes(n.all, 0),
    # Weights alone.
    "clp": lambda n, d, c: Passes(0, 0),
    "fst": lambda n, d, c: _training(d.epochs, n.all),
    # The gradient at the weights, and that at the perturbed ones.
    "ft_sam": lambda n, d, c: _training(2 * d.epochs, n.all),
    "ibau": _ibau,
    "nc": _nc,
    "nft": lambda n, d, c: _training(_floored(d.epochs, d.min_steps, n.all, d.batch_size), n.all),
    "npd": _npd,
    # A pass over attacked images: the attack's steps and one of the weights; and one over clean images.
    "pbe": lambda n, d, c: _training(d.epochs * (d.steps + 2), n.all),
    "rnp": _rnp,
    "sau": _sau,
    "mm_bd": _mm_bd,
    "grad_prune": _grad_prune,
    "grad_prune_inverted": _grad_prune_inverted,
}

# --- what to expect ---------------------------------------------------------------------------------
#
# What runs note under names of their own: a count stands for each run, and a list of a run has one each turn.
# The numbers are guesses from small models at SPC 10 until finished runs are learned from (`detrojan costs
# learn`): there, pruning kept 0 to 4 filters and tuning chose epochs 0 to 7, and a study of many classes
# should need more. So 40 rounds of pruning and 50 epochs of tuning, patience of 10 included, and three rounds
# of inversion. Searches for triggers hardly ever end early, so their bound is what to expect.

PRUNED, TUNED = 30, 40
EXPECTED: dict[str, dict[str, float]] = {
    "grad_prune": {"num_pruned": PRUNED, "tuning_epoch": TUNED},
    "grad_prune_inverted": {"inversions": 3, "num_pruned": PRUNED, "tuning_epoch": TUNED},
    "nc": {},
    "rnp": {},
    "sau": {},
    "npd": {},
    "mm_bd": {},
}
# Of which noted values medians are learned.
COUNTS: dict[str, tuple[str, ...]] = {
    "grad_prune": ("num_pruned", "tuning_epoch"),
    "grad_prune_inverted": ("inversions", "num_pruned", "tuning_epoch", "search_steps"),
    "nc": ("search_steps", "num_flagged"),
    "rnp": ("unlearning_epochs", "num_pruned"),
}


def counts_of(name: str, chosen: Mapping[str, Any]) -> dict[str, float]:
    """Return the counts of a finished run that decide its passes, by what it noted.

    Of several turns it is the median turn's: filters that it removed, epochs, steps of a search.
    """
    if name not in COUNTS:
        return {}
    noted = dict(chosen)
    if "flagged" in noted and name == "nc":
        noted["num_flagged"] = len(noted["flagged"])
    if name == "grad_prune_inverted":
        removed = noted.get("num_pruned", [])  # in all, after each turn
        noted["inversions"] = len(removed)
        noted["num_pruned"] = [after - before for before, after in zip([0, *removed], removed, strict=False)]
    return {key: _middle(noted[key]) for key in COUNTS[name] if noted.get(key) not in (None, [])}


def _middle(value: float | list[float]) -> float:
    return float(statistics.median(value)) if isinstance(value, list) else float(value)


def medians(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of each count over runs that have it."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for key, value in run.items():
            found.setdefault(key, []).append(value)
    return {key: float(statistics.median(values)) for key, values in found.items()}


def _as_noted(name: str, settings: Any, counts: Mapping[str, float]) -> dict[str, Any]:
    """Return what a run with such counts would note, as its formula reads it."""
    noted: dict[str, Any] = {key: math.ceil(value) for key, value in counts.items()}
    if name == "nc" and "num_flagged" in noted:
        noted["flagged"] = [0] * noted.pop("num_flagged")
    if name == "grad_prune_inverted":
        turns = min(settings.max_inversions, max(1, noted.pop("inversions", settings.max_inversions)))
        pruned = noted.get("num_pruned")
        if pruned is not None:
            noted["num_pruned"] = [pruned * number for number in range(1, turns + 1)]
        for key in ("tuning_epoch", "search_steps"):
            if key in noted:
                noted[key] = [noted[key]] * turns
    return noted


def bound(name: str, sizes: Sizes, settings: Mapping[str, Any]) -> Passes | None:
    """Return the most that a method passes; None if no formula is known."""
    return of_run(name, sizes, settings, {})


def expected(
    name: str, sizes: Sizes, settings: Mapping[str, Any], counts: Mapping[str, float] | None = None
) -> Passes | None:
    """Return what a method should be expected to pass, never more than its bound; None likewise.

    Args:
        name: of the method.
        sizes: of the defender's sample.
        settings: all of its settings.
        counts: medians of finished runs, which take the place of those of ``EXPECTED``.
    """
    most = bound(name, sizes, settings)
    if most is None:
        return None
    noted = _as_noted(name, SimpleNamespace(**settings), {**EXPECTED.get(name, {}), **(counts or {})})
    likely = of_run(name, sizes, settings, noted)
    assert likely
    return Passes(min(likely.forward, most.forward), min(likely.backward, most.backward), most.bound)


def of_run(name: str, sizes: Sizes, settings: Mapping[str, Any], chosen: Mapping[str, Any]) -> Passes | None:
    """Return what a method should pass, by what a run noted; None if no formula is known."""
    if name not in FORMULAS:
        return None
    return FORMULAS[name](sizes, SimpleNamespace(**settings), chosen)
