"""Write the report of the study: the page, and figures and tables beside it (rule ``report``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.analysis.report import contact_sheet, report
from detrojan.analysis.report.views import Tables
from detrojan.settings import Gate
from detrojan.storage import records
from detrojan.workflow import job

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    tables = Tables(
        records.read_table(snakemake.input.cells),
        records.read_table(snakemake.input.models),
        {name: records.read_table(snakemake.input[name]) for name in registry.names(registry.TABLES)},
    )
    sheets = contact_sheet.draw_all(
        snakemake.params.datasets, tables.models, snakemake.input.examples, snakemake.params.triggers
    )
    cards = [records.read_card(card) for card in snakemake.input.cards]
    about = report.of_study(tables, Gate(**snakemake.params.gate), snakemake.params.draws, cards)
    report.write(tables, about, Path(snakemake.output.page).parent, sheets)
