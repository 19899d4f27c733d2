"""Measure every defense at its declared settings on kept models: `python -m tests.unit.pins [NAME]`.

A name is an attack, a defense, a protocol, or some of these, as ``badnets/ft/paper`` or ``bpp/ft``. It
rewrites ``pins.json``, which `test_pins.py` holds the code to. In float32 on a CPU, one thread.
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
from tests.unit.conftest import KEPT, kept_backdoor

FILE = Path(__file__).with_name("pins.json")
FACTS = {"num_classes": 10, "image_size": 16, "architecture": "preactresnet18", "spc": 10}


def names() -> list[str]:
    """Return each kept model's attack with each defense and protocol, as ``badnets/ft/paper``."""
    return [
        f"{attack}/{name}/{protocol}"
        for attack in KEPT
        for name in registry.names("defenses")
        for protocol in declared(name)
    ]


def measured(name: str) -> dict[str, Any]:
    """Return what a defense leaves of a kept model under a protocol, and what it took."""
    attack, method, protocol = name.split("/")
    backdoored = kept_backdoor(attack)
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
    """Rewrite the pins that are named, all if none is."""
    torch.set_num_threads(1)
    asked = [set(argument.split("/")) for argument in sys.argv[1:]]
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    pins = {name: pin for name, pin in kept.items() if name in names()}
    for name in names():
        if not asked or any(parts <= set(name.split("/")) for parts in asked):
            pins[name] = measured(name)
            sys.stdout.write(f"{name} {pins[name]}\n")
            FILE.write_text(json.dumps(dict(sorted(pins.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
