"""Makes the text of strangers harmless where it is written: names in their tables end up in our files."""

import re
from typing import Any

# What a spreadsheet takes for a formula when it opens a CSV file (OWASP, "CSV Injection").
_FORMULA = re.compile(r"[=+\-@\t\r]")
# What breaks a line, hides, or turns the direction of what follows; no name needs it.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*_{}\[\]<>#|~&!]")


def for_spreadsheet(value: Any) -> Any:
    """Return a CSV cell that no spreadsheet runs: text that could be a formula gets an apostrophe before it.

    Numbers, and text that is one, stay as they are.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _is_number(value):
        return f"'{value}"
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def for_markdown(text: str) -> str:
    """Return ``text`` on one line, as Markdown shows it and makes nothing else of it."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))
