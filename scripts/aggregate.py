"""Gather all metrics and cards into the tables of the study (rule ``aggregate``)."""

from typing import TYPE_CHECKING

from detrojan.analysis import derived
from detrojan.analysis.statistics import collect, gate, settings
from detrojan.settings import Gate
from detrojan.storage import records
from detrojan.study.schema import Study
from detrojan.workflow import graph, job, sources

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    cells = collect.cells(graph.placed(snakemake.input.metrics), snakemake.params.given_up)
    limits = Gate(**snakemake.params.gate)
    beside = {name: graph.placed(snakemake.input[name]) for name in collect.BESIDE_MODELS}
    models = collect.models(cells, graph.placed(snakemake.input.models), beside, limits)
    study = Study.model_validate_json(snakemake.params.study)
    study.know_classes(sources.classes_read(study))
    settings.check(cells, models, study)
    cells = collect.completed(cells, models)
    records.write_table(cells, snakemake.output.cells, collect.CELLS)
    records.write_table(models, snakemake.output.models, collect.MODELS)
    judged = gate.table(models.to_pylist(), limits)
    derived.write({"cells": cells, "models": models, "gate": judged}, snakemake.output)
