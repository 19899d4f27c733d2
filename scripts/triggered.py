"""Trigger the test images that count for ASR and RA (rule ``triggered``)."""

from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.labels import LabelMap
from detrojan.stages import poisoning
from detrojan.storage import artifacts, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.settings)
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    test = artifacts.read_images(snakemake.input.test)
    labels = LabelMap.of(test.info.classes, **snakemake.params.labels)
    triggered = poisoning.triggered_test(attack, trigger, test, labels)
    card = poisoning.triggered_card(attack, triggered, test, labels)
    artifacts.write_poisoned(triggered, snakemake.output.triggered)
    artifacts.write_poisoned(poisoning.examples(triggered, test), snakemake.output.examples)
    records.write_card(cell.axes | card, snakemake.output.card)
