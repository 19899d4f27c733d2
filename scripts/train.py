"""Train one classifier, backdoored or clean (rule ``train``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import artifacts, stage, victim

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    images = artifacts.read_images(snakemake.input.train, snakemake.input.get("poisoned"))
    trained = victim.train(
        images,
        cell.model,
        architecture=snakemake.params.architecture,
        optimization=snakemake.params.optimization,
        code=snakemake.params.code,
        folder=Path(snakemake.output.model).parent,
        device=stage.device(),
    )
    artifacts.write_model(trained.model, snakemake.output.model)
    artifacts.write_rows(trained.history, snakemake.output.history, victim.HISTORY)
    artifacts.write_card(cell.axes | trained.card, snakemake.output.card)
    trained.checkpoint.remove()
