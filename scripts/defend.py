"""Defend one model, once a draw (rule ``defend``)."""

from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.stages import defend
from detrojan.storage import artifacts, columns, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    defense = registry.load("defenses", cell.defense, snakemake.params.settings)
    model = artifacts.read_model(snakemake.input.model).place(job.device())
    samples = artifacts.read_samples(snakemake.input.get("sample"), snakemake.input.get("triggered_sample"))
    with records.whole_folder(snakemake.output.defended) as folder:
        runs = defend.run_shard(
            defense,
            model,
            samples,
            cell.shard,
            folder,
            code=snakemake.params.code,
            **snakemake.params.sources,
            tries_left=snakemake.resources.tries_left,
        )
        records.write_rows(runs, folder / "runs.parquet", columns.RUNS)
