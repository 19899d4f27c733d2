"""Measures what `detrojan measure` takes for a study of so many shards.

    python benchmarks/measures.py cifar10 tiny_imagenet --shards 1000

Its predictions are made up: ten draws a shard, 90 % of the clean images right, 10 % of the triggered ones
sent to the target. Files have just been written, so reading them costs no disk.
"""

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from detrojan import registry
from detrojan.cells import NO_METHOD, Shard
from detrojan.storage import records
from detrojan.storage.columns import PREDICTIONS
from detrojan.study import files as study_files
from detrojan.study import grid
from detrojan.workflow.site import Site
from plan import DATASETS, HEADS, NUM_DRAWS, Images, run

NUM_FILES = 5  # of different predictions; the shards take turns
STUDY = {
    "datasets": {"digits": {"source": "digits", "image_size": 32, "held_out": 0.1}},
    "pool": "held_out",
    "grid": {
        "datasets": ["digits"],
        "architectures": ["preactresnet18"],
        "attacks": [NO_METHOD, "badnets", "blended", "sig", "ssba"],  # whose triggers all models share
        "ratios": [0.1],
        "defenses": [NO_METHOD, *registry.names("defenses")],
        "spc": [2, 10, 100],
        "draws": [f"0-{NUM_DRAWS - 1}"],
    },
}


def main() -> None:
    """Print what measuring took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "datasets", nargs="*", default=list(DATASETS), help="whose images and classes to take"
    )
    parser.add_argument("--shards", type=int, default=1000, help="at least so many")
    asked = parser.parse_args()
    print(
        f"{'data set':<16} {'shards':>7} {HEADS} {'CPU/1,000 shards, s':>20} {'rows':>11} {'table, MB':>10}"
    )
    for name in asked.datasets:
        with tempfile.TemporaryDirectory() as folder:
            count = _write(Path(folder, "results"), asked.shards, DATASETS[name])
            taken = run([sys.executable, "-m", "detrojan", "measure"], Path(folder))
            table = Site(Path(folder, "results")).table("measures")
            rows, size = pq.read_metadata(table).num_rows, table.stat().st_size / 1e6
        each = 1000 * taken.cpu / count
        print(f"{name:<16} {count:>7,} {taken} {each:>20.1f} {rows:>11,} {size:>10.1f}", flush=True)


def _write(results: Path, at_least: int, images: Images) -> int:
    """Write a study with all that is read of it; return how many shards it has."""
    num_seeds = math.ceil(at_least / len(_shards(num_seeds=1)))
    planned = _shards(num_seeds)
    study_files.keep(_study(num_seeds), results)

    rng = np.random.default_rng(0)
    labels = rng.integers(0, images.num_classes, images.num_test)
    clean, triggered = np.arange(len(labels)), np.flatnonzero(labels != 0)
    site = Site(results)
    _write_labels(site.test_images("digits"), index=clean, label=labels)
    for model in dict.fromkeys(shard.model for shard in planned):
        wanted = {"label": np.zeros(len(triggered), int), "true_label": labels[triggered]}
        if place := site.triggered_images(model):
            _write_labels(place, index=triggered, **wanted)

    def said(num_draws: int, *, attacked: bool) -> pa.Table:
        kinds = [(False, clean, 0.0), (True, triggered, 0.1)] if attacked else [(False, clean, 0.0)]
        tables = []
        for draw, (is_triggered, index, asr) in itertools.product(range(num_draws), kinds):
            right = rng.random(len(index)) < 0.9
            predicted = np.where(right, labels[index], rng.integers(0, images.num_classes, len(index)))
            predicted[rng.random(len(index)) < asr] = 0
            columns = [np.full(len(index), draw), np.full(len(index), is_triggered), index, predicted]
            tables.append(pa.table(columns, PREDICTIONS.names).cast(PREDICTIONS))
        return pa.concat_tables(tables)

    kinds = itertools.product((1, NUM_DRAWS), (False, True))
    files = {kind: [said(kind[0], attacked=kind[1]) for _ in range(NUM_FILES)] for kind in kinds}
    for number, shard in enumerate(planned):
        tables = files[len(shard.draws), shard.model.attack != NO_METHOD]
        records.write_predictions(tables[number % NUM_FILES], site.predictions(shard))
    return len(planned)


def _study(num_seeds: int) -> dict[str, object]:
    return STUDY | {"grid": STUDY["grid"] | {"seeds": list(range(num_seeds))}}


def _shards(num_seeds: int) -> Sequence[Shard]:
    return list(grid.shards(study_files.load_study(_study(num_seeds))))


def _write_labels(path: Path, **columns: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"index": pa.int32(), "label": pa.int16(), "true_label": pa.int16()}
    pq.write_table(pa.table({name: pa.array(column, kinds[name]) for name, column in columns.items()}), path)


if __name__ == "__main__":
    main()
