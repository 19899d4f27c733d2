"""Draw the defender's clean images (rule ``sample``)."""

from typing import TYPE_CHECKING

from detrojan.stages import sampling
from detrojan.storage import artifacts
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    pool = artifacts.read_images(snakemake.input.pool)
    samples = sampling.draw_samples(pool, cell.dataset, cell.spc, cell.draws.numbers())
    artifacts.write_samples(samples, snakemake.output.sample)
