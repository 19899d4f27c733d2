"""Trigger the defender's own images, for methods that know the trigger (rule ``stamp``)."""

from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.stages import poisoning
from detrojan.storage import artifacts
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.settings)
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    samples = artifacts.read_samples(snakemake.input.sample)
    artifacts.write_stamped(poisoning.stamp(attack, trigger, samples), snakemake.output.stamped)
