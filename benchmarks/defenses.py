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
from collections.abc import Mapping
from typing import Any

import torch
import yaml

import scenes  # beside this file
from detrojan import registry
from detrojan import rng as streams
from detrojan.defenses.base import Defense
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import DefenderSample
from detrojan.learning.meter import Cost, device_name, meter
from detrojan.models.base import Classifier
from detrojan.study.schema import shipped
from detrojan.workflow.image_passes import Passes, Sizes, of_run


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
    return of_run(name, sizes, defense.model_dump(), chosen or {})


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
