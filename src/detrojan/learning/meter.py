"""What a method costs: seconds, peak memory, images through the network, optimizer steps."""

import contextlib
import contextvars
import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from detrojan.models import Classifier

_RUNNING: contextvars.ContextVar["Cost | None"] = contextvars.ContextVar("running", default=None)


@dataclasses.dataclass
class Cost:
    """Cost of a stretch of work.

    Attributes:
        seconds: wall time.
        peak_memory_bytes: highest memory on the GPU that tensors took; on a CPU, the highest
            resident memory of the process, its libraries included.
        forward_passes: images that went through the whole network (one image is one pass).
        backward_passes: images whose gradient went back through the network's output.
        steps: of optimizers, in all phases of the method.
        step_images: images of all those steps together.
        device: what it ran on, such as ``cpu`` or a GPU's name.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0
    forward_passes: int = 0
    backward_passes: int = 0
    steps: int = 0
    step_images: int = 0
    device: str = "cpu"


@contextlib.contextmanager
def meter(device: torch.device) -> Iterator[Cost]:
    """Yield a cost that is filled in while the block runs, whatever copies of a classifier it uses."""
    cost = Cost(device=device_name(device))

    def count(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(module, Classifier):
            cost.forward_passes += len(output)
            if output.requires_grad:
                output.register_hook(count_backward)

    def count_backward(gradient: Tensor) -> None:
        cost.backward_passes += len(gradient)

    handle = register_module_forward_hook(count)
    token = _RUNNING.set(cost)
    _reset_peak(device)
    started = time.monotonic()
    try:
        yield cost
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        cost.seconds = time.monotonic() - started
        cost.peak_memory_bytes = _peak(device)
        handle.remove()
        _RUNNING.reset(token)


def count_step(images: int) -> None:
    """Count an optimizer step on so many images in the cost that is being metered, if one is."""
    if cost := _RUNNING.get():
        cost.steps += 1
        cost.step_images += images


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux forgets the process's peak when 5 is written here. Where that is refused, the peak
        # is the whole job's, as it is everywhere else.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
