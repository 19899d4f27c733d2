"""Train one classifier whose batches an attack poisons on the fly (rule ``train_controlled``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import artifacts, registry, stage, victim
from detrojan.labels import LabelMap

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.attack)
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    trained = victim.train(
        artifacts.read_images(snakemake.input.train),
        cell.model,
        architecture=snakemake.params.architecture,
        optimization=snakemake.params.optimization,
        code=snakemake.params.code,
        folder=Path(snakemake.output.model).parent,
        device=stage.device(),
        control=attack.control(trigger, LabelMap(**snakemake.params.labels)),
    )
    artifacts.write_tensors(trained.trigger, snakemake.output.trigger)
    artifacts.write_model(trained.model, snakemake.output.model)
    artifacts.write_rows(trained.history, snakemake.output.history, victim.HISTORY)
    artifacts.write_card(cell.axes | trained.card, snakemake.output.card)
    trained.checkpoint.remove()
