"""What can be known to fail before the first job: missing sources, too few images, impossible ratios."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import pydantic

from detrojan import registry
from detrojan.cells import NO_METHOD, NO_SAMPLES, label_of
from detrojan.study import networks
from detrojan.study.files import StudyError, explain, wrong_shipped
from detrojan.study.grid import models, shards
from detrojan.study.schema import Dataset, MethodKind, Study
from detrojan.study.trials import TUNED

if TYPE_CHECKING:
    from detrojan.datasets.base import Source


logger = logging.getLogger(__name__)


def check(study: Study) -> None:
    """Count the images of each data set of the grid and check what the study asks of them.

    What may be wrong with a source without being an error is told in warnings.

    Only the main process calls it: jobs need not count again what was found right.

    Raises:
        StudyError: the filters leave nothing, the settings that come with a method are wrong, a source
            is missing or broken, or the study asks for more images than there are.
    """
    asked = list(dict.fromkeys(model.dataset for model in models(study)))
    if not asked:
        raise StudyError(["grid: include and exclude leave no model: widen include, or narrow exclude"])
    mistakes = [*_wrong_shipped(study)]
    if mistakes:
        raise StudyError(mistakes)  # what follows reads these files
    for name in asked:
        try:
            source = _source(study, name)
            images = _counts(study, name, source)
            for remark in source.remarks():
                logger.warning("datasets.%s: %s", name, remark)
        except pydantic.ValidationError as error:
            mistakes += wrong_source(error, name, study.datasets[name])
            continue
        except (ValueError, OSError) as error:
            mistakes.append(f"datasets.{name}: {error}")
            continue
        mistakes += _wrong_target(study, name, images)
        mistakes += _tuned_on_others(study, name, images)
        mistakes += _too_few_samples(study, name, images.pool)
        mistakes += _impossible_ratios(study, name, images)
        mistakes += _images_too_small(study, name)
        mistakes += _images_of_wrong_side(study, name)
    if mistakes:
        raise StudyError(mistakes)
    for network in filter(networks.unknown, study.networks):
        logger.warning("%s: unknown to the catalogue, so its first job checks it", network)


def wrong_source(error: pydantic.ValidationError, name: str, dataset: Dataset) -> list[str]:
    """Return what a source refused of its own settings when it was loaded, a line each."""
    kind = registry.declared("datasets", dataset.source).settings
    return explain(error, kind, dataset.source_settings, f"datasets.{name}")


def _wrong_shipped(study: Study) -> Iterator[str]:
    named: dict[MethodKind, list[str]] = {"attacks": study.grid.attacks, "defenses": study.grid.defenses}
    for kind, names in named.items():
        for name in names:
            if name != NO_METHOD:
                yield from wrong_shipped(kind, name)


class _Images(NamedTuple):
    """How many images each label has in training, in the defender's pool and in the test set; its name."""

    train: Counter[int]
    pool: Counter[int]
    test: Counter[int]
    names: list[str]


def _counts(study: Study, name: str, source: "Source") -> _Images:
    # Jobs parse this module too, and need neither numpy nor Pillow for that.
    from detrojan.datasets.base import refuse_missing_classes, selected, selected_counts, split_counts

    dataset, all_names = study.datasets[name], source.class_names()
    source.check_classes(dataset.classes)
    train, test = (
        selected_counts(source.counts(split), all_names, dataset.classes) for split in ("train", "test")
    )
    names = [all_names[label] for label in selected(all_names, dataset.classes)]
    refuse_missing_classes(train, names, "train")
    train, held_out = split_counts(train, dataset.held_out, dataset.per_class)
    return _Images(train, held_out if study.pool == "held_out" else train, test, names)


def _source(study: Study, name: str) -> "Source":
    dataset = study.datasets[name]
    source: Source = registry.load("datasets", dataset.source, dataset.source_settings)
    return source


def _target(study: Study, images: _Images) -> int | None:
    """Return the label that the attacker wants of a data set; None if it has no such label."""
    try:
        return label_of(study.target, images.names)
    except ValueError:
        return None


def _wrong_target(study: Study, name: str, images: _Images) -> Iterator[str]:
    target = _target(study, images)
    if len(images.names) < 2:
        yield f"datasets.{name}: it has one class, but an attack needs a target and another class"
    elif target is None:
        known = f"whose labels are 0 to {len(images.names) - 1}"
        if isinstance(study.target, str):
            known = f"whose classes are {', '.join(images.names[:10])}{', ...' * (len(images.names) > 10)}"
        yield f"target: {study.target} is no label of data set {name}, {known}"
    elif images.test.total() == images.test[target]:
        yield (
            f"target: all {images.test.total()} test images of {name} are of class {target}, so no image is "
            "left to measure the attack on: choose another target"
        )


def _tuned_on_others(study: Study, name: str, images: _Images) -> Iterator[str]:
    """Say that settings were chosen on a data set of another number of classes, whatever its name."""
    if study.tuned is None or TUNED not in study.grid.protocols:
        return
    named = study.tuned_as.get(name, name)
    classes = study.tuned.datasets[named].num_classes
    if classes != len(images.names):
        yield (
            f"tuned: its {named} has {classes} classes, {name} has {len(images.names)}: what was chosen is "
            f"for others; tune on {name}, or name with tuned_as what is like it"
        )


def _too_few_samples(study: Study, name: str, pool: Counter[int]) -> Iterator[str]:
    label, fewest = min(pool.items(), key=lambda item: (item[1], item[0]))
    wanted = {shard.spc for shard in shards(study) if shard.model.dataset == name} - {NO_SAMPLES}
    for spc in sorted(wanted):
        if spc > fewest:
            more = (
                f"raise datasets.{name}.held_out above {study.datasets[name].held_out:g}, take pool: train"
                if study.pool == "held_out"
                else "add images"
            )
            yield (
                f"grid.spc: {spc} clean samples per class, but class {label} of {name} has only {fewest} "
                f"in the defender's pool ({study.pool}): lower it, {more}, or leave the cells out with "
                f'grid.exclude: [{{dataset: {name}, spc: "> {fewest}"}}]'
            )


def _impossible_ratios(study: Study, name: str, images: _Images) -> Iterable[str]:
    total, target = images.train.total(), _target(study, images)
    asked = {(model.attack, model.ratio) for model in models(study) if model.dataset == name}
    for attack, ratio in sorted(asked):
        if attack == NO_METHOD or registry.trigger_owner(attack) == "model":
            continue  # a share of each batch, in expectation: any ratio is possible
        label_mode = registry.declared("attacks", attack).constants["label_mode"]
        if label_mode.endswith("CLEAN_LABEL") and target is None:
            continue
        pool = images.train[target] if target is not None and label_mode.endswith("CLEAN_LABEL") else total
        wanted = round(ratio * total)
        if wanted < 1:
            yield (
                f"grid.ratios: {attack} at ratio {ratio:g} on {name} poisons none of its {total} training "
                f"images: the ratio must be at least {_rounded(1 / total, up=True)}"
            )
        elif wanted > pool:
            most = _rounded(pool / total)
            yield (
                f"grid.ratios: {attack} at ratio {ratio:g} on {name} needs {wanted} of {total} training "
                f"images, all of class {target}, which has {pool}: it can go up to {most}; leave the "
                f'cells out with grid.exclude: [{{attack: {attack}, dataset: {name}, ratio: "> {most}"}}]'
            )


def _rounded(ratio: float, *, up: bool = False) -> str:
    """Return ``ratio`` with four digits, never on the far side of it: what it suggests must hold."""
    scale = 10.0 ** (3 - math.floor(math.log10(ratio)))
    return f"{(math.ceil if up else math.floor)(ratio * scale) / scale:.4g}"


def _images_too_small(study: Study, name: str) -> Iterator[str]:
    side = study.datasets[name].image_size
    asked = {model.architecture for model in models(study) if model.dataset == name}
    for architecture in sorted(asked):
        settings = study.method("models", architecture, {"dataset": name, "architecture": architecture})
        wrong = networks.wrong_side(study.network(architecture) or architecture, settings, side)
        if wrong:
            yield f"datasets.{name}.image_size: {side} pixels, but {wrong}"


def _images_of_wrong_side(study: Study, name: str) -> Iterator[str]:
    side = study.datasets[name].image_size
    asked = {model.attack for model in models(study) if model.dataset == name} - {NO_METHOD}
    for attack in sorted(asked):
        multiple = registry.declared("attacks", attack).constants["side_multiple"]
        if side % multiple:
            yield (
                f"datasets.{name}.image_size: {side} pixels, but {attack} takes multiples of {multiple}: "
                "change it, or leave the attack out"
            )
