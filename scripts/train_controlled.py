"""Train one classifier whose batches an attack poisons on the fly (rule ``train_controlled``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.labels import LabelMap
from detrojan.stages import classifier
from detrojan.storage import artifacts, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.attack)
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    train = artifacts.read_images(snakemake.input.train)
    labels = LabelMap.of(train.info.classes, **snakemake.params.labels)
    trained = classifier.train(
        train,
        cell.model,
        architecture=snakemake.params.architecture,
        optimization=snakemake.params.optimization,
        code=snakemake.params.code,
        folder=Path(snakemake.output.model).parent,
        device=job.device(),
        control=attack.control(trigger, labels),
    )
    artifacts.write_tensors(trained.trigger, snakemake.output.trigger)
    artifacts.write_model(trained.model, snakemake.output.model)
    records.write_rows(trained.history, snakemake.output.history, classifier.HISTORY)
    records.write_card(cell.axes | trained.card, snakemake.output.card)
    trained.checkpoint.remove()
