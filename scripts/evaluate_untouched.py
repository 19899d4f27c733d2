"""Measure a model as it was trained (rule ``evaluate_untouched``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import cells
from detrojan.stages import evaluate
from detrojan.storage import artifacts, columns, records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    rows, predictions = evaluate.evaluate(
        evaluate.untouched_run(cells.untouched(cell.model), job.device(), snakemake.params.code),
        lambda draw: Path(snakemake.input.model),
        artifacts.read_images(snakemake.input.test),
        artifacts.read_images_if_any(snakemake.input.get("triggered")),
        job.device(),
    )
    records.write_rows(rows, snakemake.output.metrics, columns.METRICS)
    records.write_predictions(predictions, snakemake.output.predictions)
