"""Times the analysis of a study as large as the survey, and counts how often intervals hold the truth.

    python benchmarks/analysis.py survey [--into FOLDER]   # tables and report of made-up results
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
from detrojan.analysis.report import report
from detrojan.analysis.report.views import Tables
from detrojan.analysis.statistics import bootstrap, collect
from detrojan.analysis.statistics.relative import relative
from detrojan.cells import CELL_AXES, NO_METHOD
from detrojan.storage import records
from detrojan.storage.columns import OK
from detrojan.study import files, grid

SURVEY = Path(__file__).parents[1] / "config" / "survey.yaml"
LEVELS = {"settings": ["setting"], "models": ["seed"], "draws": ["draw"]}
SHAPES = [(8, 3, 5), (4, 2, 3), (24, 1, 10), (1, 5, 10), (1, 3, 10), (1, 2, 5), (1, 1, 10), (1, 1, 3)]
NOISES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
}


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


def survey(into: Path) -> None:
    """Make up results for the whole survey, and analyse them."""
    study = files.load_study(yaml.safe_load(SURVEY.read_text()))
    print(f"{'':<24}{'wall, s':>10}{'CPU, s':>10}{'peak, MB':>10}")
    cells = timed("results made up", lambda: made_up(study))
    print(f"{cells.num_rows:,} cells")
    records.write_table(cells, into / "tables" / "cells.parquet", collect.CELLS)
    found = {
        name: timed(name, functools.partial(table.make, cells))
        for name, table in derived.TABLES.items()
        if table.needs == ("cells",)
    }
    for name, table in found.items():
        records.write_table(table, into / "tables" / f"{name}.parquet", derived.TABLES[name].schema)
    about = report.About("Made-up results", ["They say nothing about any defense."], "", ["0-9"])
    timed("report", lambda: report.write(Tables(cells, None, found), about, into / "report"))
    page = into / "report" / "index.html"
    print(f"{page.name}: {page.stat().st_size / 1e6:.1f} MB")


def coverage(number: int = 2000) -> None:
    """Print how often the 95 % interval of a mean holds it, by settings × models × draws."""
    print(f"{'settings × models × draws':<28}{'units':<14}{'held':>8}")
    for (noise, draw), shape in itertools.product(NOISES.items(), SHAPES):
        rng, whole = np.random.default_rng(3), (number, *shape)
        varies = (shape[0] > 1, shape[0] * shape[1] > 1, True)
        values = np.zeros(whole)
        for level, (spread, is_there) in enumerate(zip((1, 0.7, 0.5), varies, strict=True), start=2):
            values = values + spread * is_there * draw(rng, whole[:level] + (1,) * (4 - level))
        axes = dict(zip(("study", "setting", "seed", "draw"), np.indices(whole).reshape(4, -1), strict=True))
        frame = pd.DataFrame(axes | {"y": values.ravel()})
        found = bootstrap.intervals(frame, ["study"], ["y"], LEVELS)
        held = ((found["y_low"] <= 0) & (found["y_high"] >= 0)).mean()
        print(f"{' × '.join(map(str, shape)):<28}{noise:<14}{100 * held:>7.1f}%")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("survey").add_argument("--into", type=Path, help="keep tables and report there")
    commands.add_parser("coverage")
    arguments = parser.parse_args()
    if arguments.command == "coverage":
        coverage()
    elif arguments.into:
        survey(arguments.into)
    else:
        with tempfile.TemporaryDirectory() as folder:
            survey(Path(folder))


if __name__ == "__main__":
    main()
