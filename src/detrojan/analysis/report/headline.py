"""What a report says first: one sentence that holds, and after it what it rests on.

Which sentence, in this order: nothing to judge; too little to judge by; nothing works; several lead
together; one leads. Only what ranks, differences and intervals bear out is said, and what they don't is.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from detrojan.analysis.report import charts, listings, views
from detrojan.analysis.report.listings import ALPHA, points, rank
from detrojan.analysis.report.views import Row, Tables, counted
from detrojan.analysis.statistics import harm
from detrojan.analysis.statistics.crossed import FACTORS
from detrojan.analysis.statistics.gate import advice
from detrojan.cells import NO_METHOD
from detrojan.storage.columns import OK
from detrojan.study.schema import BASELINES

LED_BY = "der"
MOST_NAMED = 3  # defenses with their numbers, in one sentence
MOST_PLAIN = 8  # likewise where that is all there is to say
MOST_LEVELS = 5  # that are named one by one
MUCH_HARM = 0.1  # of settings
MANY_FAILED = 0.01  # of runs
FT = BASELINES[0]
NOUNS = {"dataset": "data set", "architecture": "architecture", "attack": "attack", "ratio": "ratio"}
OF_LEVELS = dict(zip(FACTORS, ("num_datasets", "num_architectures", "num_attacks"), strict=True))


class Headline(NamedTuple):
    """What stands first, and sentences on what it rests on."""

    first: str
    rest: list[str]


def of_tables(tables: Tables) -> Headline:
    """Return what the report of ``tables`` says first: by DER, all budgets pooled."""
    pooled = {row["defense"]: row for row in tables.consistency.to_pylist() if row["spc"] is None}
    if not pooled:
        return Headline(*_nothing_to_judge(tables))
    ranked = [row for row in charts.ranks_by(tables, LED_BY) if row["spc"] is None]
    with_result = [row for name, row in pooled.items() if name != NO_METHOD and row["num_settings"]]
    rest = _rests_on(tables, ranked, pooled)
    if too_little := _too_little(tables, ranked, with_result):
        return Headline(too_little, rest)
    of_ranked = [pooled[row["defense"]] for row in ranked if pooled[row["defense"]]["num_settings"]]
    if nothing := _nothing_works(of_ranked):
        return Headline(nothing, rest)
    leaders = [ranked[0], *(row for row in ranked[1:] if listings.with_first(row, ranked[0]))]
    names = [row["defense"] for row in leaders]
    if len(names) == 1:
        said = [*_winner(tables, ranked, pooled), *_elsewhere(tables, names[0], ranked, pooled)]
    else:
        said = [*_tie(tables, leaders, ranked, pooled)]
    said += [*_harms(names, pooled), *_other_leaders(tables, names)]
    return Headline(said[0], [*said[1:], *rest])


# --- the cases -------------------------------------------------------------------------------------


def _nothing_to_judge(tables: Tables) -> tuple[str, list[str]]:
    """Return that no attack took, how near the nearest came, and what may help."""
    sources = tables.cells.filter(_untouched(tables)).to_pylist() if tables.models is None else None
    rows = tables.models.to_pylist() if sources is None and tables.models is not None else sources or []
    attacked = [row for row in rows if row["attack"] != NO_METHOD]
    failed = [row for row in attacked if row["attack_took"] is False]
    if not failed:
        return charts.nothing_to_show(tables), []
    nearest = max(failed, key=lambda row: (-(row.get("gate_reason") or "").count(" and "), row["asr"] or 0))
    what = f"{nearest['attack']} on {nearest['dataset']}, has ASR {views.share(nearest['asr'])} %"
    first = f"No attack took: 0 of {counted(len(failed), 'model')} passed the gate. The nearest, {what}."
    reason = nearest.get("gate_reason") or ""
    rest = [f"Why: {reason}."] if reason else []
    if helps := advice(reason):
        rest.append(f"What may help: {helps}; or another limit, the study file's gate.")
    return first, rest


def _untouched(tables: Tables) -> list[bool]:
    return [name == NO_METHOD for name in tables.cells["defense"].to_pylist()]


def _too_little(tables: Tables, ranked: Sequence[Row], with_result: Sequence[Row]) -> str:
    """Return plain numbers where nothing more can be said; empty if it can."""
    few = not listings.enough(with_result)
    if len(ranked) >= 2 and not few:
        return ""
    if not with_result:
        return "No defense has a result on a model whose attack took."
    models = _models_that_took(tables)
    seeds = ", one seed each" if any(row["single_seed"] for row in with_result) else ""
    shown = sorted(with_result, key=lambda row: row["defense"])
    more = f"; and {len(shown) - MOST_PLAIN} more" if len(shown) > MOST_PLAIN else ""
    numbers = "; ".join(f"{row['defense']}: {plain(row)}" for row in shown[:MOST_PLAIN]) + more
    if few:
        them = "this model" if models == 1 else "these models"
        return f"Results of {counted(models, 'model')}{seeds}, which describe {them}: {numbers}."
    return f"Fewer than two defenses can be ranked: {numbers}."


def _models_that_took(tables: Tables) -> int:
    """Return how many models there are whose attack took, and whose untouched model is known."""
    columns = (tables.cells[name].to_pylist() for name in ("defense", "attack_took", "status"))
    return sum(row == (NO_METHOD, True, OK) for row in zip(*columns, strict=True))


def _nothing_works(ranked: Sequence[Row]) -> str:
    """Return that no ranked defense surely repairs anything, by its net on this grid; empty if one does.

    Where no defense has an interval, the means have to do.
    """
    found = sorted((row for row in ranked if row["net_mean"] is not None), key=lambda row: row["defense"])
    if not found or listings.any_repairs(found):
        return ""
    best = max(found, key=lambda row: row["net_mean"])
    repaired = any(row["share_repaired"] for row in found)
    claim = "No defense surely repaired anything" if repaired else "No defense repaired anything"
    low, high = best["net_grid_low"], best["net_grid_high"]
    alike = low is not None and max(abs(low), abs(high)) <= harm.LEAST
    untouched = " The untouched model is as good." if alike else ""
    return (
        f"{claim} ({_listed(row['defense'] for row in found)}): the most that one changed net, the attack "
        f"success removed minus the accuracy lost, is {points(best['net_mean'])} points"
        f"{_interval(low, high)}.{untouched}"
    )


def _winner(tables: Tables, ranked: Sequence[Row], pooled: dict[str, Row]) -> Iterable[str]:
    """Return that one leads on this grid, in plain numbers, and how far before the next."""
    first, second = ranked[0]["defense"], ranked[1]["defense"]
    row = pooled[first]
    settings = counted(row["num_settings"], "setting")
    yield (
        f"{first} leads on this grid ({settings}): {plain(row)}. Its DER minus that of {second}, the next, "
        f"is {_pair(tables, first, second)}, and it can be told from each other defense (Holm, 5 %)."
    )
    if not listings.any_repairs([row]):
        interval = _interval(row["net_grid_low"], row["net_grid_high"])
        yield f"Whether {first} repairs anything isn't sure: net {points(row['net_mean'])} points{interval}."


def _tie(
    tables: Tables, leaders: Sequence[Row], ranked: Sequence[Row], pooled: dict[str, Row]
) -> Iterable[str]:
    """Return who leads together, no name before another but by the alphabet."""
    names = sorted(row["defense"] for row in leaders)
    ranks = [row["mean_rank"] for row in sorted(leaders, key=lambda row: row["defense"])]
    settings = counted(max(pooled[name]["num_settings"] for name in names), "setting")
    shown = [f"{name} ({plain(pooled[name])})" for name in names] if len(names) <= MOST_NAMED else names
    everyone = "All of them: " if len(names) == len(ranked) and len(names) > 2 else ""
    if len(names) == 2:
        yield (
            f"{' and '.join(shown)} lead on this grid ({settings}) and can't be told apart: mean ranks "
            f"{rank(ranks[0])} and {rank(ranks[1])} of {len(ranked)}; the DER of {names[0]} minus that of "
            f"{names[1]} is {_pair(tables, *names)}."
        )
    else:
        yield (
            f"{everyone}{_listed(shown)} lead together on this grid ({settings}): the first by DER can't be "
            f"told from the others, mean ranks {rank(min(ranks))} to {rank(max(ranks))} of {len(ranked)} "
            "(Holm, 5 %)."
        )
    if FT in names or FT not in pooled:
        return
    better = [name for name in names if _beats_ft(tables, name, "grid")]
    if better:
        who = "Each of them" if len(better) == len(names) else f"Of them {_listed(better)}"
        yield f"{who} has a higher DER than fine-tuning on this grid (Holm, 5 %)."
    else:
        yield "None of them is shown to be better than fine-tuning."


# --- how far it holds ------------------------------------------------------------------------------


def _elsewhere(tables: Tables, name: str, ranked: Sequence[Row], pooled: dict[str, Row]) -> Iterable[str]:
    """Return whether a lead also holds for other data sets, architectures and attacks."""
    row = pooled[name]
    rival = FT if name != FT and FT in pooled else ranked[1]["defense"]
    before_next = ranked[1]["leader_apart_beyond"] is True
    before_ft = rival != FT or _beats_ft(tables, name, "beyond")
    if before_next and before_ft:
        whom = _listed(dict.fromkeys((rival, ranked[1]["defense"])))
        yield (
            f"It also holds for other data sets, architectures and attacks like these, against {whom}, if "
            "these were drawn at random from those of interest."
        )
        return
    numbers = _listed(counted(row[column], NOUNS[factor]) for factor, column in OF_LEVELS.items())
    levels = _by_level(tables, name, row) if rival == FT else ""
    yield f"Whether it holds elsewhere can't be said from {numbers}{levels}."


def _by_level(tables: Tables, name: str, row: Row) -> str:
    """Return how far a defense lies before fine-tuning on each level of what varies most."""
    factors = [factor for factor, column in OF_LEVELS.items() if row[column] > 1]
    if not factors:
        return ""
    factor = max(factors, key=lambda factor: row[f"beyond_share_{factor}"] or 0.0)
    found = [
        f"{level['level']} {points(level['difference_ft'])}"
        for level in tables.levels.to_pylist()
        if (level["measure"], level["spc"], level["defense"], level["axis"]) == (LED_BY, None, name, factor)
        and level["difference_ft"] is not None
    ]
    if not found or len(found) > MOST_LEVELS:
        return ""
    return f": by {NOUNS[factor]} its DER minus fine-tuning's is {_listed(found)} points"


def _harms(names: Sequence[str], pooled: dict[str, Row]) -> Iterable[str]:
    """Return which of the leaders leave much worse than it was."""
    for name in names:
        share = pooled[name]["share_harmful"]
        if share is not None and share > MUCH_HARM:
            yield f"{name} leaves {listings.whole(share)} % of settings worse than untouched."


def _other_leaders(tables: Tables, names: Sequence[str]) -> Iterable[str]:
    """Return who else would lead at another gate, or with one level left out."""
    if tables.gate_sensitivity is not None:
        at: dict[str, list[float]] = {}
        for row in tables.gate_sensitivity.to_pylist():
            if row["leads"] and not row["is_study"] and row["defense"] not in names:
                at.setdefault(row["defense"], []).append(row["min_asr"])
        for name, limits in at.items():
            percents = _listed(f"{100 * limit:g} %" for limit in limits)
            yield f"With a gate of ASR {percents} instead, {name} would have the best mean rank."
    without: dict[str, list[str]] = {}
    for row in tables.leads.to_pylist():
        if row["leader"] not in names:
            level = f"{NOUNS[row['axis']]} {row['level_left_out']}"
            without.setdefault(row["leader"], []).append(level)
    for name, levels in without.items():
        yield f"Left out one at a time, without {_listed(levels, 'or')} {name} would have the best mean rank."


def _rests_on(tables: Tables, ranked: Sequence[Row], pooled: dict[str, Row]) -> list[str]:
    """Return what to know of every finding: its intervals, who is not ranked, what failed."""
    said = [note for note in listings.on_scopes(list(pooled.values())) if note != listings.BEYOND_NOTE]
    if any(tables.ranks["single_seed"].to_pylist()):
        said.append(listings.SINGLE_SEED)
    near = [] if tables.models is None else [row for row in tables.models["near_gate"].to_pylist() if row]
    if near:
        said.append(
            f"{counted(len(near), 'model')} within 3 points of the gate's limit, where another seed may "
            "decide otherwise."
        )
    unranked = [
        row
        for row in tables.ranks.to_pylist()
        if (row["measure"], row["spc"], row["ranked"]) == (LED_BY, None, False)
    ]
    said += [f"Not ranked: {row['defense']}, {row['why_not']}." for row in unranked]
    failed = [
        f"{name} {listings.whole(row['share_failed'])} %"
        for name, row in pooled.items()
        if name != NO_METHOD and row["share_failed"] > MANY_FAILED
    ]
    if failed:
        said.append(f"Runs without a repaired model: {_listed(failed)}.")
    return said


# --- words -----------------------------------------------------------------------------------------


def plain(row: Row) -> str:
    """Return what a defense changes on its own settings: ``ASR 95 → 36, ACC -3.0``, in percent and points.

    Args:
        row: of ``consistency``.
    """
    asr, drop = row["asr_before_mean"], row["acc_drop_mean"]
    said = []
    if asr is not None and row["asr_mean"] is not None:
        said.append(f"ASR {100 * asr:.0f} → {100 * row['asr_mean']:.0f}")
    if drop is not None:
        said.append(f"ACC {points(-drop)}")
    return ", ".join(said) or "no ASR and no ACC known"


def _pair(tables: Tables, name: str, other: str) -> str:
    """Return the DER of one defense minus that of another, which is ranked too: ``+3.1 points [1, 5]``."""
    row = next(
        row
        for row in tables.pairs.to_pylist()
        if (row["measure"], row["spc"]) == (LED_BY, None) and {row["defense"], row["other"]} == {name, other}
    )
    sign = 1 if row["defense"] == name else -1
    difference = row["difference"]
    if difference is None:
        return "not comparable"
    known = [row[f"difference_grid_{end}"] for end in ("low", "high")]
    low, high = sorted(sign * end for end in known if end is not None) or (None, None)
    return f"{points(sign * difference)} points{_interval(low, high)}"


def _beats_ft(tables: Tables, name: str, scope: str) -> bool:
    """Return whether a defense's DER is surely above fine-tuning's."""
    return any(
        row["difference"] is not None and row["difference"] > 0 and _small(row[f"p_{scope}_holm"])
        for row in tables.comparisons.to_pylist()
        if (row["measure"], row["spc"], row["baseline"], row["defense"]) == (LED_BY, None, FT, name)
    )


def _small(p: float | None) -> bool:
    return p is not None and p < ALPHA


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{points(low)}, {points(high)}]"


def _listed(names: Iterable[str], last: str = "and") -> str:
    """Return names in a sentence: ``a, b and c``."""
    *before, end = names
    return f"{', '.join(before)} {last} {end}" if before else end
