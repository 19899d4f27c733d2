"""Part 2, the loop: images a second of training against the bare step, and the kernels of a step."""

from typing import Any

import torch
from torch.autograd import DeviceType

import scenes
import train_step
from detrojan.images import ImageSet
from detrojan.settings import Optimization
from gpu_parts.bench import NO_TIME, Bench
from gpu_parts.budget import OutOfTimeError

PART = "loop"
TURNS = 3
PROBE_STEPS = 4  # before a turn's length is known
TOP = 10
FILL = "Fill"  # in the name of the kernels that fill memory


def run(bench: Bench) -> None:
    """Compare each network in both precisions; on the first also each attack that controls training."""
    batch_size, seconds, most = (8, 0.05, 2) if bench.tiny else (128, 0.6, 200)
    images = train_step.random_images(most * batch_size, scenes.Images()).to(bench.device)
    first = next(iter(bench.architectures))
    wanted = [
        (architecture, attack, bfloat16)
        for attack in train_step.ATTACKS
        for architecture in bench.architectures
        for bfloat16 in ((True, False) if bench.on_gpu else (False,))
        if attack == "badnets" or (architecture == first and bfloat16 == bench.on_gpu)
    ]
    for architecture, attack, bfloat16 in wanted:
        optimization = Optimization(batch_size=batch_size, bfloat16=bfloat16)
        settings = bench.architectures[architecture]
        step = train_step.Step(architecture, settings, attack, 0.1, optimization)
        try:
            with bench.budget.limited():
                row = _row(step, images, seconds, batch_size)
        except OutOfTimeError:
            bench.record.leave_out(PART, f"{attack} on {architecture}, {step.precision}", NO_TIME)
        else:
            bench.record.add(PART, row)


def _row(step: train_step.Step, images: ImageSet, seconds: float, batch_size: int) -> dict[str, Any]:
    """Compare for turns of about so many ``seconds``, then profile."""
    probe = step.bare(images[: PROBE_STEPS * batch_size])
    probe()
    each = train_step.taken(probe, images.device) / min(PROBE_STEPS, len(images) // batch_size)
    steps = max(2, min(len(images) // batch_size, round(seconds / each)))
    bare, loop = train_step.compare(step, images[: steps * batch_size], TURNS)
    row = {
        "architecture": step.architecture,
        "attack": step.attack,
        "precision": step.precision,
        "batch_size": batch_size,
        "bare_images_per_second": bare,
        "loop_images_per_second": loop,
    }
    return row | _kernels(step, images[: PROBE_STEPS * batch_size], batch_size)


def _kernels(step: train_step.Step, images: ImageSet, batch_size: int) -> dict[str, Any]:
    """Return what torch's profiler sees of an epoch: on a CPU its operators, for want of kernels."""
    on_gpu = images.device.type == "cuda"
    work = step.loop(images)
    work()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if on_gpu else [kind.CPU]) as profile:
        train_step.taken(work, images.device)
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profile.key_averages() if event.device_type == where]
    events.sort(key=lambda event: getattr(event, time), reverse=True)
    total = sum(getattr(event, time) for event in events) or 1
    steps = len(images) // batch_size
    return {
        "kernels_a_step": sum(event.count for event in events) / steps,
        "fills_a_step": sum(event.count for event in events if FILL.lower() in event.key.lower()) / steps,
        "busy_ms_a_step": total / steps / 1000,
        "top_ten_share": sum(getattr(event, time) for event in events[:TOP]) / total,
        "top_ten": [[event.key[:100], getattr(event, time) / total] for event in events[:TOP]],
    }
