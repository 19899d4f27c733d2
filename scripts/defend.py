"""Defend one model, once a draw (rule ``defend``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, defending, registry, stage, tables

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    defense = registry.load("defenses", cell.defense, snakemake.params.settings)
    model = artifacts.read_model(snakemake.input.model).place(stage.device())
    samples = artifacts.read_samples(snakemake.input.get("sample"), snakemake.input.get("triggered_sample"))
    with artifacts.whole_folder(snakemake.output.defended) as folder:
        runs = defending.run_shard(defense, model, samples, cell.shard, folder, code=snakemake.params.code)
        artifacts.write_rows(runs, folder / "runs.parquet", tables.RUNS)
