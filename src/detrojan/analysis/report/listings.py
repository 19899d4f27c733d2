"""Describes the tables of a report once, for the page, for CSV and for LaTeX.

Rows hold values as the Parquet tables have them, fractions included; a column says how they are written.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from detrojan.analysis.escape import for_spreadsheet
from detrojan.analysis.report import charts, views
from detrojan.analysis.report.views import (
    CLEAN_DATA,
    KNOWN_TRIGGER,
    MEASURE_TEXTS,
    UNDEFINED,
    Row,
    Tables,
    spc_text,
)
from detrojan.analysis.statistics import harm
from detrojan.analysis.statistics.relative import LOWER_IS_BETTER
from detrojan.cells import MODEL_AXES, NO_METHOD, NO_SAMPLES
from detrojan.storage.columns import OK
from detrojan.study.schema import BASELINES

UPPER_BOUND = "upper bound"
GATE_FAILED, NO_VERDICT = "gate_failed", "no_verdict"  # outcomes that no status has
ALPHA = 0.05
SAME_RANK = 1e-9
LEAST_SETTINGS = 5  # fewer describe themselves alone

# Which cells a number stands on: values of columns of the table of cells, alternatives in a list.
Query = dict[str, list[Any]]


class Column(NamedTuple):
    """A column of a listing.

    Attributes:
        key: where a row has its value, and the column's name in CSV.
        head: its name on the page and in LaTeX.
        write: returns the text of a value that is not None; without it, it is a text itself.
        low: where a row has the lower end of its interval, if it has one.
        high: likewise the upper end.
        explained: what the value is, in a sentence.
        page: whether it is a column on the page, too.
        cells: where a row has the query of the cells that its value stands on.
        verdict: where a row says whether its value is ``better`` or ``worse``, if it does.
        beside: where a row has a text that stands below the value in small print, if it has one.
    """

    key: str
    head: str
    write: Callable[[Any], str] | None = None
    low: str | None = None
    high: str | None = None
    explained: str = ""
    page: bool = True
    cells: str = "cells"
    verdict: str = ""
    beside: str = ""

    def text(self, row: Row) -> str:
        """Return what the page says of a row's value."""
        value = row.get(self.key)
        if value is None:
            return UNDEFINED if self.write else ""
        return self.write(value) if self.write else str(value)

    def interval(self, row: Row) -> str:
        """Return the interval of a row's value, empty where there is none."""
        if self.low is None or self.high is None or self.write is None or row.get(self.low) is None:
            return ""
        return f"[{self.write(row[self.low])}, {self.write(row[self.high])}]"


class Block(NamedTuple):
    """Rows of a listing that belong together.

    Attributes:
        spc: the budget that they are for; None for all of them.
        rows: by the keys of the columns: values, queries and verdicts.
        notes: sentences on them.
    """

    spc: int | None
    rows: list[Row]
    notes: list[str]


class Listing(NamedTuple):
    """A table of the report; ``name`` is that of its files."""

    name: str
    caption: str
    columns: list[Column]
    blocks: list[Block]

    @property
    def shown(self) -> list[Column]:
        """The columns that are not empty all over."""
        rows = [row for block in self.blocks for row in block.rows]
        return [
            column for column in self.columns if any(row.get(column.key) not in (None, "") for row in rows)
        ]


# --- how values are written ------------------------------------------------------------------------


def points(value: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return f"{100 * value:+z.1f}"


def spread(value: float) -> str:
    """Return a standard deviation of fractions in percentage points."""
    return f"{100 * value:.1f}"


def rank(value: float) -> str:
    """Return a mean rank."""
    return f"{value:.2f}"


def whole(value: float) -> str:
    """Return a share of settings in whole percent; what is not all is not called so."""
    rounded = round(100 * value)
    if rounded in (0, 100) and value not in (0, 1):
        return "<1" if rounded == 0 else ">99"
    return str(rounded)


def count(value: int) -> str:
    """Return how many there are."""
    return f"{value:,}"


DEFENSE = Column("defense", "defense")
GIVEN = Column("given", "is given", page=False)  # where names have badges
SECONDS = Column("seconds", "seconds", views.seconds, explained="Mean wall time of one defense.")


def _measured(measure: str) -> Column:
    title = MEASURE_TEXTS[measure]
    return Column(
        f"{measure}_mean",
        f"{title}, %",
        views.share,
        f"{measure}_grid_low",
        f"{measure}_grid_high",
        f"Mean {title} over settings, and its 95 % interval on this grid: with other seeds and samples.",
    )


def _changed(measure: str) -> Column:
    """Return what a defense changes on its own settings: other defenses may have others."""
    title = MEASURE_TEXTS[measure]
    return Column(
        f"{measure}_change",
        f"{title} change, points",
        points,
        f"{measure}_change_low",
        f"{measure}_change_high",
        f"Mean {title} minus that of the untouched models of the same settings, its 95 % interval on this "
        "grid, and both means (in percent), from the untouched models' to its own.",
        beside=f"{measure}_from_to",
    )


def _absolute(measure: str) -> Column:
    """Return a mean that is in the files alone: side by side, those of unequal settings mislead."""
    return _measured(measure)._replace(page=False)


def _changes(row: Row) -> Row:
    """Return the values of the columns of ``_changed``, of a row of ``consistency``."""
    found: Row = {}
    for measure in CHANGED:
        column, sign, _ = charts.CHANGES[measure]
        mean, *ends = (row[f"{column}_{part}"] for part in ("mean", "grid_low", "grid_high"))
        low, high = ends if sign > 0 else ends[::-1]
        for name, value in (("", mean), ("_low", low), ("_high", high)):
            # No share changes by more than all of it.
            found[f"{measure}_change{name}"] = None if value is None else min(1.0, max(-1.0, sign * value))
        before, after = row[f"{measure}_before_mean"], row[f"{measure}_mean"]
        if None not in (before, after, mean):
            found[f"{measure}_from_to"] = f"{views.share(before)} → {views.share(after)}"
    return found


CHANGED = ("asr", "acc", "ra")
EFFECT = ("asr", "acc", "der")


def _worst(measure: str) -> Column:
    title = MEASURE_TEXTS[measure]
    worst = "highest" if measure in LOWER_IS_BETTER else "lowest"
    return Column(
        f"{measure}_worst_tenth",
        f"worst tenth of {title}, %",
        views.share,
        explained=f"Mean {title} of the tenth of settings where it is {worst}.",
    )


# --- the listings ----------------------------------------------------------------------------------


def of_tables(tables: Tables) -> list[Listing]:
    """Return the listings of a study; that of models, which tables of others lack, if there are any."""
    return [
        *(ranking(tables, measure) for measure in MEASURE_TEXTS),
        *(comparisons(tables, measure) for measure in MEASURE_TEXTS),
        consistency(tables),
        *(heatmap(tables, measure) for measure in MEASURE_TEXTS),
        protocol_effect(tables),
        tuning(tables),
        outcomes(tables),
        reasons(tables),
        *([] if tables.models is None else [models(tables.models)]),
    ]


def _query(tables: Tables, spc: int | None, *defenses: str, attacked: bool = True) -> Query:
    """Return the cells of defenses at a budget, on models whose attack took, or on clean ones."""
    query: Query = {"defense": list(defenses)}
    if spc is not None:
        query["spc"] = [spc, NO_SAMPLES]
    return query | ({"attack_took": [True]} if attacked else {"attack": [NO_METHOD]})


def _of_defense(row: Row) -> Row:
    """Return what a row says of its defense: ``badge`` is what to know of it before comparing it."""
    given = views.given_text(row["threat_model"])
    badge = "" if row["threat_model"] == CLEAN_DATA else given
    if row["threat_model"] == KNOWN_TRIGGER:
        badge = UPPER_BOUND
    return {"defense": views.defense_text(row["defense"]), "given": given, "badge": badge}


def ranking(tables: Tables, measure: str) -> Listing:
    """Return the defenses by their mean rank; below, those that have none, the untouched model last."""
    title = MEASURE_TEXTS[measure]
    ranks = {
        (row["spc"], row["defense"]): row for row in tables.ranks.to_pylist() if row["measure"] == measure
    }
    blocks = []
    for spc in views.budgets(tables):
        rows = []
        for row in tables.consistency.to_pylist():
            if row["spc"] != spc:
                continue
            ranked = ranks.get((spc, row["defense"]), {})
            parts = ("mean_rank", "rank_grid_low", "rank_grid_high", "num_defenses", "beats_untouched")
            rows.append(
                row
                | _of_defense(row)
                | {part: ranked.get(part) for part in parts}
                | _changes(row)
                | {"der_all_mean": row["der_all_mean"] if row["share_failed"] else None}
                | {"cells": _query(tables, spc, row["defense"])}
            )
        rows.sort(key=_by_rank)
        for row in [row for row in rows if row["mean_rank"] is None][:1]:
            row["first_unranked"] = True
        means = {row["defense"]: row for row in tables.consistency.to_pylist() if row["spc"] == spc}
        of_budget = [row for (budget, _), row in ranks.items() if budget == spc]
        blocks.append(Block(spc, rows, _on_ranks(of_budget, means)))
    chosen = [] if measure == "der" else [_changed(measure)]
    # What is ranked by stands first; of RA, which few ask for, nothing stands elsewhere. What else is of DER
    # stands beside its ranks alone, so that no table is cut on a small screen.
    others = [_changed(other) for other in ("asr", "acc") if other != measure]
    better = "less" if measure in LOWER_IS_BETTER else "more"
    columns = [
        DEFENSE,
        GIVEN,
        Column(
            "mean_rank",
            "mean rank",
            rank,
            "rank_grid_low",
            "rank_grid_high",
            f"Mean rank by {title} from pairs of defenses, 1 the best, and its 95 % interval on this grid.",
        ),
        Column(
            "beats_untouched",
            "beats none, %",
            whole,
            explained=f"Share of its cells with {better} {title} than the untouched model, by more than a "
            "point (DER: half a point); ties count half.",
        ),
        *chosen,
        _measured("der"),
        Column(
            "der_all_mean",
            "DER with failures, %",
            views.share,
            explained="The same, a run without a repaired model being an untouched one: DER 50 %.",
            page=not chosen,
        ),
        *others,
        *(_absolute(name) for name in CHANGED),
        _worst(measure)._replace(page=False),  # which stands among the consistency
        Column(
            "share_beats_baselines",
            "beats ft and fp, %",
            whole,
            explained="Share of settings where its DER is above that of fine-tuning and of fine-pruning, by "
            "more than half a point.",
            page=not chosen,
        ),
        Column(
            "share_harmful",
            "harmful, %",
            whole,
            explained="Share of settings where it takes more accuracy than attack success, by more than a "
            "point and than noise.",
        ),
        Column("num_settings", "n", count, explained="Settings with a result, which the means are over."),
        Column("num_without_result", "without result", count, page=False),
        SECONDS,
    ]
    return Listing(f"ranking_{measure}", f"Defenses ranked by {title}", columns, blocks)


def _by_rank(row: Row) -> tuple[Any, ...]:
    unranked = row["mean_rank"] is None
    return (
        unranked,
        row["defense"] == views.defense_text(NO_METHOD),
        row["mean_rank"] or 0.0,
        row["defense"],
    )


def enough(rows: Iterable[Row]) -> bool:
    """Return whether there is enough to judge by: else results describe the settings that they are of.

    Args:
        rows: of ``consistency``, of one budget, without the untouched model.
    """
    found = [row for row in rows if row["num_settings"]]
    most = max((row["num_settings"] for row in found), default=0)
    return most >= LEAST_SETTINGS and not {row["grid_basis"] for row in found} <= {"draws", None}


def surely(row: Row) -> float:
    """Return what a defense has won of net at least; where it has no interval, the mean has to do."""
    low: float | None = row["net_grid_low"]
    return float(row["net_mean"]) if low is None else low


def any_repairs(rows: Iterable[Row]) -> bool:
    """Return whether some defense surely repairs something; ``rows`` are of ``consistency``."""
    return any(row["net_mean"] is not None and surely(row) > harm.LEAST for row in rows)


def _on_ranks(rows: Sequence[Row], means: Mapping[str, Row]) -> list[str]:
    """Return what to know of the ranks of one budget.

    Args:
        rows: of ``ranks``.
        means: the rows of ``consistency``, by defense.
    """
    if not rows:
        return ["No ranks: they take two defenses or more that were planned in the same settings."]
    ranked = [row for row in rows if row["ranked"]]
    first = ranked[0]
    shared = views.counted(first["num_shared_all"], "setting")
    notes = [f"Ranked: {views.counted(len(ranked), 'defense')}, all of them in {shared}."]
    if any(row["num_shared_least"] != first["num_shared_all"] for row in ranked):
        notes.append("Each two are compared over the settings that both were planned in.")
    notes += [f"Not ranked: {row['defense']}, {row['why_not']}." for row in rows if not row["ranked"]]
    lacking = [f"{row['defense']} {row['num_without_result']}" for row in ranked if row["num_without_result"]]
    if lacking:
        notes.append(
            f"Settings without a result, where a defense takes the last ranks: {', '.join(lacking)}."
        )
    of_ranked = [means[row["defense"]] for row in ranked]
    if not enough(of_ranked):
        notes.append("Too few settings, or samples alone, to call one better: ranks describe these settings.")
    elif not any_repairs(of_ranked):
        notes.append("None of them surely repairs anything, so nobody leads.")
    else:
        notes.append(leading(ranked))
    if any(row["single_seed"] for row in rows):
        notes.append(SINGLE_SEED)
    return notes


def leading(ranked: Sequence[Row]) -> str:
    """Return who leads, by the rows of a ranking: who can't be told from the first leads with it."""
    names = sorted(row["defense"] for row in ranked if row is ranked[0] or with_first(row, ranked[0]))
    if len(names) == 1:
        return f"{names[0]} leads: on this grid it can be told from all others (Holm, 5 %)."
    return f"{', '.join(names)} lead together: on this grid the first can't be told from them (Holm, 5 %)."


def with_first(row: Row, first: Row) -> bool:
    """Return whether a defense can't be told from the first: equal ranks are a tie, whatever p says."""
    return not row["leader_apart_grid"] or bool(row["mean_rank"] - first["mean_rank"] < SAME_RANK)


SINGLE_SEED = (
    "Single seed: each setting has one backdoored model, so nothing here tells how another training run of "
    "it fares."
)


def comparisons(tables: Tables, measure: str) -> Listing:
    """Return each defense against the two baselines, in the order of the ranking."""
    title = MEASURE_TEXTS[measure]
    better = "less" if measure in LOWER_IS_BETTER else "more"
    order = {defense: place for place, defense in enumerate(views.defenses(tables))}
    blocks = []
    rows_of = [
        row
        for row in tables.comparisons.to_pylist()
        if row["measure"] == measure and row["baseline"] in BASELINES
    ]
    for spc in views.budgets(tables):
        found: dict[str, Row] = {}
        for row in (row for row in rows_of if row["spc"] == spc):
            own = found.setdefault(row["defense"], _of_defense(row) | {"cells": {}})
            baseline = row["baseline"]
            own |= {f"{baseline}_{part}": row[part] for part in (*PARTS, "num_pairs", "num_unpaired")}
            own[f"{baseline}_beyond"] = row["difference"]
            own[f"{baseline}_verdict"] = verdict(row, measure, "grid")
            own[f"{baseline}_verdict_beyond"] = verdict(row, measure, "beyond")
            own["num_settings"] = max(own.get("num_settings", 0), row["num_settings"])
            own["cells"] = _query(tables, spc, row["defense"], *BASELINES)
        rows = sorted(found.values(), key=lambda row: order.get(row["defense"], len(order)))
        budget = [row for row in rows_of if row["spc"] == spc]
        blocks.append(Block(spc, rows, _on_pairs(budget)))
    columns = [DEFENSE, GIVEN]
    for baseline in BASELINES:
        columns += [
            Column(
                f"{baseline}_difference",
                f"{title} minus {baseline}'s, points",
                points,
                f"{baseline}_difference_grid_low",
                f"{baseline}_difference_grid_high",
                "Mean difference of pairs in percentage points, and its 95 % interval on this grid: "
                f"{better} is better.",
                verdict=f"{baseline}_verdict",
            ),
            Column(
                f"{baseline}_improvement",
                f"better than {baseline}, %",
                whole,
                f"{baseline}_improvement_grid_low",
                f"{baseline}_improvement_grid_high",
                f"Probability that it has {better} {title} than {baseline} on a pair, by more than a point "
                "(DER: half a point); ties count half.",
            ),
            Column(
                f"{baseline}_beyond",
                "beyond this grid, points",
                points,
                f"{baseline}_difference_beyond_low",
                f"{baseline}_difference_beyond_high",
                "The same difference, and its 95 % interval for other data sets, architectures and attacks "
                "like these.",
                verdict=f"{baseline}_verdict_beyond",
            ),
        ]
    columns.append(Column("num_settings", "settings", count))
    return Listing(f"comparisons_{measure}", f"{title} against fine-tuning and fine-pruning", columns, blocks)


PARTS = tuple(
    f"{name}{end}"
    for name in ("difference", "improvement")
    for end in ("", "_grid_low", "_grid_high", "_beyond_low", "_beyond_high")
)


def verdict(row: Row, measure: str, scope: str) -> str:
    """Return ``better`` or ``worse`` if its adjusted p is small in a scope, else nothing."""
    p, difference = row[f"p_{scope}_holm"], row["difference"]
    if p is None or p >= ALPHA or not difference:
        return ""
    return "better" if (difference < 0) == (measure in LOWER_IS_BETTER) else "worse"


def _on_pairs(rows: Sequence[Row]) -> list[str]:
    """Return what to know of the pairs of one budget."""
    if not rows:
        return [NO_PAIRS]
    notes = [VERDICTS, *on_scopes(rows)]
    unpaired = sum(row["num_unpaired"] for row in rows)
    if unpaired:
        pairs = unpaired + sum(row["num_pairs"] for row in rows)
        notes.append(f"{unpaired:,} of {pairs:,} planned pairs have no result on one side and are left out.")
    if any(row["single_seed"] for row in rows):
        notes.append(SINGLE_SEED)
    return notes


NO_PAIRS = "No pairs: neither fine-tuning nor fine-pruning is among the defenses, or no attack took."
VERDICTS = (
    "95 % intervals are for one row each; ▲ better and ▼ worse than the baseline hold 5 % over all rows of a "
    "column (Holm)."
)
BOUND_NOTE = "One seed a setting: intervals on this grid are upper bounds."
NO_GRID = "No intervals on this grid: seeds and samples are too few."
ONLY_DRAWS = "Intervals on this grid are of these models, with other samples."
BEYOND_NOTE = "Those beyond are right if what varies was drawn at random from what is of interest."
NO_BEYOND = "Too few data sets, architectures and attacks to speak of others."


def on_scopes(rows: Sequence[Row]) -> list[str]:
    """Return what to know of both kinds of intervals, by their basis in the rows."""
    bases = {row["grid_basis"] or "" for row in rows}
    notes = [BOUND_NOTE] if any(basis.startswith("bound") for basis in bases) else []
    notes += [ONLY_DRAWS] if bases == {"draws"} else [NO_GRID] if bases == {""} else []
    over = {row["beyond_over"] for row in rows} - {None}
    if not over:
        return [*notes, NO_BEYOND]
    return [*notes, BEYOND_NOTE]


def consistency(tables: Tables) -> Listing:
    """Return how far each defense can be relied on, in the order of the ranking."""
    order = {defense: place for place, defense in enumerate(views.defenses(tables))}
    blocks = []
    for spc in views.budgets(tables):
        rows = [
            row
            | _of_defense(row)
            | {"cells": _query(tables, spc, row["defense"])}
            | {"clean_cells": _query(tables, spc, row["defense"], attacked=False)}
            | {"num_clean_settings": row["num_clean_settings"] or None}
            for row in tables.consistency.to_pylist()
            if row["spc"] == spc and row["defense"] != NO_METHOD
        ]
        rows.sort(key=lambda row: order.get(row["defense"], len(order)))
        blocks.append(Block(spc, rows, []))
    columns = [
        DEFENSE,
        GIVEN,
        _measured("der"),
        *(
            Column(
                f"der_spread_{axis}",
                f"over {name}",
                spread,
                explained=f"Standard deviation of its mean DER over {name}, percentage points.",
            )
            for axis, name in SPREADS.items()
        ),
        *(_worst(measure)._replace(page=measure in ("der", "asr")) for measure in MEASURE_TEXTS),
        Column(
            "clean_acc_drop_mean",
            "ACC lost on clean models, points",
            points,
            explained="Mean loss of accuracy on models without a backdoor.",
            cells="clean_cells",
        ),
        Column(
            "clean_acc_drop_worst_tenth",
            "worst tenth of that",
            points,
            explained="Mean of the tenth of clean settings where it loses most.",
            cells="clean_cells",
        ),
        Column("num_clean_settings", "clean settings", count, cells="clean_cells"),
    ]
    return Listing("consistency", "How far each defense can be relied on", columns, blocks)


SPREADS = {
    "dataset": "data sets",
    "architecture": "architectures",
    "attack": "attacks",
    "ratio": "ratios",
    "spc": "SPC",
}


def heatmap(tables: Tables, measure: str) -> Listing:
    """Return the means of each defense against each attack, all data sets and budgets together."""
    frame = charts.heat(tables)
    attacks = [attack for attack in sorted(set(frame["attack"])) if attack != NO_METHOD]
    if NO_METHOD in set(frame["attack"]) and measure == "acc":
        attacks.append(NO_METHOD)
    found: dict[str, Row] = {}
    for row in frame.to_dict("records"):
        value = row[measure]
        found.setdefault(row["defense"], {})[row["attack"]] = None if math.isnan(value) else value
    order = [NO_METHOD, *views.defenses(tables)]
    rows = [{"defense": views.defense_text(name)} | found[name] for name in order if name in found]
    columns = [
        DEFENSE,
        *(Column(attack, "no attack" if attack == NO_METHOD else attack, views.share) for attack in attacks),
    ]
    caption = f"{MEASURE_TEXTS[measure]}, percent: means over settings, each by its mean over budgets"
    return Listing(f"heatmap_{measure}", caption, columns, [Block(None, rows, [])])


def protocol_effect(tables: Tables) -> Listing:
    """Return what one protocol changes against another, of each defense that ran under both."""
    found: dict[tuple[str, str, str], Row] = {}
    for row in tables.protocol_effect.to_pylist():
        if row["spc"] is not None or row["measure"] not in EFFECT:
            continue
        pair = (row["defense"], row["protocol"], row["other"])
        named = {"defense": row["defense"], "pair": f"{row['other']} → {row['protocol']}"}
        own = found.setdefault(pair, named)
        measure = row["measure"]
        for name, end in (("", ""), ("_low", "_grid_low"), ("_high", "_grid_high")):
            own[f"{measure}_change{name}"] = row[f"difference{end}"]
        if None not in (row["other_mean"], row["mean"]):
            own[f"{measure}_from_to"] = f"{views.share(row['other_mean'])} → {views.share(row['mean'])}"
        if None not in (row["other_steps"], row["steps"]):
            own["steps"] = f"{row['other_steps']:,.0f} → {row['steps']:,.0f}"
    columns = [
        DEFENSE,
        Column("pair", "protocols"),
        *(
            Column(
                f"{measure}_change",
                f"{MEASURE_TEXTS[measure]} change, points",
                points,
                f"{measure}_change_low",
                f"{measure}_change_high",
                f"Mean {MEASURE_TEXTS[measure]} under the second protocol minus that under the first, pair "
                "by pair, its 95 % interval on this grid, and both means, in percent.",
                beside=f"{measure}_from_to",
            )
            for measure in EFFECT
        ),
        Column("steps", "optimizer steps", explained="Mean number in a run, under both."),
    ]
    rows = [found[pair] for pair in sorted(found)]
    return Listing("protocol_effect", "What another protocol changes", columns, [Block(None, rows, [])])


def tuning(tables: Tables) -> Listing:
    """Return what choosing settings gains and costs each defense, with all of its trials."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in tables.tuning.to_pylist():  # the last row of a search is that of all trials
        key = (row["dataset"], row["defense"], row["spc"])
        curve = [
            *found.get(key, {}).get("curve", []),
            f"{row['num_trials']}: {views.share(row['der_tuned'])}",
        ]
        found[key] = row | {"curve": curve}
    for row in tables.stability.to_pylist():
        found[row["dataset"], row["defense"], row["spc"]] |= row | {"drawn": row["num_trials"]}
    rows = [
        row | {"curve": ", ".join(row["curve"]), "spc": row["spc"] or None}
        for _, row in sorted(found.items())
    ]
    columns = [
        DEFENSE,
        Column("dataset", "data set"),
        Column("spc", "SPC", str),
        *(Column(f"der_{name}", f"DER {name}, %", views.share) for name in ("survey", "paper")),
        Column(
            "der_tuned",
            "DER tuned, %",
            views.share,
            explained="Mean DER of the settings that attacks of other families choose; below, by how many "
            "trials were run.",
            beside="curve",
        ),
        Column(
            "der_oracle", "DER oracle, %", views.share, explained="Of the best trial of each cell: a bound."
        ),
        Column("gain", "gain, points", points, explained="Tuned minus paper: what choosing gains."),
        Column("cost", "cost, points", points, explained="Oracle minus tuned: what choosing costs."),
        Column(
            "stability",
            "stability",
            "{:.2f}".format,
            "stability_low",
            "stability_high",
            "What the median of the drawn settings earns of what the best earns, DER over 50 %, and its 95 % "
            "interval over attacks, then seeds.",
        ),
        Column("transfer", "transfer", "{:.2f}".format, explained="What tuned settings earn of the best."),
        Column("num_cells", "cells a trial", count, page=False),
        Column("forward_passes", "forward passes", count, page=False),
        Column("backward_passes", "backward passes", count, page=False),
    ]
    return Listing("tuning", "What choosing settings gains and costs", columns, [Block(None, rows, [])])


def outcomes(tables: Tables) -> Listing:
    """Return how many cells of each defense had each outcome."""
    found: dict[str, Row] = {}
    for row in tables.outcomes.to_pylist():
        of_defense: Query = {"defense": [row["defense"]]}
        own = found.setdefault(row["defense"], _of_defense(row) | {"total": 0, "cells": of_defense})
        own[row["outcome"]] = own.get(row["outcome"], 0) + row["num_cells"]
        own["total"] += row["num_cells"]
        own[f"{row['outcome']} cells"] = of_defense | _of_outcome(row["outcome"])
    kinds = {row["outcome"] for row in tables.outcomes.to_pylist()}
    rows = [found[name] for name in (NO_METHOD, *views.defenses(tables)) if name in found]
    columns = [
        DEFENSE,
        GIVEN,
        Column("total", "cells", count),
        *(
            Column(kind, kind.replace("_", " "), count, cells=f"{kind} cells")
            for kind in sorted(kinds, key=lambda kind: (kind != OK, kind))
        ),
    ]
    return Listing("outcomes", "How all cells ended", columns, [Block(None, rows, [])])


def _of_outcome(outcome: str) -> Query:
    """Return the cells that ended so."""
    if outcome in (GATE_FAILED, NO_VERDICT):
        return {"status": [OK], "attack_took": [False if outcome == GATE_FAILED else None]}
    # Of clean models the gate says nothing.
    return {"status": [outcome]} | ({"attack_took": [True, None]} if outcome == OK else {})


def reasons(tables: Tables) -> Listing:
    """Return why cells do not count, the most frequent reason first."""
    found: dict[tuple[str, str | None], Row] = {}
    for row in tables.outcomes.to_pylist():
        outcome, reason = row["outcome"], row["reason"]
        if outcome == OK:
            continue
        query = _of_outcome(outcome) | ({} if outcome in (GATE_FAILED, NO_VERDICT) else {"reason": [reason]})
        about = {"outcome": outcome.replace("_", " "), "reason": reason or "", "cells": query}
        own = found.setdefault((outcome, reason), about | {"num_cells": 0, "of": {}})
        own["num_cells"] += row["num_cells"]
        name = views.defense_text(row["defense"])
        own["of"][name] = own["of"].get(name, 0) + row["num_cells"]
    rows = [
        row | {"defenses": ", ".join(f"{name} {number:,}" for name, number in row["of"].items())}
        for row in sorted(found.values(), key=lambda row: (-row["num_cells"], row["outcome"], row["reason"]))
    ]
    columns = [
        Column("num_cells", "cells", count),
        Column("outcome", "outcome"),
        Column("reason", "reason"),
        Column("defenses", "defenses, with their cells"),
    ]
    return Listing("reasons", "Why cells do not count", columns, [Block(None, rows, [])])


def models(table: pa.Table) -> Listing:
    """Return the models before any defense, clean ones first in each data set and architecture."""
    took = {None: UNDEFINED, True: "took", False: "failed"}
    rows = [
        row
        | {"attack_text": views.attack_text(row["attack"], row["ratio"]), "gate": took[row["attack_took"]]}
        | {"cells": {axis: [row[axis]] for axis in MODEL_AXES} | {"defense": [NO_METHOD]}}
        for row in table.to_pylist()
    ]
    rows.sort(
        key=lambda row: (
            row["dataset"],
            row["architecture"],
            row["attack"] != NO_METHOD,
            row["attack"],
            row["ratio"],
            row["seed"],
        )
    )
    columns = [
        Column("dataset", "data set"),
        Column("architecture", "architecture"),
        Column("attack_text", "attack"),
        Column("seed", "seed", str),
        Column("acc", "ACC, %", views.share),
        Column("asr", "ASR, %", views.share),
        Column("ra", "RA, %", views.share),
        Column(
            "clean_asr",
            "clean model's ASR, %",
            views.share,
            explained="What the same triggered images do to the clean model of the same seed.",
        ),
        Column(
            "acc_loss", "ACC loss, points", views.share, explained="Against the clean model of the same seed."
        ),
        Column("gate", "gate"),
        Column(
            "effective_ratio",
            "effective ratio",
            "{:.4g}".format,
            explained="Poisoned of all training images.",
        ),
        Column("num_poisoned", "poisoned", count, page=False),
        Column("num_train", "training images", count, page=False),
        Column("psnr", "PSNR, dB", "{:.1f}".format, explained="Of triggered against clean test images."),
        Column("ssim", "SSIM", "{:.3f}".format, explained="Of triggered against clean test images."),
        Column("linf", "L∞", str, page=False),
        Column("num_parameters", "parameters", count, page=False),
        Column("epochs", "epochs", str, page=False),
        Column("train_accuracy", "training ACC, %", views.share, page=False),
        Column("seconds", "seconds", views.seconds, page=False),
    ]
    return Listing("models", "The models before any defense", columns, [Block(None, rows, [])])


# --- as files --------------------------------------------------------------------------------------


def csv_text(listing: Listing) -> str:
    """Return a listing as CSV: values as the tables have them, with the budget where there are several."""
    budgets = len(listing.blocks) > 1
    keys = [
        key for column in listing.columns for key in (column.key, column.low, column.high) if key is not None
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(["spc"] if budgets else []), *keys])
    for block in listing.blocks:
        for row in block.rows:
            values = [*([spc_text(block.spc)] if budgets else []), *(row.get(key) for key in keys)]
            writer.writerow("" if value is None else for_spreadsheet(value) for value in values)
    return text.getvalue()


LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"∞": r"$\infty$", "–": "--", "<": "$<$", ">": "$>$", "\n": " "}
)


def latex(listing: Listing) -> str:
    """Return a listing as a LaTeX table for the package booktabs, without a float around it."""
    columns = listing.shown
    kinds = "".join("l" if column.write is None else "r" for column in columns)
    several = len(listing.blocks) > 1
    lines = [
        f"% {listing.caption}. Needs \\usepackage{{booktabs}}.",
        f"\\begin{{tabular}}{{{kinds}}}",
        r"\toprule",
        _line(column.head for column in columns),
        r"\midrule",
    ]
    for place, block in enumerate(listing.blocks):
        if several:
            lines += [r"\addlinespace"] if place else []
            lines.append(rf"\multicolumn{{{len(columns)}}}{{l}}{{SPC {spc_text(block.spc)}}} \\")
        for row in block.rows:
            lines.append(_line(_with_interval(column, row) for column in columns))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(texts: Iterable[str]) -> str:
    return " & ".join(text.translate(LATEX) for text in texts) + r" \\"


def _with_interval(column: Column, row: Row) -> str:
    interval = column.interval(row)
    return f"{column.text(row)} {interval}" if interval else column.text(row)
