"""Compares what each defense costs with what its algorithm should cost, in image passes.

    python benchmarks/defenses.py --settings anp.iterations=100 nc.inversion_epochs=10

An image pass is one image through the whole network, forward or backward, as
``detrojan.learning.meter`` counts it and ``cells.parquet`` has it. The prediction is a formula of the
method's settings and of the sizes of the defender's sample, from the steps that the method's paper
describes and no cache can spare. A ratio well above 1 is work that the method does not need. Where the run
itself decides (early stops, rounds of pruning), the formula takes what the method noted that it chose, or
is an upper bound, marked <=.

Seconds and memory are those of one run. On a shared machine they mean little by themselves; on a CPU, the
memory is that of the whole process, torch included. The model is small, and backdoored in a few seconds on
noise around a pattern for each class, so that methods find something. With their default settings some
methods take many minutes on a CPU: name the ones you mean, or shorten them.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import yaml

import scenes  # beside this file
from detrojan import registry
from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import DefenderSample, num_batches, passes
from detrojan.learning.meter import Cost, device_name, meter
from detrojan.models.base import Classifier
from detrojan.study.schema import shipped


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
# `n` are the sizes, `d` is the method with its settings, `c` what its run noted in `clean.chosen`; with
# nothing noted, an entry that needs it gives a bound.

Formula = Callable[[Sizes, Any, Mapping[str, Any]], Passes]


def _steps(count: int, batch_size: int) -> int:
    return math.ceil(count / batch_size)


def _floored(epochs: int, min_steps: int, count: int, batch_size: int) -> int:
    """Passes over ``count`` images that take so many steps at least."""
    return passes(epochs, min_steps, num_batches(count, batch_size))


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
        d = d.model_copy(update={"batch_size": d.small_batch_size})
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
    times = d.rounds * passes(1, d.min_steps, batches)
    return Passes(times * forward, times * backward)


def _inversion(n: Sizes, d: Any, images: int, steps: int | None = None) -> Passes:
    """Every class a stamped copy of each image of a step, until the class is done, which can be early.

    Then one of each image, to see how often it gets the class. ``steps`` of the longest search, if they
    are known.
    """
    used = min(images, d.max_images)
    batches = _steps(used, d.inversion_batch_size)
    if steps is None:
        each_epoch = max(batches, _steps(d.min_steps, d.inversion_epochs))
        steps = min(d.max_steps, d.inversion_epochs * each_epoch)
    passed = n.classes * steps * used / batches
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
    backward = rounds * n.train + epochs * 2 * n.train
    return Passes(backward + looked, backward, bound=True)


def _grad_prune_inverted(n: Sizes, d: Any, c: Mapping[str, Any]) -> Passes:
    """In turns: search triggers with the training images, prune and tune. The last search may find none."""
    removed = [0, *c.get("num_pruned", [])]  # in all, after each turn
    turns: list[dict[str, int]] = [
        {"num_pruned": after - before, "tuning_epoch": epoch}
        for before, after, epoch in zip(removed, removed[1:], c.get("tuning_epoch", []), strict=False)
    ] or [{}] * d.max_inversions
    searches = c.get("search_steps", [None] * d.max_inversions)
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
    "npd": _npd,
    # A pass over attacked images: the attack's steps and one of the weights; and one over clean images.
    "pbe": lambda n, d, c: _training(d.epochs * (d.steps + 2), n.all),
    "rnp": _rnp,
    "sau": _sau,
    "mm_bd": _mm_bd,
    "grad_prune": _grad_prune,
    "grad_prune_inverted": _grad_prune_inverted,
}


def prediction(
    name: str, sizes: Sizes, defense: Defense, chosen: Mapping[str, Any] | None = None
) -> Passes | None:
    """Return what a defense should cost; None if no formula is known.

    Args:
        name: of the method.
        sizes: of the defender's sample.
        defense: the method with its settings.
        chosen: what the run noted; without, data-dependent methods get an upper bound.
    """
    return FORMULAS[name](sizes, defense, chosen or {}) if name in FORMULAS else None


# --- what it costs ----------------------------------------------------------------------------------


def main() -> None:
    """Print a row for each defense."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"width": arguments.width} if arguments.architecture == "preactresnet18" else {}
    images = scenes.Images(arguments.side, arguments.classes)
    scene = scenes.backdoored(arguments.architecture, settings, images, device, spc=arguments.spc)
    sizes = Sizes(len(scene.sample.train), len(scene.sample.validation), arguments.classes)
    print(
        f"{arguments.architecture}, {arguments.side}x{arguments.side} px, {sizes.classes} classes, "
        f"SPC {arguments.spc} ({sizes.train} training, {sizes.validation} validation images), "
        f"{device_name(device)}, {arguments.threads} CPU threads, torch {torch.__version__}"
    )
    print(f"untouched model: ACC {scene.acc:.1%}, ASR {scene.asr:.1%}")
    heads = f"{'predicted':>12} {'ratio':>6}"
    print(f"{'defense':20} {'seconds':>8} {'MB':>6} {'forward':>10} {heads} {'backward':>10} {heads}")
    for name in arguments.methods:
        given = scene.given(name)
        defense = registry.load("defenses", name, _settings(arguments, name))
        with meter(device) as cost:
            failure = _run(defense, scene.model, given)
        expected = None if failure else prediction(name, sizes, defense, given.chosen)
        print(f"{name:20} {_row(cost, expected)}{failure}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="preactresnet18", choices=registry.names("models"))
    parser.add_argument("--width", type=int, default=8, help="of preactresnet18; 64 is the standard")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--spc", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    everything = registry.names("defenses")
    parser.add_argument("--methods", nargs="+", default=everything, choices=everything, metavar="METHOD")
    parser.add_argument(
        "--settings", nargs="+", default=[], type=_setting, metavar="METHOD.FIELD=VALUE", help="as in YAML"
    )
    return parser.parse_args()


def _setting(text: str) -> tuple[str, str, Any]:
    """Return the method, the field and the value that ``method.field=value`` names."""
    place, equals, value = text.partition("=")
    method, dot, field = place.partition(".")
    if not (equals and dot and method in registry.names("defenses")):
        raise argparse.ArgumentTypeError(f"{text!r} should be as ft.epochs=10")
    return method, field, yaml.safe_load(value)


def _settings(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the settings of a method that are not its class's: the shipped ones, then the command line's."""
    settings = shipped("defenses", name).resolve({"architecture": arguments.architecture})
    return settings | {field: value for method, field, value in arguments.settings if method == name}


def _run(defense: Defense, model: Classifier, sample: DefenderSample) -> str:
    """Defend; return the reason if that is no repaired model, and nothing if it is."""
    try:
        defense(model, sample, rng=streams.stream("benchmark defense"))
    except (NotApplicableError, DivergedError) as error:
        return f"  {type(error).__name__}: {error}"
    return ""


def _row(cost: Cost, expected: Passes | None) -> str:
    measured = (cost.forward_passes, cost.backward_passes)
    cells = [f"{cost.seconds:8.1f} {cost.peak_memory_bytes / 2**20:6.0f}"]
    for found, predicted in zip(measured, expected[:2] if expected else (None, None), strict=True):
        cells.append(f"{found:10d} {_shown(predicted, expected):>12} {_ratio(found, predicted):>6}")
    return " ".join(cells)


def _shown(predicted: float | None, expected: Passes | None) -> str:
    if predicted is None or expected is None:
        return "n/a"
    return f"{'<= ' if expected.bound else ''}{predicted:.0f}"


def _ratio(measured: int, predicted: float | None) -> str:
    """Return measured / predicted as text; 1 where both are 0."""
    if predicted is None:
        return "n/a"
    if not predicted:
        return "inf" if measured else "1.00"
    return f"{measured / predicted:.2f}"


if __name__ == "__main__":
    main()
