"""A study with tuned settings: its cells have what was chosen; another choice runs only what it changes."""

import json

import yaml

from detrojan.study import schema, tuned

CELLS = ("--until", "aggregate")
ON = {"num_classes": 10, "image_size": 16, "attacks": ["badnets", "blended"]}


def choose(folder, **chosen):
    """Write a file that has a trial of CLP for each family left out."""
    choices = [
        {"defense": "clp", "dataset": "tiny", "spc": 0, "left_out": family, "trial": number}
        | {"settings": schema.trial("clp", number)[1], "code": ["c0de"], "cells": 2}
        | {"numbers": [0, number], "der": [0.5, 0.6], "acc_loss": [0.0, 0.0]}
        for family, number in chosen.items()
    ]
    (folder / "choices.json").write_text(tuned.text(tuned.made({"tiny": ON}, choices)))


def test_another_choice_runs_the_cells_that_it_changes(workshop):
    study = workshop.study()
    study["grid"] |= {"defenses": ["none", "clp"], "protocols": ["survey", "tuned"]}
    workshop.write(study | {"tuned": "choices.json"})
    choose(workshop.folder, none=2, badnets=3)
    planned = workshop.planned(*CELLS)
    assert {rule: planned.get(rule, 0) for rule in ("train", "defend", "aggregate")} == {
        "train": 0,
        "defend": 2,
        "aggregate": 1,
    }
    workshop.snakemake(*CELLS)
    found = {row["attack"]: row for row in workshop.table("cells").to_pylist() if row["protocol"] == "tuned"}
    for attack, number in {"none": 2, "badnets": 3}.items():
        values, said = (json.loads(found[attack][name]) for name in ("hyperparameters", "sources"))
        assert values == schema.trial("clp", number)[1]
        assert said == {"u": f"tuned: trial-{number:02d}"}
    assert not workshop.planned(*CELLS)
    choose(workshop.folder, none=2, badnets=4)
    planned = workshop.planned(*CELLS)
    assert (planned["defend"], planned["evaluate"], planned["aggregate"]) == (1, 1, 1)
    # The kept study is the one that ran, whatever became of the file.
    kept = json.loads(yaml.safe_load((workshop.folder / "results/study.yaml").read_text())["tuned"])
    assert {choice["left_out"]: choice["trial"] for choice in kept["choices"]} == {"none": 2, "badnets": 3}
