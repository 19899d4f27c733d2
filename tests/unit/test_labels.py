"""Label maps: what they promise for every label, number of classes and target."""

import pytest
import torch

from detrojan.labels import LabelMap

CASES = [(num_classes, target) for num_classes in (2, 10, 43, 200) for target in {0, 1, num_classes - 1}]


def all_labels(num_classes):
    return torch.arange(num_classes).repeat(3)


@pytest.mark.parametrize(("num_classes", "target"), CASES)
def test_all_to_one(num_classes, target):
    labels, label_map = all_labels(num_classes), LabelMap(target)
    attacked = label_map.attacked(labels, num_classes)
    assert attacked.tolist() == [target] * len(labels)
    # Once there, an image stays; and only images of other classes count.
    assert torch.equal(label_map.attacked(attacked, num_classes), attacked)
    assert torch.equal(label_map.counts(labels, num_classes), labels != target)
    assert label_map.single_target == target


@pytest.mark.parametrize(("num_classes", "target"), CASES)
def test_all_to_all(num_classes, target):
    labels, label_map = all_labels(num_classes), LabelMap(target, "all_to_all")
    attacked = label_map.attacked(labels, num_classes)
    # A permutation without a fixed point, of one cycle through all classes; the target plays no part.
    assert sorted(attacked.tolist()) == sorted(labels.tolist())
    assert label_map.counts(labels, num_classes).all()
    moved = labels
    for step in range(1, num_classes + 1):
        moved = label_map.attacked(moved, num_classes)
        assert torch.equal(moved, labels) == (step == num_classes)
    assert attacked[0] == 1
    assert attacked[num_classes - 1] == 0
    assert label_map.single_target is None


def test_maps_are_pure():
    labels = torch.tensor([3, 0, 2])
    for kind in ("all_to_one", "all_to_all"):
        attacked = LabelMap(1, kind).attacked(labels, 4)
        assert attacked.dtype == torch.int64
        assert attacked is not labels
        assert labels.tolist() == [3, 0, 2]
    assert LabelMap(1, "all_to_all").attacked(labels, 4).tolist() == [0, 1, 3]


def test_a_study_may_name_its_target():
    assert LabelMap.of(("cat", "dog"), target="dog", kind="all_to_one") == LabelMap(1)
    assert LabelMap.of(("cat", "dog"), target=1, kind="all_to_all") == LabelMap(1, "all_to_all")
    with pytest.raises(ValueError, match=r"no class 'emu': classes are cat, dog"):
        LabelMap.of(("cat", "dog"), target="emu", kind="all_to_one")
