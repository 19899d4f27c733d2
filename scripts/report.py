"""Draw the figures and write the page that shows the study (rule ``report``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, stage
from detrojan.analysis import figures, report

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    cells = artifacts.read_table(snakemake.input.cells)
    models = artifacts.read_table(snakemake.input.models)
    summary = artifacts.read_table(snakemake.input.summary)
    figure = figures.effect(summary)
    artifacts.write_text(figure, snakemake.output.figure)
    page = report.page(cells, models, summary, figure, snakemake.input.previews, snakemake.params.example)
    artifacts.write_text(page, snakemake.output.page)
