"""Part 1, does it run at all: each attack's training and each defense, once on each network, then again.

A trial is right if it raises nothing, leaves no tensor on another device and none that is not finite.
Where torch knows no deterministic kernel for one of its operators it says so, and there no equal bits are
promised. Training is done in the precision that jobs have; one step of it, in 32 bits and without dropout, is
also held against the CPU's.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import scenes
from detrojan import registry
from detrojan import rng as streams
from detrojan.attacks.base import Attack, Trigger
from detrojan.attacks.training_control.base import TrainingControlledAttack
from detrojan.errors import DivergedError, NotApplicableError
from detrojan.images import Batch, ImageSet
from detrojan.learning import inference, training
from detrojan.models.base import Classifier
from detrojan.settings import Optimization
from detrojan.stages import poisoning
from detrojan.stages.classifier import BatchOptions, poisoned_batches
from detrojan.storage import artifacts
from detrojan.study.schema import shipped
from gpu_parts.bench import NO_TIME, Bench
from gpu_parts.budget import OutOfTimeError

PART = "runs"
LONGEST_S = 10  # a trial that takes more is cut off, so that the others get their turn
RATIO = 0.05  # a clean-label attack can poison no more than a class
# Of the weights' change in one step in 32 bits: its distance from the CPU's, relative to its length. Rounding
# alone, float32 against float64 on a CPU, moved the gradient of such a batch by 0.012 of its length on
# VGG-19, 0.0007 on PreAct-ResNet-18 and less on the others; a wrong step is off by about its own length.
TOLERANCE = 0.1
NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


class WrongError(Exception):
    """A trial went through and left something that is not right."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the trials are."""

    spc: int
    batch_size: int
    steps: int

    @property
    def per_class(self) -> int:
        """Training images of each of ten classes, for so many whole batches."""
        return -(-self.batch_size * self.steps // 10)


@dataclasses.dataclass(frozen=True)
class Trial:
    """An attack or a defense on a network.

    Attributes:
        kind: ``attacks`` or ``defenses``.
        name: file name of the method.
        architecture: file name of the network.
    """

    kind: str
    name: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.name} on {self.architecture}"


def run(bench: Bench) -> None:
    """Make all trials once, then each again, as far as the time goes."""
    size = Size(2, 8, 2) if bench.tiny else Size(10, 32, 3)
    pictures = scenes.Images()

    @functools.cache
    def scene(architecture: str) -> scenes.Scene:
        return scenes.backdoored(
            *(architecture, bench.architectures[architecture], pictures, bench.device),
            spc=size.spc,
            per_class=size.per_class,
            epochs=1,
            batch_size=size.batch_size,
        )

    def work(trial: Trial) -> dict[str, Any]:
        if trial.kind == "defenses":
            return _defended(bench, scene(trial.architecture), trial)
        return _trained(bench, trial, size, pictures)

    trials = list(_in_turns(bench))
    first: dict[Trial, dict[str, Any]] = {}
    for again, trial in itertools.product((False, True), trials):
        if again and (trial not in first or first[trial]["status"] != "ok"):
            continue
        try:
            with bench.budget.limited(LONGEST_S):
                row = _row(bench, trial, work)
        except OutOfTimeError:
            why = NO_TIME if bench.budget.left <= 0 else f"not done after {LONGEST_S} s"
            bench.record.leave_out(PART, f"{trial}{' again' if again else ''}", why)
            continue
        if again:
            first[trial]["same_bits"] = row["digest"] == first[trial]["digest"]
            bench.record.write()
        else:
            first[trial] = row
            bench.record.add(PART, row)


def _in_turns(bench: Bench) -> Iterator[Trial]:
    """Yield all trials, the first few with each method once and with each network; if tiny, only those."""
    names = list(bench.architectures)
    methods = [("attacks", name) for name in registry.names("attacks")]
    methods += [("defenses", name) for name in registry.names("defenses")]
    for turn in range(1 if bench.tiny else len(names)):
        for place, (kind, method) in enumerate(methods):
            yield Trial(kind, method, names[(place + turn) % len(names)])


def _row(bench: Bench, trial: Trial, work: Callable[[Trial], dict[str, Any]]) -> dict[str, Any]:
    """Return what came of a trial."""
    row: dict[str, Any] = dataclasses.asdict(trial) | {"status": "ok", "problem": None, "same_bits": None}
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            row |= work(trial)
        except (NotApplicableError, DivergedError) as error:  # results of a study too
            kind = "not_applicable" if isinstance(error, NotApplicableError) else "diverged"
            row |= {"status": kind, "problem": str(error)}
        except Exception as error:  # whatever it is, the other trials go on
            row |= {"status": "failed", "problem": f"{type(error).__name__}: {error}".splitlines()[0]}
    found = {match[1] for warning in said if (match := NOT_DETERMINISTIC.search(str(warning.message)))}
    return row | {"seconds": time.monotonic() - started, "not_deterministic": ", ".join(sorted(found))}


# --- an attack --------------------------------------------------------------------------------------


def _trained(bench: Bench, trial: Trial, size: Size, pictures: scenes.Images) -> dict[str, Any]:
    """Learn a trigger and train a few steps; return a digest, and how far a step is from the CPU's."""
    attack: Attack = registry.load("attacks", trial.name, smoke=True)
    clean = pictures.patterned("train", size.per_class)
    settings = bench.architectures[trial.architecture]
    on_device = clean.to(bench.device)
    model = scenes.fresh_model(trial.architecture, settings, on_device)
    against = model if attack.against_model else None
    trigger = attack.learn_trigger(on_device, against, rng=streams.stream("trial trigger"))
    _check_tensors(trigger, bench.device)
    trigger = {name: value.cpu() for name, value in trigger.items()}
    own = _fit(attack, trigger, clean, model, size.batch_size)
    _check_tensors(model.state_dict() | own, bench.device, anywhere=frozenset(own))
    row = {"digest": _digest(model.state_dict() | own)}
    if bench.on_gpu and trial.name not in _POISONED_BEFORE:
        batch = clean[: size.batch_size]
        row |= _distance(attack, trigger, batch, trial.architecture, settings, bench.device)
    return row


# One attack that poisons data before training stands for all: the steps are the same.
_POISONED_BEFORE = [
    name
    for name in registry.names("attacks")
    if registry.trigger_owner(name) != "model" and name != "badnets"
]


def _fit(
    attack: Attack,
    trigger: Trigger,
    clean: ImageSet,
    model: Classifier,
    batch_size: int,
    *,
    bfloat16: bool = True,
) -> dict[str, Tensor]:
    """Train an epoch in place, where the model lies; return the trigger that was trained with it, if any."""
    device = next(model.parameters()).device
    optimization = Optimization(epochs=1, batch_size=batch_size, bfloat16=bfloat16)
    poisoner = None
    options: BatchOptions = {"augmentation": clean.info.augmentation}
    if isinstance(attack, TrainingControlledAttack):
        images = clean.to(device)
        poisoner = attack.poisoner(trigger, images, scenes.LABELS, rng=streams.stream("trial poisoner"))
        options = poisoned_batches(poisoner, RATIO)
    else:
        rng = streams.stream("trial poison")
        rows = poisoning.poison(attack, trigger, clean, RATIO, scenes.LABELS, rng=rng)
        images = clean.replaced(rows).to(device)
    with _no_waiting(device, len(images) // batch_size, options) as after_step:
        training.fit(
            model, images, optimization, rng=streams.stream("trial"), after_step=after_step, **options
        )
    return poisoner.trigger() if poisoner else {}


@contextlib.contextmanager
def _no_waiting(device: torch.device, steps: int, options: BatchOptions) -> Iterator[Callable[[], None]]:
    """Have torch refuse whatever makes the program wait for the GPU, from the first batch to the last step.

    ``options`` are changed; what is yielded is to be called after each step. On a CPU nothing waits.
    """
    prepare, done = options.get("prepare"), 0

    def refuse(what: str) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(what)

    def prepared(batch: Batch, rng: torch.Generator) -> Batch:
        refuse("error")
        return prepare(batch, rng) if prepare else batch

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == steps:
            refuse("default")

    options["prepare"] = prepared
    try:
        yield after_step
    finally:
        refuse("default")


def _distance(
    attack: Attack,
    trigger: Trigger,
    batch: ImageSet,
    architecture: str,
    settings: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Return how far the weights' change of one step in 32 bits is from the CPU's, relative to its length."""
    before = scenes.fresh_model(architecture, settings, batch)
    after = []
    for place in (torch.device("cpu"), device):
        model = scenes.fresh_model(architecture, settings, batch.to(place))
        _without_dropout(model)
        with _full_precision():
            _fit(attack, trigger, batch, model, len(batch), bfloat16=False)
        after.append(model.to("cpu"))
    distance = _norm(*after) / _norm(after[0], before)
    if not distance <= TOLERANCE:
        raise WrongError(f"a step is {distance:.2g} of its length from the CPU's, more than {TOLERANCE:g}")
    return {"from_cpu": distance}


def _norm(first: nn.Module, second: nn.Module) -> float:
    """Return the Euclidean norm of the difference between the weights of two networks on the CPU."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    parts = [torch.linalg.vector_norm(a.detach() - b.detach(), dtype=torch.float64) for a, b in pairs]
    return float(torch.stack(parts).norm())


def _without_dropout(model: nn.Module) -> None:
    """Switch off what draws on the device, where a GPU's generator gives other numbers than a CPU's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keep convolutions from rounding what they multiply to ten bits (TF32), which is torch's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# --- a defense --------------------------------------------------------------------------------------


def _defended(bench: Bench, scene: scenes.Scene, trial: Trial) -> dict[str, Any]:
    """Repair a model; return a digest of the repaired one."""
    settings = shipped("defenses", trial.name).resolve({"architecture": trial.architecture})
    smoke = registry.declared("defenses", trial.name).constants["smoke"]
    defense = registry.load("defenses", trial.name, settings | smoke)
    sample = scene.given(trial.name)
    before = _digest(scene.model.state_dict())
    repaired = defense(scene.model, sample, rng=streams.stream("trial defense")).eval()
    if _digest(scene.model.state_dict()) != before:
        raise WrongError("the model that it was given has changed")
    _check_tensors(repaired.state_dict(), bench.device)
    artifacts.check_finite(repaired, "the repaired model")
    shown = scene.sample.train.to(bench.device)
    if not bool(inference.logits(repaired, shown).isfinite().all()):
        raise DivergedError("the repaired model's logits are not finite")
    return {"digest": _digest(repaired.state_dict())}


# --- what a trial leaves ----------------------------------------------------------------------------


def _check_tensors(
    tensors: Mapping[str, Tensor], device: torch.device, anywhere: frozenset[str] = frozenset()
) -> None:
    """Raise ``WrongError`` if a tensor lies elsewhere or is not finite; names in ``anywhere`` may lie so."""
    for name, value in tensors.items():
        if value.device.type != device.type and name not in anywhere:
            raise WrongError(f"tensor {name} lies on {value.device}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise WrongError(f"tensor {name} has values that are not finite")


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the tensors' bits, summed up where they lie: hundreds of MB stay on the device."""
    sums = {}
    for name, value in sorted(tensors.items()):
        flat = value.detach().contiguous().flatten()
        bits = flat.view(_BITS[flat.element_size()]).long()
        # Odd factors that differ by place: another value, or two that change places, gives another sum.
        factors = torch.arange(len(bits), device=flat.device) * 2_654_435_762 + 1
        sums[name] = int((bits * factors).sum())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]
