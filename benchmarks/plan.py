"""Measures what planning a study and starting its jobs costs, and counts what a pass of a network takes.

    python benchmarks/plan.py planning       # dry runs of studies of 1,000 to 60,000 jobs, and of the survey
    python benchmarks/plan.py overhead       # what Snakemake and SLURM take for each job that does nothing
    python benchmarks/plan.py starts         # studies with forked jobs, and with jobs that start anew
    python benchmarks/plan.py predictions    # size of the predictions of a shard
    python benchmarks/plan.py aggregation    # what the tables of so many shards take
    python benchmarks/plan.py networks       # slurm/networks.csv: what a pass of each network takes

docs/scale.md has what they print. Processor seconds are user and system time of all processes; on a shared
machine trust them, not the wall clock.
"""

import argparse
import csv
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detrojan import registry
from detrojan.commands import plan
from detrojan.study.files import load_study
from detrojan.workflow.cost_formula import (
    DATASETS,
    NETWORK_COLUMNS,
    NETWORKS,
    NUM_DRAWS,
    Counted,
    Images,
    Network,
    counted,
)
from detrojan.workflow.fork_server import SWITCH
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


# --- what the formula of costs knows of networks ----------------------------------------------------

ARCHITECTURES = ("preactresnet18", "vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")


def measured_network(module: Any, *inputs: Any) -> Network:
    """Return what a pass through a module takes, counted while it passes one image."""
    from torch import Tensor, nn

    counts = {"multiply_adds": 0, "modules": 0}

    def count(layer: nn.Module, _inputs: Any, output: Any) -> None:
        counts["modules"] += 1
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


def counted_networks(datasets: Iterable[str] = DATASETS) -> Iterator[Counted]:
    """Yield what a pass takes of each network of the survey, and of the parts of attacks, by data set."""
    import torch
    from torch import nn

    from detrojan import models
    from detrojan.attacks.data_poisoning import ssba
    from detrojan.attacks.training_control import iab

    for images in map(DATASETS.__getitem__, datasets):
        side, classes = images.side, images.num_classes
        with torch.device("meta"):  # shapes alone: nothing is computed
            pixels = torch.empty(1, 3, side, side)
            for architecture in ARCHITECTURES:
                build = models.Build(architecture, {}, classes, (0.5,) * 3, (0.25,) * 3)
                yield Counted(architecture, side, classes, measured_network(models.build(build), pixels))
            parts = {
                "ssba_encoder": measured_network(ssba.Encoder(1), torch.empty(1, 1), pixels),
                "ssba_decoder": measured_network(ssba.Decoder(1, side, side), pixels),
                "iab_generator": measured_network(nn.Sequential(iab.Generator(3)), pixels),
            }
        for name, part in parts.items():
            yield Counted(name, side, classes, part)


def networks_text() -> str:
    """Return the table of networks, in the order of their names."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(NETWORK_COLUMNS)
    for row in sorted(counted_networks(), key=lambda row: row[:3]):
        multiply_adds, modules, weights, mb = row.taken
        writer.writerow([*row[:3], int(multiply_adds), int(modules), int(weights), f"{mb:.6g}"])
    return file.getvalue()


def networks(arguments: argparse.Namespace) -> None:
    """Write what a pass takes of each network: multiply-adds, modules, weights, MB."""
    arguments.table.write_text(networks_text(), encoding="utf-8")
    print(f"{arguments.table}: {len(counted()):,} rows")


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
    command("networks", networks).add_argument("--table", type=Path, default=NETWORKS)
    return parser.parse_args()


def main() -> None:
    """Run the command that was asked for."""
    arguments = _arguments()
    arguments.does(arguments)


if __name__ == "__main__":
    main()
