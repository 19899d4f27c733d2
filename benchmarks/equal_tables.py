"""Compares two folders of results, bit for bit: a refactoring must not change them.

    python benchmarks/equal_tables.py before/results after/results

Run one study with the old code and with the new, on one machine. What is compared, and what is left out, says
`detrojan.commands.differences`, by which `detrojan prove` goes too. Prints what differs, and exits with 1 if
anything does.
"""

import argparse
import sys
from pathlib import Path

from detrojan.commands.differences import compared, differences


def main() -> int:
    """Compare the folders that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="folder of results of the old code")
    parser.add_argument("after", type=Path, help="folder of results of the new code")
    asked = parser.parse_args()
    try:
        found = list(differences(asked.before, asked.after))
    except ValueError as error:
        sys.exit(str(error))
    print("\n".join(found) if found else f"Equal, file by file: {len(compared(asked.before))}.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
