"""Measures what planning a study and starting its jobs costs, and writes what the table of costs assumes.

    python benchmarks/plan.py planning       # dry runs of studies of 1,000 to 60,000 jobs, and of the survey
    python benchmarks/plan.py overhead       # what Snakemake and SLURM take for each job that does nothing
    python benchmarks/plan.py starts         # studies with forked jobs, and with jobs that start anew
    python benchmarks/plan.py predictions    # size of the predictions of a shard
    python benchmarks/plan.py aggregation    # what the tables of so many shards take
    python benchmarks/plan.py assume         # the assumed rows of slurm/costs.csv, from multiply-adds

docs/scale.md has what they print. Processor seconds are user and system time of all processes; on a shared
machine trust them, not the wall clock. ``assume`` leaves rows that were measured as they are.
"""

import argparse
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detrojan import registry
from detrojan.cells import SURVEY
from detrojan.commands import plan
from detrojan.settings import Optimization
from detrojan.study.files import load_study
from detrojan.study.schema import PROTOCOLS, Axis, protocols, shipped
from detrojan.workflow import job_costs
from detrojan.workflow.fork_server import SWITCH
from detrojan.workflow.job_costs import Costs, Estimate, Key, Row
from equal_tables import differences

ROOT = Path(__file__).parents[1]


class Taken(NamedTuple):
    """What a command took; memory is that of its largest process, MB of 10^6 bytes."""

    wall: float
    cpu: float
    peak_mb: float

    def __str__(self) -> str:
        return f"{self.wall:8.1f} {self.cpu:8.1f} {self.peak_mb:8.0f}"


HEADS = f"{'wall, s':>8} {'CPU, s':>8} {'peak, MB':>8}"


def run(command: Sequence[str], folder: Path) -> Taken:
    """Run a command, which must end well, in ``folder``."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\n{said.read()[-3000:]}")
    kilo = 1 if sys.platform == "darwin" else 1024
    return Taken(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * kilo / 1e6)


def snakemake(*arguments: str | Path) -> list[str]:
    """Return the command that runs Snakemake."""
    return [sys.executable, "-m", "snakemake", *map(str, arguments)]


# --- planning --------------------------------------------------------------------------------------

# On digits, which need no data: seven models a seed, each with all defenses at two SPC.
DIGITS = {
    "datasets": {"digits": {"source": "digits", "image_size": 32, "held_out": 0.1}},
    "pool": "held_out",
    "grid": {
        "datasets": ["digits"],
        "architectures": ["preactresnet18"],
        "attacks": ["none", "badnets", "blended"],
        "ratios": [0.01, 0.05, 0.1],
        "defenses": ["none", *registry.names("defenses")],
        "spc": [2, 10],
        "draws": ["0-9"],
    },
}


def planning(arguments: argparse.Namespace) -> None:
    """Print what dry runs take."""
    print(f"{'study':<24} {'jobs':>7} {HEADS}")
    for wanted in arguments.jobs:
        raw = digits_study(wanted)
        _dry_run(f"digits, {len(raw['grid']['seeds'])} seeds", raw)
    survey = yaml.safe_load((ROOT / "config" / "survey.yaml").read_text())
    for dataset in survey["datasets"].values():
        dataset["download"] = True  # a dry run then goes without the images
    _dry_run("config/survey.yaml", survey)
    if shutil.which("sbatch"):
        _dry_run("  with --profile slurm", survey, "--profile", ROOT / "slurm")


def digits_study(num_jobs: int) -> dict[str, Any]:
    """Return a study of about ``num_jobs`` jobs."""

    def study(num_seeds: int) -> dict[str, Any]:
        return DIGITS | {"grid": DIGITS["grid"] | {"seeds": list(range(num_seeds))}}  # type: ignore[operator]

    return study(max(1, round(num_jobs / (_num_jobs(study(2)) - _num_jobs(study(1))))))


def _num_jobs(raw: dict[str, Any]) -> int:
    return sum(plan.count_jobs(load_study(raw)).values())


def _dry_run(title: str, raw: dict[str, Any], *options: str | Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "study.yaml").write_text(yaml.safe_dump(raw))
        command = snakemake("--snakefile", ROOT / "Snakefile", "--configfile", "study.yaml", *options)
        taken = run([*command, "--dry-run", "--quiet", "rules"], Path(folder))
    print(f"{title:<24} {_num_jobs(raw):>7,} {taken}", flush=True)


# --- what starting Python for each job costs --------------------------------------------------------


def starts(arguments: argparse.Namespace) -> None:
    """Print what whole studies take with forked jobs and with jobs that start anew; compare their tables."""
    print(f"{'study':<24} {'jobs':>9} {HEADS}")
    for study in arguments.studies:
        with tempfile.TemporaryDirectory() as folder:
            results = []
            for jobs, switch in (("forked", "1"), ("anew", "0")):
                place = Path(folder, jobs)
                place.mkdir()
                options = ("--profile", ROOT / "local", "--cores", "2", "--configfile", study.resolve())
                command = snakemake("--snakefile", ROOT / "Snakefile", *options)
                taken = run(["env", f"{SWITCH}={switch}", *command], place)
                results.append(place / "results")
                print(f"{study.name:<24} {jobs:>9} {taken}", flush=True)
            print("\n".join(differences(*results)) or "  equal tables")


# --- what a job costs that does nothing ------------------------------------------------------------

TOY = """
rule all:
    input:
        expand("out/{{number}}.txt", number=range({jobs})),


rule job:
    output:
        "out/{{number}}.txt",
    log:
        "logs/{{number}}.log",
    {directive}
"""
DIRECTIVES = {
    "shell": 'shell:\n        "touch {output}"',
    "script": 'script:\n        "job.py"',
}


def overhead(arguments: argparse.Namespace) -> None:
    """Print what trivial jobs take, each."""
    heads = f"{'wall, s':>8} {'CPU, s':>8} {'wall/job, s':>12} {'CPU/job, s':>12}"
    print(f"{'where':<8} {'job':<8} {'jobs':>6} {heads}")
    for name in DIRECTIVES:
        _overhead("local", name, arguments.jobs, [*_local(), "--cores", str(arguments.cores)])
    if not _slurm_works():
        print("slurm    skipped: no SLURM answers (sinfo)")
        return
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    at_once = ["--jobs", str(arguments.slurm_at_once)]
    _overhead("slurm", "script", arguments.slurm_jobs, [*_slurm(), *at_once])
    jobs = _accounted(started)
    for title, each in (("elapsed", [job[0] for job in jobs]), ("CPU", [job[1] for job in jobs])):
        print(f"slurm's own account of {len(jobs)} jobs: {title} {sum(each) / len(jobs):.1f} s a job")


def _overhead(place: str, name: str, jobs: int, options: Sequence[str]) -> None:
    nothing, taken = (_toy(name, count, options) for count in (0, jobs))
    wall, cpu = ((after - before) / jobs for after, before in zip(taken[:2], nothing[:2], strict=True))
    # On a cluster this is the driver's share: what jobs take there is no child's of it.
    print(
        f"{place:<8} {name:<8} {jobs:>6} {taken.wall:8.1f} {taken.cpu:8.1f} {wall:12.3f} {cpu:12.3f}",
        flush=True,
    )


def _accounted(started: str) -> list[tuple[float, float]]:
    """Return elapsed and processor seconds of this user's SLURM jobs since ``started``."""
    time.sleep(10)  # the account lags behind
    asked = ["sacct", "--noheader", "--parsable2", "--starttime", started, "-o", "JobID,ElapsedRaw,TotalCPU"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    elapsed: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for name, seconds, clock in (line.split("|") for line in done.stdout.splitlines()):
        job, _, step = name.partition(".")
        if step:  # only steps have processor time in every SLURM
            cpu[job] = cpu.get(job, 0.0) + _seconds(clock)
        else:
            elapsed[job] = float(seconds)
    return [(elapsed[job], cpu.get(job, 0.0)) for job in elapsed]


def _seconds(clock: str) -> float:
    """Return the seconds that SLURM writes as ``[[days-]hours:]minutes:seconds``."""
    days, _, rest = clock.rpartition("-")
    parts = [float(part) for part in rest.split(":")]
    return 86_400 * int(days or 0) + sum(part * 60**place for place, part in enumerate(reversed(parts)))


def _local() -> list[str]:
    """Return the options of the local profile."""
    return ["--profile", str(ROOT / "local")]


def _slurm() -> list[str]:
    """Return the options of the SLURM profile, with an early look at jobs that are over at once."""
    early = ["--slurm-init-seconds-before-status-checks", "1", "--max-status-checks-per-second", "1"]
    return ["--profile", str(ROOT / "slurm"), *early]


def _slurm_works() -> bool:
    if not shutil.which("sbatch"):
        return False
    return subprocess.run(["sinfo"], capture_output=True, check=False, timeout=60).returncode == 0


def _toy(name: str, jobs: int, options: Sequence[str]) -> Taken:
    # Below the working directory: a cluster's nodes share that, and not /tmp.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        Path(folder, "Snakefile").write_text(TOY.format(jobs=jobs, directive=DIRECTIVES[name]))
        Path(folder, "job.py").write_text('open(snakemake.output[0], "w").close()\n')
        return run(snakemake(*options), Path(folder))


# --- sizes of what shards leave --------------------------------------------------------------------


class Images(NamedTuple):
    """A data set, as its authors publish it, and the side to which the survey scales it."""

    num_classes: int
    num_train: int
    num_test: int
    side: int

    @property
    def mb_each(self) -> float:
        """Size of an image, 8 bits a channel."""
        return 3 * self.side**2 / 1e6


DATASETS = {
    "cifar10": Images(10, 50_000, 10_000, 32),
    "gtsrb": Images(43, 39_209, 12_630, 32),
    "tiny_imagenet": Images(200, 100_000, 10_000, 64),
}
NUM_DRAWS = 10


def predictions(arguments: argparse.Namespace) -> None:
    """Print how large the predictions of a shard of ten draws are."""
    print(f"{'data set':<16} {'ACC':>6} {'ASR':>6} {'rows':>10} {'bytes':>9} {'bytes/row':>10}")
    for name, images in DATASETS.items():
        for acc, asr in ((0.9, 0.1), (0.9, 0.9), (0.5, 0.1)):
            rows, size = _predictions_size(images, acc, asr)
            print(f"{name:<16} {acc:6.0%} {asr:6.0%} {rows:10,} {size:9,} {size / rows:10.2f}")


def _predictions_size(images: Images, acc: float, asr: float) -> tuple[int, int]:
    """Write predictions of random errors, each draw's on its own; return their rows and bytes."""
    import numpy as np
    import pyarrow as pa

    from detrojan.storage import records
    from detrojan.storage.columns import PREDICTIONS

    rng = np.random.default_rng(0)
    labels = rng.integers(0, images.num_classes, images.num_test)
    others = np.flatnonzero(labels != 0)

    def guessed(true: Any) -> Any:
        return np.where(rng.random(len(true)) < acc, true, rng.integers(0, images.num_classes, len(true)))

    tables = []
    for draw in range(NUM_DRAWS):
        clean, stamped = guessed(labels), guessed(labels[others])
        stamped = np.where(rng.random(len(others)) < asr, 0, stamped)
        for index, predicted, triggered in ((np.arange(len(labels)), clean, False), (others, stamped, True)):
            columns = [np.full(len(index), draw), np.full(len(index), triggered), index, predicted]
            tables.append(pa.table(columns, PREDICTIONS.names).cast(PREDICTIONS))
    table = pa.concat_tables(tables)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "predictions.parquet")
        records.write_predictions(table, file)
        return len(table), file.stat().st_size


# --- what the tables take ---------------------------------------------------------------------------


def aggregation(arguments: argparse.Namespace) -> None:
    """Print what gathering the metrics of so many shards of ten draws takes."""
    print(f"{'shards':>8} {'cells':>9} {HEADS} {'CPU/1,000 shards, s':>20}")
    for shards in arguments.shards:
        with tempfile.TemporaryDirectory() as folder:
            _write_metrics(Path(folder), shards)
            taken = run([sys.executable, __file__, "gather", folder], Path(folder))
        per_thousand = 1000 * taken.cpu / shards
        print(f"{shards:>8,} {shards * NUM_DRAWS:>9,} {taken} {per_thousand:>20.1f}", flush=True)


def _write_metrics(folder: Path, shards: int) -> None:
    from detrojan.analysis.statistics.collect import NOTHING_MEASURED
    from detrojan.cells import Draws, Model, Shard
    from detrojan.storage import provenance, records
    from detrojan.storage.columns import METRICS, cell_key

    origin = provenance.origin("0" * 16)
    names = registry.names("defenses")
    for number in range(shards):
        model = Model("digits", "preactresnet18", "badnets", 0.1, number // len(names))
        shard = Shard(model, names[number % len(names)], 10, Draws(0, NUM_DRAWS - 1))
        rows = [
            NOTHING_MEASURED
            | cell_key(shard, draw)
            | {"status": "ok", "reason": None, "acc": 0.9, "asr": 0.01 * draw, "ra": 0.8}
            | origin
            for draw in range(NUM_DRAWS)
        ]
        records.write_rows(rows, folder / f"{number}.parquet", METRICS)


def gather(arguments: argparse.Namespace) -> None:
    """Make the table of cells and those that follow from it, as the rule ``aggregate`` does."""
    import pyarrow as pa

    from detrojan.analysis import derived
    from detrojan.analysis.statistics import collect
    from detrojan.storage import records

    cells = collect.cells({path: {} for path in sorted(arguments.folder.glob("*.parquet"))})
    models = pa.Table.from_pylist([], schema=collect.MODELS)
    cells = collect.completed(cells, models)
    records.write_table(cells, arguments.folder / "cells.table", collect.CELLS)
    given = {"cells": cells, "models": models}
    derived.write(given, {name: arguments.folder / f"{name}.table" for name in derived.TABLES})


# --- what the table of costs assumes ----------------------------------------------------------------
#
# One data-centre GPU, an A100. PreAct-ResNet-18 takes 555 million multiply-adds for an image of 32 pixels,
# so these figures mean that it passes 10,000 images a second forward in 32 bits (TensorFloat-32
# convolutions, 7 % of the GPU's peak) and 20,000 in bfloat16. Small batches wait for launched kernels.

DEVICE = "A100"
MULTIPLY_ADDS_PER_S = 5.55e12
BFLOAT16_GAIN = 2
BACKWARD = 2  # passes forward that a backward pass is worth
LAUNCH_S = 40e-6  # for a module's kernels, forward
WEIGHTS_PER_S = 75e9  # read and written five times by a step, 4 bytes each, at 1.5 TB/s
DRAW_S = 1.0  # to copy a model and note what was done
DISK_MB_PER_S = 500
CPU_MULTIPLY_ADDS_PER_S = 1e10  # of one core
CPU_IMAGE_S = 2e-3  # to decode and scale one image
CPU_STAMP_S = 1e-4  # to trigger one image, without a network
JOB_S = 20  # 5 for Snakemake's two starts, measured; then torch and the GPU
JOB_MB = 350  # of Snakemake's processes, measured
PROCESS_MB, CPU_PROCESS_MB = 3000, 700  # with torch and, on a GPU, its libraries
COPIES = 3  # of a data set while it is read
AGGREGATE_S, AGGREGATE_MB = 20.0, 2000.0  # for a thousand shards, 20 ms a file; for all of the survey

OTHER_DATASET = "gtsrb"  # a data set that has no row is taken for one of its size
OTHER_DEFENSE = "sau"  # and a defense for one of the slower
SPCS = (2, 10, 100)
SSBA_EPOCHS, IAB_MASK_EPOCHS = 20, 25
LF_PASSES = 50 * 100 * 10  # passes over its images, images, DeepFool steps
CPU = "cpu"


class Network(NamedTuple):
    """What a pass of one image takes."""

    multiply_adds: float
    calls: int  # modules that run
    weights: int
    mb: float  # all that is saved

    def seconds(self, forward: float, backward: float, batch: float, gain: float = 1) -> float:
        """Return what so many image passes take in batches of ``batch``; ``gain`` in arithmetic."""
        arithmetic = batch * self.multiply_adds / (gain * MULTIPLY_ADDS_PER_S)
        step = max(arithmetic, self.calls * LAUNCH_S)
        return (forward * step + backward * (BACKWARD * step + self.weights / WEIGHTS_PER_S)) / batch


def measured_network(module: Any, *inputs: Any) -> Network:
    """Return what a pass through a module takes, counted while it passes one image."""
    from torch import Tensor, nn

    counts = {"multiply_adds": 0, "calls": 0}

    def count(layer: nn.Module, _inputs: Any, output: Any) -> None:
        counts["calls"] += 1
        if isinstance(layer, nn.Conv2d):
            rows = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
            counts["multiply_adds"] += output.numel() * rows
        elif isinstance(layer, nn.Linear):
            counts["multiply_adds"] += output.numel() * layer.in_features

    for layer in module.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    output = module.eval()(*inputs)
    assert isinstance(output, Tensor)
    size = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    return Network(**counts, weights=sum(p.numel() for p in module.parameters()), mb=size / 1e6)


@functools.cache
def surveyed(kind: registry.Kind) -> list[str]:
    """Return the methods of the survey's grid, which have rows; any other has that of no name."""
    grid = yaml.safe_load((ROOT / "config" / "survey.yaml").read_text())["grid"]
    return sorted(set(grid["architectures" if kind == "models" else kind]) - {"none"})


class Assumptions:
    """Makes the rows: what each stage takes, for each data set, network and method that a row is for."""

    def __init__(self) -> None:
        import torch
        from torch import nn

        from detrojan import models
        from detrojan.attacks.data_poisoning import ssba
        from detrojan.attacks.training_control import iab

        self.rows: dict[Key, Row] = {}
        self.networks: dict[tuple[str, str], Network] = {}
        self.encoders: dict[str, Network] = {}
        self.decoders: dict[str, Network] = {}
        self.generators: dict[str, Network] = {}
        self.predictions_mb: dict[str, float] = {}
        for name, images in DATASETS.items():
            with torch.device("meta"):  # shapes alone: nothing is computed
                pixels = torch.empty(1, 3, images.side, images.side)
                for architecture in surveyed("models"):
                    build = models.Build(architecture, {}, images.num_classes, (0.5,) * 3, (0.25,) * 3)
                    self.networks[architecture, name] = measured_network(models.build(build), pixels)
                self.encoders[name] = measured_network(ssba.Encoder(1), torch.empty(1, 1), pixels)
                self.decoders[name] = measured_network(ssba.Decoder(1, images.side, images.side), pixels)
                self.generators[name] = measured_network(nn.Sequential(iab.Generator(3)), pixels)
            _, size = _predictions_size(images, acc=0.9, asr=0.1)
            self.predictions_mb[name] = size / NUM_DRAWS / 1e6
        for name in (*DATASETS, ""):
            self._before(name)
            self._train(name)
            for protocol in PROTOCOLS:
                self._defend(name, protocol)
            self._evaluate(name)
        for rule in ("aggregate", "report"):
            self._add(Key(rule), AGGREGATE_S, AGGREGATE_MB, 0.1, CPU)
        self._add(Key("job"), JOB_S, JOB_MB, 0, CPU)

    def _add(self, key: Key, seconds: float, memory_mb: float, disk_mb: float, device: str = DEVICE) -> None:
        """Add a row. Its seconds get two digits: an assumption has no more."""
        estimate = Estimate(float(f"{seconds:.2g}"), float(f"{memory_mb:.2g}"), float(f"{disk_mb:.3g}"))
        self.rows[key] = Row(key, estimate, device, job_costs.ASSUMED)

    def _before(self, dataset: str) -> None:
        """Add what comes before training: data set, samples, triggers and what is stamped with them."""
        known = dataset or OTHER_DATASET
        images = DATASETS[known]
        train_mb, test_mb = (count * images.mb_each for count in (images.num_train, images.num_test))
        memory = CPU_PROCESS_MB + COPIES * train_mb
        area = (images.side / 32) ** 2
        seconds = (images.num_train + images.num_test) * CPU_IMAGE_S * area
        self._add(
            Key("dataset", dataset=dataset), seconds, memory + COPIES * test_mb, train_mb + test_mb, CPU
        )
        reading = 5 + train_mb / DISK_MB_PER_S
        for attack in (*surveyed("attacks"), ""):
            stamp_s = self._stamp_s(attack, known)
            poisoning = images.num_train * stamp_s + reading
            self._add(Key("poison", attack, dataset=dataset), poisoning, memory, train_mb, CPU)
            triggering, triggered_memory = (
                images.num_test * stamp_s + 5,
                CPU_PROCESS_MB + 2 * COPIES * test_mb,
            )
            self._add(Key("triggered", attack, dataset=dataset), triggering, triggered_memory, test_mb, CPU)
            for spc, sample in self._samples(known):
                key = Key("stamp", attack, dataset=dataset, spc=spc)
                sample_memory = CPU_PROCESS_MB + 2 * COPIES * NUM_DRAWS * sample * images.mb_each
                self._add(key, DRAW_S + sample * stamp_s, sample_memory, sample * images.mb_each, CPU)
            for architecture in (*surveyed("models"), "") if attack == "lf" else ("",):
                learning = self._trigger_s(attack, architecture, known) + reading
                gpu_memory = PROCESS_MB + COPIES * train_mb
                self._add(Key("trigger", attack, architecture, dataset), learning, gpu_memory, 5)
        for spc, sample in self._samples(known):
            key = Key("sample", dataset=dataset, spc=spc)
            self._add(key, DRAW_S + reading / NUM_DRAWS, memory, sample * images.mb_each, CPU)

    def _samples(self, dataset: str) -> Iterator[tuple[int | None, int]]:
        """Yield each SPC of a row, the largest as none, and how many images a draw of it has."""
        for spc in SPCS:
            yield None if spc == SPCS[-1] else spc, spc * DATASETS[dataset].num_classes

    def _stamp_s(self, attack: str, dataset: str) -> float:
        """Return what it takes to trigger an image on one core; the slowest if no attack is named."""
        if not attack:
            return max(self._stamp_s(name, dataset) for name in surveyed("attacks"))
        networks = {"ssba": [self.encoders[dataset]], "iab": 2 * [self.generators[dataset]]}
        passed = sum(network.multiply_adds for network in networks.get(attack, ()))
        return CPU_STAMP_S + passed / CPU_MULTIPLY_ADDS_PER_S

    def _trigger_s(self, attack: str, architecture: str, dataset: str) -> float:
        """Return what it takes to learn a trigger; the slowest if no attack or no architecture is named."""
        count = DATASETS[dataset].num_train
        if attack == "ssba":
            presented, networks = SSBA_EPOCHS * count, (self.encoders[dataset], self.decoders[dataset])
            return sum(network.seconds(presented, presented, 64) for network in networks)
        if attack == "iab":  # each image meets a partner
            presented = 2 * IAB_MASK_EPOCHS * count
            return self.generators[dataset].seconds(presented, presented, 128)
        if attack == "lf":
            names = [architecture] if architecture else surveyed("models")
            return max(self.networks[name, dataset].seconds(LF_PASSES, LF_PASSES, 1) for name in names)
        if attack:
            return 0.0
        return max(self._trigger_s(name, architecture, dataset) for name in surveyed("attacks"))

    def _train(self, dataset: str) -> None:
        """Add what an epoch takes, with the generators of IAB and without."""
        known = dataset or OTHER_DATASET
        images, batch = DATASETS[known], Optimization().batch_size
        count = images.num_train
        # Of each batch a tenth is triggered and a tenth gets another image's pattern.
        generators = self.generators[known].seconds(0.4 * count, 0.2 * count, 0.2 * batch, BFLOAT16_GAIN)
        for attack, more in (("", 0.0), ("iab", generators)):
            for architecture, network in self._networks(known):
                taken = max(n.seconds(count, count, batch, BFLOAT16_GAIN) for n in network)
                size = max(n.mb for n in network)
                memory = PROCESS_MB + 4 * size + COPIES * count * images.mb_each
                self._add(Key("train", attack, architecture, dataset), taken + more, memory, size)

    def _networks(self, dataset: str) -> Iterator[tuple[str, list[Network]]]:
        """Yield each architecture and its network; at last all of them, for one that is not named."""
        names = surveyed("models")
        for name in names:
            yield name, [self.networks[name, dataset]]
        yield "", [self.networks[name, dataset] for name in names]

    def _defend(self, dataset: str, protocol: str) -> None:
        """Add what a draw takes under a protocol; what has no row of its own takes what ``survey`` takes."""
        known = dataset or OTHER_DATASET
        for defense in (*surveyed("defenses"), *([""] if protocol == SURVEY else [])):
            method = defense or OTHER_DEFENSE
            if protocol not in protocols(method):
                continue
            for architecture, networks in self._networks(known):
                names = [architecture] if architecture else surveyed("models")
                for spc, sample in self._samples(known):
                    if spc and registry.threat_model("defenses", method) == "data_free":
                        continue
                    key = Key("defend", defense, architecture, dataset, spc, protocol * (protocol != SURVEY))
                    taken = max(
                        self._defend_s(method, name, known, spc or SPCS[-1], protocol) for name in names
                    )
                    size = max(network.mb for network in networks)
                    copies = (
                        2 * COPIES if registry.threat_model("defenses", method) == "known_trigger" else COPIES
                    )
                    given = NUM_DRAWS * sample * DATASETS[known].mb_each
                    self._add(key, taken, PROCESS_MB + 4 * size + copies * given, size)

    def _defend_s(self, method: str, architecture: str, dataset: str, spc: int, protocol: str) -> float:
        """Return what a draw takes, by the image passes that the method should need, at most."""
        import defenses  # beside this file
        from detrojan.defenses._parts.inversion import PIXELS, TriggerInversion
        from detrojan.stages.sampling import num_validation

        images, network = DATASETS[dataset], self.networks[architecture, dataset]
        facts: dict[str, Axis] = {"architecture": architecture, "spc": spc}
        facts |= {"num_classes": images.num_classes, "image_size": images.side}
        settings = shipped("defenses", method, protocol).resolve(facts)
        defense = registry.load("defenses", method, settings)
        classes, held = images.num_classes, num_validation(spc)
        sizes = defenses.Sizes(classes * (spc - held), classes * held, classes)
        passes = defenses.prediction(method, sizes, defense)
        if isinstance(defense, TriggerInversion):
            batch = PIXELS / images.side**2  # of the search, which is nearly all of it
        elif method == "anp" or getattr(defense, "replacement", False):
            batch = defense.batch_size  # drawn with replacement
        else:
            size = getattr(defense, "batch_size", sizes.all)
            batch = sizes.all / math.ceil(sizes.all / size)
        return DRAW_S + network.mb / DISK_MB_PER_S + network.seconds(passes.forward, passes.backward, batch)

    def _evaluate(self, dataset: str) -> None:
        known = dataset or OTHER_DATASET
        images = DATASETS[known]
        tested = 2 * images.num_test  # clean and triggered
        for architecture, networks in self._networks(known):
            taken = max(n.seconds(tested, 0, 512) + n.mb / DISK_MB_PER_S for n in networks)
            memory = PROCESS_MB + 3 * max(n.mb for n in networks) + COPIES * tested * images.mb_each
            metrics_mb = 0.01
            for rule, more in (("evaluate", metrics_mb / NUM_DRAWS), ("evaluate_untouched", metrics_mb)):
                key = Key(rule, "", architecture, dataset)
                self._add(key, 0.5 + taken, memory, self.predictions_mb[known] + more)


def assume(arguments: argparse.Namespace) -> None:
    """Write the assumed rows of the table of costs; leave what was measured."""
    try:
        measured = {row.key: row for row in Costs.load(arguments.table).rows.values() if row.measured}
    except ValueError:
        measured = {}
    rows = Assumptions().rows | measured
    Costs(rows.values(), arguments.table).write()
    print(f"{arguments.table}: {len(rows):,} rows, of which {len(measured):,} are measured")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(name: str, does: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=(does.__doc__ or "").splitlines()[0])
        added.set_defaults(does=does)
        return added

    numbers = command("planning", planning)
    numbers.add_argument("--jobs", nargs="*", type=int, default=[1000, 10_000, 30_000, 60_000], metavar="N")
    command("starts", starts).add_argument(
        "studies",
        nargs="*",
        type=Path,
        default=[ROOT / "config" / name for name in ("config.yaml", "smoke.yaml")],
    )
    toys = command("overhead", overhead)
    toys.add_argument("--jobs", type=int, default=200)
    toys.add_argument("--slurm-jobs", type=int, default=200)
    toys.add_argument("--slurm-at-once", type=int, default=500, help="as jobs in slurm/config.yaml")
    toys.add_argument("--cores", type=int, default=2)
    command("predictions", predictions)
    command("aggregation", aggregation).add_argument("--shards", nargs="+", type=int, default=[1000, 4000])
    command("gather", gather).add_argument("folder", type=Path)
    command("assume", assume).add_argument("--table", type=Path, default=job_costs.TABLE)
    return parser.parse_args()


def main() -> None:
    """Run the command that was asked for."""
    arguments = _arguments()
    arguments.does(arguments)


if __name__ == "__main__":
    main()
