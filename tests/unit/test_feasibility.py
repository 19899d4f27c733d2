"""What planning refuses, with the numbers, and what it lets pass."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from detrojan.datasets.digits import Digits
from detrojan.study import feasibility
from detrojan.study.feasibility import _rounded, check
from detrojan.study.files import StudyError, load_study
from tests.unit.test_schema import minimal

ROOT = Path(__file__).parents[2]
TRAIN = {0: 143, 1: 146, 2: 142, 3: 147, 4: 145, 5: 146, 6: 145, 7: 144, 8: 140, 9: 144}  # 1,442 digits


def mistakes(*, pool="train", target=0, dataset=(), **grid):
    raw = minimal(**grid) | {"pool": pool, "target": target}
    raw["datasets"]["digits"] |= dict(dataset)
    with pytest.raises(StudyError) as caught:
        check(load_study(raw))
    return caught.value.mistakes


@pytest.fixture
def counts(monkeypatch):
    """Let the digits have other numbers of images."""

    def use(train, test):
        numbers = {"train": Counter(train), "test": Counter(test)}
        monkeypatch.setattr(Digits, "counts", lambda self, split: numbers[split])

    return use


def test_a_possible_study_passes():
    check(load_study(minimal(attacks=["badnets", "sig"], ratios=[0.01, 0.09], spc=[140])))


def test_clean_label_attack_above_its_class():
    [line] = mistakes(attacks=["badnets", "sig"], ratios=[0.09, 0.1])
    # 143 of 1,442 images are 9.917 %.
    assert line == (
        "grid.ratios: sig at ratio 0.1 on digits needs 144 of 1442 training images, all of class 0, which "
        "has 143: it can go up to 0.09916; leave the cells out with grid.exclude: "
        '[{attack: sig, dataset: digits, ratio: "> 0.09916"}]'
    )
    suggested = [{"attack": "sig", "dataset": "digits", "ratio": "> 0.09916"}]
    check(load_study(minimal(attacks=["badnets", "sig"], ratios=[0.09, 0.1], exclude=suggested)))
    check(load_study(minimal(attacks=["sig"], ratios=[0.09916])))


def test_the_survey_example(counts):
    counts({0: 210, 1: 38999}, {0: 60, 1: 690})
    [line] = mistakes(attacks=["sig"], ratios=[0.1, 0.005])
    assert "needs 3921 of 39209 training images, all of class 0, which has 210" in line
    assert "up to 0.005355" in line


def test_held_out_images_cannot_be_poisoned():
    grid = {"attacks": ["sig"], "ratios": [0.099]}
    check(load_study(minimal(**grid)))
    # 4 of 10 images of each class stay for training: the ratio is of those, 40, and so is the class.
    assert "needs 5 of 40 training images, all of class 0, which has 4" in "\n".join(
        mistakes(attacks=["sig"], ratios=[0.12], pool="held_out", dataset={"held_out": 0.6, "per_class": 10})
    )


def test_ratio_below_one_image():
    [line] = mistakes(ratios=[0.0001])
    assert line.startswith("grid.ratios: badnets at ratio 0.0001 on digits poisons none of its 1442 training")
    assert line.endswith("the ratio must be at least 0.0006935")
    check(load_study(minimal(ratios=[0.0006935])))


@pytest.mark.parametrize("numerator", [1, 7, 143, 999, 9999])
def test_suggested_ratios_hold(numerator):
    exact = numerator / 12345
    assert float(_rounded(exact)) <= exact <= float(_rounded(exact, up=True))
    assert float(_rounded(exact)) == pytest.approx(exact, rel=1e-3)


def test_more_samples_than_the_smallest_class():
    assert mistakes(spc=[2, 141, 200]) == [
        f"grid.spc: {spc} clean samples per class, but class 8 of digits has only 140 in the defender's pool "
        "(train): lower it, add images, or leave the cells out with grid.exclude: "
        '[{dataset: digits, spc: "> 140"}]'
        for spc in (141, 200)
    ]


def test_more_samples_than_were_held_out():
    [line] = mistakes(pool="held_out", spc=[15], dataset={"held_out": 0.1})
    assert "class 0 of digits has only 14 in the defender's pool (held_out)" in line
    assert "raise datasets.digits.held_out above 0.1" in line


def test_only_planned_samples_count():
    check(load_study(minimal(spc=[2, 200], exclude=[{"spc": "> 100"}])))
    check(load_study(minimal(spc=[200], defenses=["clp"], controls=False)))


def test_per_class_limits_the_pool():
    [line] = mistakes(spc=[13], dataset={"per_class": 12})
    assert "has only 12" in line


def test_chosen_classes_are_counted_by_their_new_numbers(counts):
    counts({0: 30, 1: 5, 2: 20}, {0: 3, 1: 3, 2: 3})
    [line] = mistakes(spc=[25], dataset={"classes": [2, 0]})
    assert "class 0 of digits has only 20" in line
    [line] = mistakes(dataset={"classes": [2, 7]})
    assert line == "datasets.digits: classes: there is no label 7: labels are 0 to 2"
    raw = minimal()
    raw["datasets"]["digits"]["classes"] = [2, 2]
    with pytest.raises(StudyError, match=r"datasets\.digits\.classes.*more than once"):
        load_study(raw)


def test_target_outside_the_classes():
    lines = mistakes(target=10)
    assert "target: 10 is no label of data set digits, whose labels are 0 to 9" in lines


def test_the_target_may_be_a_name(counts):
    check(load_study(minimal() | {"target": "3"}))
    assert "target: x is no label of data set digits, whose classes are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in (
        mistakes(target="x")
    )
    # After the choice of classes, whose numbers are new.
    assert "target: 3 is no label of data set digits, whose classes are 5, 4" in (
        mistakes(target="3", dataset={"classes": ["5", 4]})
    )
    counts({0: 10, 1: 10}, {1: 5})
    assert "all 5 test images of digits are of class 1" in mistakes(target="1")[0]


def test_a_gap_among_the_labels_is_refused_only_where_it_is_used(counts):
    counts({0: 30, 2: 30}, {0: 3, 2: 3})
    assert mistakes()[0].startswith(
        "datasets.digits: train: no training image of class 1 (1); 1 of 3 classes"
    )
    raw = minimal()
    raw["datasets"]["digits"]["classes"] = [2, 0]
    check(load_study(raw))


def test_one_class_is_not_enough(counts):
    counts({0: 10}, {0: 10})
    assert mistakes() == ["datasets.digits: it has one class, but an attack needs a target and another class"]


def test_only_target_images_to_test_on(counts):
    counts({0: 10, 1: 10}, {0: 5})
    assert "all 5 test images of digits are of class 0" in mistakes()[0]


def test_filters_that_leave_nothing():
    assert mistakes(exclude=[{"attack": "badnets"}]) == [
        "grid: include and exclude leave no model: widen include, or narrow exclude"
    ]


def test_held_out_share_that_leaves_nothing_to_train_on():
    [line] = mistakes(pool="held_out", dataset={"held_out": 0.9, "per_class": 2})
    assert line.startswith("datasets.digits: class 0 has 2 training images, and held_out 0.9 reserves 2")


def test_missing_source_and_other_mistakes_are_listed_together(tmp_path):
    raw = minimal(datasets=["digits", "signs"], spc=[500])
    raw["datasets"]["signs"] = {"source": "image_folder", "path": str(tmp_path / "no"), "image_size": 32}
    with pytest.raises(StudyError) as caught:
        check(load_study(raw))
    spc, missing = caught.value.mistakes
    assert spc.startswith("grid.spc: 500")
    assert missing.startswith(f"datasets.signs: {tmp_path}/no/train: no such folder")


def test_what_may_be_wrong_with_a_source_is_told(monkeypatch, caplog):
    monkeypatch.setattr(Digits, "left_out", lambda self: {"too dark": ["a.png", "b.png"]})
    check(load_study(minimal()))
    assert caplog.messages == ["datasets.digits: left out, too dark: 2 files: a.png, b.png"]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"train": "/data/train-*"}, "train: /data/train-* should be relative to path: put the folder there"),
        ({"path": "$NOWHERE/x"}, "path: $NOWHERE/x: the environment has no $NOWHERE; set it"),
    ],
)
def test_settings_that_a_source_refuses_are_one_line(settings, line):
    raw = minimal(datasets=["shards"])
    raw["datasets"]["shards"] = {"source": "huggingface_parquet", "path": "x", "image_size": 32} | settings
    with pytest.raises(StudyError) as caught:
        check(load_study(raw))
    [said] = caught.value.mistakes
    assert said.startswith(f"datasets.shards.{line}")
    assert "\n" not in said


def test_data_sets_without_cells_are_not_looked_at(tmp_path):
    raw = minimal(datasets=["digits", "signs"], exclude=[{"dataset": "signs"}])
    raw["datasets"]["signs"] = {"source": "image_folder", "path": str(tmp_path / "no"), "image_size": 32}
    check(load_study(raw))


def test_digits_are_those_counted_here():
    images = feasibility._counts(load_study(minimal()), "digits", Digits())
    assert images.train == TRAIN
    assert images.train.total() == 1442


def test_images_that_an_architecture_cannot_take_are_refused():
    raw = minimal(architectures=["preactresnet18", "vgg19_bn"])
    raw["datasets"]["digits"]["image_size"] = 31
    with pytest.raises(
        StudyError, match=r"datasets.digits.image_size: 31 pixels, but vgg19_bn takes"
    ) as caught:
        check(load_study(raw))
    assert len(caught.value.mistakes) == 1


def test_images_of_a_side_that_an_attack_cannot_take_are_refused():
    raw = minimal(attacks=["badnets", "iab", "ssba"])
    raw["datasets"]["digits"]["image_size"] = 24  # three times 8, but no multiple of 16
    with pytest.raises(StudyError) as caught:
        check(load_study(raw))
    [line] = caught.value.mistakes
    assert line == (
        "datasets.digits.image_size: 24 pixels, but ssba takes multiples of 16: change it, or leave the "
        "attack out"
    )


def test_a_share_of_each_batch_may_be_less_than_an_image():
    # 1,442 images: one in 1e-5 is none of a data set, but some batches get one.
    check(load_study(minimal(attacks=["iab", "wanet", "bpp"], ratios=[0.00001])))


def test_the_survey_is_feasible_and_its_exclusions_are_needed(counts):
    """With the images of the real data sets; the digits stand in for their files."""
    raw = yaml.safe_load((ROOT / "config" / "survey.yaml").read_text())
    files = ("source", "layout", "path", "download")
    datasets = {
        name: {"source": "digits"} | {key: value for key, value in own.items() if key not in files}
        for name, own in raw["datasets"].items()
    }
    for name, (of_target, total, num_classes) in SURVEY.items():
        others = dict.fromkeys(range(1, num_classes), (total - of_target) // (num_classes - 1))
        others[1] += total - of_target - sum(others.values())
        counts({0: of_target} | others, {0: 50, 1: 50})
        study = raw | {"datasets": datasets, "grid": raw["grid"] | {"datasets": [name]}}
        check(load_study(study))
        if name != "cifar10":
            unfiltered = study | {"grid": {k: v for k, v in study["grid"].items() if k != "exclude"}}
            with pytest.raises(StudyError) as caught:
                check(load_study(unfiltered))
            assert [line.partition(" on ")[0] for line in caught.value.mistakes] == [
                f"grid.ratios: sig at ratio {ratio}" for ratio in ("0.01", "0.05", "0.1")
            ]


SURVEY = {"cifar10": (5000, 50000, 10), "gtsrb": (210, 39209, 43), "tiny_imagenet": (500, 100000, 200)}
