"""Chooses settings by finished trials, and writes the file that the protocol ``tuned`` needs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from detrojan.analysis import protocols
from detrojan.analysis.report import views
from detrojan.analysis.statistics import collect, tuning
from detrojan.analysis.statistics.tuning import Search
from detrojan.cells import CELL_AXES, NO_METHOD, axes_text
from detrojan.storage import records
from detrojan.study import files, trials, tuned
from detrojan.workflow import graph, sources

DECIMALS = 6  # of means, which are there to be read


def main(folders: Sequence[Path], num_trials: int, out: Path) -> list[str]:
    """Write what trials choose; return what was done, a sentence a line.

    Args:
        folders: of results, whose studies had trials.
        num_trials: the first so many count.
        out: the file to write.

    Raises:
        ValueError: a study is missing or broken, or none has a trial on a model whose attack took; two have
            the same cells, or disagree on a data set or on what a trial is.
    """
    found = pa.concat_tables([_trials(folder) for folder in folders])
    _refuse_repeats(found)
    searches = [s for whole in tuning.searches(found) if len((s := whole.first(num_trials)).numbers)]
    if not searches:
        raise ValueError(
            "no trials to choose from: the studies need protocols: [trials], and models whose attack took"
        )
    facts = _facts(folders)
    datasets = {
        name: facts[name] | _met([search for search in searches if search.dataset == name])
        for name in dict.fromkeys(search.dataset for search in searches)
    }
    content = tuned.made(datasets, [choice for search in searches for choice in _choices(search)])
    records.write_text(tuned.text(content), out)
    return [*_about(searches), f"{out}: {len(content.choices)} choices, digest {content.digest}"]


def _trials(folder: Path) -> pa.Table:
    path = graph.below(folder, graph.table("cells"))
    return protocols.of_trials(records.read_table(path, collect.CELLS))


def _refuse_repeats(found: pa.Table) -> None:
    keys = found.select(CELL_AXES).to_pandas()
    repeated = keys[keys.duplicated()]
    if len(repeated):
        first = axes_text(repeated.iloc[0].to_dict())
        raise ValueError(f"two studies have the same trial of the same cell, and one may count: {first}")


def _facts(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return how many classes each data set has, and how large its images are."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        study = files.load_study(files.kept(folder))
        study.know_classes(sources.classes_read(study, folder))
        for name in study.grid.datasets:
            own = {"num_classes": study.num_classes(name), "image_size": study.datasets[name].image_size}
            if found.setdefault(name, own) != own:
                raise ValueError(
                    f"{folder}: its {name} is another data set than in the studies before: {own}"
                )
    return found


def _met(searches: Sequence[Search]) -> dict[str, Any]:
    """Return the attacks that the trials on a data set met, and what their study set by itself."""
    studied = {search.defense: _of_source(search.rows, "study") for search in searches}
    return {
        "attacks": sorted({str(attack) for search in searches for attack in search.attacks}),
        "studied": {defense: values for defense, values in sorted(studied.items()) if values},
    }


def _choices(search: Search) -> Iterator[dict[str, Any]]:
    """Yield what is chosen with each family left out, and with none."""
    for family in [NO_METHOD, *dict.fromkeys(search.families.tolist())]:
        at = search.chosen(family)
        if at is None:
            continue  # the one family that there is has nobody else to choose for it
        seen = search.families != family
        number = int(search.numbers[at])
        rows = search.rows[search.rows["trial"] == number]
        yield {
            "defense": search.defense,
            "dataset": search.dataset,
            "spc": search.spc,
            "left_out": family,
            "trial": number,
            "settings": _of_source(rows, "trial"),
            "code": sorted(set(search.rows["code"]) - {""}),
            "cells": int(seen.sum()),
            "numbers": search.numbers.tolist(),
            "der": search.der[seen].mean(axis=0).round(DECIMALS).tolist(),
            "acc_loss": search.acc_loss[seen].mean(axis=0).round(DECIMALS).tolist(),
        }


def _of_source(rows: pd.DataFrame, source: str) -> dict[str, Any]:
    """Return the settings whose value is of this source, which all rows must agree on."""
    found: dict[str, Any] = {}
    for settings, said in set(zip(rows["hyperparameters"], rows["sources"], strict=True)):
        values, whose = json.loads(settings), json.loads(said)
        own = {name: values[name] for name, word in whose.items() if word == source}
        for name, value in own.items():
            if found.setdefault(name, value) != value and source == "trial":
                first = rows.iloc[0]
                raise ValueError(
                    f"{first['protocol']} of {first['defense']} ran with {name} {found[name]!r} and with "
                    f"{value!r}: were its ranges edited between two studies? Run the trials with one code"
                )
    return found


def _about(searches: Sequence[Search]) -> Iterator[str]:
    """Yield what was chosen for each search where no attack is left out, and what its study fixed."""
    for search in searches:
        at = search.chosen()
        assert at is not None, "a search has cells"
        where = f"{search.defense} on {search.dataset}" + (f", SPC {search.spc}" if search.spc else "")
        der = views.share(float(search.der[:, at].mean()))
        yield f"{where}: {trials.name(int(search.numbers[at]))} of {len(search.numbers)}, DER {der} %"
        fixed = _of_source(search.rows, "study")
        if fixed:
            said = ", ".join(f"{name}={value}" for name, value in sorted(fixed.items()))
            yield f"  its study set {said}, which the protocol tuned does not"
