"""A defense that runs out of memory is tried again with more, if the run has retries; then it is a row."""

import pyarrow.parquet as pq

from detrojan.cells import Draws, Model, Shard
from detrojan.workflow import graph

FT = Shard(Model("tiny", "preactresnet18", "badnets", 0.1, 0), "ft", 2, Draws(0, 1))
METHOD = "src/detrojan/defenses/clean_data/ft.py"


def test_it_is_a_row_after_the_last_try(workshop):
    workshop.edit(
        METHOD,
        "    def __call__(",
        "    def __call__(self, *_, **__):\n        raise MemoryError\n\n    def usual(",
    )
    metrics = graph.metrics(FT)
    output = workshop.snakemake("--retries", "1", metrics)
    assert output.count("draw 0 ran out of memory: MemoryError; the job is tried again") >= 1
    rows = pq.read_table(workshop.folder / metrics).to_pylist()
    assert [(row["status"], row["reason"]) for row in rows] == 2 * [("out_of_memory", "MemoryError")]
