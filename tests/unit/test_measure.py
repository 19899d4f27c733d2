"""Measures of stored predictions: worked out by hand, and held against others' code; files and messages."""

import shutil
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, recall_score

import detrojan
from detrojan import registry
from detrojan.analysis.statistics import predictions
from detrojan.analysis.statistics.predictions import MEASURES, NO_LABEL, Answers
from detrojan.cells import NO_METHOD, NO_SAMPLES, ONE_DRAW, Draws, Model, Shard
from detrojan.commands import measure
from detrojan.storage import records
from detrojan.storage.columns import PREDICTIONS
from detrojan.study import files, grid
from detrojan.workflow import graph
from detrojan.workflow.site import Site
from tests.command import exit_code
from tests.unit.test_schema import minimal

TARGET = 0
# Six test images of three classes. Those that don't show the target count as triggered.
LABELS = [0, 0, 1, 1, 1, 2]
TRIGGERED = [2, 3, 4, 5]  # rows of the test set, of true classes 1, 1, 1, 2
# Of the untouched model, then of three draws of a defense.
UNTOUCHED = ([0, 0, 1, 1, 2, 2], [0, 0, 0, 0])
DRAWS = {
    0: ([0, 1, 1, 1, 2, 2], [0, 1, 2, 0]),
    1: ([0, 0, 1, 1, 1, 2], [1, 1, 1, 2]),
    2: ([0, 0, 0, 0, 0, 0], [1, 0, 1, 2]),
}
# Measure: class, value of each draw, images behind it.
BY_HAND = {
    "acc": [(None, (4 / 6, 1, 2 / 6), 6)],
    "asr": [(None, (2 / 4, 0, 1 / 4), 4)],
    "ra": [(None, (1 / 4, 1, 3 / 4), 4)],
    "class_acc": [(0, (1 / 2, 1, 1), 2), (1, (2 / 3, 1, 0), 3), (2, (1, 1, 0), 1)],
    "class_asr": [(0, (2 / 4, 0, 1 / 4), 4)],
    "class_ra": [(1, (1 / 3, 1, 2 / 3), 3), (2, (0, 1, 1), 1)],
    "source_asr": [(1, (1 / 3, 0, 1 / 3), 3), (2, (1, 0, 0), 1)],
    # The untouched model says 2 of the fifth image.
    "agreement": [(None, (5 / 6, 5 / 6, 2 / 6), 6)],
    "triggered_agreement": [(None, (2 / 4, 0, 1 / 4), 4)],
}
WORST_SOURCES = [(2, 1, 1), (1, 0, 3), (1, 1 / 3, 3)]  # label, value, images; a tie in draw 1


def classes(values):
    return np.array(values, np.int16)


def by_hand():
    clean, triggered = (classes(part) for part in zip(*DRAWS.values(), strict=True))
    true = classes(LABELS)[TRIGGERED]
    return Answers(
        clean, triggered, classes(LABELS), true, np.full_like(true, TARGET), *map(classes, UNTOUCHED)
    )


def made_up(num_draws=4, num_classes=7, num_images=300, *, all_to_all=False):
    """Return answers with errors at random; of class 6 there is no image."""
    rng = np.random.default_rng(0)

    def guess(*shape):
        return classes(rng.integers(0, num_classes, shape))

    labels = classes(rng.integers(0, num_classes - 1, num_images))
    wanted = (labels + 1) % num_classes if all_to_all else np.full_like(labels, TARGET)
    counts = wanted != labels
    sizes = (num_images, int(counts.sum()))
    said = [guess(num_draws, size) for size in sizes]
    return Answers(*said, labels, labels[counts], wanted[counts], *(guess(size) for size in sizes))


# --- the measures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_HAND)
def test_a_measure_by_hand(name):
    found = predictions.REGISTRY[name](by_hand())
    labels, values, counts = zip(*BY_HAND[name], strict=True)
    assert found.label.tolist() == [NO_LABEL if label is None else label for label in labels]
    assert found.value.T.tolist() == [list(value) for value in values]
    assert found.num_images.tolist() == list(counts)


def test_the_worst_source_class_by_hand():
    found = predictions.worst_source_asr(by_hand())
    columns = (found.label, found.value, found.num_images)
    assert list(zip(*(column[:, 0].tolist() for column in columns), strict=True)) == WORST_SOURCES


def test_every_measure_is_worked_out_by_hand():
    assert set(predictions.REGISTRY) == {*BY_HAND, "worst_source_asr"}


@pytest.mark.parametrize("all_to_all", [False, True])
def test_shares_against_scikit_learn(all_to_all):
    answers = made_up(all_to_all=all_to_all)
    registered = {name: function(answers) for name, function in predictions.REGISTRY.items()}
    shown = {
        "acc": (answers.labels, answers.clean),
        "asr": (answers.wanted_labels, answers.triggered),
        "ra": (answers.true_labels, answers.triggered),
        "agreement": (answers.untouched_clean, answers.clean),
        "triggered_agreement": (answers.untouched_triggered, answers.triggered),
    }
    for name, (expected, said) in shown.items():
        assert registered[name].value[:, 0].tolist() == [accuracy_score(expected, one) for one in said], name
    recalls = {"class_acc": shown["acc"], "class_ra": shown["ra"], "class_asr": shown["asr"]}
    for name, (expected, said) in recalls.items():
        labels = registered[name].label.tolist()
        assert labels == sorted(set(expected.tolist())), name
        for value, one in zip(registered[name].value, said, strict=True):
            np.testing.assert_array_equal(
                value, recall_score(expected, one, labels=labels, average=None), name
            )


@pytest.mark.parametrize("all_to_all", [False, True])
def test_source_classes_against_a_loop(all_to_all):
    answers = made_up(all_to_all=all_to_all)
    sources, worst = predictions.source_asr(answers), predictions.worst_source_asr(answers)
    for draw, said in enumerate(answers.triggered.tolist()):
        shares = {}
        for source in sources.label.tolist():
            rows = [row for row, true in enumerate(answers.true_labels.tolist()) if true == source]
            hits = sum(said[row] == answers.wanted_labels[row] for row in rows)
            shares[source] = float(Fraction(int(hits), len(rows)))
        assert sources.value[draw].tolist() == list(shares.values())
        label, value = worst.label[draw, 0], worst.value[draw, 0]
        assert value == max(shares.values()) == shares[label]
        assert worst.num_images[draw, 0] == (answers.true_labels == label).sum()


def test_without_triggered_images_theirs_is_undefined():
    clean = made_up()
    nothing = clean.triggered[:, :0]
    answers = Answers(
        clean.clean, nothing, clean.labels, *[nothing[0]] * 2, clean.untouched_clean, nothing[0]
    )
    for name, function in predictions.REGISTRY.items():
        value, num_images, _ = function(answers)
        of_clean = name in ("acc", "class_acc", "agreement")
        assert np.isnan(value).all() == (not of_clean), name
        assert value.shape == (
            4,
            6 if name == "class_acc" else 0 if "class" in name or name == "source_asr" else 1,
        )
        assert (num_images > 0).all() == of_clean or not num_images.size


# --- files -----------------------------------------------------------------------------------------

MODEL = Model("digits", "preactresnet18", "badnets", 0.1, 0)
CONTROLLED = MODEL._replace(attack="wanet")
CLEAN = MODEL._replace(attack=NO_METHOD, ratio=0.0)
FT = Shard(MODEL, "ft", 2, Draws(0, 3))


def write_labels(path, index, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    index = pa.array(index, pa.int32())
    pixels = pa.array([b"?"] * len(index))  # must not be read
    table = pa.table({"index": index, "image": pixels} | {k: classes(v) for k, v in columns.items()})
    records.write_table(table, path, table.schema)


def said(*draws, attacked=True, order=slice(None)):
    """Return a table of predictions: of the draws' numbers and answers."""
    tables = []
    for draw, (clean, triggered) in draws:
        parts = [(False, list(range(6)), clean), (True, TRIGGERED, triggered)][: 1 + attacked]
        for is_triggered, index, predicted in parts:
            columns = ([draw] * len(index), [is_triggered] * len(index), index[order], predicted)
            tables.append(pa.table(list(columns), PREDICTIONS.names).cast(PREDICTIONS))
    return pa.concat_tables([PREDICTIONS.empty_table(), *tables])


def mixed(column, values):
    """Return predictions of draw 0 with other values in a column."""
    table = said((0, DRAWS[0]))
    place = table.column_names.index(column)
    return table.set_column(place, table.field(place), pa.array(values, table.field(place).type))


@pytest.fixture
def results(tmp_path):
    """Return the results of a study: draw 3 of FT diverged, all of FP's did, nothing else was defended."""
    folder = tmp_path / "results"
    files.keep(minimal(attacks=["none", "badnets", "wanet"], draws=["0-3"], defenses=["ft", "fp"]), folder)
    write_labels(folder / "datasets/digits/test.parquet", range(6), label=LABELS)
    triggered = {"label": [TARGET] * 4, "true_label": [1, 1, 1, 2]}
    for place in ("digits/badnets/seed-0", graph.of_model(CONTROLLED)):
        write_labels(folder / "triggered" / place / "test.parquet", TRIGGERED, **triggered)

    def write(shard, table):
        records.write_predictions(table, Site(folder).predictions(shard))

    for model in (MODEL, CONTROLLED, CLEAN):
        untouched = Shard(model, NO_METHOD, NO_SAMPLES, ONE_DRAW)
        write(untouched, said((0, UNTOUCHED), attacked=model.attack != NO_METHOD))
    write(FT, said(*DRAWS.items()))
    write(FT._replace(defense="fp"), said())
    write(FT._replace(model=CONTROLLED), said((0, DRAWS[0])))
    write(FT._replace(model=CLEAN), said(*DRAWS.items(), attacked=False))
    return folder


def measured(results, *arguments):
    assert exit_code("measure", "--results", results, *arguments) == 0
    return records.read_table(results / "tables/measures.parquet", MEASURES)


def rows_of(table, shard, name):
    """Return label, value and images of the rows of a shard's measure, by draw."""
    found = {}
    for row in table.to_pylist():
        same = all(row[axis] == value for axis, value in shard.model._asdict().items())
        if same and (row["defense"], row["spc"], row["measure"]) == (shard.defense, shard.spc, name):
            found.setdefault(row["draw"], []).append((row["label"], row["value"], row["num_images"]))
    return found


def test_the_table_has_what_was_worked_out_by_hand(results):
    table = measured(results)
    for name, expected in BY_HAND.items():
        by_draw = {
            draw: [(label, values[draw], count) for label, values, count in expected] for draw in (0, 1, 2)
        }
        assert rows_of(table, FT, name) == by_draw | {3: [(label, None, 0) for label, _, _ in expected]}
    worst = rows_of(table, FT, "worst_source_asr")
    assert worst == {draw: [row] for draw, row in enumerate(WORST_SOURCES)} | {3: [(None, None, 0)]}
    controlled = rows_of(table, FT._replace(model=CONTROLLED), "asr")
    assert controlled == {0: [(None, 0.5, 4)], **{draw: [(None, None, 0)] for draw in (1, 2, 3)}}


def test_every_cell_has_a_row_of_each_measure_of_a_whole_cell(results, capsys):
    table = measured(results)
    shards = [*grid.shards(Site(results).study)]
    there = [shard for shard in shards if predictions.Reader(Site(results)).is_there(shard)]
    assert (len(shards), len(there)) == (9, 7)
    for shard in there:
        for name in ("acc", "asr", "ra", "worst_source_asr", "agreement", "triggered_agreement"):
            found = rows_of(table, shard, name)
            assert list(found) == list(shard.draws.numbers()), (shard, name)
            assert all(len(rows) == 1 for rows in found.values())
    assert rows_of(table, FT._replace(model=CLEAN), "asr")[0] == [(None, None, 0)]
    assert rows_of(table, FT._replace(defense="fp"), "class_acc")[2] == [
        (label, None, 0) for label in range(3)
    ]
    out = capsys.readouterr().out
    assert f"{len(table):,} rows, 10 measures of 19 cells." in out
    assert "2 more are planned and were left out" in out


def test_untouched_models_agree_with_themselves(results):
    table = measured(results, "--only", "agreement,triggered_agreement", "defense=none")
    assert [row["value"] for row in table.to_pylist()] == [1.0, None, 1.0, 1.0, 1.0, 1.0]


def test_selected_cells_and_measures(results, tmp_path):
    into = tmp_path / "few.parquet"
    arguments = [
        "--results",
        str(results),
        "--into",
        str(into),
        "attack=badnets",
        "--only",
        "ra,acc",
        "draw=2",
    ]
    assert exit_code("measure", *arguments) == 0
    table = records.read_table(into, MEASURES).to_pylist()
    assert [(row["defense"], row["draw"], row["measure"], row["value"]) for row in table] == [
        *(("ft", 2, "ra", 3 / 4), ("ft", 2, "acc", 2 / 6)),
        *(("fp", 2, "ra", None), ("fp", 2, "acc", None)),
    ]
    assert not (results / "tables").exists()


def test_lists_ranges_and_comparisons_select_cells_too(results, tmp_path):
    into = tmp_path / "few.parquet"
    asked = ["attack=badnets,wanet", "defense=ft", "spc=>=1", "draw=1-2,7", "--only", "acc"]
    assert exit_code("measure", "--results", results, "--into", into, *asked) == 0
    table = records.read_table(into, MEASURES).to_pylist()
    assert [(row["attack"], row["draw"]) for row in table] == [
        ("badnets", 1),
        ("badnets", 2),
        ("wanet", 1),
        ("wanet", 2),
    ]


def test_the_measures_are_listed(capsys):
    assert exit_code("measure", "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(predictions.REGISTRY)


def test_it_is_the_same_in_several_row_groups(results, monkeypatch):
    whole = measured(results)
    monkeypatch.setattr(measure, "ROWS_AT_ONCE", 50)
    parts = measured(results)
    assert parts.equals(whole)
    assert pq.read_metadata(results / "tables/measures.parquet").num_row_groups > 2


def test_it_reads_as_a_frame(results):
    table = measured(results)
    frame = detrojan.read_measures(results)
    assert len(frame) == len(table)
    assert frame["measure"].cat.categories.tolist() == sorted(predictions.REGISTRY)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "acc,agreemant"], "unknown measure 'agreemant'; there are acc, asr, ra"),
        (
            ["attack=badnet"],
            "no cell of the study has attack=badnet; there are badnets, none, wanet",
        ),
        (["attack=wanet", "defense=fp"], "no predictions of 1 planned shard, such as"),
        (["atack=badnets"], "unknown key 'atack'; did you mean 'attack'?"),
    ],
)
def test_what_can_not_be_measured(results, capsys, arguments, said):
    assert exit_code("measure", "--results", results, *arguments) == 1
    assert said in capsys.readouterr().err
    assert not (results / "tables").exists()


def test_a_folder_without_a_study(tmp_path, capsys):
    assert exit_code("measure", "--results", tmp_path) == 1
    assert "no study.yaml, so what was planned here is not known" in capsys.readouterr().err


def broken(results, capsys, path):
    assert exit_code("measure", "--results", results, "attack=badnets") == 1
    error = capsys.readouterr().err
    assert str(path) in error
    assert not (results / "tables/measures.parquet").exists()
    return error


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (said(*DRAWS.items(), order=slice(None, None, -1)), "its images, or their order, are not those of"),
        (said(*DRAWS.items(), attacked=False), "18 rows are no multiple of 10 test images"),
        (mixed("draw", [0] * 5 + [1] * 5), "its images, or their order, are not those of"),
        (mixed("triggered", [False] * 10), "its images, or their order, are not those of"),
        (said((0, DRAWS[0])).drop_columns("triggered"), "its columns are not this version's"),
    ],
)
def test_predictions_of_other_images(results, capsys, table, said):
    path = Site(results).predictions(FT)
    records.write_predictions(table, path)
    assert said in broken(results, capsys, path)


def test_test_sets_that_are_missing_or_broken(results, capsys):
    path = results / "triggered/digits/badnets/seed-0/test.parquet"
    shutil.move(path, path.with_suffix(".away"))
    assert "no such test set" in broken(results, capsys, path)
    path.write_bytes(b"PAR1 and no more")
    assert "not a whole test set" in broken(results, capsys, path)


def test_an_untouched_model_without_predictions_leaves_its_shards_out(results, capsys):
    Site(results).predictions(Shard(MODEL, NO_METHOD, NO_SAMPLES, ONE_DRAW)).unlink()
    table = measured(results)
    assert "badnets" not in table["attack"].to_pylist()
    assert "5 more are planned and were left out" in capsys.readouterr().out


def test_attacks_whose_trigger_is_their_own():
    assert registry.trigger_owner(MODEL.attack) == "all"
    assert registry.trigger_owner(CONTROLLED.attack) == "model"
