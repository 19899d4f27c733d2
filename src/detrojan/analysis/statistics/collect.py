"""Gathers the metrics and cards of a study into its two tables of observations."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from detrojan import registry
from detrojan.analysis.statistics.gate import Verdict, allowance, of_row
from detrojan.analysis.statistics.relative import MEASURED, RELATIVE, relative
from detrojan.cells import CELL_AXES, MODEL_AXES, NO_METHOD, Model, axes_text
from detrojan.settings import Gate
from detrojan.storage import records
from detrojan.storage.columns import METRICS, MODEL_KEYS, ORIGIN, required

GATHERED = METRICS.insert(METRICS.get_field_index("defense") + 1, required("threat_model", pa.string()))
GATHERED = GATHERED.insert(GATHERED.get_field_index("reason") + 1, pa.field("adapted", pa.bool_()))
CELLS = functools.reduce(
    pa.Schema.append,
    (pa.field(measure, pa.float64()) for measure in RELATIVE),
    GATHERED.insert(len(MODEL_AXES), pa.field("attack_took", pa.bool_())),
)

MODELS = pa.schema(
    [
        *MODEL_KEYS,
        pa.field("acc", pa.float64()),
        pa.field("asr", pa.float64()),
        pa.field("ra", pa.float64()),
        pa.field("acc_loss", pa.float64()),
        pa.field("acc_allowance", pa.float64()),
        pa.field("clean_matched", pa.bool_()),
        pa.field("clean_asr", pa.float64()),
        pa.field("clean_ra", pa.float64()),
        pa.field("decoy_asr", pa.float64()),
        pa.field("asr_relative", pa.float64()),
        pa.field("attack_took", pa.bool_()),
        pa.field("gate_reason", pa.string()),
        pa.field("near_gate", pa.bool_()),
        pa.field("trigger_weakness", pa.string()),
        required("num_train", pa.int32()),
        required("num_poisoned", pa.int32()),
        required("effective_ratio", pa.float64()),
        pa.field("target", pa.int16()),
        pa.field("label_map", pa.string()),
        pa.field("psnr", pa.float64()),
        pa.field("ssim", pa.float64()),
        pa.field("linf", pa.int16()),
        pa.field("attack_hyperparameters", pa.string()),
        required("num_parameters", pa.int64()),
        required("architecture_settings", pa.string()),
        required("optimization", pa.string()),
        required("epochs", pa.int32()),
        required("train_loss", pa.float64()),
        required("train_accuracy", pa.float64()),
        required("seconds", pa.float64()),
        required("images_per_second", pa.float64()),
        required("peak_memory_bytes", pa.int64()),
        required("device", pa.string()),
        *ORIGIN,
    ]
)

# Of a cell whose job never came to its end.
NOTHING_MEASURED = {
    **dict.fromkeys(("chosen", "hyperparameters", "sources", "versions"), "{}"),
    "deviates": False,
    "adapted": None,
    "steps": 0,
    "images_a_step": None,
    "passes": None,
    **dict.fromkeys(("device", "code", "git_commit"), ""),
    **dict.fromkeys(("seconds", "peak_memory_bytes", "forward_passes", "backward_passes"), 0),
    **dict.fromkeys(("num_test", "num_triggered"), 0),
}

# Of attacks that redraw the whole image, dB.
LEAST_PSNR = {"ssba": 25.0}
# Of ASR: what a decoy, the trigger without its secret, must fall short of the trigger by.
LEAST_OF_SECRET = 0.1
JUDGED_BY = ("acc_allowance", "clean_matched", "clean_asr", "clean_ra", "decoy_asr")
# The kinds of cards that say how a model was attacked, and by what.
BESIDE_MODELS = ("triggers", "poisoned", "triggered", "checks")

Card = Mapping[str, Any]
NO_CARD: Card = {}
# Files, each with the axes that its place names; none, of one that may lie anywhere.
Placed = Mapping[str | Path, Mapping[str, Any]]


class Cards:
    """Cards by the axes of what they describe; an axis that a card lacks matches any value."""

    def __init__(self, paths: Placed) -> None:
        self._by_axes: dict[tuple[str, ...], dict[tuple[Any, ...], Card]] = {}
        for card in _cards(paths):
            axes = tuple(axis for axis in MODEL_AXES if axis in card)
            self._by_axes.setdefault(axes, {})[tuple(card[axis] for axis in axes)] = card

    def of(self, model: Model) -> Card:
        """Return the card that fits ``model``, or an empty one."""
        fitting = (
            cards.get(tuple(getattr(model, axis) for axis in axes)) for axes, cards in self._by_axes.items()
        )
        return next(filter(None, fitting), NO_CARD)


def _cards(paths: Placed) -> Iterator[Card]:
    """Yield the cards, each of which says the axes that its place names."""
    for path, axes in paths.items():
        card = records.read_card(path)
        found = {axis: card.get(axis) for axis in axes}
        if found != axes:
            raise _misplaced(path, found, axes)
        yield card


def _metrics(path: str | Path, axes: Mapping[str, Any]) -> pa.Table:
    """Return a table of metrics, which has the rows that its place names, once each and no others."""
    table = records.read_table(path, METRICS)
    if axes:
        shared = {axis: value for axis, value in axes.items() if axis != "draws"}
        planned = [shared | {"draw": draw} for draw in axes["draws"].numbers()]
        rows = table.select(CELL_AXES).to_pylist()
        if rows != planned:
            wrong = next((row for row in rows if row not in planned), None)
            raise _misplaced(path, wrong or {"draw": ", ".join(str(row["draw"]) for row in rows)}, axes)
    return table


def _misplaced(path: str | Path, found: Mapping[str, Any], named: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"{path}: another's ({axes_text(found)}), and should be that of {axes_text(named)}; was it copied "
        f"there? {records.anew(path)}"
    )


def cells(paths: Placed, given_up: Sequence[Mapping[str, Any]] = ()) -> pa.Table:
    """Return the rows of all metrics tables, in the order of their keys, each with its threat model.

    These are the columns of ``CELLS`` that a cell has by itself; :func:`completed` adds the others.

    Args:
        paths: of the metrics tables; ``draws`` is one of their axes.
        given_up: keys, status and reason of cells that have none, see :mod:`detrojan.workflow.closing`.

    Raises:
        ValueError: a table is broken, or has other rows than its place names.
    """
    # A table at a time: they are thousands of small files, and one that is broken must be named.
    tables = [_metrics(path, axes) for path, axes in paths.items()]
    rows = [{**NOTHING_MEASURED, **cell} for cell in given_up]
    table = pa.concat_tables([*tables, pa.Table.from_pylist(rows, schema=METRICS)])
    folders = {
        name: registry.threat_model("defenses", name) for name in pc.unique(table["defense"]).to_pylist()
    }
    threat_models = pa.array([folders[name] for name in table["defense"].to_pylist()], pa.string())
    table = table.append_column("threat_model", threat_models)
    # Methods note it, so no table of metrics that is there already lacks it.
    table = table.append_column("adapted", pc.match_substring(table["chosen"], '"adapted": true'))
    keys = [(name, "ascending") for name in CELL_AXES]
    return table.sort_by(keys).select(GATHERED.names)


def models(
    cells: pa.Table,
    model_cards: Placed,
    beside: Mapping[str, Placed],
    gate: Gate,
) -> pa.Table:
    """Return a row a model: how it was trained and poisoned, what it does untouched, if its attack took.

    Args:
        cells: the table of cells; its rows without a defense are the untouched models.
        model_cards: paths of the models' cards.
        beside: paths of the cards of triggers, poisoned sets, triggered test sets and checks of triggers, by
            ``BESIDE_MODELS``; of a kind that is left out nothing is known.
        gate: what an attack has to reach.

    Raises:
        ValueError: a card is broken, or another's than its place names.
    """
    untouched = {_model(row): row for row in cells.filter(pc.field("defense") == NO_METHOD).to_pylist()}
    cards = [Cards(beside.get(kind, {})) for kind in BESIDE_MODELS]
    rows = []
    trained = {_model(card): card for card in _cards(model_cards)}
    for model, card in trained.items():
        clean = model._replace(attack=NO_METHOD, ratio=0.0)
        trigger, poisoned, triggered, check = (of_kind.of(model) for of_kind in cards)
        row = untouched[model] | _beside_clean(untouched[model], card, trained.get(clean))
        row |= {name: check.get(name) for name in ("clean_asr", "clean_ra", "decoy_asr")}
        row["label_map"] = triggered.get("label_map")
        judged = of_row(row, untouched.get(clean, {}).get("acc"), gate)
        rows.append(_model_row(row, judged, card, trigger, poisoned, triggered))
    return pa.Table.from_pylist(rows, schema=MODELS).sort_by([(axis, "ascending") for axis in MODEL_AXES])


def completed(cells: pa.Table, models: pa.Table) -> pa.Table:
    """Return ``cells`` in the columns of ``CELLS``: with the gate's verdict, and with what has changed.

    Args:
        cells: of the schema ``GATHERED``.
        models: of the schema ``MODELS``.
    """
    took = {_model(row): row["attack_took"] for row in models.to_pylist()}
    keys = zip(*(cells[axis].to_pylist() for axis in MODEL_AXES), strict=True)
    # A model that was given up has no row.
    flags = pa.array([took.get(Model(*key)) for key in keys], pa.bool_())
    changes = relative(cells.select([*CELL_AXES, *MEASURED]).to_pandas())
    for measure in RELATIVE:
        cells = cells.append_column(measure, pa.array(changes[measure], pa.float64(), from_pandas=True))
    return cells.append_column("attack_took", flags).select(CELLS.names)


def _model(row: Card) -> Model:
    return Model(*(row[axis] for axis in MODEL_AXES))


def _beside_clean(row: Card, card: Card, clean: Card | None) -> dict[str, Any]:
    """Return what is to know before a model is held against the clean one, of that one's card, if any."""
    if row["attack"] == NO_METHOD:
        return {}
    return {
        "acc_allowance": allowance(row["attack"], row["num_test"], row["num_triggered"]),
        "clean_matched": None if clean is None else card["optimization"] == clean["optimization"],
    }


def _weakness(row: Card, trigger: Card, triggered: Card) -> str | None:
    """Return why a trigger should not be expected to work, or to be what it seems; None if it should."""
    found = [trigger["weakness"]] if trigger.get("weakness") else []
    least, psnr = LEAST_PSNR.get(row["attack"]), triggered.get("psnr")
    if least is not None and psnr is not None and psnr < least:
        found.append(
            f"PSNR {psnr:.1f} dB, below {least:g}: the images are blurred, and a model may have learned the "
            "blur instead of what is hidden in them"
        )
    decoy, asr = row["decoy_asr"], row["asr"]
    if decoy is not None and asr is not None and decoy > asr - LEAST_OF_SECRET:
        found.append(
            f"the secret hardly matters: ASR {100 * asr:.1f} % with it, {100 * decoy:.1f} % with another in "
            "its place"
        )
    return "; ".join(found) or None


def _model_row(
    row: Card, judged: Verdict, card: Card, trigger: Card, poisoned: Card, triggered: Card
) -> dict[str, Any]:
    """Return a model's row from its untouched cell's row, the gate's verdict and its cards."""
    # An attack that controls training counts what it poisons there: its numbers are in the model's card.
    counts = {"num_poisoned": 0, "effective_ratio": 0.0} if row["attack"] == NO_METHOD else poisoned
    settings = triggered.get("hyperparameters")
    values = (
        {name: counts.get(name) for name in ("num_poisoned", "effective_ratio")}
        | dict(card)
        | {name: row.get(name) for name in ("acc", "asr", "ra", *JUDGED_BY)}
        | judged._asdict()
        | {"trigger_weakness": _weakness(row, trigger, triggered)}
        | {name: triggered.get(name) for name in ("target", "label_map", "psnr", "ssim", "linf")}
        | {"attack_hyperparameters": None if settings is None else json.dumps(settings, sort_keys=True)}
        | {name: json.dumps(card[name], sort_keys=True) for name in ("architecture_settings", "optimization")}
    )
    return {name: values.get(name) for name in MODELS.names}
