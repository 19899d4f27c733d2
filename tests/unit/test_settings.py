"""Rows of other settings than the study's are refused, by name; others are left alone."""

import json

import pyarrow as pa
import pytest

from detrojan.analysis.statistics import settings
from detrojan.cells import MODEL_AXES, NO_METHOD
from detrojan.study.files import load_study
from tests.unit.test_schema import minimal

MODEL = dict(zip(MODEL_AXES, ["digits", "preactresnet18", "badnets", 0.1, 0], strict=True))
STUDY = load_study(
    minimal()
    | {
        "defenses": {"ft": {"epochs": 3, "overrides": [{"when": {"spc": 2}, "set": {"epochs": 4}}]}},
        "attacks": {"badnets": {"side": 2}},
    }
)


def cell(defense="ft", spc=10, draw=0, code="c", **changed):
    axes = MODEL | {"defense": defense, "protocol": "survey", "spc": spc, "draw": draw}
    values = {} if defense == NO_METHOD else STUDY.method("defenses", defense, axes)
    return axes | {"hyperparameters": json.dumps(values | changed), "code": code}


def model(**changed):
    values = {
        "architecture_settings": STUDY.method("models", "preactresnet18", MODEL),
        "optimization": STUDY.optimization(MODEL),
        "attack_hyperparameters": STUDY.method("attacks", "badnets", MODEL),
    }
    return MODEL | {name: json.dumps(value | changed.get(name, {})) for name, value in values.items()}


def check(cells, models=()):
    schema = pa.schema([(name, pa.string()) for name in (*MODEL_AXES, "architecture_settings")])
    models = pa.Table.from_pylist(list(models)) if models else schema.empty_table()
    settings.check(pa.Table.from_pylist(cells), models, STUDY)


def test_what_the_study_asked_for_is_left_alone():
    clean = model() | {"attack": NO_METHOD, "ratio": 0.0, "attack_hyperparameters": None}
    given_up = cell(draw=1, code="", epochs=9)
    check([cell(), cell(spc=2), cell(NO_METHOD, spc=0), given_up], [model(), clean])


def test_a_cell_of_other_settings_is_named():
    with pytest.raises(ValueError, match=r"^1 results have other .*spc=2 draw=7 \(epochs was 3, is 4\): run"):
        check([cell(), cell(spc=2), cell(spc=2, draw=7, epochs=3)])


@pytest.mark.parametrize(
    ("column", "changed"),
    [
        ("architecture_settings", {"width": 5}),
        ("optimization", {"epochs": 7}),
        ("attack_hyperparameters", {"side": 3}),
    ],
)
def test_a_model_of_other_settings_is_named(column, changed):
    ((name, value),) = changed.items()
    with pytest.raises(ValueError, match=rf"model dataset=digits .*seed=0 \({name} was {value}, is \d+\)"):
        check([cell()], [model(**{column: changed})])


def test_only_the_first_are_named():
    rows = [cell(draw=draw, epochs=1) for draw in range(settings.MOST_NAMED + 2)]
    with pytest.raises(ValueError, match=", and 2 more: run the workflow") as caught:
        check(rows)
    assert str(caught.value).count("cell ") == settings.MOST_NAMED
