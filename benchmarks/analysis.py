"""Times the analysis of a study as large as the survey, and counts how often intervals hold the truth.

    python benchmarks/analysis.py survey [--into FOLDER]   # tables and report of made-up results
    python benchmarks/analysis.py survey --no-report       # tables alone
    python benchmarks/analysis.py coverage                 # simulated studies with a known mean

The results are random: a part of each defense, attack and budget, and noise. They show what a report of the
survey's size looks like and takes, and nothing about any defense.
"""

import argparse
import functools
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml

from detrojan import registry
from detrojan.analysis import derived
from detrojan.analysis.others import external
from detrojan.analysis.report import report
from detrojan.analysis.report.views import Tables
from detrojan.analysis.statistics import collect
from detrojan.analysis.statistics.crossed import Crossed, Design
from detrojan.analysis.statistics.relative import relative
from detrojan.cells import CELL_AXES, NO_METHOD
from detrojan.storage import records
from detrojan.storage.columns import OK
from detrojan.study import files, grid

SURVEY = Path(__file__).parents[1] / "config" / "survey.yaml"
# Standard deviations of what varies, and how much of it.
NOISE = {"model": 0.05, "cell": 0.05}
ON_GRID = {
    "noise only": {},
    "and interactions .05": {"interaction": 0.05},
    "and shared triggers .04": {"interaction": 0.05, "trigger": 0.04},
    "and shared draws .03": {"interaction": 0.05, "trigger": 0.04, "draw": 0.03},
}
BEYOND = {
    "data sets, architectures, attacks .05": {"dataset": 0.05, "architecture": 0.05, "attack": 0.05},
    "data sets alone .1": {"dataset": 0.1},
    "noise only": {},
}
SHAPES = {"survey's grid": (3, 4, 8, 3), "2 × 2 × 4 × 2": (2, 2, 4, 2)}


def made_up(study: files.Study, seed: int = 0) -> pa.Table:
    """Return random results for every cell of a study, as a table of the schema ``CELLS``."""
    rows = [
        (*shard.model, shard.defense, shard.spc, draw)
        for shard in grid.shards(study)
        for draw in shard.draws.numbers()
    ]
    frame = pd.DataFrame(rows, columns=list(CELL_AXES))
    rng = np.random.default_rng(seed)
    untouched, clean = frame["defense"] == NO_METHOD, frame["attack"] == NO_METHOD
    score = 0.5 * rng.standard_normal(len(frame)) - 0.4 * np.log1p(frame["spc"])
    for axis, spread in (("defense", 1.0), ("attack", 0.8), ("architecture", 0.3), ("dataset", 0.3)):
        effects = {name: spread * rng.standard_normal() for name in sorted(frame[axis].unique())}
        score += frame[axis].map(effects)
    shares = 1 / (1 + np.exp(-score))
    weak = (frame["attack"] == "wanet") & (frame["ratio"] == frame["ratio"].where(~clean).min())
    frame["acc"] = 0.94 - np.where(untouched, 0, 0.1 * rng.beta(1, 5, len(frame)))
    frame["asr"] = np.where(untouched, np.where(weak, 0.6, 0.97), 0.97 * shares)
    frame["ra"] = 0.93 * (1 - frame["asr"])
    frame["status"], frame["reason"] = OK, None
    lost = ~untouched & (rng.random(len(frame)) < 0.01)
    frame.loc[lost, ["status", "reason"]] = "diverged", "the loss is not finite"
    useless = clean & (frame["defense"] == "grad_prune")
    frame.loc[useless, ["status", "reason"]] = "not_applicable", "a clean model has no trigger"
    frame.loc[lost | useless, ["acc", "asr", "ra"]] = np.nan
    frame.loc[clean, ["asr", "ra"]] = np.nan
    frame["attack_took"] = (~weak).astype("boolean").mask(clean)
    models = {name: registry.threat_model("defenses", name) for name in frame["defense"].unique()}
    frame["threat_model"] = frame["defense"].map(models)
    frame["seconds"] = np.where(untouched, 0, rng.gamma(2, 20, len(frame)))
    frame["chosen"] = [f'{{"epoch": {epoch}}}' for epoch in rng.integers(1, 100, len(frame))]
    frame["hyperparameters"] = [
        f'{{"epochs": 100, "lr": 0.01, "of": "{name} on {data}"}}'
        for name, data in zip(frame["defense"], frame["dataset"], strict=True)
    ]
    whole = dict.fromkeys(("peak_memory_bytes", "forward_passes", "backward_passes"), 10**9)
    whole |= {"num_test": 10_000, "num_triggered": 9_000}
    origin = {"device": "made up", "code": "0" * 64, "versions": "{}", "git_commit": "0" * 40}
    frame = frame.assign(**whole, **origin, **relative(frame))
    return pa.Table.from_pandas(frame[collect.CELLS.names], collect.CELLS, preserve_index=False)


def timed(name: str, work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns; print its seconds, wall and processor, and the peak memory so far."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(f"{name:<24}{wall:>10.1f}{processor:>10.1f}{peak:>10.0f}")
    return result


def derived_of(cells: pa.Table, gate: pa.Table) -> dict[str, pa.Table]:
    """Return the tables that follow from cells and the gate; print what each takes, and all together."""
    found: dict[str, pa.Table] = {"cells": cells, "gate": gate}
    start, waiting = time.process_time(), dict(derived.TABLES)
    while ready := [name for name, table in waiting.items() if found.keys() >= set(table.needs)]:
        for name in ready:
            table = waiting.pop(name)
            given = {need: found[need] for need in table.needs}
            found[name] = timed(name, functools.partial(table.make, **given))
    print(f"{'derived, all':<24}{'':>10}{time.process_time() - start:>10.1f}")
    return {name: table for name, table in found.items() if name not in ("cells", "gate")}


def survey(into: Path, *, with_report: bool) -> None:
    """Make up results for the whole survey, and analyse them."""
    study = files.load_study(yaml.safe_load(SURVEY.read_text()))
    print(f"{'':<24}{'wall, s':>10}{'CPU, s':>10}{'peak, MB':>10}")
    cells = timed("results made up", lambda: made_up(study))
    print(f"{cells.num_rows:,} cells")
    records.write_table(cells, into / "tables" / "cells.parquet", collect.CELLS)
    found = derived_of(cells, external.gate_table(cells, study.gate))
    for name, table in found.items():
        records.write_table(table, into / "tables" / f"{name}.parquet", derived.TABLES[name].schema)
    if not with_report:
        return
    about = report.About("Made-up results", ["They say nothing about any defense."], "", ["0-9"])
    timed("report", lambda: report.write(Tables(cells, None, found), about, into / "report"))
    page = into / "report" / "index.html"
    print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")


class Simulated:
    """Studies of one shape with known parts, whose true mean over all that varies is 0."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        axes = np.indices(shape).reshape(4, -1)
        if shape[0] > 2:  # as SIG in the survey, the last attack is possible on one data set alone
            axes = axes[:, ~((axes[2] == shape[2] - 1) & (axes[0] > 0))]
        self.dataset, self.architecture, self.attack, _ = axes
        self.design = Design(self.dataset, self.architecture, self.attack)

    def effects(self, rng: np.random.Generator, over: list[Any], deviation: float, *more: int) -> Any:
        """Return an effect at each setting, the same where all of ``over`` are the same."""
        codes = np.unique(np.stack(over), axis=1, return_inverse=True)[1].reshape(-1)
        return rng.normal(0, deviation, (codes.max() + 1, *more))[codes]

    def held(self, scope: str, parts: dict[str, float], seeds: int, number: int) -> tuple[float, float]:
        """Return in what share of studies an interval holds the truth, and its median width."""
        rng, draws = np.random.default_rng(3), 3
        hits, widths = [], []
        for _ in range(number):
            fixed = self.effects(rng, [self.dataset, self.attack], parts.get("interaction", 0.0))
            fixed = fixed - fixed.mean()
            for factor in ("dataset", "architecture", "attack"):
                fixed = fixed + self.effects(rng, [getattr(self, factor)], parts.get(factor, 0.0))
            values = rng.normal(0, NOISE["cell"], (len(fixed), seeds, 1, draws))
            values += rng.normal(0, NOISE["model"], (len(fixed), seeds, 1, 1)) + fixed[:, None, None, None]
            trigger = self.effects(rng, [self.dataset, self.attack], parts.get("trigger", 0.0), seeds)
            sample = self.effects(rng, [self.dataset], parts.get("draw", 0.0), draws)
            found = Crossed(self.design, values + trigger[..., None, None] + sample[:, None, None])
            half = getattr(found, scope).half
            hits.append(abs(found.mean) <= half)
            widths.append(2 * half)
        return float(np.mean(hits)), float(np.median(widths))


def coverage(number: int = 1000) -> None:
    """Print how often 95 % intervals of simulated studies hold the truth, and how wide they are."""
    print(f"{'interval':<10}{'study':<18}{'what varies':<42}{'seeds':>6}{'held':>9}{'width':>9}")
    for (name, shape), (scope, cases) in itertools.product(
        SHAPES.items(), {"grid": ON_GRID, "beyond": BEYOND}.items()
    ):
        study = Simulated(shape)
        for (what, parts), seeds in itertools.product(cases.items(), (1, 2, 3) if scope == "grid" else (1,)):
            held, width = study.held(scope, parts, seeds, number)
            print(f"{scope:<10}{name:<18}{what:<42}{seeds:>6}{100 * held:>8.1f}%{width:>9.3f}")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("survey")
    command.add_argument("--into", type=Path, help="keep tables and report there")
    command.add_argument("--no-report", action="store_true", help="make the tables alone")
    commands.add_parser("coverage")
    arguments = parser.parse_args()
    if arguments.command == "coverage":
        coverage()
    elif arguments.into:
        survey(arguments.into, with_report=not arguments.no_report)
    else:
        with tempfile.TemporaryDirectory() as folder:
            survey(Path(folder), with_report=not arguments.no_report)


if __name__ == "__main__":
    main()
