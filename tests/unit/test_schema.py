"""Study files: what is read, what is refused, and that one error says it all with YAML paths."""

import copy
import itertools
import re
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel

from detrojan import registry, settings
from detrojan.cells import NO_METHOD, Draws
from detrojan.study import feasibility, files, grid, schema
from detrojan.study.files import StudyError, load_study
from detrojan.study.grid import shards
from detrojan.study.schema import Filter

ROOT = Path(__file__).parents[2]


def minimal(**grid):
    """Return the smallest study file, with these changes of its grid."""
    return {
        "pool": "train",
        "datasets": {"digits": {"source": "digits", "image_size": 16}},
        "grid": {
            "datasets": ["digits"],
            "architectures": ["preactresnet18"],
            "attacks": ["badnets"],
            "ratios": [0.1],
            "defenses": ["ft", "fp"],
            "spc": [2],
            "draws": ["0-1"],
        }
        | grid,
    }


def mistakes(raw):
    with pytest.raises(StudyError) as caught:
        load_study(raw)
    return caught.value.mistakes


# --- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.yaml")), ids=lambda file: file.name)
def test_study_files_of_the_project_load(file):
    load_study(yaml.safe_load(file.read_text()))


def test_defaults():
    study = load_study(minimal())
    assert study.target == 0
    assert study.grid.seeds == [0]
    assert study.grid.include == study.grid.exclude == []
    assert study.keep_defended is False
    digits = study.datasets["digits"]
    assert digits.options == {
        "side": 16,
        "held_out": 0,
        "classes": None,
        "per_class": None,
        "overlap": 0.0,
        "mean": None,
        "std": None,
    }
    assert digits.augmentation == settings.Augmentation()
    assert digits.source_settings == {}


def test_reading_leaves_the_file_alone():
    raw = minimal(exclude=[{"ratio": "> 0.05"}])
    before = copy.deepcopy(raw)
    load_study(raw)
    assert raw == before


def test_numbers_as_text_are_numbers():
    # YAML 1.1 reads 1e-3 as text, for want of a point.
    raw = minimal(ratios=["1e-2"], spc=["2"], exclude=[{"ratio": "1e-2", "spc": ["2"]}])
    raw["training"] = {"lr": "1e-3"}
    study = load_study(raw)
    assert study.grid.ratios == [0.01]
    assert study.optimization({})["lr"] == 0.001
    assert study.grid.exclude[0].matches({"ratio": 0.01, "spc": 2})


def test_draws_are_sorted_and_single_ones_are_ranges():
    assert load_study(minimal(draws=["5-9", 4, "0-3"])).grid.draws == [Draws(0, 3), Draws(4, 4), Draws(5, 9)]


def test_source_settings_stand_beside_the_fields_of_all_data_sets():
    raw = minimal()
    raw["datasets"]["digits"] |= {"source": "huggingface_parquet", "path": "x", "label_column": "y"}
    assert load_study(raw).datasets["digits"].source_settings == {"path": "x", "label_column": "y"}


# --- settings --------------------------------------------------------------------------------------


def test_settings_are_defaults_then_values_then_overrides_in_order():
    raw = minimal()
    raw["defenses"] = {
        "ft": {
            "epochs": 7,
            "overrides": [
                {"when": {"attack": "badnets"}, "set": {"epochs": 8, "lr": 0.5}},
                {"when": {"attack": "badnets", "spc": "< 3"}, "set": {"epochs": 9}},
            ],
        }
    }
    study = load_study(raw)
    defaults = registry.load("defenses", "ft").model_dump()
    clean = {"attack": NO_METHOD, "spc": 2}
    assert study.method("defenses", "ft", clean) == defaults | {"epochs": 7}
    assert study.method("defenses", "ft", {"attack": "badnets", "spc": 5}) == defaults | {
        "epochs": 8,
        "lr": 0.5,
    }
    assert study.method("defenses", "ft", {"attack": "badnets", "spc": 2})["epochs"] == 9
    assert study.method("defenses", "fp", clean) == registry.load("defenses", "fp").model_dump()


def test_settings_that_come_along_lie_between_the_class_and_the_study(tmp_path, monkeypatch):
    def ship(text):
        (tmp_path / "defenses").mkdir(exist_ok=True)
        (tmp_path / "defenses" / "ft.yaml").write_text(text)
        schema.shipped.cache_clear()
        schema.shipped_file.cache_clear()

    monkeypatch.setattr(schema, "CONFIG", tmp_path)
    ship(
        "protocols: {survey: {set: {epochs: 3}, overrides: [{when: {num_classes: 10}, set: {epochs: 4}}]}}\n"
        "overrides: [{when: {image_size: '< 64'}, set: {lr: 2e-3}}]"
    )
    raw = minimal()
    defaults = registry.load("defenses", "ft").model_dump()
    here, elsewhere = {"dataset": "digits"}, {"dataset": "other"}
    assert load_study(raw).method("defenses", "ft", elsewhere) == defaults | {"epochs": 3}
    assert load_study(raw).method("defenses", "ft", here) == defaults | {"epochs": 4, "lr": 0.002}
    raw["defenses"] = {"ft": {"epochs": 7}}
    assert load_study(raw).method("defenses", "ft", here) == defaults | {"epochs": 7, "lr": 0.002}
    ship(
        "protocols: {survey: {set: {epoch: 3}, sources: {epochs: 'yaml', epoch: 'survey: yaml'}}}\n"
        "overrides: [{when: {dataset: digits}, set: {lr: -1}}]"
    )
    with pytest.raises(StudyError) as caught:
        feasibility.check(load_study(minimal()))
    said = "say where the value is from, with survey, paper, ours and a colon in front"
    survey = "config/defenses/ft.yaml.protocols.survey"
    where = "config/defenses/ft.yaml.overrides[0].when.dataset"
    assert {
        f"{survey}.epoch: unknown key 'epoch'; did you mean 'epochs'?",
        f"{survey}.sources.epoch: unknown setting 'epoch'; did you mean 'epochs'?",
        f"{survey}.sources.epochs: {said}",
        f"{survey}.sources.lr: {said}",
        "config/defenses/ft.yaml.overrides[0].set.lr: should be greater than 0, found -1",
        f"{where}: a data set may have any name: ask for num_classes or image_size",
    } <= set(caught.value.mistakes)
    ship("overrides: [{set: {lr: 1}}]")
    with pytest.raises(StudyError, match=r"config/defenses/ft\.yaml: 1 validation error"):
        feasibility.check(load_study(minimal()))
    schema.shipped.cache_clear()
    schema.shipped_file.cache_clear()


@pytest.fixture
def two_protocols(tmp_path, monkeypatch):
    """Let fine-tuning have two protocols, of which the second sets a rate, halved above ten classes."""
    (tmp_path / "defenses").mkdir()
    (tmp_path / "defenses" / "ft.yaml").write_text(
        "protocols:\n"
        "  survey: {sources: {lr: 'survey: yaml'}}\n"
        "  paper:\n"
        "    set: {lr: 0.5}\n"
        "    sources: {lr: 'paper: section 1', epochs: 'ours: it does not say'}\n"
        "    overrides: [{when: {num_classes: '> 10'}, set: {lr: 0.25}}]\n"
    )
    for cached in (schema.shipped, schema.shipped_file):
        cached.cache_clear()
    monkeypatch.setattr(schema, "CONFIG", tmp_path)
    yield
    for cached in (schema.shipped, schema.shipped_file):
        cached.cache_clear()


@pytest.mark.usefixtures("two_protocols")
def test_a_protocol_sets_and_names_its_sources():
    study = load_study(minimal(protocols=["survey", "paper"]))
    survey, paper = ({"dataset": "digits", "protocol": name} for name in ("survey", "paper"))
    assert (study.method("defenses", "ft", survey)["lr"], study.method("defenses", "ft", paper)["lr"]) == (
        0.01,
        0.5,
    )
    sources = study.sources("ft", paper)
    assert (sources["lr"], sources["epochs"], sources["momentum"]) == ("paper", "ours", "ours")
    assert not study.deviates("ft", paper)
    raw = minimal(protocols=["paper"]) | {"defenses": {"ft": {"lr": 0.5, "epochs": 7}}}
    own = load_study(raw)
    assert own.sources("ft", paper) == sources | {"lr": "study", "epochs": "study"}
    assert own.deviates("ft", paper)
    raw["defenses"]["ft"].pop("epochs")  # what is left is the protocol's value, said once more
    assert not load_study(raw).deviates("ft", paper)


@pytest.mark.usefixtures("two_protocols")
def test_cells_only_of_protocols_that_a_defense_declares():
    study = load_study(minimal(protocols=["survey", "paper"]))
    found = {(shard.defense, shard.protocol) for shard in shards(study)}
    # One that declares nothing runs as its class is, whichever of the two is asked for.
    assert found == {("none", "none"), *itertools.product(("ft", "fp"), ("survey", "paper"))}
    other = load_study(minimal(protocols=["ours"]))
    assert {shard.defense for shard in shards(other)} == {"none"}
    [line] = grid.undeclared(other)
    assert line == "No cells under protocol ours, which they don't declare: ft, fp."
    [line] = mistakes(minimal(protocols=["surveys"]))
    assert line.startswith("grid.protocols[0]: unknown name 'surveys'; did you mean 'survey'?")


@pytest.mark.parametrize("num_classes", [10, 43])
@pytest.mark.usefixtures("two_protocols")
def test_settings_follow_what_a_data_set_is_and_not_its_name(num_classes):
    for name in ("gtsrb", "my_gtsrb"):
        raw = minimal(datasets=[name])
        raw["datasets"] = {name: {"source": "digits", "image_size": 16}}
        study = load_study(raw)
        study.know_classes({name: num_classes})
        asked = {"dataset": name, "protocol": "paper"}
        assert study.method("defenses", "ft", asked)["lr"] == {10: 0.5, 43: 0.25}[num_classes]


def test_classes_are_counted_if_nobody_has_said():
    study = load_study(minimal())
    assert study.num_classes("digits") == 10
    raw = minimal()
    raw["datasets"]["digits"]["classes"] = [3, 1, 4]
    assert load_study(raw).num_classes("digits") == 3


def test_filters_of_the_grid_ask_for_axes_alone():
    [line] = mistakes(minimal(exclude=[{"num_classes": 10}]))
    assert line.startswith(
        "grid.exclude[0].num_classes: filters of the grid ask for axes alone: use dataset,"
    )


SHIPPED = sorted((ROOT / "config").glob("[ad]*/*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_settings_that_come_along_are_allowed_and_change_something(file):
    kind, name = file.parent.name, file.stem
    assert not list(files.wrong_shipped(kind, name))
    own = registry.declared(kind, name).settings().model_dump()
    for protocol in schema.protocols(name):
        values = own | schema.shipped(kind, name, protocol).resolve({})
        for override in schema.shipped(kind, name, protocol).overrides:
            # Another place is where what holds so far does not: else the line says nothing.
            assert set(override.when.conditions) <= {"dataset", "architecture", *schema.FACTS}
            assert any(values[key] != value for key, value in override.set.items())
            values |= override.set


def test_every_defense_declares_the_survey_and_its_paper():
    for name in registry.names("defenses"):
        declared = set(schema.protocols(name))
        assert declared >= ({"survey"} if name == "grad_prune_inverted" else {"survey", "paper"}), name
        assert ("ours" in declared) == name.startswith("grad_prune")
        assert not list(files.wrong_shipped("defenses", name))


def test_a_trigger_of_an_architecture_may_depend_on_it():
    raw = minimal(attacks=["lf"])
    override = {"when": {"architecture": "preactresnet18"}, "set": {"max_passes": 3}}
    raw["attacks"] = {"lf": {"overrides": [override]}}
    study = load_study(raw)
    assert study.method("attacks", "lf", {"architecture": "preactresnet18"})["max_passes"] == 3
    assert study.method("attacks", "lf", {"architecture": "vgg19_bn"})["max_passes"] == 50
    override["when"] = {"ratio": 0.1}
    [line] = mistakes(raw)
    axes = "dataset, architecture, attack, seed, num_classes, image_size"
    assert line.endswith(f"one trigger serves every ratio: use {axes}")


def test_label_map():
    assert load_study(minimal()).labels == {"target": 0, "kind": "all_to_one"}
    study = load_study(minimal(attacks=["badnets", "wanet"]) | {"label_map": "all_to_all", "target": 3})
    assert study.labels == {"target": 3, "kind": "all_to_all"}
    [line] = mistakes(minimal(attacks=["badnets", "sig"]) | {"label_map": "all_to_all"})
    assert line == (
        "label_map: all_to_all changes labels, but sig is a clean-label attack, which leaves them as they "
        "are: take it out of grid.attacks"
    )
    [line] = mistakes(minimal() | {"label_map": "all_to_none"})
    assert line.startswith("label_map: should be 'all_to_one' or 'all_to_all'")


def test_gate():
    assert load_study(minimal()).gate.model_dump() == {
        "min_asr": 0.8,
        "max_acc_loss": 0.1,
        "min_asr_gain": 0.5,
    }
    assert load_study(minimal() | {"gate": {"min_asr": 0.6}}).gate.max_acc_loss == 0.1
    [line] = mistakes(minimal() | {"gate": {"min_asr": 60}})
    assert line.startswith("gate.min_asr: should be less than or equal to 1")


def test_training_has_overrides_too():
    raw = minimal()
    raw["training"] = {"overrides": [{"when": {"architecture": "vgg19_bn"}, "set": {"lr": 0.5}}]}
    study = load_study(raw)
    assert study.optimization({"architecture": "vgg19_bn"})["lr"] == 0.5
    assert study.optimization({"architecture": "preactresnet18"}) == settings.Optimization().model_dump()


def test_attacks_depend_on_nothing_that_shares_their_trigger():
    for axis, value in {"architecture": "vgg19_bn", "ratio": 0.1, "defense": "ft", "spc": 2}.items():
        raw = minimal()
        raw["attacks"] = {"badnets": {"overrides": [{"when": {axis: value}, "set": {"side": 4}}]}}
        [line] = mistakes(raw)
        assert line.startswith(f"attacks.badnets.overrides[0].when.{axis}: one trigger serves every {axis}: ")
    raw["attacks"]["badnets"]["overrides"][0]["when"] = {"dataset": "digits", "seed": 0}
    assert load_study(raw).method("attacks", "badnets", {"dataset": "digits", "seed": 0})["side"] == 4


def test_models_depend_on_nothing_that_shares_them():
    raw = minimal()
    raw["training"] = {"overrides": [{"when": {"defense": "ft"}, "set": {"lr": 0.5}}]}
    assert (
        "training.overrides[0].when.defense: one model serves every defense: use dataset, "
        in mistakes(raw)[0]
    )


# --- filters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        ({"ratio": 0.1}, True),
        ({"ratio": [0.05, 0.1]}, True),
        ({"ratio": [0.05]}, False),
        ({"ratio": "> 0.1"}, False),
        ({"ratio": ">= 0.1"}, True),
        ({"ratio": "<0.2"}, True),
        ({"ratio": "<= 1e-1"}, True),
        ({"seed": 0}, True),
        ({"seed": "> 0"}, False),
        ({"attack": "sig"}, True),
        ({"attack": ["badnets", "sig"]}, True),
        ({"attack": "badnets"}, False),
        ({"attack": "sig", "ratio": "> 0.05"}, True),
        ({"attack": "sig", "ratio": "> 0.5"}, False),
        ({"attack": "sig", "defense": "ft"}, False),  # these axes have no defense
    ],
)
def test_filter(condition, matches):
    axes = {"dataset": "digits", "attack": "sig", "ratio": 0.1, "seed": 0}
    assert Filter.model_validate(condition).matches(axes) is matches


def test_what_has_no_ratio_or_spc_meets_no_condition_on_it():
    clean = {"attack": NO_METHOD, "ratio": 0.0, "seed": 0}
    for condition in ({"ratio": "< 0.05"}, {"ratio": ">= 0"}, {"attack": NO_METHOD, "ratio": 0}):
        assert not Filter.model_validate(condition).matches(clean)
    assert not Filter(spc="< 5").matches({"defense": "clp", "spc": 0})
    # Seed 0 is a seed like any other.
    assert Filter(seed="< 5").matches(clean)


def test_partial_match_asks_no_more_than_is_known():
    condition = Filter.model_validate({"attack": "sig", "defense": "ft"})
    assert condition.matches({"attack": "sig"}, partial=True)
    assert not condition.matches({"attack": "badnets"}, partial=True)
    assert Filter(ratio=0.1).matches({"ratio": 0.0}, partial=True)


# --- what is refused -------------------------------------------------------------------------------


def test_all_mistakes_are_in_one_error():
    raw = minimal(attacks=["badnet"], ratios=[2], sedes=[0])
    raw["pool"] = "elsewhere"
    raw["datasets"]["digits"] |= {"image_size": 8, "pth": "x"}
    raw["defenses"] = {"ft": {"lr": -1, "epoch": 2}, "overrides": {"lr": 1}}
    found = mistakes(raw)
    paths = [line.partition(":")[0] for line in found]
    assert sorted(paths) == sorted(
        [
            "pool",
            "grid.sedes",
            "grid.attacks[0]",
            "grid.ratios[0]",
            "datasets.digits.image_size",
            "datasets.digits.pth",
            "defenses.ft.lr",
            "defenses.ft.epoch",
            "defenses.overrides",
        ]
    )
    with pytest.raises(StudyError, match="the study file has 9 mistakes:\n  ") as caught:
        load_study(raw)
    assert len(str(caught.value).splitlines()) == 10


@pytest.mark.parametrize(
    ("place", "key", "nearest"),
    [
        ((), "datsets", "datasets"),
        (("grid",), "ratio", "ratios"),
        (("grid", "exclude", 0), "rato", "ratio"),
        (("datasets", "digits"), "imagesize", "image_size"),
        (("datasets", "digits", "augmentation"), "crop_pading", "crop_padding"),
        (("training",), "learning_schedule", "schedule"),
        (("training", "overrides", 0), "wen", "when"),
        (("defenses", "fp"), "tolerence", "tolerance"),
        (("defenses", "fp", "overrides", 0, "set"), "epoch", "epochs"),
        (("attacks", "blended"), "alfa", "alpha"),
        (("architectures", "preactresnet18"), "widht", "width"),
    ],
)
def test_unknown_key_names_the_nearest(place, key, nearest):
    raw = minimal(exclude=[{"attack": "sig"}])
    raw["datasets"]["digits"]["augmentation"] = {}
    override = {"when": {"attack": "badnets"}, "set": {"epochs": 1}}
    raw["training"] = {"overrides": [copy.deepcopy(override)]}
    raw |= {"attacks": {"blended": {}}, "architectures": {"preactresnet18": {}}}
    raw["defenses"] = {"fp": {"overrides": [copy.deepcopy(override)]}}
    load_study(raw)
    where = raw
    for part in place:
        where = where[part]
    where[key] = 1
    path = re.sub(r"\.(\d+)", r"[\1]", ".".join(map(str, (*place, key))))
    assert mistakes(raw) == [f"{path}: unknown key {key!r}; did you mean {nearest!r}?"]


def test_far_off_names_list_all():
    assert mistakes(minimal(attacks=["zzz"])) == [
        "grid.attacks[0]: unknown name 'zzz'; there are " + ", ".join([NO_METHOD, *registry.names("attacks")])
    ]


def test_one_line_a_path_where_a_value_may_have_several_types():
    class Either(BaseModel):
        size: int | Literal["auto"] | list[int] = "auto"

    assert list(files._check(Either, {"size": "big"}, "x")) == [
        "x.size: should be a whole number or 'auto' or a list, such as [a, b], found 'big'"
    ]


def test_overrides_do_not_repeat_the_mistakes_of_the_values():
    raw = minimal()
    override = {"when": {"spc": 2}, "set": {"lr": 0.1}}
    raw["defenses"] = {"ft": {"epochs": 0, "overrides": [override, override | {"set": {"lr": 0}}]}}
    assert mistakes(raw) == [
        "defenses.ft.epochs: should be greater than or equal to 1, found 0",
        "defenses.ft.overrides[1].set.lr: should be greater than 0, found 0",
    ]


# --- the page that explains it ---------------------------------------------------------------------

PAGE = (ROOT / "docs" / "study-files.md").read_text()


def tables():
    """Return the tables of the page: each key with the text of its default."""
    found = []
    for table in re.findall(r"^\| key .*\n\|[ -|]+\n((?:\|.*\n)+)", PAGE, re.M):
        rows = [row.split(" | ") for row in table.splitlines()]
        found.append({key: row[2] for row in rows for key in re.findall(r"`(\w+)`", row[0])})
    return found


# A new source may stand on a page of its own.
SOURCES = [
    registry.declared("datasets", name).settings
    for name in registry.names("datasets")
    if f"**`{name}`**" in PAGE
]


@pytest.mark.parametrize(
    "kinds",
    [
        [schema.Study],
        [schema.Dataset],
        [settings.Augmentation],
        *[[source] for source in SOURCES if source.model_fields],
        [schema.Grid],
        [Filter],
        [schema.Settings, schema.Overrides],
        [settings.Optimization],
    ],
    ids=lambda kinds: kinds[0].__name__,
)
def test_every_key_is_explained_with_its_default(kinds):
    fields = {name: field for kind in kinds for name, field in kind.model_fields.items()}
    [defaults] = [table for table in tables() if set(table) == set(fields)]
    for name, field in fields.items():
        stated = defaults[name]
        if stated.startswith("`"):
            value = yaml.safe_load(stated.strip("`"))
            value = tuple(value) if isinstance(field.default, tuple) else value
            # An empty section stands for its defaults.
            assert value == field.default or (value == {} and isinstance(field.default, BaseModel)), name
        else:
            assert stated in (["required"] if field.is_required() else ["any", "empty", "see below"]), name


def test_the_page_has_the_sources_that_come_along():
    described = set(re.findall(r"^\*\*`(\w+)`\*\*:", PAGE, re.M))
    assert described == {"digits", "image_folder", "huggingface_parquet", "torchvision_folder"}


def test_examples_of_the_page_are_allowed():
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    complete, *parts = map(yaml.safe_load, blocks)
    load_study(complete)
    for part in parts:
        raw = minimal(**part.pop("grid", {}))
        sources = {name: {"source": "digits", "image_size": 32} for name in ("cifar10", "gtsrb")}
        raw["datasets"] |= sources | part.pop("datasets", {})
        load_study(raw | part)


# --- the studies that come along -------------------------------------------------------------------


def smoke_study(**changed):
    return load_study(yaml.safe_load((ROOT / "config" / "smoke.yaml").read_text()) | changed)


def test_smoke_study_uses_what_each_method_calls_smoke():
    study = smoke_study()
    for kind in ("attacks", "defenses"):
        for name in registry.names(kind):
            declared = registry.declared(kind, name)
            quick = declared.settings(**declared.constants["smoke"]).model_dump(mode="json")
            assert study.method(kind, name, {}) == quick, name
    assert smoke_study(architectures={}).method("models", "preactresnet18", {}) == {"width": 64}


def test_what_a_smoke_study_sets_wins():
    study = smoke_study(defenses={"ft": {"lr": 0.5, "epochs": 7}})
    settings = study.method("defenses", "ft", {})
    assert (settings["lr"], settings["epochs"]) == (0.5, 7)
    assert smoke_study(smoke=False).method("defenses", "ft", {})["epochs"] == 100


def test_smoke_study_meets_every_attack_and_defense():
    study = smoke_study()
    feasibility.check(study)
    found = list(shards(study))
    assert {shard.defense for shard in found} == {NO_METHOD, *registry.names("defenses")}
    assert {shard.model.attack for shard in found} == {NO_METHOD, *registry.names("attacks")}
    # A trigger of each owner meets a method of each threat model that is given samples.
    given = {
        (registry.trigger_owner(shard.model.attack), registry.threat_model("defenses", shard.defense))
        for shard in found
        if NO_METHOD not in (shard.model.attack, shard.defense)
    }
    owners = {registry.trigger_owner(name) for name in registry.names("attacks")}
    assert given >= {(owner, knows) for owner in owners for knows in ("clean_data", "known_trigger")}


def test_all_stands_for_the_control_and_every_method():
    study = load_study(minimal(attacks="all", defenses="all"))
    assert study.grid.attacks == [NO_METHOD, *registry.names("attacks")]
    assert study.grid.defenses == [NO_METHOD, *registry.names("defenses")]
    with pytest.raises(StudyError, match=r"grid\.architectures: should be a list"):
        load_study(minimal(architectures="all"))
    with pytest.raises(StudyError, match=r"grid\.attacks\[0\]: unknown name 'all'"):
        load_study(minimal(attacks=["all"]))


def test_all_attacks_can_t_all_relabel_to_the_next_class():
    with pytest.raises(StudyError, match="sig is a clean-label attack"):
        load_study(minimal(attacks="all") | {"label_map": "all_to_all"})


@pytest.mark.parametrize(
    ("given", "kills"), [("true", 3), (True, 3), (False, 0), ("false", 0), (5, 5), (1, 1), (0, 0)]
)
def test_close_takes_a_number_or_a_truth_value_from_file_or_command_line(given, kills):
    # Snakemake's --config leaves `true` as text.
    assert load_study(minimal() | {"close": given}).kills == kills


@pytest.mark.parametrize("given", [-1, 2.5, "often", None])
def test_close_takes_nothing_else(given):
    with pytest.raises(StudyError, match="close"):
        load_study(minimal() | {"close": given})


@pytest.mark.parametrize("left", [b"", b"grid: {spc: [", b"\0\0\0", b"grid", b"\xff\xfe\xff"])
def test_a_kept_study_that_a_power_cut_left_broken_is_a_line(tmp_path, left):
    files.keep({"pool": "train"}, tmp_path)
    assert files.kept(tmp_path) == {"pool": "train"}
    (tmp_path / "study.yaml").write_bytes(left)
    with pytest.raises(StudyError, match=r"study\.yaml is broken: run the study again, which writes it"):
        files.kept(tmp_path)
