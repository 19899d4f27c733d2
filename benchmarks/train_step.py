"""Compares the training loop with the bare training step, for each attack, in one run.

    python benchmarks/train_step.py --width 16 --images 4096

The bare step is forward, backward and SGD on float images that lie on the device: what no loop can
do without. The loop is the one that trains victims: it shuffles, indexes, augments, poisons on the
fly and keeps its books. Both take turns, so that a machine that others use slows both alike; a
figure is the median over the turns. Data poisoning is done before training and costs the loop
nothing; one such attack stands for all. torch is as deterministic as it is in a job.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

import scenes  # beside this file
from detrojan import registry
from detrojan import rng as streams
from detrojan.attacks.training_control.base import TrainingControlledAttack
from detrojan.images import DatasetInfo, ImageSet, to_float
from detrojan.learning import determinism, training
from detrojan.learning.meter import device_name
from detrojan.models.base import memory_format
from detrojan.settings import Augmentation, Optimization
from detrojan.stages.classifier import poisoned_batches

# What trains differently: an attack that poisons data before training, and those that control it.
ATTACKS = [
    "badnets",
    *(name for name in registry.names("attacks") if registry.trigger_owner(name) == "model"),
]

Work = Callable[[], None]


class Step(NamedTuple):
    """What is trained, and how.

    Attributes:
        architecture: file name in ``models/``.
        settings: of the architecture, where they differ from its defaults.
        attack: file name in ``attacks/``.
        ratio: share of a batch that an attack poisons on the fly.
        optimization: batch size and precision; the epochs don't count.
    """

    architecture: str
    settings: dict[str, Any]
    attack: str
    ratio: float
    optimization: Optimization

    @property
    def precision(self) -> str:
        """The number format of a pass on a GPU."""
        return "bfloat16" if self.optimization.bfloat16 else "float32"

    def bare(self, images: ImageSet) -> Work:
        """Return what takes as many bare steps as an epoch of ``images``, on their device, has."""
        model, optimization = scenes.fresh_model(self.architecture, self.settings, images), self.optimization
        size, kind = optimization.batch_size, images.device.type
        batch = to_float(images.images[:size]).contiguous(memory_format=memory_format(images.device))
        labels = images.labels[:size]
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=1e-4,
            momentum=optimization.momentum,
            weight_decay=optimization.weight_decay,
        )

        def steps() -> None:
            model.train()
            for _ in range(len(images) // size):
                with torch.autocast(kind, torch.bfloat16, enabled=optimization.bfloat16 and kind == "cuda"):
                    loss = F.cross_entropy(model(batch), labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        return steps

    def loop(self, images: ImageSet) -> Work:
        """Return what trains an epoch of ``images``, on their device, as jobs do."""
        model = scenes.fresh_model(self.architecture, self.settings, images)
        attack = registry.load("attacks", self.attack, smoke=True)
        if isinstance(attack, TrainingControlledAttack):
            trigger = attack.learn_trigger(images, rng=streams.stream("trigger"))
            poisoner = attack.poisoner(trigger, images, scenes.LABELS, rng=streams.stream("poisoner"))
            options = poisoned_batches(poisoner, self.ratio)
        else:
            options = {"augmentation": images.info.augmentation}
        optimization = self.optimization.model_copy(update={"epochs": 1})

        def epoch() -> None:
            training.fit(model, images, optimization, rng=streams.stream("loop"), **options)

        return epoch


def random_images(count: int, images: scenes.Images) -> ImageSet:
    """Return noise: what is in the images costs a step nothing."""
    side, classes = images.side, tuple(map(str, range(images.classes)))
    info = DatasetInfo(side, side, classes, (0.5,) * 3, (0.25,) * 3, Augmentation(flip=True))
    rng = streams.stream("benchmark images")
    pixels = torch.randint(256, (count, 3, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.randint(images.classes, (count,), generator=rng)
    return ImageSet.clean(pixels, labels, torch.arange(count), info)


def taken(work: Work, device: torch.device) -> float:
    """Return the seconds that ``work`` takes, with what it leaves the GPU to do."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def compare(step: Step, images: ImageSet, turns: int) -> tuple[float, float]:
    """Return images per second of the bare step and of the loop, medians over the turns."""
    bare, loop = step.bare(images), step.loop(images)
    seconds: dict[Work, list[float]] = {bare: [], loop: []}
    for turn in range(turns + 1):
        for work, of_work in seconds.items():
            passed = taken(work, images.device)
            if turn:  # the first turn warms up: kernels are chosen, memory is taken
                of_work.append(passed)
    return len(images) / statistics.median(seconds[bare]), len(images) / statistics.median(seconds[loop])


def main() -> None:
    """Print a row for each precision and attack."""
    arguments = _arguments()
    determinism.configure(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = arguments.images // arguments.batch_size * arguments.batch_size
    images = random_images(count, scenes.Images(arguments.side, arguments.classes)).to(device)
    print(
        f"{arguments.architecture}, {arguments.side}x{arguments.side} px, {arguments.classes} classes, "
        f"batch {arguments.batch_size}, ratio {arguments.ratio:g}, {device_name(device)}, "
        f"{arguments.threads} CPU threads, torch {torch.__version__}"
    )
    heads = f"{'bare, images/s':>15} {'loop, images/s':>15} {'share':>7} {'cost':>7}"
    print(f"{'precision':10} {'attack':10} {heads}")
    settings = {} if arguments.width is None else {"width": arguments.width}
    for bfloat16 in (True, False) if device.type == "cuda" else (False,):
        optimization = Optimization(batch_size=arguments.batch_size, bfloat16=bfloat16)
        for attack in ATTACKS:
            step = Step(arguments.architecture, settings, attack, arguments.ratio, optimization)
            bare, loop = compare(step, images, arguments.turns)
            row = f"{step.precision:10} {attack:10} {bare:15.0f} {loop:15.0f}"
            print(f"{row} {loop / bare:7.1%} {bare / loop - 1:+7.1%}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="preactresnet18", choices=registry.names("models"))
    parser.add_argument("--width", type=int, help="of preactresnet18; 64 if not given")
    parser.add_argument("--images", type=int, default=8192, help="of an epoch, and of as many bare steps")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
