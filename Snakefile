"""Detrojan: poison, train, defend, evaluate, aggregate, report."""

import pathlib

from detrojan.study import feasibility, files, grid
from detrojan.workflow import earlier, graph, handover, sources

# Another study replaces the default one; `--config` alone changes it.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


planned = handover.take(config)
retries = handover.retries(config)
study = files.load_study(config)
files.with_choices(config, study)
study.know_classes(planned.classes)
if workflow.is_main_process:
    feasibility.check(study)


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
    earlier.wait(workflow)
    files.keep(config, pathlib.Path(graph.RESULTS))
    asked = sources.of(study)
    classes = {name: study.num_classes(name) for name in asked}
    images = {name: images_of(name) for name in asked}
    handover.give(workflow, config, images, classes, study.networks)


rule all:
    default_target: True
    input:
        **needs("all"),
