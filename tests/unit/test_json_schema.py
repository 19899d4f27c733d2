"""The JSON schema of study files, by which editors complete and check them."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from detrojan import registry
from detrojan.study import files, json_schema
from detrojan.study.schema import SECTIONS
from tests.command import exit_code
from tests.unit.test_schema import minimal

CONFIG = Path(__file__).parents[2] / "config"
SHIPPED = sorted(CONFIG.glob("*.yaml"))
FILTER = {"attack": ["badnets", "sig"], "ratio": "> 0.01", "spc": 10, "why": "a note"}


@pytest.fixture(scope="module")
def validator():
    schema = json_schema.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def where(validator, study):
    """Return the places in a study file that the schema refuses."""
    return [error.json_path for error in validator.iter_errors(study)]


def test_the_committed_schema_is_todays(capsys):
    """But for methods that were added: a new method is one file. The linters ask for these too."""
    assert exit_code("schema") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json_schema.json_schema()
    committed = json.loads((CONFIG / "schema.json").read_text(encoding="utf-8"))
    assert within(committed, said), (
        "the fields of study files have changed; make their schema anew: detrojan schema > config/schema.json"
    )


def within(less, more):
    """Return whether ``more`` says the same, but for keys and choices that it has besides."""
    if isinstance(less, dict) and isinstance(more, dict):
        return all(key in more and within(value, more[key]) for key, value in less.items())
    if isinstance(less, list) and isinstance(more, list):
        return all(any(within(one, other) for other in more) for one in less)
    return less == more


def test_what_is_within_what():
    less = {"enum": ["a", "b"], "fields": {"x": {"minimum": 1}}}
    assert within(less, {"enum": ["a", "c", "b"], "fields": {"x": {"minimum": 1}, "y": {}}})
    assert not within(less, {"enum": ["a", "c"], "fields": {"x": {"minimum": 1}}})
    assert not within(less, {"enum": ["a", "b"], "fields": {"x": {"minimum": 2}}})
    assert not within(less, {"enum": ["a", "b"], "fields": {}})


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_studies_name_it_and_keep_to_it(validator, file):
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"
    assert where(validator, yaml.safe_load(text)) == []


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_field_of_every_method_is_known_and_no_other(validator, kind):
    section = SECTIONS[kind]
    for name in registry.names(kind):
        fields = registry.declared(kind, name).settings.model_fields
        defaults = registry.declared(kind, name).settings().model_dump(mode="json")
        overrides = [{"when": FILTER, "set": {key: value}} for key, value in defaults.items()]
        right = minimal() | {section: {name: {**defaults, "overrides": overrides}}}
        assert where(validator, right) == [], name
        for key in fields:
            wrong = copy.deepcopy(right)
            wrong[section][name][f"{key}x"] = wrong[section][name].pop(key)
            assert where(validator, wrong) == [f"$.{section}.{name}"]
            wrong = minimal() | {section: {name: {"overrides": [{"when": FILTER, "set": {f"{key}x": 1}}]}}}
            assert where(validator, wrong) == [f"$.{section}.{name}.overrides[0].set"]


def dataset(**fields):
    return minimal() | {"datasets": {"digits": {"image_size": 32, "held_out": 0.1, **fields}}}


RIGHT = [
    minimal(),
    minimal(draws=["0-4", 5, "6"]),
    minimal(include=[FILTER], exclude=[{"seed": [0, 1], "defense": "ft"}]),
    minimal()
    | {
        "close": True,
        "training": {"epochs": 3, "overrides": [{"when": {"attack": "sig"}, "set": {"lr": 0.1}}]},
    },
    dataset(source="image_folder", path="photos"),
    dataset(source="digits", mean=[0.1, 0.2, 0.3], std=[1, 1, 1], augmentation={"flip": True}),
]
WRONG = [
    (minimal() | {"tarqet": 0}, "$"),
    (minimal(defenses=["ft", "fq"]), "$.grid.defenses"),
    (minimal(attacks=["badnet"]), "$.grid.attacks"),
    (minimal(architectures=["resnet"]), "$.grid.architectures[0]"),
    (minimal(draws=["0 to 4"]), "$.grid.draws[0]"),
    (minimal(ratios=[1.5]), "$.grid.ratios[0]"),
    (minimal(include=[{"attack": "badnet"}]), "$.grid.include[0].attack"),
    (minimal(include=[{"spc": "=> 10"}]), "$.grid.include[0].spc"),
    (minimal(include=[{"draw": 1}]), "$.grid.include[0]"),
    (minimal() | {"defenses": {"ftt": {}}}, "$.defenses"),
    (minimal() | {"defenses": {"ft": {"epochs": 0}}}, "$.defenses.ft.epochs"),
    (minimal() | {"training": {"epoch": 3}}, "$.training"),
    (minimal() | {"training": {"overrides": [{"when": FILTER}]}}, "$.training.overrides[0]"),
    (dataset(source="digit"), "$.datasets.digits.source"),
    (dataset(source="digits", path="photos"), "$.datasets.digits"),
    (dataset(source="image_folder"), "$.datasets.digits"),
    (dataset(), "$.datasets.digits"),
    (minimal() | {"datasets": {"my digits": minimal()["datasets"]["digits"]}}, "$.datasets"),
]


@pytest.mark.parametrize("study", RIGHT)
def test_what_studies_may_say(validator, study):
    files.load_study(study | {"grid": study["grid"] | {"controls": False}})
    assert where(validator, study) == []


@pytest.mark.parametrize(("study", "place"), WRONG, ids=lambda one: one if isinstance(one, str) else "")
def test_what_the_workflow_refuses_is_marked_where_it_stands(validator, study, place):
    with pytest.raises(files.StudyError):
        files.load_study(study)
    assert where(validator, study) == [place]


def test_fields_are_explained(validator):
    parts = validator.schema["$defs"]
    for name, part in parts.items():
        if name.partition("_")[0] in SECTIONS.values():
            assert all(field.get("description") for field in part["properties"].values()), name
