"""Compares the training loop with the bare training step, for each attack, in one run.

    python benchmarks/train_step.py --width 16 --images 4096

The bare step is forward, backward and SGD on float images that lie on the device: what no loop can
do without. The loop is the one that trains victims: it shuffles, indexes, augments, poisons on the
fly and keeps its books. Both take turns, so that a machine that others use slows both alike; a
figure is the median over the turns. Data poisoning is done before training and costs the loop
nothing; one such attack stands for all.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from detrojan import models, registry, training
from detrojan import rng as streams
from detrojan.attacks.training_control.base import TrainingControlledAttack
from detrojan.cost import device_name
from detrojan.data import DatasetInfo, ImageSet, to_float
from detrojan.labels import LabelMap
from detrojan.models.base import Classifier, memory_format
from detrojan.settings import Augmentation, Optimization
from detrojan.victim import poisoned_batches

LABELS = LabelMap(0)


def main() -> None:
    """Print a row for each precision and attack."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = _images(arguments).to(device)
    attacks = ["badnets", *(n for n in registry.names("attacks") if registry.trigger_owner(n) == "model")]
    print(
        f"{arguments.architecture}, {arguments.side}x{arguments.side} px, {arguments.classes} classes, "
        f"batch {arguments.batch_size}, ratio {arguments.ratio:g}, {device_name(device)}, "
        f"{arguments.threads} CPU threads, torch {torch.__version__}"
    )
    heads = f"{'bare, images/s':>15} {'loop, images/s':>15} {'share':>7} {'cost':>7}"
    print(f"{'precision':10} {'attack':10} {heads}")
    for bfloat16 in (True, False) if device.type == "cuda" else (False,):
        for attack in attacks:
            bare, loop = _compare(arguments, images, attack, bfloat16=bfloat16)
            precision = "bfloat16" if bfloat16 else "float32"
            row = f"{precision:10} {attack:10} {bare:15.0f} {loop:15.0f}"
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


def _images(arguments: argparse.Namespace) -> ImageSet:
    side, count = arguments.side, arguments.images // arguments.batch_size * arguments.batch_size
    classes = tuple(map(str, range(arguments.classes)))
    info = DatasetInfo(side, side, classes, (0.5,) * 3, (0.25,) * 3, Augmentation(flip=True))
    rng = streams.stream("benchmark images")
    pixels = torch.randint(256, (count, 3, side, side), generator=rng, dtype=torch.uint8)
    labels = torch.randint(arguments.classes, (count,), generator=rng)
    return ImageSet.clean(pixels, labels, torch.arange(count), info)


def _compare(
    arguments: argparse.Namespace, images: ImageSet, attack: str, *, bfloat16: bool
) -> tuple[float, float]:
    """Return images per second of the bare step and of the loop, medians over the turns."""
    optimization = Optimization(epochs=1, batch_size=arguments.batch_size, bfloat16=bfloat16)
    bare = _bare_steps(_model(arguments, images), images, optimization)
    loop = _loop(_model(arguments, images), images, optimization, attack, arguments.ratio)
    seconds: dict[Callable[[], None], list[float]] = {bare: [], loop: []}
    for turn in range(arguments.turns + 1):
        for work, taken in seconds.items():
            started = time.perf_counter()
            work()
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up: kernels are chosen, memory is taken
                taken.append(time.perf_counter() - started)
    return len(images) / statistics.median(seconds[bare]), len(images) / statistics.median(seconds[loop])


def _model(arguments: argparse.Namespace, images: ImageSet) -> Classifier:
    settings = {} if arguments.width is None else {"width": arguments.width}
    info = images.info
    build = models.Build(arguments.architecture, settings, images.num_classes, info.mean, info.std)
    with streams.global_stream(streams.stream("benchmark model")):
        return models.build(build).place(images.device)


def _bare_steps(model: Classifier, images: ImageSet, optimization: Optimization) -> Callable[[], None]:
    size = optimization.batch_size
    batch = to_float(images.images[:size]).contiguous(memory_format=memory_format(images.device))
    labels = images.labels[:size]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-4, momentum=optimization.momentum, weight_decay=optimization.weight_decay
    )
    kind = images.device.type

    def steps() -> None:
        model.train()
        for _ in range(len(images) // size):
            with torch.autocast(kind, torch.bfloat16, enabled=optimization.bfloat16 and kind == "cuda"):
                loss = F.cross_entropy(model(batch), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return steps


def _loop(
    model: Classifier, images: ImageSet, optimization: Optimization, name: str, ratio: float
) -> Callable[[], None]:
    attack = registry.load("attacks", name, smoke=True)
    if isinstance(attack, TrainingControlledAttack):
        trigger = attack.learn_trigger(images, rng=streams.stream("trigger"))
        poisoner = attack.poisoner(trigger, images, LABELS, rng=streams.stream("poisoner"))
        options = poisoned_batches(poisoner, ratio)
    else:
        options = {"augmentation": images.info.augmentation}

    def epoch() -> None:
        training.fit(model, images, optimization, rng=streams.stream("loop"), **options)

    return epoch


if __name__ == "__main__":
    main()
