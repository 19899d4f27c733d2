"""The benchmark of Grad-Prune's variants: which settings each has, and a line of its output."""

import dataclasses

import pytest

import grad_prune_variants as benchmark
from detrojan.cells import Model
from detrojan.images import ImageSet
from detrojan.study import protocols

MODEL = Model("toy", "planted", "badnets", 0.1, 0)


@pytest.fixture
def given(planted, planted_sample):
    """Return the planted model; its test images are the validation images, class 0 is the target."""
    stamped = planted_sample.triggered.validation
    rows = stamped[stamped.labels == 1]
    triggered = ImageSet(rows.images, 0 * rows.labels, rows.index, rows.info, rows.labels)
    return benchmark.Given(planted, {0: planted_sample}, planted_sample.validation, triggered)


def test_variants_are_the_protocols_and_the_halves_of_ours(given):
    facts = benchmark._facts(given, MODEL, 10)
    settings = {name: benchmark.settings_of(name, facts) for name in benchmark.VARIANTS}
    for name, protocol in (("authors", "paper"), ("eval_scores", "survey"), ("mixed_joint", "ours")):
        assert settings[name] == ("grad_prune", protocols.settings("grad_prune", protocol, facts))

    def differing(first, second):
        pair = settings[first][1], settings[second][1]
        return {key for key in pair[0] if pair[0][key] != pair[1][key]}

    assert differing("joint", "eval_scores") == {"criterion"}
    assert differing("mixed", "eval_scores") == {"tuning_batch"}
    assert differing("mixed_joint_V", "mixed_joint") == {"accuracy_images"}
    assert settings["inverted_ours"] == (
        "grad_prune_inverted",
        protocols.settings("grad_prune_inverted", "ours", facts),
    )


def test_a_line_says_what_is_left_and_what_was_chosen(given):
    assert given.rates(given.model) == (100, 100, 0)
    line = benchmark.run("mixed_joint", given, MODEL, 10, 0, {"max_epochs": 1, "no_such": 3}).split()
    assert line[:4] == ["100.0", "0.0", "100.0", "1"]
    assert line[5] in {"yes", "no"}
    assert given.samples[0].chosen["pruned"] == ["conv:1"]


def test_losses_are_those_behind_the_pruning(given):
    text = benchmark.losses(given, 0)
    assert [part.split()[0] for part in text.split(", ")] == ["two_passes", "mixed", "eval"]
    # Without the planted filter nothing of the trigger is left, in whatever mode.
    assert float(text.split()[-1]) < 0.1


def test_an_inverted_trigger_is_found_without_the_real_one(given, monkeypatch):
    seen = []
    monkeypatch.setattr(
        benchmark.registry,
        "load",
        lambda kind, name, settings: lambda model, clean, rng: seen.append(clean) or model,
    )
    sample = dataclasses.replace(given.samples[0], chosen={})
    with pytest.raises(KeyError):  # nothing was chosen
        benchmark.run("inverted_ours", given._replace(samples={0: sample}), MODEL, 10, 0, {})
    assert seen[0].triggered is None
