"""Bad study files stop before the first job, with one line a mistake: where, what, what to do."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from detrojan.study import feasibility
from detrojan.study.files import StudyError, load_study

from . import forked

SNAKEFILE = Path(__file__).parents[2] / "Snakefile"
STUDY = """
pool: held_out
datasets:
  digits: {source: digits, image_size: 32, held_out: 0.1}
  signs: {source: image_folder, path: signs, image_size: 32, held_out: 0.5}
  shards: {source: huggingface_parquet, path: shards, image_size: 32, held_out: 0.5}
architectures:
  preactresnet18: {width: 4}
training: {epochs: 1}
attacks:
  blended: {alpha: 0.2}
defenses:
  ft: {epochs: 2}
grid:
  datasets: [digits]
  architectures: [preactresnet18]
  attacks: [none, badnets]
  ratios: [0.1]
  defenses: [none, ft, fp]
  spc: [2]
  draws: [0-1]
"""
GONE = "(left out)"

# Where in the study file; the YAML put there; how the line that says what is wrong goes on after the place.
CASES = [
    # --- keys
    ("sedes", "[0]", ": unknown key 'sedes'; "),
    ("grid.defence", "[ft]", ": unknown key 'defence'; did you mean 'defenses'?"),
    ("datasets.digits.imgsize", "32", ": unknown key 'imgsize'; did you mean 'image_size'?"),
    ("datasets.signs.pth", "x", ": unknown key 'pth'; did you mean 'path'?"),
    ("datasets.digits.augmentation", "{flipp: true}", ".flipp: unknown key 'flipp'; did you mean 'flip'?"),
    ("grid.exclude", "[{model: preactresnet18}]", "[0].model: unknown key 'model'; "),
    ("training.learning_rate", "0.1", ": unknown key 'learning_rate'; there are epochs, batch_size, lr, "),
    ("defenses.ft.epoch", "5", ": unknown key 'epoch'; did you mean 'epochs'?"),
    (
        "defenses.ft.overrides",
        "[{when: {spc: 2}, set: {epoch: 5}}]",
        "[0].set.epoch: unknown key 'epoch'; did you mean 'epochs'?",
    ),
    ("pool", GONE, ": missing: where the defender's images come from"),
    ("grid.spc", GONE, ": missing: clean samples per class that the defender holds"),
    ("datasets.signs.path", GONE, ": missing: folder that holds"),
    ("grid", GONE, ": missing: the axes of the study"),
    # --- types
    ("training.epochs", "many", ": should be a whole number, found 'many'"),
    ("training.epochs", "1.5", ": should be a whole number, found 1.5"),
    ("grid.spc", "2", ": should be a list, such as [a, b], found 2"),
    ("training", "fast", ": should be keys with values, found 'fast'"),
    ("defenses", "", ": should be keys with values, found nothing"),
    ("datasets", "[digits]", ": should be keys with values, found ['digits']"),
    ("training.epochs", "yes", ": True is a truth value (YAML reads"),
    ("grid.seeds", "[0, on]", ": True is a truth value (YAML reads yes, no"),
    ("keep_defended", "perhaps", ": should be true or false, found 'perhaps'"),
    ("training.lr", ".inf", ": should be a finite number, found inf"),
    ("training.weight_decay", ".nan", ": should be a finite number, found nan"),
    ("defenses.ft.lr", "'inf'", ": should be a finite number, found 'inf'"),
    # --- ranges
    ("grid.attacks", "[]", ": should have at least 1 item, found []"),
    ("datasets", "{}", ": should have at least 1 item, found {}"),
    ("grid.ratios", "[0]", "[0]: should be greater than 0, found 0"),
    ("grid.ratios", "[0.1, 1]", "[1]: should be less than 1, found 1"),
    ("grid.ratios", "[-0.1]", "[0]: should be greater than 0, found -0.1"),
    ("grid.ratios", "[10%]", "[0]: should be a number, found '10%'"),
    ("grid.spc", "[0]", "[0]: should be greater than or equal to 1, found 0"),
    ("grid.seeds", "[-1]", "[0]: should be greater than or equal to 0, found -1"),
    ("target", "-1", ": should be greater than or equal to 0 or text, found -1"),
    ("datasets.digits.image_size", "8", ": should be greater than or"),
    ("datasets.digits.held_out", "1.0", ": should be less than 1, found 1.0"),
    ("attacks.blended.alpha", "20", ": should be less than or equal to 1, found 20"),
    ("architectures.preactresnet18.width", "0", ": should be greater"),
    ("training.schedule", "linear", ": should be 'cosine' or 'constant', found"),
    ("pool", "test", ": should be 'held_out' or 'train', found 'test'"),
    ("grid.draws", "[5-2]", "[0]: '5-2' ends before it starts: write the smaller"),
    ("grid.draws", "[a-b]", "[0]: 'a-b' is no range of draws: write one as 0-9"),
    ("grid.draws", "[0-4, 3-9]", ": draws 0-4 and 3-9 overlap: give each draw to"),
    ("grid.ratios", "[0.1, 0.10]", ": 0.1 stands there more than once: remove"),
    ("grid.draws", "[0-4, 0-4]", ": 0-4 stands there more than once: remove"),
    # --- huge values
    ("grid.seeds", "[2147483648]", ": should be at most 2,147,483,647, found 2147483648"),
    ("training.epochs", "9223372036854775808", ": should be at most 2,147,483,647, found "),
    ("defenses.ft.epochs", "1" + 300 * "0", ": should be at most 2,147,483,647, found 1000"),
    ("grid.draws", "[4294967296]", ": should be at most 2,147,483,647, found 4294967296"),
    ("grid.draws", "[0-99999999999]", ": draw 99999999999 is more than 2,147,483,647"),
    ("grid.draws", "[0-20000]", ": 0-20000 are more than 10,000 draws, which one job takes: split them"),
    (
        "datasets.digits.augmentation",
        "{crop_padding: 1000000000}",
        ".crop_padding: should be less than or equal to 511",
    ),
    # --- names
    ("grid.datasets", "[digit]", "[0]: unknown name 'digit'; did you mean 'digits'?"),
    ("grid.architectures", "[preactresnet-18]", "[0]: unknown name 'preact"),
    ("grid.attacks", "[badnet]", "[0]: unknown name 'badnet'; did you mean 'badnets'?"),
    ("grid.defenses", "[ft, fp, clip]", "[2]: unknown name 'clip'; did you mean 'clp'?"),
    ("defenses.fpp", "{}", ": unknown name 'fpp'; did you mean 'fp'?"),
    ("defenses.none", "{}", ": unknown name 'none'; "),
    ("datasets.digits.source", "digit", ": unknown name 'digit'; did you mean"),
    ("grid.include", "[{attack: bdnets}]", "[0].attack: unknown name 'bdnets'"),
    ("datasets.a/b", "{source: digits, image_size: 32}", ": the name becomes part of"),
    ("datasets.größe", "{source: digits, image_size: 32}", ": the name becomes"),
    ("grid.datasets", "[7]", "[0]: should be text, found 7"),
    # --- filters and overrides
    ("grid.exclude", "[{ratio: above 0.1}]", "[0].ratio: 'above 0.1' is no condition: "),
    ("grid.exclude", "[{spc: '> ten'}]", "[0].spc: '> ten' is no condition: write"),
    ("grid.exclude", "[{attack: }]", "[0].attack: should be a name or a list of names"),
    ("grid.exclude", "[{}]", "[0]: without a condition it matches all: name one of"),
    ("grid.exclude", "{attack: sig}", ": should be a list, such as [a, b], found"),
    ("training.overrides", "[{set: {lr: 0.1}}]", "[0].when: missing: the"),
    (
        "attacks.blended.overrides",
        "[{when: {ratio: 0.1}, set: {alpha: 0.3}}]",
        "[0].when.ratio: one trigger serves every ratio: use dataset, attack, seed",
    ),
    # --- what doesn't go together
    ("grid.defenses", "[none, clp]", ": ft and fp missing, the baselines that every"),
    ("grid.defenses", "[none, ft]", ": fp missing, the baselines that every table"),
    ("datasets.digits.held_out", "0", ": with pool: held_out the"),
    ("datasets.digits.mean", "[125, 123, 114]", "[0]: should be less than or equal to 1, found 125"),
    # --- found by counting
    ("target", "10", ": 10 is no label of data set digits, whose labels are 0"),
    ("grid.spc", "[2, 15]", ": 15 clean samples per class, but class 0 of digits has"),
    ("grid.ratios", "[1e-5]", ": badnets at ratio 1e-05 on digits poisons none of"),
]
FOUND_ELSEWHERE = [
    (
        "datasets.digits.augmentation",
        "{crop_padding: 32}",
        "datasets.digits: augmentation.crop_padding is 32, so that a crop of 32 pixels can miss the image",
    ),
    (
        "datasets.digits.mean",
        "[0.5, 0.5, 0.5]",
        "datasets.digits: give both mean and std, or neither to have them measured",
    ),
    (
        "grid.attacks",
        "[sig]",
        "grid.ratios: sig at ratio 0.1 on digits needs 130 of 1299 training images, all of class 0",
    ),
    ("grid.exclude", "[{dataset: digits}]", "grid: include and exclude leave no model"),
    ("grid.datasets", "[signs]", "datasets.signs: signs/train: no such folder; path must name"),
    ("grid.datasets", "[shards]", "datasets.shards: shards: no file like train-*.parquet"),
]


def changed(place, text):
    """Return the study with YAML put at a place."""
    study = yaml.safe_load(STUDY)
    *parents, last = place.split(".")
    where = study
    for key in parents:
        where = where[key]
    if text == GONE:
        del where[last]
    else:
        where[last] = yaml.safe_load(text)
    return study


def mistakes(study):
    with pytest.raises(StudyError) as caught:
        feasibility.check(load_study(study))
    assert str(caught.value).startswith("the study file has ")
    return caught.value.mistakes


def test_the_study_is_right_without_the_mistakes():
    feasibility.check(load_study(yaml.safe_load(STUDY)))


LINES = [(place, text, place + said) for place, text, said in CASES] + FOUND_ELSEWHERE


@pytest.mark.parametrize(("place", "text", "line"), LINES)
def test_mistake_is_named(place, text, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no data set lies
    found = mistakes(changed(place, text))
    assert [said for said in found if said.startswith(line)], found
    places = [said.partition(": ")[0] for said in found]
    assert len(places) == len(set(places)), found
    assert not [said for said in found if "\n" in said or "pydantic" in said or "Input" in said]


def test_not_a_mapping():
    assert mistakes(["grid"]) == ["study file: should be keys with values, found ['grid']"]


# --- broken data -----------------------------------------------------------------------------------


def images(folder, splits=("train", "test"), classes=("a", "b"), number=4):
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for row in range(number):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / split / name / f"{row}.png")


def shards(folder, labels=(0, 0, 1, 1)):
    folder.mkdir()
    for split in ("train", "test"):
        table = pa.table({"image": [b""] * len(labels), "label": list(labels)})
        pq.write_table(table, folder / f"{split}.parquet")


def empty_class(folder):
    images(folder / "signs")
    for file in (folder / "signs" / "train" / "b").iterdir():
        file.unlink()


def missing_test_class(folder):
    images(folder / "signs", ["train"])
    images(folder / "signs", ["test"], ["a"])


def one_class(folder):
    images(folder / "signs", classes=["a"])


def corrupt_parquet(folder):
    shards(folder / "shards")
    file = folder / "shards" / "train.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def gap_in_the_labels(folder):
    shards(folder / "shards", [0, 0, 2, 2])


def no_labels(folder):
    (folder / "shards").mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table({"image": [b""]}), folder / "shards" / f"{split}.parquet")


@pytest.mark.parametrize(
    ("dataset", "prepare", "line"),
    [
        ("signs", empty_class, "datasets.signs: signs/train/b: a class folder without images"),
        (
            "signs",
            missing_test_class,
            "datasets.signs: signs/test/b: no such class folder, but train has one",
        ),
        ("signs", one_class, "datasets.signs: it has one class, but an attack needs a target and another"),
        ("shards", corrupt_parquet, "datasets.shards: shards/train.parquet: not a whole Parquet file"),
        ("shards", gap_in_the_labels, "datasets.shards: train: no training image of class 1 (1)"),
        (
            "shards",
            no_labels,
            "datasets.shards: 2 problems: shards/train.parquet: no column label; it has image",
        ),
    ],
)
def test_broken_data_is_named(dataset, prepare, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    found = mistakes(changed("grid.datasets", f"[{dataset}]"))
    assert found[0].startswith(line)


# --- by the real command ---------------------------------------------------------------------------


def run(folder, study):
    """Run the workflow, not dry, on a study file in an empty folder; return its exit code and output."""
    (folder / "study.yaml").write_text(study)
    arguments = ["--snakefile", SNAKEFILE, "--cores", "1", "--configfile", "study.yaml"]
    done = forked.snakemake(arguments, folder, dict(os.environ))
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("place", "text", "lines"),
    [
        ("grid.defence", "[ft]", ["  grid.defence: unknown key 'defence'; did you mean 'defenses'?"]),
        (
            "training",
            "{epochs: yes, lr: .inf, weight_decay: 1e-3}",
            [
                "the study file has 2 mistakes:",
                "  training.epochs: True is a truth value (YAML reads yes, no, on and off so)",
                "  training.lr: should be a finite number, found inf",
            ],
        ),
        (
            "grid.attacks",
            "[sig]",
            ["  grid.ratios: sig at ratio 0.1 on digits needs 130 of 1299 training images, all of class 0"],
        ),
        (
            "grid.spc",
            "[15]",
            ["  grid.spc: 15 clean samples per class, but class 0 of digits has only 14 in the "],
        ),
        (
            "grid.datasets",
            "[signs]",
            ["  datasets.signs: signs/train: no such folder; path must name a folder that "],
        ),
    ],
)
def test_the_command_says_it_and_leaves_nothing(place, text, lines, tmp_path):
    code, output = run(tmp_path, yaml.safe_dump(changed(place, text)))
    assert code == 1
    said = output.splitlines()
    for line in lines:
        assert [row for row in said if row.startswith(line)], output
    # Snakemake adds where in the Snakefile it was: no wall.
    assert "Traceback" not in output
    assert len(said) <= len(lines) + 5, output
    assert sorted(path.name for path in tmp_path.iterdir()) == [".snakemake", "study.yaml"]


@pytest.mark.parametrize(
    ("study", "line"),
    [
        ("grid: {ratios: [0.1\n", "study.yaml, line 2: expected ',' or ']', but got '<stream end>'"),
        ("- grid\n", "study.yaml: no keys with values at its top, such as `key: value`"),
        ("target: 1\ntarget: 2\n", "study.yaml, line 2: key 'target' stands there twice"),
        ("__use_yte__: true\ntarget: ?open('ran', 'w').write('1')\n", "study.yaml: __use_yte__ would run"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_told_with_its_line(study, line, tmp_path):
    code, output = run(tmp_path, study)
    assert code == 1
    assert line in output
    assert "Traceback" not in output
    assert not (tmp_path / "ran").exists()


def test_a_name_that_no_path_can_hold_is_refused():
    study = changed("grid.datasets", f"[{300 * 'a'}]")
    study["datasets"][300 * "a"] = study["datasets"]["digits"]
    found = mistakes(study)
    assert "datasets.aaaaaaaaaaaaaaaaaaaa...: a name of 300 characters; at most 64 can be" in found
