"""Tries study files and tables that strangers could bring: what is refused, what is taken, and what breaks.

    python benchmarks/strangers.py

Each place of a study file gets each of many values that have no business there. A table of results is cut
off after each of its bytes, and gets characters that nobody can see. Ends with 1 if anything but a clear
refusal comes, or if a cut table is read without a word.
"""

import copy
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from detrojan.analysis.others import external
from detrojan.study import files, grid

CONFIG = Path(__file__).parents[1] / "config"
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -1e308, float("nan"), float("inf")),
    *(
        "",
        "x" * 300,
        "é\u2028",
        "../../etc",
        "/abs",
        "a\nb",
        "0-99999999999",
        "9" * 5000,
        "9-1",
        "0-1-2",
        "²",
    ),
    *("=1+1", "> 1e999", ">", "null", "\x00", "~", "$HOME", "https://x/y", "all", "none", "2001-01-01"),
    *([], {}, [[]], [{}], {"a": 1}, {1: 2}, {None: 1}, [None], [1, 1], ["all"], [">1"], list(range(5000))),
)
# Keys that the file leaves out.
MORE = ("target", "label_map", "close", "gate", "smoke", "unknown", "attacks", "architectures")
LONGEST_LINE = 400
SLOW_S = 20.0
TABLE = "data,net,attack,rate,defense,CA,ASR,RA\n" + "".join(
    f"gtsrb,preactresnet18,badnet,{rate},{defense},0.{place}{rate:.0f}1,0.9{place}3,0.0{place}7\n"
    for rate in (0.1, 0.05)
    for place, defense in enumerate(("nothing", "ft", "fp"))
)
UNSEEN = ("\x00", "\x07", "\x1b[31m", "\u2028", "\u202e", "\ufeff", "\x85")


def main() -> int:
    """Try all and print the counts; return 1 if something is wrong."""
    logging.disable(logging.NOTSET)
    wrong: list[str] = []
    counts = {
        "study files": studies(wrong),
        "tables cut off": cut_off(wrong),
        "tables, unseen": unseen(wrong),
    }
    for what, count in counts.items():
        print(
            f"{what}: {sum(count.values())}, " + ", ".join(f"{n} {how}" for how, n in sorted(count.items()))
        )
    print(*wrong, sep="\n")
    return int(bool(wrong))


def studies(wrong: list[str]) -> Counter[str]:
    """Put each value in each place of the quickstart's study."""
    base = yaml.safe_load((CONFIG / "config.yaml").read_text(encoding="utf-8"))
    places = [*_places(base), *((key,) for key in MORE)]
    count: Counter[str] = Counter()
    for place in places:
        for value in WRONG:
            started = time.monotonic()
            how = _study(_put(base, place, value))
            if time.monotonic() - started > SLOW_S:
                how = f"slow: {how}"
            if how not in ("refused", "taken"):
                wrong.append(f"{'.'.join(map(str, place))} = {repr(value)[:60]}: {how}")
                how = "wrong"
            count[how] += 1
    return count


def _study(raw: Any) -> str:
    try:
        study = files.load_study(raw)
        for _ in (*grid.shards(study), *grid.models(study)):
            pass
    except files.StudyError as error:
        unclear = [line for line in error.mistakes if len(line) > LONGEST_LINE or not line.isprintable()]
        return f"unclear: {unclear[0][:200]!r}" if unclear else "refused"
    except Exception as error:  # that is what is looked for
        return f"crashed: {error!r}"
    return "taken"


def _places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    for key, inner in items:
        yield from _places(inner, (*above, key))


def _put(base: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(base)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def cut_off(wrong: list[str]) -> Counter[str]:
    """Cut a table off after each of its bytes."""
    count: Counter[str] = Counter()
    for length in range(len(TABLE)):
        how = _table(TABLE[:length])
        # Whole lines are a smaller table, and nothing tells that there were more.
        if how == "taken" and not TABLE[:length].endswith("\n") and TABLE[length] != "\n":
            wrong.append(f"a table that ends with {TABLE[:length].splitlines()[-1]!r} is read without a word")
        count[how] += 1
    return count


def unseen(wrong: list[str]) -> Counter[str]:
    """Put a character that nobody sees into each place of a table."""
    count: Counter[str] = Counter()
    for place in range(len(TABLE)):
        for text in UNSEEN:
            if place == 0 and text == "\ufeff":
                continue  # there it is a mark of UTF-8
            how = _table(TABLE[:place] + text + TABLE[place:])
            if how != "refused":
                wrong.append(f"{text!a} before {TABLE[place : place + 10]!r}: {how}")
            count[how] += 1
    return count


class _Words(logging.Handler):
    """Counts warnings."""

    number = 0

    def emit(self, _record: logging.LogRecord) -> None:
        self.number += 1


def _table(text: str) -> str:
    words = _Words(logging.WARNING)
    logging.getLogger("detrojan").addHandler(words)
    logging.getLogger("detrojan").propagate = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "table.csv")
            path.write_text(text, encoding="utf-8", newline="")
            external.read_table(path)
    except ValueError as error:
        return "refused" if str(error).isprintable() else f"unclear: {str(error)!r}"
    finally:
        logging.getLogger("detrojan").removeHandler(words)
    return "taken with a word" if words.number else "taken"


if __name__ == "__main__":
    sys.exit(main())
