"""Make or learn an attack's trigger (rule ``trigger``)."""

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
    clean = artifacts.read_images(snakemake.input.train).to(job.device())
    model = artifacts.read_model_if_any(snakemake.input.get("model"), job.device())
    trigger = attack.learn_trigger(
        clean,
        model,
        target=LabelMap.of(clean.info.classes, **snakemake.params.labels).target,
        rng=rng.stream("trigger", *cell.axes.values()),
    )
    artifacts.write_tensors(trigger, snakemake.output.trigger)
    records.write_card(cell.axes | poisoning.trigger_card(attack, trigger), snakemake.output.card)
