"""Make or learn an attack's trigger (rule ``trigger``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, poisoning, registry, rng, stage

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    attack = registry.load("attacks", cell.attack, snakemake.params.settings)
    clean = artifacts.read_images(snakemake.input.train).to(stage.device())
    model = artifacts.read_model_if_any(snakemake.input.get("model"), stage.device())
    trigger = attack.learn_trigger(
        clean, model, target=snakemake.params.labels["target"], rng=rng.stream("trigger", *cell.axes.values())
    )
    artifacts.write_tensors(trigger, snakemake.output.trigger)
    artifacts.write_card(cell.axes | poisoning.trigger_card(attack, trigger), snakemake.output.card)
