"""Writes the measured part of docs/defenses.md from the tables of a study, config/defenses.yaml's.

    python benchmarks/defenses_page.py results --leaderboard leaderboard.csv

All that stands between the two marks in the page is replaced. The leaderboard is BackdoorBench's, as its
page offers it for download; without it the column is left out.
"""

import argparse
import csv
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from scipy import stats

PAGE = Path(__file__).parents[1] / "docs" / "defenses.md"
BEGIN, END = "<!-- measured: benchmarks/defenses_page.py -->", "<!-- measured: end -->"
SIDE_BY_SIDE = ("survey", "paper")
KNOWS_TRIGGER = "grad_prune"
# When a backdoor counts as removed here: the mean over the draws, shares.
MOST_ASR, MOST_LOSS = 0.2, 0.05
TITLES = {
    "badnets": "BadNets",
    "blended": "Blended",
    "bpp": "BppAttack, which controls training",
    "none": "The clean model",
}
# Methods whose rule is the leaderboard's: its ANP chose the threshold on the test set, and its MBNS goes by
# other statistics than BNP.
ALIKE = {
    "clp": "clp",
    "ft": "ft",
    "fp": "fp",
    "nad": "nad",
    "ibau": "i-bau",
    "nc": "nc",
    "none": "no defense",
}
LISTED_ATTACKS = {"badnets": "badnet", "blended": "blended", "bpp": "bpp"}

Row = dict[str, Any]


def percent(shares: Sequence[float]) -> str:
    """Return the mean of some shares in percent."""
    return f"{100 * statistics.mean(shares):.1f}"


def half_width(shares: Sequence[float]) -> float | None:
    """Return half of Student's 95 % interval of a mean, a share; None of a single value."""
    if len(shares) < 2:
        return None
    return float(stats.t.ppf(0.975, len(shares) - 1)) * statistics.stdev(shares) / len(shares) ** 0.5


def rates(rows: Sequence[Row]) -> str:
    """Return ACC / ASR / RA in percent, with half of ASR's interval where there are several draws."""
    done = [row for row in rows if row["acc"] is not None]
    if not done:
        return rows[0]["status"].replace("_", " ") if rows else ""
    texts = [percent([row["acc"] for row in done])]
    asr = [row["asr"] for row in done if row["asr"] is not None]
    if asr:
        half = half_width(asr)
        texts.append(percent(asr) + ("" if half is None else f" ± {100 * half:.1f}"))
        texts.append(percent([row["ra"] for row in done]))
    return " / ".join(texts)


def steps(rows: Sequence[Row]) -> str:
    """Return the optimizer steps that were taken, from the fewest to the most."""
    taken = sorted({row["steps"] for row in rows})
    return "" if not taken else f"{taken[0]:,}" if len(taken) == 1 else f"{taken[0]:,}–{taken[-1]:,}"


class Measured:
    """The cells of a study of one model an attack."""

    def __init__(self, cells: Iterable[Row]) -> None:
        self.rows = list(cells)

    def of(self, **axes: Any) -> list[Row]:
        """Return the cells with these axes, by draw."""
        return [row for row in self.rows if all(row[axis] == value for axis, value in axes.items())]

    def values(self, axis: str) -> list[Any]:
        """Return what an axis takes, in the order of the cells."""
        return list(dict.fromkeys(row[axis] for row in self.rows if row["defense"] != "none"))

    def untouched(self, attack: str) -> Row:
        """Return the cell of the model as it was trained."""
        return self.of(attack=attack, defense="none")[0]

    def at(self, spc: int, **axes: Any) -> list[Row]:
        """Return the cells of a budget; those of a data-free defense at any."""
        return self.of(spc=spc, **axes) or self.of(spc=0, **axes)

    def removing(self, attack: str, protocol: str, spc: int) -> tuple[list[str], int]:
        """Return the defenses that remove the backdoor, and of how many; without the one that knows it."""
        before = self.untouched(attack)["acc"]
        names, count = [], 0
        for defense in self.values("defense"):
            rows = [r for r in self.at(spc, attack=attack, defense=defense, protocol=protocol) if r["acc"]]
            if defense == KNOWS_TRIGGER or not rows:
                continue
            count += 1
            asr = statistics.mean(row["asr"] for row in rows)
            if asr <= MOST_ASR and before - statistics.mean(row["acc"] for row in rows) <= MOST_LOSS:
                names.append(f"`{defense}`")
        return names, count


def listed(file: Path | None) -> dict[tuple[str, str], str]:
    """Return the leaderboard's ACC / ASR / RA by our names of attack and defense: GTSRB, ratio 0.1."""
    if file is None:
        return {}
    with file.open(newline="") as stream:
        found = {
            (row["attack_name"], row["defense_name"]): [row[f"test_{name}"] for name in ("acc", "asr", "ra")]
            for row in csv.DictReader(stream)
            if (row["dataset"], row["backbone"], row["ratio"]) == ("gtsrb", "preactresnet18", "0.1")
        }
    return {
        (attack, defense): " / ".join(percent([float(text)]) for text in texts)
        for attack, theirs in LISTED_ATTACKS.items()
        for defense, name in ALIKE.items()
        if all(texts := found.get((theirs, name), [""])) and float(texts[0]) >= 0
    }


def table(
    measured: Measured, attack: str, spc: int, leaderboard: dict[tuple[str, str], str]
) -> Iterator[str]:
    """Yield the lines of a table: a row a defense, the protocols side by side."""
    heads = ["defense", *(text for name in SIDE_BY_SIDE for text in (f"`{name}`", "steps"))]
    if leaderboard and attack != "none":
        heads.append("leaderboard")

    def line(cells: Sequence[str], defense: str) -> str:
        own = [leaderboard.get((attack, defense), "")] if "leaderboard" in heads else []
        return f"| {' | '.join([*cells, *own])} |"

    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    before = rates([measured.untouched(attack)])
    yield line(["untouched", before, "", before, ""], "none")
    for defense in sorted(measured.values("defense")):
        cells = [f"`{defense}`"]
        for protocol in SIDE_BY_SIDE:
            rows = measured.at(spc, attack=attack, defense=defense, protocol=protocol)
            cells += [rates(rows), steps(rows)]
        if any(cells[1:]):
            yield line(cells, defense)
        ours = measured.at(spc, attack=attack, defense=defense, protocol="ours")
        if ours:
            yield line([f"`{defense}`, protocol `ours`", "", "", rates(ours), steps(ours)], "")


def answer(measured: Measured, spc: int) -> Iterator[str]:
    """Yield what a reader asks first: how many methods remove each backdoor, by protocol."""
    for attack in (name for name in TITLES if name != "none" and measured.of(attack=name)):
        for protocol in SIDE_BY_SIDE:
            names, count = measured.removing(attack, protocol, spc)
            if count:
                which = f": {', '.join(sorted(names))}" if names else ""
                title = TITLES[attack].partition(",")[0]
                yield f"- {title}, `{protocol}`: {len(names)} of {count}{which}."


def section(measured: Measured, leaderboard: dict[tuple[str, str], str]) -> str:
    """Return all that stands between the marks."""
    rule = (
        "**How many remove the backdoor with 10 images a class?** Removed means: ASR at most "
        f"{100 * MOST_ASR:.0f} % and ACC at most {100 * MOST_LOSS:.0f} points lower, mean over the draws. "
        f"`{KNOWS_TRIGGER}`, which knows the trigger, is not counted."
    )
    lines = [
        rule,
        "",
        *answer(measured, 10),
    ]
    for spc in sorted(spc for spc in measured.values("spc") if spc):
        lines += ["", f"### {spc} images a class"]
        for attack, title in TITLES.items():
            rows = measured.of(attack=attack, spc=spc)
            if rows:
                draws = len({row["draw"] for row in rows})
                lines += ["", f"**{title}** ({draws} draw{'' if draws == 1 else 's'})", ""]
                lines += table(measured, attack, spc, leaderboard)
    return "\n".join(lines)


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--leaderboard", type=Path, help="BackdoorBench's table, CSV")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    cells = pq.read_table(given.results / "tables" / "cells.parquet").to_pylist()
    before, rest = given.page.read_text().split(BEGIN)
    _, after = rest.split(END)
    made = section(Measured(cells), listed(given.leaderboard))
    given.page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
