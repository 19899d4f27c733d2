"""What the terminal table and the report both show: groups, percents, failures, notes."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import pyarrow as pa

from detrojan import registry
from detrojan.analysis import protocols
from detrojan.analysis.statistics import gate
from detrojan.cells import NO_METHOD, ratio_text
from detrojan.storage.columns import OK

Row = dict[str, Any]

UNDEFINED = "–"
FAILED = "attack failed the gate"
NAMED_SETTINGS = 3  # of a failure; more are only counted
MEASURE_TEXTS = {"der": "DER", "asr": "ASR", "acc": "ACC", "ra": "RA"}
DATA_FREE, CLEAN_DATA, KNOWN_TRIGGER = "data_free", "clean_data", "known_trigger"
# What a defense is given, by its threat model; tables of others may have more of them.
GIVEN = {
    "none": "",  # the untouched model
    DATA_FREE: "no data",
    CLEAN_DATA: "clean images",
    KNOWN_TRIGGER: "the trigger",
    "training_data": "the poisoned training set",
}


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables of a study, or of other people's results, which have no models.

    Those that are made of cells and models are attributes too: ``tables.ranks``. One that needs models is
    None where there are none.
    """

    cells: pa.Table
    models: pa.Table | None
    made: Mapping[str, pa.Table]

    @property
    def protocols(self) -> list[str]:
        """The protocols of its defenses, in their order."""
        return protocols.of(self.cells)

    def of_protocol(self, protocol: str) -> "Tables":
        """Return what it has of one protocol; tables that compare protocols stay whole."""
        from detrojan.analysis import derived  # with pandas, which `detrojan status` does without

        made = {
            name: table if derived.TABLES[name].table.across else protocols.only(table, protocol)
            for name, table in self.made.items()
        }
        return Tables(protocols.only(self.cells, protocol), self.models, made)

    def __getattr__(self, name: str) -> Any:
        if name not in registry.names(registry.TABLES):
            raise AttributeError(f"there is no table {name!r}")
        return self.made.get(name)


class Setting(NamedTuple):
    """What the rows of one small table share; ``attack_took`` is None where there is no attack."""

    dataset: str
    architecture: str
    attack: str
    ratio: float
    attack_took: bool | None

    def __str__(self) -> str:
        parts = [self.dataset, self.architecture, attack_text(self.attack, self.ratio)]
        return " · ".join([*parts, FAILED] if self.attack_took is False else parts)


class Failure(NamedTuple):
    """Cells of one defense that ended with the same status and reason."""

    num_cells: int
    status: str
    reason: str
    defense: str
    settings: list[Setting]

    @property
    def where(self) -> str:
        """The settings, or how many there are."""
        few = len(self.settings) <= NAMED_SETTINGS
        return "; ".join(map(str, self.settings)) if few else f"{len(self.settings)} settings"


def attack_text(attack: str, ratio: float) -> str:
    """Return an attack with its poisoning ratio, or that there is none."""
    return "no attack" if attack == NO_METHOD else f"{attack}, ratio {ratio_text(ratio)}"


def defense_text(defense: str) -> str:
    """Return the name of a defense, or what the model without one is called."""
    return "untouched" if defense == NO_METHOD else defense


def given_text(threat_model: str) -> str:
    """Return what a defense of this threat model is given."""
    return GIVEN.get(threat_model, threat_model)


def spc_text(spc: int | None) -> str:
    """Return a budget in words: clean samples per class, or all budgets of a study."""
    return "pooled" if spc is None else str(spc) if spc else "none"


def budgets(tables: Tables) -> list[int | None]:
    """Return the budgets that rankings are made for: pooled, then each SPC, unless there is only one."""
    spcs = sorted({row["spc"] for row in tables.consistency.to_pylist()} - {None})
    return [None, *spcs] if len(spcs) > 1 else [None]


def ranked(tables: Tables) -> list[str]:
    """Return the defenses that are ranked, the best by DER at pooled budgets first."""
    rows = [row for row in tables.ranks.to_pylist() if row["ranked"]]
    best = [row["defense"] for row in rows if row["measure"] == "der" and row["spc"] is None]
    return [*best, *sorted({row["defense"] for row in rows} - {*best})]


def defenses(tables: Tables) -> list[str]:
    """Return all defenses: those that are ranked by their rank, then the others by name."""
    first = ranked(tables)
    return [*first, *sorted(set(tables.summary["defense"].to_pylist()) - {*first, NO_METHOD})]


def groups(summary: pa.Table) -> dict[Setting, list[Row]]:
    """Return the rows of ``summary`` by setting: clean models first, the untouched model first in each.

    Settings whose attack failed the gate stand after all others.
    """
    found: dict[Setting, list[Row]] = {}
    rows = summary.to_pylist()
    for row in sorted(rows, key=lambda row: (row["defense"] != NO_METHOD, row["defense"], row["spc"])):
        found.setdefault(_setting(row), []).append(row)
    return {setting: found[setting] for setting in sorted(found, key=_place)}


def _place(setting: Setting) -> tuple[Any, ...]:
    attacked = setting.attack != NO_METHOD
    return (setting.attack_took is False, setting.dataset, setting.architecture, attacked, *setting[2:4])


def _setting(row: Row) -> Setting:
    return Setting(*(row[axis] for axis in Setting._fields))


def percent(row: Row, measure: str) -> str:
    """Return the mean of a measure and its interval in percent: ``97.5 [96.7, 98.3]``."""
    mean, low, high = (row[f"{measure}_{part}"] for part in ("mean", "low", "high"))
    if mean is None:
        return UNDEFINED
    return share(mean) if low is None or high is None else f"{share(mean)} [{share(low)}, {share(high)}]"


def share(value: float | None) -> str:
    """Return a fraction in percent, with one decimal."""
    return UNDEFINED if value is None else f"{100 * value:z.1f}"


def counted(number: int, noun: str) -> str:
    """Return how many there are: ``1 model``, ``2 models``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def seconds(value: float | None) -> str:
    """Return a time with as many decimals as it deserves."""
    if value is None:
        return UNDEFINED
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 or not value else f"{value:.2f}"


def interval_note(summary: pa.Table) -> str:
    """Return the sentence that says what the intervals of ``summary`` are over."""
    over = set(summary["interval_over"].to_pylist()) - {None}
    if not over:
        return "No intervals: each setting has one cell."
    return f"[low, high] is the 95 % interval of the mean, {over_text(over)}."


def over_text(over: Set[str]) -> str:
    """Return what intervals of settings are over, by the values of ``interval_over``."""
    of_draws = "over draws of one model, which says nothing of other models"
    if over == {"draws"}:
        return of_draws
    of_models = "over models" + (" and draws" if "models_draws" in over else "")
    if "draws" not in over:
        return of_models
    return f"{of_models} where there are two or more models, else {of_draws}"


def failures(cells: pa.Table) -> list[Failure]:
    """Return the cells that did not end well, counted by defense, status and reason, most frequent first."""
    found: dict[tuple[str, str, str], list[Setting]] = {}
    for row in cells.to_pylist():
        if row["status"] != OK:
            found.setdefault((row["status"], row["reason"] or "", row["defense"]), []).append(_setting(row))
    failures = [Failure(len(settings), *what, sorted(set(settings))) for what, settings in found.items()]
    return sorted(failures, key=lambda failure: (-failure.num_cells, *failure[1:]))


def failed_attacks(models: pa.Table) -> dict[Setting, list[str]]:
    """Return why attacks failed the gate: by setting, a line for each model, with its seed."""
    found: dict[Setting, list[str]] = {}
    for row in models.to_pylist():
        if row["attack_took"] is False:
            found.setdefault(_setting(row), []).append(f"seed {row['seed']}: {row['gate_reason']}")
    return found


def advice(models: pa.Table) -> list[str]:
    """Return what may help the attacks that failed the gate, each advice once."""
    reasons = (row["gate_reason"] or "" for row in models.to_pylist() if row["attack_took"] is False)
    return sorted({helps for reason in reasons if (helps := gate.advice(reason))})


def weak_triggers(models: pa.Table) -> list[str]:
    """Return a line for each trigger that its own making found weak, and how many models have it."""
    weak = (row for row in models.to_pylist() if row["trigger_weakness"] is not None)
    found = Counter((row["dataset"], row["attack"], row["trigger_weakness"]) for row in weak)
    return [
        f"{dataset} · {attack} ({counted(number, 'model')}): {weakness}"
        for (dataset, attack, weakness), number in found.items()
    ]


def statuses(cells: pa.Table) -> dict[str, int]:
    """Return how many cells ended with each status, ``ok`` first."""
    found = Counter(cells["status"].to_pylist())
    return dict(sorted(found.items(), key=lambda item: (item[0] != OK, item[0])))


def values(table: pa.Table, column: str) -> Sequence[Any]:
    """Return the distinct values of a column, sorted, nulls left out."""
    return sorted(set(table[column].to_pylist()) - {None})
