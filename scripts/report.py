"""Draw the figures and write the page that shows the study (rule ``report``)."""

from typing import TYPE_CHECKING

from detrojan import artifacts, stage
from detrojan.analysis import contact_sheet, figures, report
from detrojan.settings import Gate

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with stage.run(snakemake) as cell:
    cells = artifacts.read_table(snakemake.input.cells)
    models = artifacts.read_table(snakemake.input.models)
    summary = artifacts.read_table(snakemake.input.summary)
    figure = figures.effect(summary)
    sheets = contact_sheet.draw_all(snakemake.params.datasets, models, snakemake.input.examples)
    gate = Gate(**snakemake.params.gate)
    artifacts.write_text(figure, snakemake.output.figure)
    texts = contact_sheet.write(sheets, snakemake.output.sheets, snakemake.output.pictures)
    page = report.page(cells, models, summary, figure, texts, gate, snakemake.params.example)
    artifacts.write_text(page, snakemake.output.page)
