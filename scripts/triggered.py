"""Trigger the test images that count for ASR and RA (rule ``triggered``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, poisoning, registry, stage

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.settings)
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    test = artifacts.read_images(snakemake.input.test)
    triggered = poisoning.triggered_test(attack, trigger, test, snakemake.params.target)
    artifacts.write_poisoned(triggered, snakemake.output.triggered)
