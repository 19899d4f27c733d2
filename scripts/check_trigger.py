"""See what a trigger does where it should do nothing (rule ``check_trigger``)."""

from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.stages import evaluate
from detrojan.storage import artifacts, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    device = job.device()
    trigger, _ = artifacts.read_tensors(snakemake.input.trigger)
    card = evaluate.check_trigger(
        artifacts.read_model(snakemake.input.model).place(device),
        artifacts.read_model(snakemake.input.clean).place(device),
        registry.load("attacks", cell.attack, snakemake.params.settings),
        {name: tensor.to(device) for name, tensor in trigger.items()},
        artifacts.read_images(snakemake.input.triggered).to(device),
        artifacts.read_images(snakemake.input.test).to(device),
    )
    records.write_card(cell.axes | card, snakemake.output.card)
