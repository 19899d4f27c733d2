"""Names of strangers run nowhere: not in a spreadsheet, not on a page."""

import pytest

from detrojan.analysis.escape import for_markdown, for_spreadsheet


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "-"])
def test_a_formula_is_text(text):
    assert for_spreadsheet(text) == f"'{text}"


@pytest.mark.parametrize("value", ["-0.5", "+3", "-1e-3", "-inf", "ft", "", "a=b", -0.5, None, 3])
def test_numbers_and_names_stay(value):
    assert for_spreadsheet(value) == value


def test_markdown_shows_what_stands_there():
    assert for_markdown("a|b <script>\n# `x` [y](z)") == r"a\|b \<script\> \# \`x\` \[y\](z)"
