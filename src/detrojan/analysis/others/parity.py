"""Other people's results beside ours: what both measured, and how their settings differ."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import stats

from detrojan.analysis import protocols
from detrojan.analysis.others.external import TableMapping, TheirSetting
from detrojan.analysis.report import views
from detrojan.analysis.report.listings import LATEX
from detrojan.analysis.statistics.collect import CELLS, MODELS
from detrojan.analysis.statistics.relative import MEASURED
from detrojan.analysis.tables import summary
from detrojan.cells import NO_METHOD
from detrojan.storage import paths, records
from detrojan.storage.columns import OK, required
from detrojan.study import files
from detrojan.study.schema import NAMED_AXES, Dataset, Study

SETTING = ("dataset", "architecture", "attack", "ratio")
NOT_OURS, NO_VALUE, NO_RESULT = "not in our study", "no value in their table", "no result in our study"
HEAD = ("setting", "defense", *(name.upper() for name in MEASURED), "differences")
FEWEST = 3  # pairs behind a correlation
TRAINING = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule")

PARITY = pa.schema(
    [
        required("dataset", pa.string()),
        required("architecture", pa.string()),
        required("attack", pa.string()),
        required("ratio", pa.float64()),
        required("defense", pa.string()),
        required("spc", pa.int32()),
        required("our_ratio", pa.float64()),
        required("our_spc", pa.int32()),
        pa.field("attack_took", pa.bool_()),
        pa.field("our_attack_took", pa.bool_()),
        required("num_runs", pa.int32()),
        required("our_num_models", pa.int32()),
        required("our_num_runs", pa.int32()),
        pa.field("our_interval_over", pa.string()),
        *(
            pa.field(f"{part}{measure}{end}", kind)
            for measure in MEASURED
            for part, end, kind in (
                ("", "", pa.float64()),
                ("our_", "", pa.float64()),
                ("our_", "_low", pa.float64()),
                ("our_", "_high", pa.float64()),
                ("", "_difference", pa.float64()),
                ("", "_within", pa.bool_()),
            )
        ),
        required("comparable", pa.bool_()),
        required("differences", pa.string()),
    ]
)

BY_DEFENSE = pa.schema(
    [
        pa.field("defense", pa.string()),
        required("num_pairs", pa.int32()),
        *(
            pa.field(f"{measure}_{part}", pa.float64())
            for measure in MEASURED
            for part in ("difference", "correlation", "spearman", "kendall")
        ),
        *(pa.field(f"{measure}_within", pa.float64()) for measure in MEASURED),
    ]
)

AGREEMENT = pa.schema(
    [
        required("measure", pa.string()),
        required("num_settings", pa.int32()),
        pa.field("spearman", pa.float64()),
        pa.field("kendall", pa.float64()),
    ]
)

Row = dict[str, Any]
Key = tuple[Any, ...]


class Images(NamedTuple):
    """A data set of our study; ``num_classes`` is None where nobody knows."""

    settings: Dataset
    num_classes: int | None


class Ours(NamedTuple):
    """Results of a study of ours.

    Attributes:
        cells: of the schema ``CELLS``.
        models: of the schema ``MODELS``.
        images: its data sets, by name.
    """

    cells: pa.Table
    models: pa.Table
    images: Mapping[str, Images]


def read_ours(results: Path) -> Ours:
    """Return the results of the study that was run in the folder ``results``.

    Raises:
        ValueError: there are none, or they are another version's.
    """
    cells = records.read_table(paths.table(results, "cells"), CELLS)
    models = records.read_table(paths.table(results, "models"), MODELS)
    study = files.load_study(files.kept(results))
    return Ours(cells, models, {name: _images(results, study, name) for name in study.grid.datasets})


def _images(results: Path, study: Study, name: str) -> Images:
    settings, file = study.datasets[name], results / "datasets" / name / "train.parquet"
    if file.exists():
        info = json.loads(pq.read_schema(file).metadata[b"detrojan"])
        return Images(settings, len(info["classes"]))
    return Images(settings, None if settings.classes is None else len(settings.classes))


# --- which of ours belongs to which of theirs ------------------------------------------------------


class _Named(NamedTuple):
    """What must be the same on both sides."""

    dataset: str
    architecture: str
    attack: str
    defense: str


def _named(row: Row) -> _Named:
    return _Named(*(row[axis] for axis in _Named._fields))


class Parity(NamedTuple):
    """Theirs beside ours.

    Attributes:
        pairs: of the schema ``PARITY``.
        left_out: how many of their settings and defenses have no pair, by the reason.
        apart: of each axis on which no name is the same, a sentence that has both sides' names.
    """

    pairs: pa.Table
    left_out: dict[str, int]
    apart: list[str]


def parity(theirs: pa.Table, ours: Ours, mapping: TableMapping) -> Parity:
    """Return theirs beside ours: a row for each of their settings and defenses that has a match.

    A match has the same data set, architecture, attack and defense. Of several, ours has the nearest ratio,
    then the nearest SPC (in proportion), and rather an attack that took than one that did not. What is not
    the same stands in ``differences``, ours first. Pairs of which either has no value are left out.

    Args:
        theirs: of the schema ``CELLS``, from :func:`detrojan.analysis.others.external.cells`.
        ours: a study of ours.
        mapping: of their table.
    """
    ours = ours._replace(cells=protocols.only(ours.cells, mapping.protocol))
    candidates = _grouped(_summary(ours.cells, theirs).to_pylist(), _named)
    settings = _OurSettings(ours)
    num_theirs = theirs.group_by([*SETTING, "defense", "spc"]).aggregate([]).num_rows
    left_out = {NOT_OURS: num_theirs, NO_VALUE: 0, NO_RESULT: 0}
    rows = []
    for their in _summary(theirs, ours.cells).to_pylist():
        asked = mapping.setting({axis: their[axis] for axis in (*SETTING, "defense")})
        our = _nearest(their, candidates.get(_named(their), ()), asked)
        if our is None:
            continue
        left_out[NOT_OURS] -= 1
        if not their["num_ok"]:
            left_out[NO_VALUE] += 1
        elif not our["num_ok"]:
            left_out[NO_RESULT] += 1
        else:
            rows.append(_pair(their, our, _differences(their, our, asked, settings, mapping)))
    return Parity(pa.Table.from_pylist(rows, PARITY), left_out, list(_apart_in(ours.cells, theirs)))


def _apart_in(ours: pa.Table, theirs: pa.Table) -> Iterator[str]:
    for axis in NAMED_AXES:
        names = [sorted(set(table[axis].to_pylist()) - {NO_METHOD}) for table in (ours, theirs)]
        if not set(names[0]) & set(names[1]):
            yield f"No {axis} in common: ours {', '.join(names[0])}; theirs {', '.join(names[1])}."


def _summary(cells: pa.Table, other: pa.Table) -> pa.Table:
    """Return the summary of those cells whose names all occur in the ``other`` table."""
    kept = pa.array([True] * len(cells))
    for axis in NAMED_AXES:
        kept = pc.and_(kept, pc.is_in(cells[axis], pc.unique(other[axis])))
    return summary.make(cells.filter(kept))


def _grouped(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _nearest(their: Row, candidates: Sequence[Row], asked: TheirSetting) -> Row | None:
    """Return the candidate whose ratio, then whose SPC is nearest; None of none."""
    budget = their["spc"] or asked.samples_per_class or math.inf

    def distance(our: Row) -> tuple[float, ...]:
        no_result, not_taken = not our["num_ok"], our["attack_took"] is False
        return (
            _apart(our["ratio"], their["ratio"]),
            no_result,
            # Where nobody knows what their budget comes to, ours with most: they hold a share of all images.
            -our["spc"] if budget == math.inf else _apart(our["spc"], budget),
            not_taken,
        )

    return min(candidates, key=distance, default=None)


def _apart(one: float, other: float) -> float:
    return abs(math.log(one / other)) if one and other else 0.0


def _pair(their: Row, our: Row, differences: Sequence[str]) -> Row:
    row: Row = {axis: their[axis] for axis in (*SETTING, "defense", "spc", "attack_took")}
    row |= {
        f"our_{name}": our[name] for name in ("ratio", "spc", "attack_took", "num_models", "interval_over")
    }
    row |= {"num_runs": their["num_ok"], "our_num_runs": our["num_ok"], "differences": "; ".join(differences)}
    # Where an attack did not take, a low ASR is no defense's merit; untouched models are what they are.
    both_took = their["attack_took"] == our["attack_took"] and their["attack_took"] is not False
    row["comparable"] = _apart(our["ratio"], their["ratio"]) == 0 and (
        their["defense"] == NO_METHOD or both_took
    )
    for name in MEASURED:
        value, mean, low, high = (
            their[f"{name}_mean"],
            *(our[f"{name}_{part}"] for part in ("mean", "low", "high")),
        )
        known, bounded = None not in (value, mean), None not in (value, low, high)
        row |= {
            name: value,
            f"our_{name}": mean,
            f"our_{name}_low": low,
            f"our_{name}_high": high,
            f"{name}_difference": mean - value if known else None,
            f"{name}_within": low <= value <= high if bounded else None,
        }
    return row


# --- how the settings differ -----------------------------------------------------------------------


class _OurSettings:
    """How our results came about, by what they are keyed by."""

    def __init__(self, ours: Ours) -> None:
        self.images = ours.images
        self._models = _grouped(ours.models.to_pylist(), self._setting)
        columns = [*SETTING, "defense", "spc", "hyperparameters"]
        cells = ours.cells.filter(pc.equal(ours.cells["status"], OK)).select(columns)
        self._cells = _grouped(
            cells.group_by(columns).aggregate([]).to_pylist(),
            lambda row: (self._setting(row), row["defense"], row["spc"]),
        )

    @staticmethod
    def _setting(row: Row) -> Key:
        return tuple(row[axis] for axis in SETTING)

    def of_models(self, our: Row, column: str) -> list[Any]:
        """Return the distinct values of a column of our models of a setting."""
        return _distinct(row[column] for row in self._models.get(self._setting(our), ()))

    def settings(self, our: Row, kind: str) -> list[Row]:
        """Return the distinct settings of the network, of training, of the attack or of the defense."""
        if kind == "defense":
            rows = self._cells.get((self._setting(our), our["defense"], our["spc"]), ())
            texts = _distinct(row["hyperparameters"] for row in rows)
        else:
            texts = self.of_models(our, kind)
        return [json.loads(text) for text in texts if text is not None]


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _differences(
    their: Row, our: Row, asked: TheirSetting, settings: _OurSettings, mapping: TableMapping
) -> list[str]:
    """Return what differs, ours / theirs; what a side does not say is not compared."""
    images = settings.images[our["dataset"]]
    augmentation = {} if asked.augmentation is None else asked.augmentation.model_dump()
    found = itertools.chain(
        _differing("ratio", [our["ratio"]], their["ratio"]),
        _budgets(their, our, mapping),
        _differing("", [images.settings.image_size], asked.image_size, unit=" px"),
        _classes(images, asked),
        _differing("training images", settings.of_models(our, "num_train"), asked.num_train),
        _all_differing("", settings.settings(our, "architecture_settings"), asked.architecture),
        _all_differing(
            "", settings.settings(our, "optimization"), {name: getattr(asked, name) for name in TRAINING}
        ),
        _all_differing("", [images.settings.augmentation.model_dump()], augmentation),
        _all_differing(our["attack"], settings.settings(our, "attack_hyperparameters"), asked.attack),
        _all_differing(our["defense"], settings.settings(our, "defense"), asked.defense),
        _runs(their, our),
        _differing("attack took", [our["attack_took"]], their["attack_took"]),
        [] if asked.remark is None else [asked.remark],
    )
    return list(found)


def _differing(name: str, ours: Sequence[Any], theirs: Any, unit: str = "") -> Iterator[str]:
    known = [value for value in ours if value is not None]
    if known and theirs is not None and known != [theirs]:
        both = f"{' and '.join(map(_text, known))}{unit} / {_text(theirs)}{unit}"
        yield f"{name} {both}".strip()


def _all_differing(of: str, ours: Sequence[Row], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name, value in theirs.items():
        label = f"{of} {name.replace('_', ' ')}".strip()
        yield from _differing(label, _distinct(row.get(name) for row in ours), value)


def _budgets(their: Row, our: Row, mapping: TableMapping) -> Iterator[str]:
    """Say what the defender holds, where it holds anything."""
    if our["spc"] and our["spc"] != their["spc"]:
        theirs = f"SPC {their['spc']}" if their["spc"] else mapping.budget
        yield f"SPC {our['spc']} / {theirs}"


def _classes(images: Images, asked: TheirSetting) -> Iterator[str]:
    ours, theirs = images.num_classes, asked.num_classes
    if ours is not None and theirs is not None and ours != theirs:
        yield f"{ours} of {theirs} classes" if ours < theirs else f"{ours} / {theirs} classes"


def _runs(their: Row, our: Row) -> Iterator[str]:
    """Say how many results each mean is over."""
    if (our["num_models"], our["num_ok"]) != (their["num_models"], their["num_ok"]):
        yield f"{_counted(our)} / {_counted(their)}"


def _counted(row: Row) -> str:
    models = "1 model" if row["num_models"] == 1 else f"{row['num_models']} models"
    if row["num_ok"] == row["num_models"]:
        return models
    return f"{row['num_ok']} draws of {models}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- how far both agree ----------------------------------------------------------------------------


def by_defense(pairs: pa.Table) -> pa.Table:
    """Return how ours differ from theirs, by defense, of the schema ``BY_DEFENSE``; null: all together.

    Only over ``comparable`` pairs: the same ratio, and an attack that took on both sides (for the untouched
    model, whether or not). A difference is ours minus theirs, mean over pairs; a correlation is Pearson's,
    over the pairs' values, with Spearman's and Kendall's beside it, null for fewer than three pairs or where
    a side is constant; ``within`` is the share of theirs within our interval, where there is one.

    Args:
        pairs: of the schema ``PARITY``.
    """
    frame = _comparable(pairs)
    groups = [*frame.groupby("defense", sort=True), *([(None, frame)] if len(frame) else [])]
    rows = []
    for defense, group in groups:
        row: Row = {"defense": defense, "num_pairs": len(group)}
        for name in MEASURED:
            both = group[[f"our_{name}", name]].dropna().astype(float)
            within = group[f"{name}_within"].dropna().astype(float)
            row |= {
                f"{name}_difference": _or_none((both[f"our_{name}"] - both[name]).mean()),
                f"{name}_within": _or_none(within.mean()),
            }
            for kind, value in _correlations(both[f"our_{name}"], both[name]).items():
                row[f"{name}_{kind}"] = value
        rows.append(row)
    return pa.Table.from_pylist(rows, BY_DEFENSE)


def agreement(pairs: pa.Table) -> pa.Table:
    """Return whether both rank the defenses alike, of the schema ``AGREEMENT``: a row a measure.

    In each setting with three comparable defenses or more, the rank correlation over defenses; then the mean
    over settings.

    Args:
        pairs: of the schema ``PARITY``.
    """
    frame = _comparable(pairs)
    frame = frame[frame["defense"] != NO_METHOD]
    rows = []
    for name in MEASURED:
        known = frame.dropna(subset=[name, f"our_{name}"])
        found = [
            _correlations(group[f"our_{name}"].astype(float), group[name].astype(float))
            for _, group in known.groupby(list(SETTING), sort=True)
        ]
        ranked = pd.DataFrame(found, columns=["spearman", "kendall"], dtype=float).dropna()
        means = {kind: _or_none(ranked[kind].mean()) for kind in ranked}
        rows.append({"measure": name, "num_settings": len(ranked), **means})
    return pa.Table.from_pylist(rows, AGREEMENT)


def _comparable(pairs: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = pairs.filter(pairs["comparable"]).to_pandas()
    return frame


def _correlations(one: "pd.Series[float]", other: "pd.Series[float]") -> dict[str, float | None]:
    kinds: dict[str, Any] = {
        "correlation": stats.pearsonr,
        "spearman": stats.spearmanr,
        "kendall": stats.kendalltau,
    }
    if len(one) < FEWEST or one.nunique() < 2 or other.nunique() < 2:
        return dict.fromkeys(kinds)
    return {kind: _or_none(float(measure(one, other).statistic)) for kind, measure in kinds.items()}


def _or_none(value: float) -> float | None:
    return None if pd.isna(value) else float(value)


# --- as tables and as text -------------------------------------------------------------------------


def tables(both: Parity) -> dict[str, tuple[pa.Table, pa.Schema]]:
    """Return the tables that a comparison writes, each with its schema, by name."""
    return {
        "parity": (both.pairs, PARITY),
        "parity_by_defense": (by_defense(both.pairs), BY_DEFENSE),
        "parity_agreement": (agreement(both.pairs), AGREEMENT),
    }


def texts(row: Row) -> list[str]:
    """Return a row of ``PARITY`` as text: setting, defense, ours / theirs of each measure, differences."""
    setting = f"{row['dataset']} · {row['architecture']} · {views.attack_text(row['attack'], row['ratio'])}"
    measured = []
    for name in MEASURED:
        ours = {f"{name}_mean": row[f"our_{name}"]} | {
            f"{name}_{end}": row[f"our_{name}_{end}"] for end in ("low", "high")
        }
        measured.append(f"{views.percent(ours, name)} / {views.share(row[name])}")
    return [setting, views.defense_text(row["defense"]), *measured, row["differences"]]


def latex(pairs: pa.Table) -> str:
    """Return ``pairs`` as a LaTeX table (packages ``booktabs`` and ``longtable``), percent, ours / theirs.

    Args:
        pairs: of the schema ``PARITY``.
    """
    lines = [
        r"\begin{longtable}{llrrrp{0.35\linewidth}}",
        r"\toprule",
        rf"{' & '.join(HEAD)} \\",
        r"\midrule \endhead",
    ]
    for row in pairs.to_pylist():
        cells = (text.translate(LATEX) for text in texts(row))
        lines.append(rf"{' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{longtable}", ""])
