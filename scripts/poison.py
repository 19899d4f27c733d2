"""Poison part of a training set (rule ``poison``)."""

from typing import TYPE_CHECKING

from detrojan import registry, rng
from detrojan.labels import LabelMap
from detrojan.stages import poisoning
from detrojan.storage import artifacts, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.settings)
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    train = artifacts.read_images(snakemake.input.train)
    labels = LabelMap.of(train.info.classes, **snakemake.params.labels)
    stream = rng.stream("poison", cell.dataset, cell.seed)
    rows = poisoning.poison(attack, trigger, train, cell.ratio, labels, rng=stream)
    artifacts.write_poisoned(rows, snakemake.output.poisoned)
    records.write_card(cell.axes | poisoning.card(attack, rows, train), snakemake.output.card)
    records.write_picture(poisoning.preview(rows, train), snakemake.output.preview)
