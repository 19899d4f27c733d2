"""What a job should take by arithmetic, where nobody has measured it: seconds, memory, disk.

A step takes as long as its multiply-adds or as its launches, whichever is longer::

    step     = max(batch × multiply-adds / rate, modules × launch)
    seconds  = start + forward passes / batch × step + backward passes / batch × (2 × step + weights)

Passes are those of :mod:`detrojan.workflow.image_passes`: ``seconds`` are of the most that a method passes,
``expected_s`` of what to expect. What a pass of a network takes stands in ``slurm/networks.csv``, counted by
``benchmarks/plan.py networks``. Of images or settings that have no row there, the row of the same network
with the nearest side is taken, its multiply-adds scaled by the area, and by the square of ``width`` if the
network has one; for a network without any row, the slowest. A data set that is not known by its name or
source is taken for one with as many images as GTSRB, of the size and classes that the study says, and a
defense without formula for SAU.

Everything here is an assumption of a machine (:class:`Machine`); rows of ``slurm/costs.csv`` are measured and
win, see :mod:`detrojan.workflow.job_costs`. Free of torch: the Snakefile asks at every parse.
"""

import csv
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from detrojan import registry
from detrojan.cells import SURVEY
from detrojan.settings import Optimization
from detrojan.study import protocols
from detrojan.study.schema import Study
from detrojan.workflow import image_passes

NETWORKS = registry.CHECKOUT / "slurm" / "networks.csv"
NETWORK_COLUMNS = ("network", "side", "num_classes", "multiply_adds", "modules", "weights", "mb")


class Machine(NamedTuple):
    """What computes; all figures are assumed until ``benchmarks/gpu.py`` has measured them.

    Attributes:
        name: as tables print it.
        multiply_adds_per_s: of a full batch.
        bfloat16_gain: factor of that in training, which runs in bfloat16.
        launch_s: for a module's kernels, forward.
        weights_per_s: weights that an optimizer's step passes.
        draw_s: to copy a model and note what was done.
        search_pixels: of stamped images in one pass of a search for triggers: what a quarter of its memory
            holds, see ``defenses/_parts/inversion.py``.
    """

    name: str
    multiply_adds_per_s: float
    bfloat16_gain: float
    launch_s: float
    weights_per_s: float
    draw_s: float
    search_pixels: float


# An A100 at 7 % of its peak in 32 bits (TensorFloat-32 convolutions): PreAct-ResNet-18 takes 555 million
# multiply-adds for an image of 32 pixels, so this is 10,000 images a second forward. A step reads and writes
# each weight five times, 4 bytes each, at 1.5 TB/s.
ASSUMED = Machine("A100", 5.55e12, 2, 40e-6, 75e9, 1.0, 2**21)
# An H100 in bfloat16 with channels last, up to twice an A100's published training (NVIDIA: ResNet-50, 2,470
# images/s, 3 × 4.09 billion multiply-adds each, so 30e12). 6 µs a module need CUDA graphs or several
# processes a GPU.
H100 = Machine("H100, 45e12", 45e12, 1, 6e-6, 167e9, 0.3, 2**22)
H100_FAST = H100._replace(name="H100, 60e12", multiply_adds_per_s=60e12)
# Eight cores in 32 bits, each as fast as one of a shared server (processor time): 20e9 multiply-adds a second
# through PreAct-ResNet-18 in batches of 16, 120 µs a module through MobileNetV3-Large with one image.
LAPTOP = Machine("laptop", 1.6e11, 1, 120e-6, 2e9, 0.1, 2**19)

BACKWARD = 2  # passes forward that a backward pass is worth
DISK_MB_PER_S = 500
CPU_MULTIPLY_ADDS_PER_S = 1e10  # of one core
CPU_IMAGE_S = 2e-3  # to decode and scale one image
CPU_STAMP_S = 1e-4  # to trigger one image, without a network
SAMPLE_S = 1.0  # to note a draw
JOB_S = 20  # 5 for Snakemake's two starts, measured; then torch and the GPU
JOB_MB = 350  # of Snakemake's processes, measured
PROCESS_MB, CPU_PROCESS_MB = 3000, 700  # with torch and, on a GPU, its libraries
COPIES = 3  # of a data set while it is read
AGGREGATE_S, AGGREGATE_MB = 20.0, 2000.0  # for a thousand shards, 20 ms a file; for all of the survey
METRICS_MB = 0.01
NUM_DRAWS = 10
WIDTH = 64  # of a network whose settings have a width, in networks.csv
SAMPLES = 100  # a class, of a job that names none

OTHER_DEFENSE = "sau"  # a method that has no formula is taken for one of the slower
SSBA_EPOCHS, IAB_MASK_EPOCHS = 20, 25
LF_PASSES = 50 * 100 * 10  # passes over its images, images, DeepFool steps
CPU, GPU = "cpu", "GPU"


class Images(NamedTuple):
    """A data set: how many classes and images, and their side, pixels."""

    num_classes: int
    num_train: int
    num_test: int
    side: int

    @property
    def mb_each(self) -> float:
        """Size of an image, 8 bits a channel."""
        return 3 * self.side**2 / 1e6


# As their authors publish them, at the side to which the survey scales them.
DATASETS = {
    "cifar10": Images(10, 50_000, 10_000, 32),
    "gtsrb": Images(43, 39_209, 12_630, 32),
    "tiny_imagenet": Images(200, 100_000, 10_000, 64),
}
BUNDLED = {"digits": Images(10, 1_442, 355, 32)}
OTHER_DATASET = DATASETS["gtsrb"]


class Network(NamedTuple):
    """What a pass of one image takes: multiply-adds, modules that run, weights, MB of all that is saved."""

    multiply_adds: float
    modules: float
    weights: float
    mb: float

    def seconds(
        self, machine: Machine, forward: float, backward: float, batch: float, gain: float = 1
    ) -> float:
        """Return what so many image passes take in batches of ``batch``; ``gain`` in arithmetic."""
        arithmetic = batch * self.multiply_adds / (gain * machine.multiply_adds_per_s)
        step = max(arithmetic, self.modules * machine.launch_s)
        return (forward * step + backward * (BACKWARD * step + self.weights / machine.weights_per_s)) / batch


class Facts(NamedTuple):
    """All that decides what a job takes.

    Attributes:
        stage: a key of ``job_costs.UNITS``.
        method: the defense for ``defend``, else the attack; empty for any.
        architecture: likewise.
        images: of the data set.
        spc: clean samples per class; 0 for none.
        settings: of the defense, all of them.
        width: of the network, as a share of that in ``networks.csv``.
        batch_size: of training.
        counts: what finished runs say of the defense's counts.
    """

    stage: str
    method: str
    architecture: str
    images: Images
    spc: int
    settings: Mapping[str, Any]
    width: float
    batch_size: int
    counts: Mapping[str, float]


class Taken(NamedTuple):
    """What a unit of a job takes; memory is the whole job's, MB as disk."""

    seconds: float
    expected_s: float
    memory_mb: float
    disk_mb: float
    device: str


# --- what is known of a job -------------------------------------------------------------------------


def facts(
    stage: str,
    method: str,
    axes: Mapping[str, Any],
    study: Study | None = None,
    counts: Mapping[str, float] | None = None,
) -> Facts:
    """Return what decides the costs of a job.

    Args:
        stage: a key of ``job_costs.UNITS``.
        method: of it, as :class:`Facts` has it.
        axes: those that the job has.
        study: that the job is of; without one, the shipped settings and the published data sets.
        counts: of the defense, learned from finished runs.
    """
    images = _images(axes.get("dataset", ""), study)
    architecture = axes.get("architecture", "")
    spc = axes.get("spc")
    settings: Mapping[str, Any] = {}
    if stage == "defend":
        named = method or OTHER_DEFENSE
        known = named if named in image_passes.FORMULAS else OTHER_DEFENSE
        settings = _defense_settings(known, known == named, axes, images, study)
    width, batch_size = 1.0, Optimization().batch_size
    if study and architecture:
        width = study.method("models", architecture, axes).get("width", WIDTH) / WIDTH
    if study and stage == "train":
        batch_size = study.optimization(axes)["batch_size"]
    return Facts(
        stage,
        method,
        architecture,
        images,
        SAMPLES if spc is None else spc,
        settings,
        width,
        batch_size,
        counts or {},
    )


def is_known(dataset: str, study: Study | None) -> bool:
    """Return whether the images of a data set of this name are known, and not those of another."""
    return dataset in DATASETS or bool(study and dataset in study.datasets)


def _images(dataset: str, study: Study | None) -> Images:
    known = DATASETS.get(dataset, OTHER_DATASET)
    if study is None or dataset not in study.datasets:
        return known
    asked = study.datasets[dataset]
    known = BUNDLED.get(asked.source, DATASETS.get(str(asked.source_settings.get("layout")), known))
    try:
        classes = study.num_classes(dataset)
    except (ValueError, OSError):  # its source isn't at hand; whoever runs the study will be told
        classes = known.num_classes
    most = asked.per_class * classes if asked.per_class else math.inf
    num_train, num_test = (int(min(count, most)) for count in (known.num_train, known.num_test))
    return Images(classes, num_train, num_test, asked.image_size)


def _defense_settings(
    name: str, own: bool, axes: Mapping[str, Any], images: Images, study: Study | None
) -> Mapping[str, Any]:
    if study and own:
        return study.method("defenses", name, axes)
    asked = {"architecture": axes.get("architecture", ""), "spc": axes.get("spc") or SAMPLES}
    told = asked | {"num_classes": images.num_classes, "image_size": images.side}
    protocol = str(axes.get("protocol") or SURVEY)
    return protocols.settings(name, protocol if own else SURVEY, told)


# --- networks ---------------------------------------------------------------------------------------


class Counted(NamedTuple):
    """A row of ``networks.csv``."""

    network: str
    side: int
    num_classes: int
    taken: Network


@functools.cache
def counted() -> list[Counted]:
    """Return what was counted of networks."""
    with NETWORKS.open(encoding="utf-8", newline="") as file:
        return [
            Counted(
                row["network"],
                int(row["side"]),
                int(row["num_classes"]),
                Network(*(float(row[name]) for name in NETWORK_COLUMNS[3:])),
            )
            for row in csv.DictReader(file)
        ]


@functools.cache
def architectures() -> list[str]:
    """Return the networks that were counted, without the parts of attacks."""
    return list(dict.fromkeys(row.network for row in counted() if row.network in registry.names("models")))


@functools.cache
def network(name: str, images: Images, width: float = 1.0) -> Network:
    """Return what a network takes for an image, scaled from the nearest row where there is none."""

    def distance(row: Counted) -> tuple[float, float]:
        return abs(row.side - images.side), abs(row.num_classes - images.num_classes)

    nearest = min((row for row in counted() if row.network == name), key=distance)
    area = (images.side / nearest.side) ** 2 * width**2
    taken = nearest.taken
    return taken._replace(
        multiply_adds=taken.multiply_adds * area, weights=taken.weights * width**2, mb=taken.mb * width**2
    )


def _networks(known: Facts) -> Iterator[tuple[str, Network]]:
    """Yield the network of a job; all that were counted if it names none of them."""
    named = known.architecture in architectures()
    for name in [known.architecture] if named else architectures():
        yield name, network(name, known.images, known.width if named else 1.0)


# --- what a unit takes ------------------------------------------------------------------------------


def taken(known: Facts, machine: Machine = ASSUMED) -> Taken | None:
    """Return what a unit of a job takes on a machine; None of a stage that this knows nothing of."""
    stage = STAGES.get(known.stage)
    if stage is None:
        return None
    seconds, expected, memory, disk, device = stage(known, machine)
    # An assumption has no more digits than these.
    return Taken(
        _rounded(seconds),
        _rounded(min(expected, seconds)),
        _rounded(memory),
        float(f"{disk:.3g}"),
        device,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _dataset(known: Facts, machine: Machine) -> Taken:
    images = known.images
    train_mb, test_mb = _mb(images)
    seconds = (images.num_train + images.num_test) * CPU_IMAGE_S * (images.side / 32) ** 2
    memory = CPU_PROCESS_MB + COPIES * (train_mb + test_mb)
    return Taken(seconds, seconds, memory, train_mb + test_mb, CPU)


def _sample(known: Facts, machine: Machine) -> Taken:
    seconds = SAMPLE_S + _reading_s(known.images) / NUM_DRAWS
    memory = CPU_PROCESS_MB + COPIES * _mb(known.images)[0]
    return Taken(seconds, seconds, memory, _num_samples(known) * known.images.mb_each, CPU)


def _poison(known: Facts, machine: Machine) -> Taken:
    train_mb, _ = _mb(known.images)
    seconds = known.images.num_train * _stamp_s(known.method, known.images) + _reading_s(known.images)
    return Taken(seconds, seconds, CPU_PROCESS_MB + COPIES * train_mb, train_mb, CPU)


def _triggered(known: Facts, machine: Machine) -> Taken:
    _, test_mb = _mb(known.images)
    seconds = known.images.num_test * _stamp_s(known.method, known.images) + 5
    return Taken(seconds, seconds, CPU_PROCESS_MB + 2 * COPIES * test_mb, test_mb, CPU)


def _stamp(known: Facts, machine: Machine) -> Taken:
    sample, each = _num_samples(known), known.images.mb_each
    seconds = SAMPLE_S + sample * _stamp_s(known.method, known.images)
    return Taken(
        seconds, seconds, CPU_PROCESS_MB + 2 * COPIES * NUM_DRAWS * sample * each, sample * each, CPU
    )


def _trigger(known: Facts, machine: Machine) -> Taken:
    seconds = _trigger_s(known, known.method, machine) + _reading_s(known.images)
    return Taken(seconds, seconds, PROCESS_MB + COPIES * _mb(known.images)[0], 5, GPU)


def _train(known: Facts, machine: Machine) -> Taken:
    """What an epoch takes, with the generators of IAB and without."""
    count, batch, gain = known.images.num_train, known.batch_size, machine.bfloat16_gain
    networks = [one for _, one in _networks(known)]
    seconds = max(one.seconds(machine, count, count, batch, gain) for one in networks)
    if known.method == "iab":
        # Of each batch a tenth is triggered and a tenth gets another image's pattern.
        generator = network("iab_generator", known.images)
        seconds += generator.seconds(machine, 0.4 * count, 0.2 * count, 0.2 * batch, gain)
    size = max(one.mb for one in networks)
    memory = PROCESS_MB + 4 * size + COPIES * count * known.images.mb_each
    return Taken(seconds, seconds, memory, size, GPU)


def _defend(known: Facts, machine: Machine) -> Taken:
    """What a draw takes."""
    method = known.method if known.method in image_passes.FORMULAS else OTHER_DEFENSE
    sizes = sizes_of(known)
    most = image_passes.bound(method, sizes, known.settings)
    likely = image_passes.expected(method, sizes, known.settings, known.counts)
    assert most
    assert likely
    batch = _batch(method, known, sizes, machine)

    def seconds(one: Network, passes: image_passes.Passes) -> float:
        start = machine.draw_s + one.mb / DISK_MB_PER_S
        return start + one.seconds(machine, passes.forward, passes.backward, batch)

    networks = [one for _, one in _networks(known)]
    size = max(one.mb for one in networks)
    knows_trigger = method == known.method and (registry.threat_model("defenses", method) == "known_trigger")
    given = NUM_DRAWS * sizes.all * known.images.mb_each
    return Taken(
        max(seconds(one, most) for one in networks),
        max(seconds(one, likely) for one in networks),
        PROCESS_MB + 4 * size + (2 if knows_trigger else 1) * COPIES * given,
        size,
        GPU,
    )


def _batch(method: str, known: Facts, sizes: image_passes.Sizes, machine: Machine) -> float:
    """Return how many images a step of a defense passes, on average."""
    settings = known.settings
    if "inversion_batch_size" in settings:
        # Of the search, which is nearly all of it: all classes' stamped images, as far as memory goes.
        used = float(min(sizes.all, settings["max_images"], settings["inversion_batch_size"]))
        return max(1.0, min(machine.search_pixels / known.images.side**2, sizes.classes * used))
    if method == "anp" or settings.get("replacement"):
        return float(settings["batch_size"])  # drawn with replacement
    size = settings.get("batch_size", sizes.all)
    return sizes.all / math.ceil(sizes.all / size) if sizes.all else 1.0


def sizes_of(known: Facts) -> image_passes.Sizes:
    """Return how many images a defender holds."""
    classes, held = known.images.num_classes, num_validation(known.spc)
    return image_passes.Sizes(classes * (known.spc - held), classes * held, classes)


def num_validation(spc: int) -> int:
    """Return how many of a class's images are for validation, as ``stages.sampling`` says."""
    return max(1, spc // 10) if spc > 1 else 0


def _evaluate(known: Facts, machine: Machine) -> Taken:
    """What a draw takes: clean and triggered test images forward, and the weights from disk."""
    images = known.images
    tested = 2 * images.num_test
    networks = [one for _, one in _networks(known)]
    seconds = max(one.seconds(machine, tested, 0, 512) + one.mb / DISK_MB_PER_S for one in networks)
    memory = PROCESS_MB + 3 * max(one.mb for one in networks) + COPIES * tested * images.mb_each
    metrics_mb = METRICS_MB / NUM_DRAWS if known.stage == "evaluate" else METRICS_MB
    return Taken(0.5 + seconds, 0.5 + seconds, memory, _predictions_mb(images) + metrics_mb, GPU)


def _gather(known: Facts, machine: Machine) -> Taken:
    return Taken(AGGREGATE_S, AGGREGATE_S, AGGREGATE_MB, 0.1, CPU)


def _job(known: Facts, machine: Machine) -> Taken:
    return Taken(JOB_S, JOB_S, JOB_MB, 0, CPU)


STAGES = {
    "dataset": _dataset,
    "sample": _sample,
    "trigger": _trigger,
    "poison": _poison,
    "triggered": _triggered,
    "stamp": _stamp,
    "train": _train,
    "defend": _defend,
    "evaluate": _evaluate,
    "evaluate_untouched": _evaluate,
    "aggregate": _gather,
    "report": _gather,
    "job": _job,
}


def _mb(images: Images) -> tuple[float, float]:
    """Return the size of the training and the test set."""
    return images.num_train * images.mb_each, images.num_test * images.mb_each


def _reading_s(images: Images) -> float:
    return 5 + _mb(images)[0] / DISK_MB_PER_S


def _num_samples(known: Facts) -> int:
    return known.spc * known.images.num_classes


def _stamp_s(attack: str, images: Images) -> float:
    """Return what it takes to trigger an image on one core; the slowest if no attack is named."""
    if not attack:
        return max(_stamp_s(name, images) for name in registry.names("attacks"))
    parts = {"ssba": ["ssba_encoder"], "iab": 2 * ["iab_generator"]}.get(attack, [])
    passed = sum(network(part, images).multiply_adds for part in parts)
    return CPU_STAMP_S + passed / CPU_MULTIPLY_ADDS_PER_S


def _trigger_s(known: Facts, attack: str, machine: Machine) -> float:
    """Return what it takes to learn a trigger; the slowest if no attack or no architecture is named."""
    count = known.images.num_train
    if not attack:
        return max(_trigger_s(known, name, machine) for name in registry.names("attacks"))
    if attack == "ssba":
        presented, parts = SSBA_EPOCHS * count, ("ssba_encoder", "ssba_decoder")
        return sum(network(part, known.images).seconds(machine, presented, presented, 64) for part in parts)
    if attack == "iab":  # each image meets a partner
        presented = 2 * IAB_MASK_EPOCHS * count
        return network("iab_generator", known.images).seconds(machine, presented, presented, 128)
    if attack == "lf":
        return max(one.seconds(machine, LF_PASSES, LF_PASSES, 1) for _, one in _networks(known))
    return 0.0


def _predictions_mb(images: Images) -> float:
    """Return the size of a draw's predictions, a tenth of them wrong, as measured within 10 %."""
    rows = images.num_test * (2 - 1 / images.num_classes)
    return rows * (0.2 + 0.1 * math.log2(images.num_classes)) / 1e6
