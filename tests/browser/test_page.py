"""The page in a browser: opened from disk, filtered, asked for the cells behind its numbers."""

import dataclasses
import json
import re

import pandas as pd
import pytest

from detrojan.analysis.report import report, vega, views
from detrojan.analysis.report.figures import base
from tests.unit import pages
from tests.unit import tables as made

READY = "document.documentElement.dataset.ready === ''"
MEASURES = {"der": "DER", "asr": "ASR", "acc": "ACC", "ra": "RA"}


@pytest.fixture(scope="module")
def tables():
    """Return the tables of two data sets, with an attack that failed the gate and an evil reason."""
    rows = []
    for number, dataset in enumerate(("digits", "letters")):
        for row in made.random_study(number, attacks=("badnets", "sig"), seeds=(0,), draws=2).to_pylist():
            weak = row["attack"] == "sig" and row["ratio"] == 0.05
            failed = {"attack_took": False} if weak else {}
            reason = {"reason": pages.EVIL} if row["status"] != "ok" else {}
            rows.append(row | {"dataset": dataset, "architecture": "net"} | failed | reason)
    return pages.tables_of(pages.of_rows(*rows))


@pytest.fixture(scope="module")
def path(tables, tmp_path_factory):
    return written(tables, tmp_path_factory.mktemp("report"))


def written(tables, folder, said=None):
    """Write the page of ``tables`` and return its path."""
    path = folder / "index.html"
    path.write_text(pages.page(tables, said), encoding="utf-8")
    return path


def opened(browser, path, **window):
    tab = browser.open(path.as_uri(), **window)
    tab.wait_for(READY)
    return tab


@pytest.fixture
def tab(browser, path):
    return opened(browser, path)


def choose(tab, **values):
    """Choose a measure or a budget for the whole page."""
    for name, value in values.items():
        tab.run(f"document.querySelector('#choice input[name={name}][value=\"{value}\"]').click()")


def filtered(tab, section, **values):
    """Set filters of the heat map or of the settings."""
    for name, value in values.items():
        tab.run(
            f"""(() => {{
              const select = document.querySelector('{section} [name={name}]');
              select.value = {json.dumps(value)};
              select.dispatchEvent(new Event(select.tagName === 'INPUT' ? 'input' : 'change'));
            }})()"""
        )


def shown(tab, section):
    """Return the rows of a table as lists of text, the heads first."""
    return tab.run(
        f"""[...document.querySelectorAll('{section} table tr')].map((row) =>
          [...row.cells].map((cell) => (cell.querySelector('button') ?? cell).textContent.trim()))"""
    )


def heat_map(tab):
    """Return the numbers of the heat map by defense and attack."""
    head, *rows = shown(tab, "#heat .scroll")
    names = {"untouched": "none", "no attack": "none"}
    return {
        (names.get(row[0].split()[0], row[0].split()[0]), names.get(attack, attack)): text
        for row in rows
        for attack, text in zip(head[1:], row[1:], strict=True)
        if text not in ("", views.UNDEFINED)
    }


def by_pandas(tables, measure, query="attack == attack"):
    """Return the same numbers from the table, in another way than the page."""
    summary = tables.summary.to_pandas().query(query)
    summary = summary[summary["attack_took"].isna() | (summary["attack_took"] == True)]  # noqa: E712
    settings = summary.groupby(["defense", "attack", "dataset", "architecture", "ratio"])
    means = settings[f"{measure}_mean"].mean().groupby(["defense", "attack"]).mean().dropna()
    return {key: views.share(value) for key, value in means.items()}


# --- opening ---------------------------------------------------------------------------------------


def drawn_to_the_end(tab):
    """Scroll until every figure is drawn; return how many there are."""
    number = tab.run("document.querySelectorAll('figure[data-figure]').length")
    for place in range(number):
        figure = f"document.querySelectorAll('figure[data-figure]')[{place}]"
        tab.run(f"{figure}.closest('details')?.setAttribute('open', ''), {figure}.scrollIntoView()")
        tab.wait_for(f"{figure}.classList.contains('drawn')")
        assert tab.run(f"{figure}.querySelector('svg').getBBox().width") > 100
    return number


def test_it_opens_without_an_error_and_asks_for_nothing(browser, path):
    tab = opened(browser, path)
    assert drawn_to_the_end(tab) == len(base.ordered())
    said, asked = tab.problems()
    assert said == []
    assert {address.split(",")[0] for address in asked} <= {path.as_uri(), "data:image/svg+xml;base64"}


def test_the_libraries_neither_end_their_element_nor_start_a_comment():
    assert not re.search(r"</script|<!--", vega.bundle(), re.IGNORECASE)


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast_in_light_and_dark(browser, path, dark):
    tab = opened(browser, path, dark=dark)
    found = tab.run(
        """(() => {
          const channels = (color) => color.match(/[\\d.]+/g).map(Number);
          const luminance = (color) => channels(color).slice(0, 3).map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
            .reduce((sum, c, place) => sum + c * [0.2126, 0.7152, 0.0722][place], 0);
          const ground = (element) => {
            const color = getComputedStyle(element).backgroundColor;
            return channels(color)[3] === 0 ? ground(element.parentElement) : color;
          };
          const wanted = 'h1, h2, h3, p, a, td, th, small, button, .badge, .better, .worse, .yes, dt, li';
          return [...document.querySelectorAll(wanted)].filter((e) => e.offsetParent).map((element) => {
            const [a, b] = [luminance(getComputedStyle(element).color), luminance(ground(element))];
            const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            return [contrast, element.tagName + ' ' + element.className, element.textContent.slice(0, 40)];
          }).sort((x, y) => x[0] - y[0])[0];
        })()"""
    )
    assert found[0] >= 4.5, found
    assert tab.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)"
    )


def test_nothing_sticks_out_on_a_phone(browser, path):
    tab = opened(browser, path, width=390, height=844)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.run("document.querySelector('#heat td button').click()")
    assert tab.run(
        "document.querySelector('dialog').scrollWidth <= document.querySelector('dialog').clientWidth"
    )


def test_no_table_is_cut_on_a_small_screen(browser, path):
    tab = opened(browser, path, width=1280)
    for measure in ("der", "ra"):
        tab.run(f"document.querySelector('#choice [value={measure}]').click()")
        tables = "[...document.querySelectorAll('.scroll')]"
        cut = f"{tables}.filter((e) => e.scrollWidth > e.clientWidth)"
        assert tab.run(f"{cut}.map((e) => [e.getAttribute('aria-label'), e.scrollWidth])") == []


def test_without_scripts_the_numbers_and_figures_are_there(browser, path):
    tab = browser.open("about:blank")
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    tab.send("Page.navigate", url=path.as_uri())
    tab.wait_for("document.readyState === 'complete'")
    assert tab.run("document.documentElement.classList.contains('live')") is False
    text = tab.run("document.body.innerText")
    for part in (
        "Defenses ranked by DER, SPC pooled",
        "Defenses ranked by RA, SPC 2",
        "Why cells do not count",
    ):
        assert part in text
    assert tab.run("[...document.querySelectorAll('.plate > img')].filter((i) => i.offsetParent).length") >= 7
    assert tab.run("document.querySelector('#choice').offsetParent") is None


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_the_heat_map_has_the_tables_numbers(tab, tables, measure):
    choose(tab, measure=measure)
    assert heat_map(tab) == by_pandas(tables, measure)


def test_filters_change_the_heat_map(tab, tables):
    before = heat_map(tab)
    choose(tab, measure="asr", spc=10)
    filtered(tab, "#heat", dataset="letters", ratio="0.1")
    query = "dataset == 'letters' and ratio == 0.1 and spc in (0, 10)"
    found = heat_map(tab)
    assert found == by_pandas(tables, "asr", query)
    assert found != before
    assert len(found) > 8
    filtered(tab, "#heat", dataset="", ratio="")
    choose(tab, measure="der", spc="")
    assert heat_map(tab) == before


def test_attacks_that_failed_the_gate_are_shown_apart(tab, tables):
    choose(tab, measure="asr")
    filtered(tab, "#heat", attack_took="false")
    found = heat_map(tab)
    assert {attack for _, attack in found} == {"sig"}
    summary = tables.summary.to_pandas()
    failed = summary[summary["attack_took"] == False]  # noqa: E712
    expected = failed[failed["defense"] == "clp"].groupby("dataset")["asr_mean"].mean().mean()
    assert found["clp", "sig"] == views.share(expected)


def test_pandas_gives_the_numbers_that_the_page_says_it_gives(tab, tables, tmp_path):
    choose(tab, measure="acc", spc=2)
    filtered(tab, "#heat", dataset="digits")
    lines = tab.run("document.querySelector('#heat details code').textContent")
    assert "groupby" in lines
    path = tmp_path / "summary.parquet"
    tables.summary.to_pandas().to_parquet(path)
    lines = lines.replace("results/tables/summary.parquet", str(path)).replace("print(", "found = (")
    names = {}
    exec(lines, names)  # what a reader would paste
    means = names["found"]
    pairs = {(defense, attack): means.loc[defense, attack] for defense in means.index for attack in means}
    assert {key: f"{value:.1f}" for key, value in pairs.items() if pd.notna(value)} == heat_map(tab)


def test_all_settings_have_the_tables_numbers(tab, tables):
    head, *rows = shown(tab, "#all-settings .scroll")
    assert len(rows) == len(tables.summary)
    found = {
        tuple(row[head.index(name)] for name in ("data set", "attack", "ratio", "defense", "SPC")): row
        for row in rows
    }
    for line in tables.summary.to_pylist():
        key = (
            line["dataset"],
            "no attack" if line["attack"] == "none" else line["attack"],
            "0" if line["ratio"] == 0 else str(line["ratio"]),
            views.defense_text(line["defense"]),
            "" if line["defense"] == "none" else str(line["spc"]) if line["spc"] else "none",
        )
        row = dict(zip(head, found[key], strict=True))
        for measure, title in MEASURES.items():
            assert row[f"{title}, %"] == views.share(line[f"{measure}_mean"]), key
        assert row["cells"] == f"{line['num_ok']}/{line['num_cells']}"
        assert row["seconds"] == views.seconds(line["seconds"])


def test_settings_are_searched_filtered_and_sorted(tab, tables):
    filtered(tab, "#all-settings", search="letters BADNETS", defense="ft", spc="2")
    head, *rows = shown(tab, "#all-settings .scroll")
    assert {(row[head.index("data set")], row[head.index("defense")]) for row in rows} == {("letters", "ft")}
    assert len(rows) == 2  # ratios
    filtered(tab, "#all-settings", search="", defense="", spc="")
    click = (
        "[...document.querySelectorAll('#all-settings thead button')].find((b) => b.textContent === 'ASR, %')"
    )
    for direction in (1, -1):
        tab.run(f"{click}.click()")
        head, *rows = shown(tab, "#all-settings .scroll")
        values = [row[head.index("ASR, %")] for row in rows]
        known = [float(value) for value in values if value != views.UNDEFINED]
        assert known == sorted(known)[::direction]
        assert values[len(known) :] == [views.UNDEFINED] * (len(values) - len(known))


def test_numbers_are_rounded_as_in_python(tab):
    texts = (report.ASSETS / "text.js").read_text()
    # Those in the middle, and those whose binary value lies a little off it.
    values = [place / 8000 for place in range(0, 4000, 7)] + [-0.0005, -0.0004, 0.12345, 0.5, 0.125]
    times = [0.0, 0.001, 0.125, 0.375, 1.25, 2.75, 12.25, 99.95, 100.5, 101.5, 12345.5, 1e6]
    lists = f"[{json.dumps(values)}.map(share), {json.dumps(times)}.map(seconds)]"
    found = tab.run(f"(() => {{ {texts}; return {lists}; }})()")
    assert found == [[views.share(value) for value in values], [views.seconds(time) for time in times]]


# --- choices ---------------------------------------------------------------------------------------


def test_the_chosen_measure_and_budget_are_shown_everywhere(tab):
    tab.run("document.querySelector('[data-figure=ranking]').scrollIntoView()")
    tab.wait_for("document.querySelector('[data-figure=ranking]').classList.contains('drawn')")
    choose(tab, measure="asr", spc=10)
    heads = tab.run(
        "[...document.querySelectorAll('[data-block] h3')].filter((h) => h.offsetParent)"
        ".map((h) => h.textContent)"
    )
    assert [re.sub(r"\s+CSV.*", "", " ".join(head.split())) for head in heads] == [
        "Defenses ranked by ASR, SPC 10",
        "How far each defense can be relied on, SPC 10",
        "ASR against fine-tuning and fine-pruning, SPC 10",
    ]
    tab.wait_for("/by ASR/.test(document.querySelector('[data-figure=ranking] svg').textContent)")
    assert tab.problems()[0] == []


def test_keys_are_enough(tab):
    tab.run("document.querySelector('#choice input[value=der]').focus()")
    tab.press("ArrowRight")
    assert tab.run("document.querySelector('#choice input:checked').value") == "asr"
    assert "ASR" in tab.run("document.querySelector('#heat .legend').textContent")
    tab.run("document.querySelector('#heat thead button').focus()")
    columns = len(shown(tab, "#heat .scroll")[0])
    for _ in range(columns):
        tab.press("Tab")
    number = "document.activeElement.textContent"
    first = tab.run("document.querySelector('#heat td button').textContent")
    assert tab.run(number) == first
    tab.press("Enter")
    assert tab.run("document.querySelector('dialog').open")
    assert tab.run("document.querySelector('dialog').contains(document.activeElement)")
    tab.press("Escape")
    assert not tab.run("document.querySelector('dialog').open")
    assert tab.run(number) == first  # back where the reader was


# --- from a number to its cells --------------------------------------------------------------------


def number_in_heat_map(defense, attack):
    """Return JavaScript for a number's button."""
    return (
        "(() => { const table = document.querySelector('#heat .scroll table');"
        f"const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === '{attack}');"
        f"const row = [...table.tBodies[0].rows].find((r) => r.cells[0].textContent.startsWith('{defense}'));"
        "return row.cells[column].querySelector('button'); })()"
    )


def test_a_number_leads_to_its_cells_and_a_cell_to_its_commands(tab, tables):
    filtered(tab, "#heat", dataset="letters", ratio="0.1")
    tab.run(f"{number_in_heat_map('ft', 'badnets')}.click()")
    cells = tables.cells.to_pandas()
    chosen = cells.query("dataset == 'letters' and ratio == 0.1 and attack == 'badnets' and defense == 'ft'")
    head, *rows = shown(tab, "dialog")
    found = [dict(zip(head, row, strict=True)) for row in rows]
    expected = chosen.sort_values(["spc", "draw"]).to_dict("records")
    assert [(row["SPC"], row["draw"], row["status"]) for row in found] == [
        (str(row["spc"]), str(row["draw"]), row["status"]) for row in expected
    ]
    for row, cell in zip(found, expected, strict=True):
        for measure, title in MEASURES.items():
            value = None if pd.isna(cell[measure]) else cell[measure]
            assert row[f"{title}, %"] == views.share(value)
    # The last draw of its shard.
    place = next(p for p, row in enumerate(expected) if row["status"] == "ok" and row["draw"] == 1)
    tab.run(f"document.querySelectorAll('dialog tbody button')[{place}].click()")
    text = tab.run("document.querySelector('dialog').innerText")
    cell = expected[place]
    axes = "dataset=letters architecture=net attack=badnets ratio=0.1 seed=0"
    axes += f" defense=ft protocol=survey spc={cell['spc']}"
    assert f"detrojan why {axes} draw={cell['draw']}\n" in text
    assert f"detrojan reproduce {axes} draw={cell['draw']}\n" in text
    assert f"ACC\n{views.share(cell['acc'])} %, untouched 95.0 %" in text
    assert (
        f"logs/shards/letters/net/badnets/ratio-0.1/seed-0/ft/survey/spc-{cell['spc']}/draws-0-1.log" in text
    )
    for known in ("c0de", "abc123", "torch = 2.13.0", "lr = 0.01", "epoch = 3"):
        assert known in text
    assert tab.problems()[0] == []


def test_commands_are_copied(tab):
    tab.run(f"{number_in_heat_map('untouched', 'badnets')}.click()")
    tab.run("document.querySelector('dialog tbody button').click()")
    tab.run("document.querySelector('dialog .command button').click()")
    tab.wait_for("document.querySelector('dialog .command button').textContent !== 'Copy'")
    said = tab.run("document.querySelector('dialog .command button').textContent")
    line = tab.run("document.querySelector('dialog .command code').textContent")
    assert said in ("Copied", "Selected")
    if said == "Selected":
        assert tab.run("getSelection().toString()") == line


def test_numbers_of_tables_lead_to_cells_that_they_count(tab, tables):
    outcomes = {}
    for row in tables.outcomes.to_pylist():
        key = (row["defense"], row["outcome"])
        outcomes[key] = outcomes.get(key, 0) + row["num_cells"]
    counted = tab.run(
        """(() => {
          const table = document.querySelector('[aria-label="How all cells ended"] table');
          const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
          const found = [];
          for (const row of table.tBodies[0].rows) {
            for (const button of row.querySelectorAll('button')) {
              button.click();
              const said = document.querySelector('dialog .counts')?.textContent ?? '1 cell';
              const head = heads[button.closest('td').cellIndex];
              found.push([row.cells[0].firstChild.textContent.trim(), head, button.textContent, said]);
              document.querySelector('dialog .close').click();
            }
          }
          return found;
        })()"""
    )
    assert len(counted) > 15
    for defense, outcome, number, said in counted:
        name = "none" if defense == "untouched" else defense
        key = (name, outcome.replace(" ", "_"))
        if outcome != "cells":
            assert number == str(outcomes[key])
        assert said.startswith(f"{number} cell"), (defense, outcome)


def test_reasons_from_outside_stay_text(tab):
    tab.run(
        """[...document.querySelectorAll('[aria-label="Why cells do not count"] tr')]
          .find((row) => row.textContent.includes('diverged')).querySelector('button').click()"""
    )
    tab.run("document.querySelector('dialog tbody button').click()")
    assert pages.EVIL in tab.run("document.querySelector('dialog').textContent")
    assert tab.problems()[0] == []


# --- other studies ---------------------------------------------------------------------------------


def clean_only():
    return pages.tables_of(pages.of_rows(made.untouched(attack="none"), made.cell("ft", attack="none")))


def no_attack_took():
    failed = {"attack_took": False}
    return pages.tables_of(pages.of_rows(made.untouched(asr=0.1, **failed), made.cell("ft", **failed)))


def nothing_ended_well():
    lost = {"status": "out_of_memory", "attack_took": None, "reason": "killed"}
    return pages.tables_of(pages.of_rows(made.untouched(**lost), made.cell("ft", **lost)))


def one_defense():
    return pages.tables_of(pages.of_rows(made.untouched(), made.cell("anp")))


@pytest.mark.parametrize("study", [clean_only, no_attack_took, nothing_ended_well, one_defense])
def test_studies_without_much_to_show_open_too(browser, tmp_path, study):
    tab = opened(browser, written(study(), tmp_path))
    drawn_to_the_end(tab)
    assert tab.problems()[0] == []


def test_other_peoples_results_open_without_commands(browser, tables, tmp_path):
    cells = tables.cells
    for name in ("device", "code", "git_commit"):
        place = cells.column_names.index(name)
        cells = cells.set_column(place, name, [[""] * len(cells)])
    said = report.About("Theirs", [], "All attacks count.", None)
    tab = opened(browser, written(dataclasses.replace(tables, cells=cells, models=None), tmp_path, said))
    tab.run(f"{number_in_heat_map('untouched', 'badnets')}.click()")
    tab.run("document.querySelector('dialog tbody button').click()")
    text = tab.run("document.querySelector('dialog').innerText")
    assert "python -m" not in text
    assert "logs/" not in text
    assert tab.problems()[0] == []
