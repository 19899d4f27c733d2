"""What was measured, on a screen."""

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from gpu_parts import loop, prices, runs, study
from gpu_parts.record import Record

Row = dict[str, Any]
MOST_MISSING = 8  # lines


def summary(record: Record) -> str:
    """Return the lines that a reader wants first."""
    machine = record.parts["machine"][0]
    spent = f"{machine['seconds']:.0f} of {60 * machine['minutes']:.0f} s"
    lines = [f"{machine['device']}, torch {machine['torch']}, {spent}, {machine['git_commit'][:12]}"]
    shown: dict[str, Callable[[list[Row]], list[str]]] = {
        runs.PART: _runs,
        loop.PART: _loop,
        study.UNTOUCHED: _models,
        study.PART: _cells,
        prices.PART: _costs,
    }
    for part, show in shown.items():
        lines += ["", *(show(record.parts[part]) if record.parts.get(part) else [f"{part}: nothing"])]
    missing = record.missing()
    if missing:
        lines += ["", "Left out:", *(f"  {line[:150]}" for line in missing[:MOST_MISSING])]
        if len(missing) > MOST_MISSING:
            lines.append(f"  and more: {len(missing) - MOST_MISSING} reasons, in gpu.json")
    return "\n".join(lines) + "\n"


def _runs(rows: list[Row]) -> list[str]:
    by_status = Counter(row["status"] for row in rows)
    counts = ", ".join(f"{count} {status}" for status, count in by_status.most_common())
    lines = [f"It runs: {len(rows)} trials, {counts}"]
    again = [row for row in rows if row["same_bits"] is not None]
    promised = [row for row in again if not row["not_deterministic"]]
    same = sum(row["same_bits"] for row in promised)
    lines.append(f"  twice the same bits: {same} of {len(promised)} where torch promises them")
    if others := [row for row in again if row["not_deterministic"]]:
        operators = ", ".join(sorted({row["not_deterministic"] for row in others}))
        same = sum(row["same_bits"] for row in others)
        lines.append(f"  and {same} of {len(others)} where it does not ({operators})"[:150])
    if measured := [row["from_cpu"] for row in rows if "from_cpu" in row]:
        lines.append(f"  a step in 32 bits is at most {max(measured):.1g} of its length from the CPU's")
    lines += [
        f"  {row['name']} on {row['architecture']}: {row['problem']}"[:150]
        for row in rows
        if row["status"] == "failed"
    ]
    lines += [
        f"  {row['name']} on {row['architecture']}: other bits the second time"
        for row in promised
        if not row["same_bits"]
    ]
    return lines


def _loop(rows: list[Row]) -> list[str]:
    heads = f"{'bare/s':>8} {'loop/s':>8} {'share':>6} {'kernels':>8} {'fills':>6} {'top ten':>8}"
    lines = [f"The loop, images a second: {'':23} {heads}"]
    for row in rows:
        bare, full = row["bare_images_per_second"], row["loop_images_per_second"]
        name = f"{row['architecture']} {row['precision']} {row['attack']}"
        lines.append(
            f"  {name:48} {bare:8.0f} {full:8.0f} {full / bare:6.0%} {row['kernels_a_step']:8.0f} "
            f"{row['fills_a_step']:6.0f} {row['top_ten_share']:8.0%}"
        )
    return lines


def _models(rows: list[Row]) -> list[str]:
    lines = [f"Models: {'':30} epochs    ACC    ASR     RA  images/s"]
    for row in rows:
        name = f"{row['dataset']} {row['attack']} {row['architecture']}"
        numbers = " ".join(_percent(row[measure]) for measure in ("acc", "asr", "ra"))
        took = {True: "", False: " did not take", None: ""}[row["attack_took"]]
        lines.append(f"  {name:37} {row['epochs']:5} {numbers} {row['images_per_second']:9.0f}{took}")
    return lines


def _percent(share: float | None) -> str:
    return f"{'–':>6}" if share is None else f"{share:6.1%}"


def _cells(rows: list[Row]) -> list[str]:
    """Show the defenses of the model that has the most."""
    count = Counter((row["dataset"], row["attack"]) for row in rows).most_common(1)[0]
    (dataset, attack), _ = count
    of_model = [row for row in rows if (row["dataset"], row["attack"]) == (dataset, attack)]
    lines = [f"Defenses: {len(rows)} cells; of {attack} on {dataset} (ACC / ASR, mean of the draws)"]
    texts = []
    for defense in dict.fromkeys(row["defense"] for row in of_model):
        ended = [row for row in of_model if row["defense"] == defense and row["status"] == "ok"]
        if ended:
            means = [
                statistics.fmean(row[name] for row in ended if row[name] is not None)
                for name in ("acc", "asr")
            ]
            texts.append(f"{defense:20} {means[0]:5.0%} /{means[1]:5.0%}")
    return [*lines, *("  " + "   ".join(texts[at : at + 3]) for at in range(0, len(texts), 3))]


def _costs(rows: list[Row]) -> list[str]:
    ended = [row for row in rows if row["status"] == "ok"]
    if not ended:
        return [f"Costs: {len(rows)} further cells"]
    slowest = max(ended, key=lambda row: row["seconds"])
    where = f"{slowest['defense']} on {slowest['architecture']} at SPC {slowest['spc']}"
    return [f"Costs: {len(rows)} further cells; the longest {where}, {slowest['seconds']:.0f} s"]
