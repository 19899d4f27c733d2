"""Draw the defender's clean images (rule ``sample``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, sampling, stage

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    pool = artifacts.read_images(snakemake.input.pool)
    samples = sampling.draw_samples(pool, cell.dataset, cell.spc, cell.draws.numbers())
    artifacts.write_samples(samples, snakemake.output.sample)
