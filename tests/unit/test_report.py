"""The page and its figure: the tables' numbers, nothing from the network, the same bytes again."""

import base64
import html.parser
import re

import matplotlib as mpl
import pyarrow as pa
import pytest

from detrojan.analysis import figures, report, summary
from detrojan.analysis.summary import SUMMARY
from detrojan.settings import Gate

EXAMPLE = "results/metrics/digits/net/sig/ratio-0.05/seed-0/ft/spc-2/draws-0-1/metrics.parquet"
EVIL = "<script>alert('x')</script> & co"
SHEETS = {"digits": "<svg>the triggers</svg>", "untouched-set": "<svg>nothing</svg>"}


def row(attack="sig", defense="ft", spc=2, acc=0.9, asr=0.2, **others):
    empty = {field.name: None for field in SUMMARY}
    keys = {"dataset": "digits", "architecture": "net", "ratio": 0.0 if attack == "none" else 0.05}
    counts = {"num_cells": 2, "num_ok": 2, "num_models": 1, "interval_over": "draws", "seconds": 1.5}
    interval = {"acc_low": acc - 0.05, "acc_high": min(1.0, acc + 0.05), "ra_mean": 0.5}
    own = {"attack": attack, "defense": defense, "spc": spc, "acc_mean": acc, "asr_mean": asr}
    own["attack_took"] = None if attack == "none" else True
    return empty | keys | {"threat_model": "clean_data"} | counts | interval | own | others


def a_summary(*rows):
    return pa.Table.from_pylist(list(rows), SUMMARY)


@pytest.fixture
def tables():
    """Return the tables of one clean and one attacked model; one cell failed for an evil reason."""
    shared = {
        "dataset": "digits",
        "architecture": "net",
        "seed": 0,
        "device": "cpu",
        "code": "c0de",
        "versions": '{"torch": "2.13.0"}',
        "git_commit": "abc123",
        "seconds": 1800.0,
    }
    cell = shared | {"spc": 2, "draw": 0, "defense": "ft", "threat_model": "clean_data", "status": "ok"}
    untouched = {"defense": "none", "threat_model": "none", "spc": 0, "seconds": 0.0}
    sig = {"attack": "sig", "ratio": 0.05, "attack_took": True}
    clean = {"attack": "none", "ratio": 0.0, "attack_took": None}
    none = {"reason": None, "acc": None, "asr": None, "ra": None}
    cells = [
        none | cell | sig | {"acc": 0.913, "asr": 0.117, "ra": 0.521},
        none | cell | sig | {"draw": 1, "status": "diverged", "reason": EVIL},
        none | cell | sig | untouched | {"acc": 0.987, "asr": 0.963, "ra": 0.031},
        none | cell | clean | untouched | {"acc": 0.991},
    ]
    cells = pa.Table.from_pylist(cells)
    model = shared | {"num_train": 1000, "num_poisoned": 50, "epochs": 10, "num_parameters": 12345}
    model |= {"train_accuracy": 0.99, "effective_ratio": 0.05, "psnr": 21.25, "ssim": 0.876, "linf": 51}
    model |= {"gate_reason": None, "trigger_weakness": None, "acc_loss": None}
    unpoisoned = {"num_poisoned": 0, "effective_ratio": 0.0, "psnr": None, "ssim": None, "linf": None}
    models = [
        model | sig | {"acc": 0.987, "asr": 0.963, "ra": 0.031, "acc_loss": 0.004},
        model | clean | unpoisoned | {"acc": 0.991, "asr": None, "ra": None},
    ]
    return cells, pa.Table.from_pylist(models), summary.summarize(cells)


def page_of(cells, models, table):
    return report.page(cells, models, table, figures.effect(table), SHEETS, Gate(), EXAMPLE)


@pytest.fixture
def page(tables):
    return page_of(*tables)


class Reader(html.parser.HTMLParser):
    """Collects the cells of tables, by row, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.fetched, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.fetched += [attrs[name] for name in ("src", "srcset", "poster", "data") if name in attrs]
        if tag == "link" or (tag in ("a", "use", "image") and not _inside(attrs)):
            self.fetched.append(str(attrs))
        if tag not in ("meta", "link", "img", "path", "use", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        if not _inside(dict(attrs)) and tag in ("use", "image"):
            self.fetched.append(str(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def _inside(attrs):
    target = attrs.get("href") or attrs.get("xlink:href") or ""
    return target.startswith("#")


def test_numbers_are_the_tables(page):
    rows = Reader(page).rows
    assert ["ft", "clean_data", "2", "91.3", "11.7", "52.1", "1/2", "1,800"] in rows
    assert ["untouched", "", "", "98.7", "96.3", "3.1", "1/1", "0.0"] in rows
    assert ["untouched", "", "", "99.1", "–", "–", "1/1", "0.0"] in rows
    sig = [
        "digits",
        "net",
        "sig, ratio 0.05",
        "0",
        "98.7",
        "96.3",
        "3.1",
        "0.4",
        "took",
        "0.05",
        "50/1,000",
        "21.2",
        "0.876",
    ]
    assert [*sig, "51", "12,345", "10", "99.0", "1,800"] in rows
    assert "3 ok, 1 diverged" in page
    assert "1.00 h of training, 1.00 h of defending" in page


def test_the_page_is_well_formed_and_fetches_nothing(page):
    reader = Reader(page)
    assert not reader.open  # every element is closed, in order
    assert [source[:26] for source in reader.fetched] == ["data:image/svg+xml;base64,"]
    names_only = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"https?:|@import|url\((?!#)", names_only)
    assert "default-src 'none'" in page


def test_text_from_outside_is_escaped(page):
    assert EVIL not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; co" in page


def test_the_same_inputs_give_the_same_page(page, tables):
    assert page_of(*tables) == page


def test_tables_and_pictures_speak_to_screen_readers(page):
    assert re.findall(r"<th(?![^>]*scope)[ >]", page) == []
    assert re.findall(r"<img(?![^>]*alt=)", page) == []
    assert '<html lang="en">' in page


def test_the_page_holds_the_sheets_of_attacked_data_sets(page):
    (source,) = Reader(page).fetched
    assert base64.b64decode(source.split(",")[1]).decode() == SHEETS["digits"]
    assert "Triggers on digits" in page
    assert "untouched-set" not in page


def test_controls_provenance_and_command(page):
    assert 'the baseline ft: <span class="yes">there' in page
    assert 'the baseline fp: <span class="no">missing' in page
    assert "<code>abc123</code>" in page
    assert f"snakemake --cores 2 --rerun-incomplete -R {EXAMPLE}" in page


def test_a_study_without_attacks(tables):
    cells, models, _ = tables
    cells = cells.filter(pa.compute.field("attack") == "none")
    models = models.filter(pa.compute.field("attack") == "none")
    only_clean = summary.summarize(cells)
    page = page_of(cells, models, only_clean)
    assert page.count("No model of this study was attacked") == 2  # as a figure, and for want of a sheet
    assert "Every cell ended well" in page


def changed(table, **columns):
    for name, values in columns.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return table


def test_an_attack_that_failed_the_gate_is_flagged(tables, page):
    assert (
        "An attack took if the untouched model&#39;s ASR is at least 80 % and its ACC at most 10 points"
        in page
    )
    assert "failed this gate" not in page
    cells, models, _ = tables
    took = [None if attack == "none" else False for attack in cells["attack"].to_pylist()]
    cells = changed(cells, attack_took=took)
    reasons = pa.array(["ASR 2.0 % is below 80 %", None])
    models = changed(models, attack_took=[False, None], asr=[0.02, None])
    models = models.set_column(models.column_names.index("gate_reason"), "gate_reason", reasons)
    page = page_of(cells, models, summary.summarize(cells))
    title = "digits · net · sig, ratio 0.05 · attack failed the gate"
    assert f"<li>{title}: seed 0: ASR 2.0 % is below 80 %</li>" in page
    assert page.index(f">{title}</summary>") > page.index(">digits · net · no attack</summary>")
    assert "No attack of this study took (1 setting failed the gate)" in page
    assert ["sig, ratio 0.05", "0", "98.7", "2.0", "3.1", "0.4", "failed"] in [
        row[2:9] for row in Reader(page).rows
    ]


def test_a_weak_trigger_is_pointed_out(tables, page):
    assert "weak in themselves" not in page
    cells, models, table = tables
    weakness = pa.array(["fools nobody", None])
    models = models.set_column(models.column_names.index("trigger_weakness"), "trigger_weakness", weakness)
    assert "<li>digits · sig (1 model): fools nobody</li>" in page_of(cells, models, table)


def test_figure_is_deterministic_and_undated():
    table = a_summary(row("sig", "none", 0, 0.98, 0.97), row(), row(spc=10), row(defense="clp", spc=0))
    text = figures.effect(table)
    assert text == figures.effect(table)
    assert "<dc:date>" not in text
    assert "DOCTYPE" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace(
        "http://www.w3.org/1999/xlink", ""
    )


def test_figure_shows_the_means():
    with mpl.rc_context(figures.STYLE):
        figure = figures.draw(a_summary(row("sig", "none", 0, 0.98, 0.97), row(), row(spc=10, asr=None)))
    (panel,) = figure.axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if line.get_marker() == "o"}
    assert points == {(20.0, 90.0)}  # the row without an ASR has no place
    assert panel.get_title() == "sig, ratio 0.05"
    assert panel.get_ylim()[0] < 85.0  # the lower end of the interval


@pytest.mark.parametrize(("num_attacks", "num_panels"), [(1, 1), (5, 8), (60, figures.MAX_PANELS)])
def test_figure_wraps_and_says_what_it_leaves_out(num_attacks, num_panels):
    figure = figures.draw(a_summary(*(row(f"attack_{number:02}") for number in range(num_attacks))))
    assert len(figure.axes) == num_panels
    assert len([panel for panel in figure.axes if panel.get_visible()]) == min(num_attacks, num_panels)
    title = figure.legends[0].get_title().get_text()
    assert title == (
        "" if num_attacks < 60 else "The first 48 of 60 settings; tables/summary.parquet has all."
    )


def test_figure_leaves_out_attacks_that_failed_the_gate_and_says_so():
    figure = figures.draw(a_summary(row(), row("bpp", attack_took=False), row("iab", attack_took=False)))
    (panel,) = figure.axes
    assert panel.get_title() == "sig, ratio 0.05"
    title = figure.legends[0].get_title().get_text()
    assert title == "Left out, as the attack failed the gate: 2 settings."


def test_figure_of_a_study_where_no_attack_took():
    figure = figures.draw(a_summary(row("none", "none", 0), row("bpp", attack_took=False)))
    assert not figure.axes
    assert figure.texts[0].get_text().startswith("No attack of this study took (1 setting failed the gate)")


def test_every_defense_has_its_own_look():
    table = a_summary(*(row(defense=f"d{number:02}", spc=spc) for number in range(20) for spc in (2, 10)))
    looks = figures._looks(table)
    assert len(set(looks.values())) == 40
    assert len({(look.color, look.marker) for look in looks.values()}) == 20
