"""Prints what separates the survey from a thousand GPU-hours: the hours after each measure in turn.

    python benchmarks/waterfall.py                       # config/survey.yaml
    python benchmarks/waterfall.py my-study.yaml

Hours are of defending alone, by the formula of ``detrojan plan``. A measure changes settings of the study,
or one constant of the machine; it stays for all that follow. The column ``state`` says which of them hold as
it is, which change results and must be asked for, and which nobody has built yet. Nothing here was
measured on a GPU.
"""

import argparse
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detrojan.commands import plan
from detrojan.study.files import load_study, read
from detrojan.study.schema import Study
from detrojan.workflow import graph
from detrojan.workflow.cost_formula import ASSUMED, H100, Machine
from detrojan.workflow.job_costs import Costs, Row

SURVEY = Path(__file__).parents[1] / "config" / "survey.yaml"
SEARCHING = ("nc", "grad_prune_inverted")
PRUNING = ("grad_prune", "grad_prune_inverted")
FEWER = {"max_images": 256, "inversion_batch_size": 64, "min_steps": 320}
FASTER = {"weight_patience": 3, "inversion_epochs": 53, "min_steps": 212}
SCORED = {"score_images": 1000}
BEFORE = ASSUMED._replace(search_pixels=2**19)
MIXED = ASSUMED._replace(search_pixels=2**22, bfloat16_gain=1, weights_per_s=H100.weights_per_s)

HERE, ASKED, TO_DO = "here", "a setting, off", "not built"


class Step(NamedTuple):
    """A measure: settings of defenses, the machine from then on, and whether the bound counts."""

    title: str
    state: str
    settings: Mapping[str, Mapping[str, Any]] = {}
    machine: Machine | None = None
    bound: bool = False


STEPS = [
    Step("as it was: caps, searches of 512 images a pass", HERE, {}, BEFORE, bound=True),
    Step("E1 what to expect in place of caps", HERE),
    Step("S1 searches pass what memory holds", HERE, {}, ASSUMED),
    Step("S2 search on 256 images, 64 a step", ASKED, dict.fromkeys(SEARCHING, FEWER)),
    Step("S3 the weight grows after 3 epochs, 212 steps", ASKED, dict.fromkeys(SEARCHING, FASTER)),
    Step("G1 score filters on 1,000 images", ASKED, dict.fromkeys(PRUNING, SCORED)),
    Step("A2 ANP with its paper's batch of 128", ASKED, {"anp": {"batch_size": 128}}),
    *(
        Step(
            f"T an H100 in bfloat16, {rate}e12 multiply-adds/s",
            TO_DO,
            {},
            MIXED._replace(multiply_adds_per_s=rate * 1e12),
        )
        for rate in (20, 30, 45)
    ),
    Step("L 6 µs a module for 40: CUDA graphs", TO_DO, {}, H100),
    Step("  the same at 60e12 multiply-adds/s", TO_DO, {}, H100._replace(multiply_adds_per_s=60e12)),
]


def hours(study: Study, machine: Machine, *, bound: bool) -> Counter[str]:
    """Return the hours of defending on a machine, by method."""
    costs = Costs.load().of(study)
    known: dict[Hashable, Row] = {}
    taken: Counter[str] = Counter()
    for rule, axes in graph.jobs(study):
        if graph.RULES[rule].stage_name == "defend":
            kind = costs.kind("defend", axes)
            if kind not in known:
                known[kind] = costs.by_formula("defend", axes, machine)
            seconds = known[kind].estimate.seconds if bound else known[kind].expected_s
            taken[axes["defense"]] += len(axes["draws"]) * seconds / 3600  # type: ignore[assignment]
    return taken


def steps(raw: dict[str, Any]) -> list[tuple[Step, Counter[str]]]:
    """Return each measure and the hours after it, by method."""
    defenses: dict[str, dict[str, Any]] = {
        name: dict(settings) for name, settings in raw.get("defenses", {}).items()
    }
    machine, found = ASSUMED, []
    for step in STEPS:
        for name, settings in step.settings.items():
            defenses[name] = defenses.get(name, {}) | dict(settings)
        machine = step.machine or machine
        study = load_study(raw | {"defenses": defenses})
        found.append((step, hours(study, machine, bound=step.bound)))
    return found


def main() -> None:
    """Print a line of a table a measure, and what the other stages take."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=[SURVEY])
    raw = read(parser.parse_args().files)
    print("| after | state | hours | what takes most |")
    print("| --- | --- | --- | --- |")
    for step, taken in steps(raw):
        largest = ", ".join(f"{name} {value:,.0f}" for name, value in taken.most_common(3))
        print(f"| {step.title.strip()} | {step.state} | {sum(taken.values()):,.0f} | {largest} |", flush=True)
    whole = plan.make(load_study(raw), Costs.load())
    others = {name: stage.gpu / 3600 for name, stage in whole.stages.items() if name != "defend"}
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in others.items() if value >= 1)
    print(f"\nBeside it, as assumed: {shown} hours.")


if __name__ == "__main__":
    main()
