"""Shows in eight minutes what no CPU can: that all of it runs on a GPU, how fast, how well, at what cost.

    PYTHONPATH=src python benchmarks/gpu.py --data FOLDER --into gpu-results

It needs no Snakemake and no network: a checkout, torch with CUDA, and numpy, pandas, pyarrow, pillow,
safetensors, pyyaml and pydantic. Without torchvision the networks that come from there are left out.
FOLDER holds a folder of Parquet shards for each data set, ``cifar10`` and ``gtsrb``. The four parts, each
in a file of ``gpu_parts/``, run in the order of their worth and write what they have measured at once; at
the end stands what there was no time for. docs/gpu.md says what to make of the rows.

``--tiny`` tries the check itself, on a CPU: networks, images and settings are cut down, so its numbers
mean nothing.
"""

import time

STARTED = time.monotonic()  # before torch is imported, which is part of the minutes

import argparse
import contextlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells the terminal when it starts

import torch

from detrojan import registry
from detrojan.learning import determinism
from detrojan.learning.meter import device_name
from detrojan.storage import provenance
from gpu_parts import loop, prices, runs, study
from gpu_parts.bench import Bench
from gpu_parts.budget import Budget
from gpu_parts.record import Record
from gpu_parts.summary import summary

# Where each part must end, as a share of the minutes. What one leaves, the next may use.
ENDS = {runs.PART: 1 / 8, loop.PART: 2.5 / 8, study.PART: 6.5 / 8, prices.PART: 0.98}
TINY_ENDS = {runs.PART: 0.4, loop.PART: 0.6, study.PART: 0.85, prices.PART: 0.98}
TINY_MINUTES = 20.0  # a limit that a slow machine keeps too: its work ends long before
FROM_TORCHVISION = ("vgg19_bn", "efficientnet_b3", "mobilenet_v3_large")
# Seconds a step, or seconds to be made. The contract tests have them, VGG a narrow one.
TOO_SLOW_FOR_A_TRIAL = {*FROM_TORCHVISION, "resnet18_small"}  # the last has no width


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 1 if a trial of the first failed."""
    asked = _arguments(arguments)
    logging.basicConfig(level=logging.ERROR)
    minutes = asked.minutes or (TINY_MINUTES if asked.tiny else 8.0)
    device = torch.device("cuda" if torch.cuda.is_available() and not asked.tiny else "cpu")
    if device.type == "cpu" and not asked.tiny:
        sys.exit("benchmarks/gpu.py: torch sees no GPU; --tiny tries the check itself on a CPU")
    determinism.configure(1 if asked.tiny else os.cpu_count() or 1)
    record = Record(asked.into)
    budget = Budget(60 * minutes, STARTED)
    bench = Bench(device, asked.tiny, budget, record, asked.data, _architectures(asked.tiny, record))
    record.add("machine", machine(device, minutes))
    _part(bench, runs.PART, lambda: runs.run(bench))
    _part(bench, loop.PART, lambda: loop.run(bench))
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(study.begun(bench))
        _part(bench, study.PART, lambda: study.run(work))
        _part(bench, prices.PART, lambda: prices.run(work))
        prices.write(work)
    record.parts["machine"][0]["seconds"] = budget.spent
    record.write()
    text = summary(record)
    (asked.into / "summary.txt").write_text(text, encoding="utf-8")
    print(f"\n{text}", end="")
    return int(any(row["status"] == "failed" for row in record.parts.get(runs.PART, [])))


def _part(bench: Bench, name: str, work: Callable[[], object]) -> None:
    """Run a part until its time is over; say how it went in a line."""
    before = bench.budget.spent
    with bench.budget.until((TINY_ENDS if bench.tiny else ENDS)[name]):
        work()
    bench.record.write()
    rows = len(bench.record.parts.get(name, []))
    left = len(bench.record.left_out.get(name, []))
    bench.say(f"{name}: {rows} rows in {bench.budget.spent - before:.0f} s, {left} left out")


def _architectures(tiny: bool, record: Record) -> dict[str, dict[str, Any]]:
    """Return the networks that can be tried here, with their settings, PreAct-ResNet-18 first."""
    found: dict[str, dict[str, Any]] = {study.FIRST: {"width": 4} if tiny else {}}
    for name in registry.names("models"):
        if name in FROM_TORCHVISION and importlib.util.find_spec("torchvision") is None:
            record.leave_out("networks", name, "torchvision is not installed")
        elif tiny and name in TOO_SLOW_FOR_A_TRIAL:
            record.leave_out("networks", name, "too slow on a CPU")
        else:
            found.setdefault(name, {})
    return found


def machine(device: torch.device, minutes: float) -> dict[str, Any]:
    """Return what the rows were measured on, and with."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "git_commit": provenance.git_commit(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "minutes": minutes,
        "seconds": None,
    }


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="how long it may take; 8, or 20 with --tiny")
    parser.add_argument("--data", type=Path, help="folder of the folders cifar10 and gtsrb")
    parser.add_argument("--into", type=Path, default=Path("gpu-results"), help="folder for what is measured")
    parser.add_argument("--tiny", action="store_true", help="try the check itself, on a CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
