"""Measure every defense at its declared settings on the kept model: `python -m tests.unit.pins [METHOD]`.

It rewrites ``pins.json``, which `test_pins.py` holds the code to. In float32 on a CPU, one thread.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from detrojan import registry, rng
from detrojan.learning.meter import meter
from detrojan.study import protocols
from detrojan.study.schema import protocols as declared
from tests.unit.conftest import kept_backdoor

FILE = Path(__file__).with_name("pins.json")
FACTS = {"num_classes": 10, "image_size": 16, "architecture": "preactresnet18", "spc": 10}


def names() -> list[str]:
    """Return each defense with each of its protocols, as ``ft/paper``."""
    return [f"{name}/{protocol}" for name in registry.names("defenses") for protocol in declared(name)]


def measured(name: str) -> dict[str, Any]:
    """Return what a defense leaves of the kept model under a protocol, and what it took."""
    method, _, protocol = name.partition("/")
    backdoored = kept_backdoor()
    sample = dataclasses.replace(backdoored.sample, chosen={})
    if registry.threat_model("defenses", method) != "known_trigger":
        sample = dataclasses.replace(sample, triggered=None)
    defense = registry.load("defenses", method, protocols.settings(method, protocol, FACTS))
    started = time.process_time()  # another job beside it is no matter
    with meter(torch.device("cpu")) as cost:
        repaired = defense(backdoored.model, sample, rng=rng.stream("pins"))
    acc, asr, _ = backdoored.rates(repaired)
    return {
        "acc": round(acc, 4),
        "asr": round(asr, 4),
        "steps": cost.steps,
        "seconds": round(time.process_time() - started, 1),
    }


def main() -> None:
    """Rewrite the pins of the named methods, of all if none is named."""
    torch.set_num_threads(1)
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    pins = {name: pin for name, pin in kept.items() if name in names()}
    for name in names():
        if not sys.argv[1:] or {name, name.partition("/")[0]} & set(sys.argv[1:]):
            pins[name] = measured(name)
            sys.stdout.write(f"{name} {pins[name]}\n")
            FILE.write_text(json.dumps(dict(sorted(pins.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
