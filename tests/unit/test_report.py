"""The page without its scripts: the tables' numbers, nothing from the network, the same bytes again."""

import base64
import dataclasses
import gzip
import hashlib
import html
import html.parser
import json
import re
import struct

import numpy as np
import pyarrow as pa
import pytest

from detrojan.analysis.report import payload, report, vega, views
from detrojan.workflow import graph
from tests.unit import pages
from tests.unit import tables as made
from tests.unit.pages import EVIL, SHEETS
from tests.unit.test_why import CARD_OF_IMAGES


@pytest.fixture(autouse=True, scope="module")
def quick_bundle():
    """Vega's own scripts take seconds to bundle, and only a browser needs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vega, "bundle", lambda: "/* Vega */")
        yield


@pytest.fixture(scope="module")
def tables():
    return pages.tables_of(pages.small())


@pytest.fixture(scope="module")
def page(quick_bundle, tables):
    return pages.page(tables)


class Reader(html.parser.HTMLParser):
    """Collects the cells of tables, by row, everything that a browser would fetch, and all links."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.fetched, self.links, self.open, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.fetched += [attrs[name] for name in ("src", "srcset", "poster", "data") if name in attrs]
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag == "link":
            self.fetched.append(str(attrs))
        if tag == "a":
            self.links.append(attrs["href"])
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        pass  # lines of small drawings

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.rows[-1][-1] += data


def rows_of(page):
    """Return the rows of the page's tables, spaces squeezed."""
    return [[" ".join(cell.split()) for cell in row] for row in Reader(page).rows]


def data_of(page):
    """Return the header of what the page carries."""
    (text,) = re.findall(r'id="data">([^<]*)<', page)
    whole = gzip.decompress(base64.b64decode(text))
    (length,) = struct.unpack("<I", whole[:4])
    return json.loads(whole[4 : 4 + length])


# --- numbers ---------------------------------------------------------------------------------------


def test_the_ranking_has_the_tables_numbers(page):
    rows = rows_of(page)
    # Of ft one cell of two ended well; clp has no data, so its row is the same at the one budget.
    ft = next(row for row in rows if row[0] == "ft" and len(row) > 10)
    # DER: (0.963 - 0.117 - (0.987 - 0.913) + 1) / 2 = 0.886.
    assert ft[1] == "1.00"
    # Better than untouched, DER, DER with the failed run as an untouched one, changes of ASR and ACC.
    assert ft[3:8] == ["100", "88.6", "69.3", "-84.696.3 → 11.7", "-7.498.7 → 91.3"]
    assert ft[-1] == "1,800"
    clp = next(row for row in rows if row[0] == "clp no data" and len(row) > 10)
    assert clp[1] == "2.00"
    bound = next(row for row in rows if row[0] == "grad_prune upper bound" and len(row) > 10)
    assert bound[1] == "–"  # it is shown, and not ranked


def test_models_and_outcomes_have_the_tables_numbers(page):
    rows = rows_of(page)
    sig = ["digits", "net", "sig, ratio 0.05", "0", "98.7", "96.3", "3.1", "0.4", "took", "0.05"]
    assert [*sig, "21.2", "0.876"] in rows
    assert ["ft", "3", "2", "1"] in rows  # cells, ok, diverged
    assert "1.00 h of training" in page


def test_data_sets_have_their_cards_numbers(tables):
    card = CARD_OF_IMAGES | {"remarks": [EVIL]}
    said = pages.about(tables)._replace(cards=[card, card | {"dataset": "another", "remarks": []}])
    page = pages.page(tables, said)
    rows = [row for row in rows_of(page) if row[1:] == ["2", "3", "1", "4", "1", "0", "2", "5"]]
    assert [row[0] for row in rows] == ["another", "digits"]
    assert html.escape(EVIL, quote=False) in page.replace("&#39;", "'")
    assert '<li><a href="#data-sets">' in page
    assert page.count("what may be wrong:") == 1


def test_without_cards_nothing_is_said_of_data_sets(page):
    assert "data-sets" not in page


def test_every_number_leads_to_its_cells(page):
    found = {html.unescape(text) for text in re.findall(r'data-cells="([^"]*)"', page)}
    queries = [json.loads(text) for text in found]
    assert {"defense": ["ft"], "attack_took": [True]} in queries
    assert {"defense": ["ft"], "attack": ["none"]} in queries
    assert {"defense": ["ft"], "status": ["diverged"]} in queries
    columns = set(data_of(page)["tables"]["cells"]["columns"])
    assert all(set(query) <= columns for query in queries)


def test_controls_provenance_and_commands(page):
    rows = rows_of(page)
    assert ["the baseline ft", "there"] in [row[:2] for row in rows]
    assert ["the baseline fp", "missing", ""] in rows
    assert ["a clean model (attack none)", "there", "ACC 99.1 %, mean of 1 setting"] in rows
    assert "<code>abc123</code>" in page
    axes = (
        "dataset=digits architecture=net attack=sig ratio=0.05 seed=0 defense=ft protocol=survey spc=2 draw=0"
    )
    assert f"detrojan reproduce {axes}" in page


def test_a_single_seed_is_pointed_out(page):
    assert "Single seed:" in page
    seeds = {"seeds": (0, 1), "draws": 1, "defenses": ("ft", "fp"), "attacks": ("sig",)}
    assert "Single seed:" not in pages.page(pages.random_study(**seeds))


# --- what the page is ------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_fetches_nothing(page):
    reader = Reader(page)
    assert not reader.open  # every element is closed, in order
    assert {source[:26] for source in reader.fetched} == {"data:image/svg+xml;base64,"}
    names_only = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"https?:|@import|url\((?!#)", names_only)
    assert "default-src 'none'" in page


def test_links_lead_into_the_page_or_to_files_beside_it(page):
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    inside = {link[1:] for link in reader.links if link.startswith("#")}
    assert inside <= set(reader.ids)
    assert {link.split("/")[0] for link in reader.links if not link.startswith("#")} == {"figures", "tables"}


def test_no_script_runs_but_those_of_the_page(page):
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    scripts = re.findall(r"<script(?: type=\"module\")?>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = re.findall(r"sha256-([^&]*)&#39;", policy)
    assert hashes == allowed
    assert "unsafe-eval" not in policy
    assert "script-src &#39;unsafe-inline" not in policy


def test_no_script_ends_its_element_or_starts_a_comment():
    # What stands in the page unescaped: the scripts here, and Vega's, whose test is in tests/browser.
    for name in report.SCRIPTS:
        assert not re.search(r"</script|<!--", report._asset(name), re.IGNORECASE), name


def test_every_asset_is_used():
    included = re.findall(r'{% include "(.*?)" %}', report._asset(report.TEMPLATE))
    used = {report.TEMPLATE, *included, report.STYLE, *report.SCRIPTS, "vega.json"}
    assert {path.name for path in report.ASSETS.iterdir()} == used


def test_text_from_outside_is_escaped(page):
    assert "<script>alert" not in page
    assert html.escape(EVIL).replace("&#x27;", "&#39;") in page  # as a reason
    assert r"\u003cscript\u003ealert" in page  # as a query


def test_the_same_inputs_give_the_same_page(page, tables):
    assert pages.page(tables) == page


def test_tables_and_pictures_speak_to_screen_readers(page):
    assert re.findall(r"<th(?![^>]*scope)[ >]", page) == []
    assert re.findall(r"<img(?![^>]*alt=)", page) == []
    assert '<html lang="en">' in page


def test_the_page_holds_the_sheets_of_attacked_data_sets(page):
    sheets = [base64.b64decode(source.split(",")[1]).decode() for source in Reader(page).fetched]
    assert sheets.count(SHEETS["digits"]) == 1
    assert SHEETS["untouched-set"] not in sheets
    assert "Triggers on digits" in page


# --- other studies ---------------------------------------------------------------------------------


def test_a_study_without_attacks(tables):
    clean = tables.cells.filter(pa.compute.field("attack") == "none")
    page = pages.page(pages.tables_of(clean))
    assert "No model was attacked: there is no backdoor to remove." in page
    assert "Every cell ended well" in page
    assert not Reader(page).open


def test_attacks_that_failed_the_gate_are_named(page):
    assert "failed the gate:" not in page
    cells = pages.of_rows(
        made.untouched(asr=0.02, attack_took=False, attack="sig", dataset="digits", architecture="net"),
        made.cell("ft", attack_took=False, attack="sig", dataset="digits", architecture="net"),
    )
    models = pages.models_of(cells)
    place = models.column_names.index("gate_reason")
    models = models.set_column(place, "gate_reason", pa.array(["ASR 2.0 % is below 80 %"]))
    page = pages.page(pages.tables_of(cells, models))
    assert "Attacks that failed the gate: 1 of 1 settings." in page
    setting = "digits · net · sig, ratio 0.1 · attack failed the gate"
    assert f"<li>{setting}: seed 0: ASR 2.0 % is below 80 %</li>" in page
    said = "No attack took: 0 of 1 model passed the gate. The nearest, sig on digits, has ASR 2.0 %."
    assert f'<p class="finding">{said}</p>' in page
    assert "<p>What may help: more epochs, a larger ratio or a wider model.</p>" in page
    assert ["ft", "1", "1"] in rows_of(page)  # counted, and as gate failed


def test_what_has_nothing_to_show_is_one_line(page):
    assert '<p class="quiet">Without anything to show, and left out: SPC and ratio (' in page
    assert "There is one SPC. There is one ratio)." in page
    assert 'id="curves"' not in page
    assert "#curves" not in page
    clean = pages.page(pages.tables_of(pages.of_rows(made.untouched(attack="none", dataset="digits"))))
    reason = "No model was attacked: there is no backdoor to remove"
    names = "ranking, effect, SPC and ratio, cost, consistency, against the two baselines, the figure heatmap"
    assert f"left out: {names} ({reason})." in clean
    for section in ("ranking", "effect", "curves", "cost", "consistency", "comparisons"):
        assert f'id="{section}"' not in clean


def test_a_weak_trigger_is_pointed_out(tables, page):
    assert "weak in themselves" not in page
    place = tables.models.column_names.index("trigger_weakness")
    weakness = pa.array(
        ["fools nobody" if a != "none" else None for a in tables.models["attack"].to_pylist()]
    )
    models = tables.models.set_column(place, "trigger_weakness", weakness)
    assert "<li>digits · sig (1 model): fools nobody</li>" in pages.page(
        dataclasses.replace(tables, models=models)
    )


def test_other_peoples_results_have_neither_models_nor_commands():
    cells = pages.small()
    for name in ("device", "code", "git_commit"):
        blank = pa.array([""] * len(cells), pa.string())
        cells = cells.set_column(cells.column_names.index(name), name, blank)
    tables = pages.without_models(cells)
    said = report.About("Their table", ["Read from theirs.csv."], "All attacks count.", None)
    page = pages.page(tables, said, {})
    assert '<h1 id="overview">Their table</h1>' in page
    body = page[: page.index("<script")]
    for absent in (
        "detrojan reproduce",
        'id="models"',
        'id="triggers"',
        'id="provenance"',
        "h of training",
    ):
        assert absent not in body
    assert data_of(page)["commands"] is False
    assert not Reader(page).open


def test_a_column_that_is_empty_all_over_is_left_out():
    cells = pages.of_rows(
        made.untouched(ra=None), made.cell("ft", ra=None, spc=2), made.cell("fp", ra=None, spc=2)
    )
    rows = rows_of(pages.page(pages.tables_of(cells)))
    heads = next(row for row in rows if "mean rank" in row)
    assert "ASR change, points" in heads
    assert not any("RA change, points" in row for row in rows)


def test_the_files_are_those_that_the_workflow_expects(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(vega, "files", lambda figure: vega.Files(figure.alt, b"png", b"pdf"))
    report.write(tables, pages.about(tables), tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    planned = [path for made in graph.RULES["report"].outputs_for([]).values() for path in graph.listed(made)]
    assert found == {path.removeprefix("results/report/") for path in planned}
    assert all(f"tables/ranking_{measure}.csv" in found for measure in views.MEASURE_TEXTS)


# --- what the page carries -------------------------------------------------------------------------


def unpacked(text, name):
    """Return a packed table as lists, the way page/data.js reads it."""
    whole = gzip.decompress(base64.b64decode(text))
    (length,) = struct.unpack("<I", whole[:4])
    header = json.loads(whole[4 : 4 + length])
    start = -(-(4 + length) // 8) * 8
    table = header["tables"][name]
    columns = {}
    for column, what in table["columns"].items():
        kind = np.dtype(f"<{what['kind']}")
        numbers = np.frombuffer(whole, kind, table["length"], start + what["at"])
        if "values" in what:
            columns[column] = [what["values"][number] for number in numbers]
        else:
            columns[column] = [None if np.isnan(number) else float(number) for number in numbers]
    return columns


def test_packed_tables_come_out_as_they_went_in(monkeypatch):
    monkeypatch.setattr(payload, "MOST_VALUES", 300)
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "name": pa.array(["a", None, "ü</script>"] * 100),
            "took": pa.array([True, False, None] * 100),
            "spc": pa.array([2, 10, None] * 100, pa.int32()),
            "few": pa.array([0.1, 1 / 3, None] * 100),
            "many": pa.array([*rng.random(299).tolist(), None]),
            "distinct": pa.array(range(300), pa.int64()),
        }
    )
    text = payload.pack({"x": table, "empty": table.slice(0, 0)}, {"more": [1]})
    assert unpacked(text, "x") == table.to_pydict()
    assert unpacked(text, "empty") == {name: [] for name in table.column_names}
    assert payload.pack({"x": table, "empty": table.slice(0, 0)}, {"more": [1]}) == text


def test_numbers_with_many_values_are_packed_whole(monkeypatch):
    monkeypatch.setattr(payload, "MOST_VALUES", 10)
    values = [*np.random.default_rng(0).random(50).tolist(), None]
    assert unpacked(payload.pack({"x": pa.table({"v": values})}, {}), "x")["v"] == values


def test_the_page_carries_the_cells_and_the_summary(page, tables):
    (text,) = re.findall(r'id="data">([^<]*)<', page)
    cells, summary = unpacked(text, "cells"), unpacked(text, "summary")
    for measure in ("acc", "asr", "ra", "der"):
        assert cells[measure] == tables.cells[measure].to_pylist()
        assert summary[f"{measure}_mean"] == tables.summary[f"{measure}_mean"].to_pylist()
    assert set(cells["ratio"]) == {"0.05", "0"}  # as commands write them
    assert cells["reason"] == tables.cells["reason"].to_pylist()
    assert cells["chosen"][0] == '{"epoch": 3}'


def test_what_methods_chose_is_left_out_of_a_page_that_would_be_too_large(tables, monkeypatch):
    monkeypatch.setattr(report, "MOST_CHOSEN", 10)
    assert "chosen" not in data_of(pages.page(tables))["tables"]["cells"]["columns"]


def test_the_page_draws_figures_for_each_measure(page):
    figures = data_of(page)["figures"]
    assert {"ranking_der", "ranking_ra", "cost_asr", "effect", "heatmap"} <= set(figures)
    assert "ranking" not in figures


def test_every_colour_of_the_figures_has_one_for_each_theme():
    style = report._asset(report.STYLE)
    for variable in report.THEMED.values():
        assert re.search(rf"{variable}: light-dark\(", style), variable


def test_budgets_are_pooled_first_unless_there_is_one(tables):
    assert views.budgets(tables) == [None]
    study = pages.random_study(draws=1, defenses=("ft",), attacks=("sig",), ratios=(0.1,), seeds=(0,))
    assert views.budgets(study) == [None, 2, 10]


def test_each_protocol_has_a_page_and_all_lead_to_one_another(tmp_path, monkeypatch):
    rows = made.random_study(attacks=("badnets",), ratios=(0.1,), spc=(2,), draws=2).to_pylist()
    paper = [row | {"protocol": "paper", "asr": 0.125} for row in rows if row["protocol"] == "survey"]
    tables = pages.tables_of(pages.of_rows(*rows, *paper))
    written = {}
    monkeypatch.setattr(
        report, "_write", lambda own, about, folder, _: written.update({folder: (own, about)})
    )
    report.write(tables, pages.about(tables), tmp_path)
    assert set(written) == {tmp_path, tmp_path / "paper"}
    for folder, name, others in (
        (tmp_path, "survey", {"paper": "paper/index.html"}),
        (tmp_path / "paper", "paper", {"survey": "../index.html"}),
    ):
        own, said = written[folder]
        assert said.protocol == report.Protocol(name, others)
        assert own.protocols == [name]
        assert set(own.ranks["protocol"].to_pylist()) == {name}
        text = pages.page(own, said)
        for page in others.values():
            assert f'<a href="{page}">' in text
        assert "survey → paper" in text  # the one table that has both
    assert 'href="#protocols"' not in pages.page(pages.random_study(attacks=("badnets",), ratios=(0.1,)))
