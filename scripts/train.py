"""Train one classifier, backdoored or clean (rule ``train``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan.stages import classifier
from detrojan.storage import artifacts, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    images = artifacts.read_images(snakemake.input.train, snakemake.input.get("poisoned"))
    trained = classifier.train(
        images,
        cell.model,
        architecture=snakemake.params.architecture,
        optimization=snakemake.params.optimization,
        code=snakemake.params.code,
        folder=Path(snakemake.output.model).parent,
        device=job.device(),
    )
    artifacts.write_model(trained.model, snakemake.output.model)
    records.write_rows(trained.history, snakemake.output.history, classifier.HISTORY)
    records.write_card(cell.axes | trained.card, snakemake.output.card)
    trained.checkpoint.remove()
