"""Make or learn an attack's trigger (rule ``trigger``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, registry, rng, stage

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.settings)
    clean = artifacts.read_images(snakemake.input.train)
    stream = rng.stream("trigger", cell.dataset, cell.attack, cell.seed)
    artifacts.write_tensors(attack.learn_trigger(clean, rng=stream), snakemake.output.trigger)
    artifacts.write_card(cell.axes | {"hyperparameters": attack.model_dump()}, snakemake.output.card)
