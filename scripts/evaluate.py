"""Measure the repaired weights of a shard (rule ``evaluate``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import artifacts, evaluation, stage

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    defended = Path(snakemake.input.defended)
    rows, predictions = evaluation.evaluate(
        artifacts.read_rows(defended / "runs.parquet", evaluation.RUNS),
        lambda draw: defended / f"draw-{draw}.safetensors",
        artifacts.read_images(snakemake.input.test),
        artifacts.read_images_if_any(snakemake.input.get("triggered")),
        stage.device(),
    )
    artifacts.write_rows(rows, snakemake.output.metrics, evaluation.METRICS)
    artifacts.write_predictions(predictions, snakemake.output.predictions)
