"""What all parts of the check are given."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from gpu_parts.budget import Budget
from gpu_parts.record import Record

NO_TIME = "no time was left"


@dataclasses.dataclass
class Bench:
    """One run of the check.

    Attributes:
        device: what is measured.
        tiny: whether it is a trial of the check itself, on a CPU, with networks and numbers cut down.
        budget: the time.
        record: takes what is measured.
        data: folder of the data sets, a folder of Parquet shards each; None to go without.
        architectures: the networks by name, each with its settings.
    """

    device: torch.device
    tiny: bool
    budget: Budget
    record: Record
    data: Path | None
    architectures: dict[str, dict[str, Any]]

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    def say(self, text: str) -> None:
        """Print a line of progress, with the seconds spent."""
        print(f"[{self.budget.spent:4.0f} s] {text}", flush=True)
