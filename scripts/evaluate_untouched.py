"""Measure a model as it was trained (rule ``evaluate_untouched``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import artifacts, cells, evaluation, stage

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    rows, predictions = evaluation.evaluate(
        evaluation.untouched_run(cells.untouched(cell.model), stage.device(), snakemake.params.code),
        lambda draw: Path(snakemake.input.model),
        artifacts.read_images(snakemake.input.test),
        artifacts.read_images_if_any(snakemake.input.get("triggered")),
        stage.device(),
    )
    artifacts.write_rows(rows, snakemake.output.metrics, evaluation.METRICS)
    artifacts.write_predictions(predictions, snakemake.output.predictions)
