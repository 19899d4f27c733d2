"""Measures what each variant of Grad-Prune leaves of a backdoor, on models that a study has trained.

    python benchmarks/grad_prune_variants.py --datasets digits --attacks badnets blended --spc 10 --draws 0-2

It runs where ``results/`` lies and reads models, triggers and test images from there; it writes nothing but
a line a run. A variant is a protocol's settings, or those of ``survey`` with a part of those of ``ours``.
Samples and random streams are those that the workflow would take, so a line equals the cell of a study that
sets the same. ``losses`` in place of a variant shows what the tuning sees: the loss of triggered training
images behind the pruning, as a step of each kind has it and in eval mode.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from detrojan import registry
from detrojan import rng as streams
from detrojan.cells import Draws, Model
from detrojan.defenses._parts.gradient_pruning import GradientPruning
from detrojan.defenses.known_trigger.grad_prune import GradPrune
from detrojan.images import DefenderSample, ImageSet, to_float
from detrojan.learning import inference
from detrojan.models.base import Classifier
from detrojan.stages import poisoning, sampling
from detrojan.storage import artifacts, records
from detrojan.study import protocols
from detrojan.workflow import graph

KNOWN, INVERTED = "grad_prune", "grad_prune_inverted"
JOINT, MIXED = {"criterion": "joint"}, {"tuning_batch": "mixed"}
# Name: the defense, its protocol, and what is set over that.
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "authors": (KNOWN, "paper", {}),
    "eval_scores": (KNOWN, "survey", {}),
    "joint": (KNOWN, "survey", JOINT),
    "mixed": (KNOWN, "survey", MIXED),
    "mixed_joint_V": (KNOWN, "survey", JOINT | MIXED),
    "mixed_joint": (KNOWN, "ours", {}),
    "inverted_survey": (INVERTED, "survey", {}),
    "inverted_ours": (INVERTED, "ours", {}),
}


class Given(NamedTuple):
    """A trained model, what the defender holds, and what it is measured on."""

    model: Classifier
    samples: dict[int, DefenderSample]
    test: ImageSet
    triggered: ImageSet

    def rates(self, model: torch.nn.Module) -> tuple[float, float, float]:
        """Return ACC, ASR and RA in percent."""
        clean, stamped = (inference.logits(model, images).argmax(1) for images in (self.test, self.triggered))
        pairs = ((clean, self.test.labels), (stamped, self.triggered.labels))
        shares = [
            predicted == labels for predicted, labels in (*pairs, (stamped, self.triggered.true_labels))
        ]
        acc, asr, ra = (100 * float(share.double().mean()) for share in shares)
        return acc, asr, ra


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "variants", nargs="*", default=list(VARIANTS), help=f"of {', '.join(VARIANTS)}, losses"
    )
    parser.add_argument("--datasets", nargs="+", required=True)
    parser.add_argument("--architecture", default="preactresnet18")
    parser.add_argument("--attacks", nargs="+", required=True)
    parser.add_argument("--ratio", default="0.1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--spc", nargs="+", type=int, default=[10])
    parser.add_argument("--draws", type=Draws.parse, default=Draws(0, 2))
    parser.add_argument("--pool", choices=["train", "held_out"], default="train", help="as in the study")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=NUMBER", help="for all variants")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    extra = {name: _number(text) for name, text in (item.split("=") for item in asked.set)}
    print("data set   attack   seed SPC draw variant            ACC   ASR    RA pruned epoch capped seconds")
    for dataset, attack, seed, spc in itertools.product(
        asked.datasets, asked.attacks, asked.seeds, asked.spc
    ):
        model = Model(dataset, asked.architecture, attack, float(asked.ratio), seed)
        given = read(model, asked.ratio, asked.pool, spc, asked.draws)
        start = f"{dataset:<10} {attack:<8} {seed:4d}"
        print(start, f"{'':8} untouched      ", *_texts(given.rates(given.model)), flush=True)
        for variant, draw in itertools.product(asked.variants, asked.draws.numbers()):
            line = (
                losses(given, draw) if variant == "losses" else run(variant, given, model, spc, draw, extra)
            )
            print(start, f"{spc:3d} {draw:4d} {variant:<15}", line, flush=True)


def _number(text: str) -> float:
    return float(text) if "." in text else int(text)


def read(model: Model, ratio: str, pool: str, spc: int, draws: Draws) -> Given:
    """Return a study's model with samples drawn and stamped as the workflow does it."""
    axes = model._asdict() | {"ratio": ratio}
    own = "_own" if graph.owner(model.attack) in ("architecture", "model") else ""
    finished = Path(graph.input_pattern(f"stamp{own}", "trigger", model.attack, KNOWN).format(**axes))
    made = graph.RULES[f"triggered{own}"]
    attack = registry.load(
        "attacks",
        model.attack,
        records.read_card(Path(made.pattern("card").format(**axes)))["hyperparameters"],
    )
    trigger, _ = artifacts.read_tensors(finished)
    held = artifacts.read_images(graph.RULES["dataset"].pattern(pool).format(**axes))
    samples = sampling.draw_samples(held, model.dataset, spc, draws.numbers())
    stamped = poisoning.stamp(attack, trigger, samples)
    return Given(
        artifacts.read_model(graph.RULES["train"].pattern("model").format(**axes)),
        {d: DefenderSample(s.train, s.validation, stamped[d]) for d, s in samples.items()},
        artifacts.read_images(graph.RULES["dataset"].pattern("test").format(**axes)),
        artifacts.read_images(made.pattern("triggered").format(**axes)),
    )


def settings_of(variant: str, facts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the defense behind a variant, and its settings."""
    defense, protocol, more = VARIANTS[variant]
    return defense, protocols.settings(defense, protocol, facts) | more


def run(variant: str, given: Given, model: Model, spc: int, draw: int, extra: Mapping[str, Any]) -> str:
    """Return what a variant reaches, as the end of a line."""
    defense, settings = settings_of(variant, _facts(given, model, spc))
    sample = given.samples[draw]
    if defense == INVERTED:
        sample = DefenderSample(sample.train, sample.validation)
    settings |= {name: value for name, value in extra.items() if name in settings}
    method = registry.load("defenses", defense, settings)
    started = time.monotonic()
    repaired = method(given.model, sample, rng=streams.stream("defend", *model, defense, spc, draw))
    seconds = time.monotonic() - started
    chosen = [_short(sample.chosen[name]) for name in ("num_pruned", "tuning_epoch", "tuning_capped")]
    return " ".join([*_texts(given.rates(repaired)), *(f"{text:>6}" for text in chosen), f"{seconds:7.0f}"])


def losses(given: Given, draw: int) -> str:
    """Return the losses of triggered training images behind the pruning of ``ours``."""
    sample = given.samples[draw]
    assert sample.triggered is not None
    method = GradPrune(accuracy_images="all")
    pruned = copy.deepcopy(given.model).eval()
    method.prune(
        pruned,
        method.candidates(pruned, sample.train),
        method.limit(pruned, sample),
        sample.triggered,
        rng=streams.stream("prune"),
    )
    texts = [f"{name} {value:.2f}" for name, value in _stamped_losses(method, pruned, sample)]
    return ", ".join([*texts, f"eval {inference.evaluate(pruned, sample.triggered.train)[1]:.2f}"])


def _stamped_losses(
    method: GradientPruning, model: torch.nn.Module, sample: DefenderSample
) -> Iterator[tuple[str, float]]:
    assert sample.triggered is not None
    clean, stamped = (to_float(part.train.images) for part in (sample, sample.triggered))
    for name in ("two_passes", "mixed"):
        own = method.model_copy(update={"tuning_batch": name})
        with torch.no_grad():
            _, logits = own.logits(copy.deepcopy(model).train(), clean, stamped)
        yield name, float(F.cross_entropy(logits, sample.train.labels))


def _facts(given: Given, model: Model, spc: int) -> dict[str, Any]:
    shape = {"num_classes": given.test.num_classes, "image_size": given.test.info.height}
    return model._asdict() | shape | {"spc": spc}


def _texts(rates: tuple[float, float, float]) -> list[str]:
    return [f"{rate:5.1f}" for rate in rates]


def _short(value: Any) -> str:
    """Return a choice as text; where rounds have one each, joined."""
    values = value if isinstance(value, list) else [value]
    return ",".join("yes" if one is True else "no" if one is False else str(one) for one in values)


if __name__ == "__main__":
    main()
