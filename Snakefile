"""Detrojan: poison, train, defend, evaluate, aggregate, report."""

import pathlib

from detrojan import grid, paths, planning, study_files

# Another study replaces the default one; `--config` alone changes it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


study = study_files.load_study(config)
if workflow.is_main_process:
    planning.check(study)


include: "rules/common.smk"
include: "rules/dataset.smk"
include: "rules/attack.smk"
include: "rules/train.smk"
include: "rules/defend.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


localrules:
    all,


onstart:
    study_files.keep(config, pathlib.Path(paths.RESULTS))


rule all:
    default_target: True
    input:
        "results/tables/cells.parquet",
        "results/tables/models.parquet",
        "results/tables/summary.parquet",
        "results/report/index.html",
