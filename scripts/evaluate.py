"""Measure the repaired weights of a shard (rule ``evaluate``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan.stages import evaluate
from detrojan.storage import artifacts, columns, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    defended = Path(snakemake.input.defended)
    rows, predictions = evaluate.evaluate(
        records.read_rows(defended / "runs.parquet", columns.RUNS),
        lambda draw: defended / f"draw-{draw}.safetensors",
        artifacts.read_images(snakemake.input.test),
        artifacts.read_images_if_any(snakemake.input.get("triggered")),
        job.device(),
    )
    records.write_rows(rows, snakemake.output.metrics, columns.METRICS)
    records.write_predictions(predictions, snakemake.output.predictions)
