"""NC: what it flags, what it trains on, and what it leaves alone."""

import copy
import dataclasses
import json

import pytest
import torch

from detrojan import registry, rng
from detrojan.defenses._parts.inversion import TriggerInversion, Triggers
from detrojan.defenses.clean_data.nc import NC, with_stamped
from detrojan.errors import NotApplicableError
from detrojan.images import concatenate
from detrojan.learning import training
from detrojan.study import protocols
from detrojan.study.schema import shipped

# A search small enough for a test, which still finds the planted patch (see test_inversion).
QUICK = {"inversion_epochs": 80, "min_steps": 1, "inversion_lr": 0.2, "max_images": 20}


def defend(defense, model, clean):
    return defense(model, clean, rng=rng.stream("test"))


def triggers(norms, side):
    """Return full masks of one colour a class: class 0 is stamped 0, class 1 is stamped 51, and so on."""
    count = len(norms)
    colour = torch.arange(count).view(-1, 1, 1, 1) / 5
    return Triggers(
        masks=torch.ones(count, 1, side, side),
        patterns=colour.expand(count, 3, side, side),
        norms=torch.tensor(norms, dtype=torch.float64),
        hit_rates=torch.ones(count, dtype=torch.float64),
        reached=torch.ones(count, dtype=torch.bool),
        num_images=4,
        num_steps=8,
        capped=False,
    )


def test_rows_are_replaced_by_stamped_copies_of_true_labels(sample):
    images, rows = sample.everything, torch.tensor([3, 5, 8])
    mixed = with_stamped(images, rows, triggers([1.0] * 4, 8), [2, 1])
    assert len(mixed) == len(images) - 3 + 2 * 3
    assert torch.equal(mixed.images[-6:-3], torch.full_like(images.images[rows], 102))
    assert torch.equal(mixed.images[-3:], torch.full_like(images.images[rows], 51))
    for part in (mixed.labels[-6:-3], mixed.labels[-3:]):
        assert torch.equal(part, images.labels[rows])
    assert not torch.isin(images.index[rows], mixed.index[:-6]).any()
    assert torch.isin(images.index, mixed.index).all()


def test_a_fifth_of_every_class_is_stamped_once_a_flag(toy_model, sample, monkeypatch):
    seen = []

    def fit(model, images, optimization, **kwargs):
        seen.append((images, optimization, kwargs["augmentation"]))

    monkeypatch.setattr(training, "fit", fit)
    # Median 13, deviations 12, 10, 0, 0, 1: classes 0 and 1 are far below.
    found = triggers([1.0, 13.0, 14.0, 12.5], 8)
    monkeypatch.setattr(TriggerInversion, "invert", lambda *args, **kwargs: found)
    defend(NC(), toy_model, sample)
    ((images, optimization, augmentation),) = seen
    assert sample.chosen["flagged"] == [0]
    assert sample.chosen["num_stamped"] == 8
    assert len(images) == 40
    assert torch.bincount(images.labels[-8:]).tolist() == [2, 2, 2, 2]
    assert (images.images[-8:] == 0).all()
    assert (images.images[:-8] != 0).flatten(1).any(1).all()
    assert (optimization.epochs, optimization.lr, optimization.batch_size) == (100, 0.01, 256)
    assert augmentation == sample.train.info.augmentation


def test_tiny_imagenet_is_tuned_for_200_epochs():
    assert protocols.settings("nc", "survey", {"num_classes": 200})["epochs"] == 200
    assert shipped("defenses", "nc").resolve({"num_classes": 43}) == {}


def test_a_model_without_a_flag_comes_back_as_it_was(toy_model, sample):
    clean = dataclasses.replace(sample, chosen={})
    # Fitted to noise images of honest labels: a clean model, whose classes are much alike.
    fitted = defend(registry.load("defenses", "ft", {"epochs": 60, "lr": 0.05}), toy_model, sample)
    before = copy.deepcopy(fitted.state_dict())
    returned = defend(NC(inversion_epochs=40, min_steps=1, inversion_lr=0.2), fitted, clean)
    assert clean.chosen["flagged"] == []
    assert clean.chosen["outcome"] == "no class flagged: model unchanged"
    assert max(clean.chosen["anomaly_index"]) > 0  # norms were measured and are no outliers
    assert returned is not fitted
    torch.testing.assert_close(returned.state_dict(), before, rtol=0, atol=0)


def test_two_classes_have_no_outlier(planted, planted_sample):
    with pytest.raises(NotApplicableError, match="2 classes"):
        defend(NC(), planted, planted_sample)


def test_removes_a_patch_and_says_which_class(backdoored):
    accuracy, asr, _ = backdoored.rates(backdoored.model)
    assert asr > 0.9
    tuning = {"epochs": 20, "batch_size": 16, "lr": 0.02}
    repaired = defend(NC(**QUICK, **tuning), backdoored.model, backdoored.sample)
    repaired_accuracy, repaired_asr, recovered = backdoored.rates(repaired)
    assert repaired_asr < 0.1
    assert recovered > 0.85
    assert repaired_accuracy > accuracy - 0.05
    chosen = backdoored.sample.chosen
    assert chosen["flagged"][0] == 0
    assert chosen["anomaly_index"][0] > 2
    assert min(chosen["mask_norm"]) == chosen["mask_norm"][0]
    assert chosen["hit_rate"][0] >= 0.98
    assert chosen["search_capped"] is True  # 20 of 100 images
    assert json.loads(json.dumps(chosen)) == chosen
    # The stamps are what removes it: as much plain fine-tuning leaves the backdoor open.
    plain = registry.load("defenses", "ft", tuning)
    assert backdoored.rates(defend(plain, backdoored.model, backdoored.sample))[1] > 0.8


def test_every_image_is_used(toy_model, sample, monkeypatch):
    seen = []

    def invert(self, model, images, *, rng):
        seen.append(images)
        return triggers([10.0] * 4, 8)

    monkeypatch.setattr(TriggerInversion, "invert", invert)
    defend(NC(), toy_model, sample)
    assert torch.equal(seen[0].images, concatenate(sample.train, sample.validation).images)
