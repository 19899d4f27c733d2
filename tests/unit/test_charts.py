"""The figures: the tables' numbers, at the size of paper, and the same bytes again."""

import io
import itertools
import re

import pytest
from PIL import Image

from detrojan.analysis.report import charts, layout, vega, views
from detrojan.analysis.report.figures import (
    base,
    consistency,
    cost,
    effect,
    heatmap,
    ranking,
    ratio,
    spc,
)
from detrojan.analysis.report.layout import Axis
from tests.unit import tables as made
from tests.unit.pages import values
from tests.unit.pages import without_models as tables_of


@pytest.fixture(scope="module")
def tables():
    return tables_of(made.random_study(draws=2))


def texts(figure):
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", vega.files(figure).svg))


def test_every_figure_has_its_size_and_gives_the_same_bytes_again(tables):
    figures = base.on_paper(tables)
    for name, figure in figures.items():
        files, again = vega.files(figure), vega.files(figure)
        assert files == again, name
        assert f'width="{figure.inches:g}in"' in files.svg, name
        picture = Image.open(io.BytesIO(files.png))
        assert picture.width == pytest.approx(figure.inches * vega.DPI, abs=1), name
        assert picture.info["dpi"] == pytest.approx((vega.DPI, vega.DPI), abs=0.1), name
        (box,) = re.findall(rb"/MediaBox \[0 0 ([\d.]+) [\d.]+\]", files.pdf)
        assert float(box) == pytest.approx(figure.inches * vega.POINTS, abs=0.5), name
        assert b"CreationDate" not in files.pdf
        assert set(re.findall(r'font-size="([\d.]+)px"', files.svg)) <= {"6", "7", "7.5"}, name
        # One face alone, see the module.
        assert set(re.findall(r'font-weight="(\w+)"', files.svg)) <= {"normal"}, name


def test_figures_stand_in_the_order_of_the_page():
    order = ["ranking", "effect", "heatmap", "spc", "ratio", "cost", "consistency"]
    assert [name for name in base.ordered() if name in order] == order


def test_the_ranking_has_the_ranks_of_each_budget(tables):
    drawn = {(row["defense"], row["spc"]): row for row in values(ranking.draw(tables, "asr"))}
    ranks = [row for row in tables.ranks.to_pylist() if row["measure"] == "asr"]
    assert len(drawn) == len(ranks) == 12  # four defenses, pooled and at two SPC
    for row in ranks:
        found = drawn[row["defense"], views.spc_text(row["spc"])]
        assert (found["mean"], found["low"], found["high"]) == (
            row["mean_rank"],
            row["rank_grid_low"],
            row["rank_grid_high"],
        )
    assert drawn["ft", "pooled"]["role"] == "baseline"
    assert "grad_prune" not in {defense for defense, _ in drawn}  # it knows the trigger


def test_the_ranking_joins_to_the_first_what_can_not_be_told_from_it(tables):
    drawn = {(row["defense"], row["spc"]): row for row in values(ranking.draw(tables, "der"))}
    ranks = [row for row in tables.ranks.to_pylist() if row["measure"] == "der"]
    for row in ranks:
        found = drawn[row["defense"], views.spc_text(row["spc"])]
        first = next(other for other in ranks if other["spc"] == row["spc"])
        assert found["leader"] == first["mean_rank"]
        if row == first:
            assert found["alike"] is None
    told = {"leader_apart_grid": True, "leader_apart_beyond": False}
    assert ranking.alike(told) == ranking.BEYOND
    assert ranking.alike(told | {"leader_apart_grid": False}) == ranking.ON_GRID
    assert ranking.alike(told | {"leader_apart_beyond": True}) is None


def test_effect_has_the_changes_of_each_budget(tables):
    rows = values(effect.draw(tables))
    drawn = {(r["defense"], r["SPC"], r["measure"]): r for r in rows if "defense" in r}
    table = {(r["defense"], r["spc"]): r for r in tables.consistency.to_pylist()}
    asr, of_table = drawn["ft", "2", "ASR change, points"], table["ft", 2]
    assert asr["mean"] == -100 * of_table["asr_reduction_mean"]
    assert (asr["low"], asr["high"]) == (
        -100 * of_table["asr_reduction_grid_high"],
        -100 * of_table["asr_reduction_grid_low"],
    )
    assert drawn["grad_prune", "10", "DER, %"]["mean"] == 100 * table["grad_prune", 10]["der_mean"]
    ra = drawn["clp", "none", "RA change, points"]["mean"]
    assert ra == 100 * table["clp", 2]["ra_recovery_mean"]
    assert ("clp", "2", "RA change, points") not in drawn  # one run, whatever the budget
    unchanged = {row["measure"]: row["untouched"] for row in rows if "untouched" in row}
    assert unchanged["DER, %"] == 50
    assert unchanged["ASR change, points"] == 0


def test_the_heat_map_averages_budgets_then_settings():
    cells = made.of_rows(
        made.untouched(seed=0),
        made.untouched(seed=0, dataset="y"),
        made.untouched(seed=0, dataset="y", attack="none"),
        # Two budgets of one setting count as much as the one of the other.
        made.cell("ft", asr=0.2, spc=2),
        made.cell("ft", asr=0.4, spc=10),
        made.cell("ft", asr=0.9, spc=10, dataset="y"),
        made.cell("ft", asr=0.0, spc=10, dataset="z", attack_took=False),
        made.cell("ft", acc=0.75, spc=10, dataset="y", attack="none"),
    )
    frame = charts.heat(tables_of(cells)).set_index(["defense", "attack"])
    assert frame.loc[("ft", "badnets"), "asr"] == pytest.approx((0.3 + 0.9) / 2)
    assert frame.loc[("ft", "none"), "acc"] == 0.75


def test_the_heat_map_writes_its_means_in_readable_ink(tables):
    frame = charts.heat(tables)
    attacked = frame[(frame["attack"] != "none")]
    figure = heatmap.draw(tables)
    drawn = [row for row in values(figure) if "mean" in row]
    assert len(drawn) == 4 * len(attacked)
    assert {f"{100 * value:.0f}" for value in attacked["asr"]} <= texts(figure)


def luminance(color):
    channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_numbers_have_contrast_on_every_colour_of_the_heat_map():
    def mixed(shade):
        place = shade * (len(charts.BAD_TO_GOOD) - 1)
        below = min(len(charts.BAD_TO_GOOD) - 2, int(place))
        pair = charts.BAD_TO_GOOD[below : below + 2]
        channels = [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in pair]
        whole = [round(a + (b - a) * (place - below)) for a, b in zip(*channels, strict=True)]
        return "#" + "".join(f"{channel:02x}" for channel in whole)

    for step in range(1001):
        shade = step / 1000
        ink = charts.DARK if charts.PALE[0] < shade < charts.PALE[1] else charts.LIGHT
        light, dark = sorted((luminance(mixed(shade)), luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, shade


def test_one_end_of_the_colours_is_good_for_every_measure_and_in_every_report():
    assert [charts.shade(value, "acc") for value in (0.0, 0.55, 1.0)] == [0.0, 0.55, 1.0]
    assert charts.shade(0.25, "asr") == 0.75
    assert charts.shade(0.5, "der") == 0.5  # pale: the untouched model
    assert (charts.shade(-0.1, "ra"), charts.shade(1.1, "ra")) == (0.0, 1.0)


def curve_of(*asrs):
    """Return the curve of ASR over two ratios; ``asrs`` are those of an attack at both, None without one."""
    rows = []
    for number, of_attack in enumerate(asrs):
        for at, asr in zip((0.05, 0.1), of_attack, strict=True):
            axes = {"attack": f"attack{number}", "ratio": at}
            rows += [made.untouched(**axes)]
            rows += [] if asr is None else [made.cell("ft", asr=asr, **axes)]
    drawn = values(ratio.draw(tables_of(made.of_rows(*rows))))
    return {(r["at"], r["rest"]): r for r in drawn if r["measure"] == "ASR"}


def test_curves_are_over_the_settings_that_all_points_have():
    found = curve_of((0.2, 0.3), (0.4, 0.7), (None, 0.9))
    assert found["0.05", False]["mean"] == pytest.approx(30)
    assert found["0.1", False]["mean"] == pytest.approx(50)
    assert {row["settings"] for (_, rest), row in found.items() if not rest} == {2}
    assert (found["0.1", True]["mean"], found["0.1", True]["settings"]) == (pytest.approx(90), 1)
    assert ("0.05", True) not in found
    assert {row["panel"] for row in found.values()} == {"ft (n 2)"}


def test_points_without_a_common_setting_make_no_line():
    found = curve_of((0.2, None), (None, 0.9))
    assert {rest for _, rest in found} == {True}


def test_curves_over_budgets_are_those_of_the_table():
    rows = []
    for attack in range(4):
        axes = {"attack": f"attack{attack}"}
        rows.append(made.untouched(**axes))
        for spc_, draw in itertools.product((2, 10), (0, 1)):
            ra = 0.1 * (attack + draw) + spc_ / 100
            rows.append(made.cell("fp", ra=ra, draw=draw, spc=spc_, **axes))
    whole = tables_of(made.of_rows(*rows))
    drawn = {(r["defense"], r["at"], r["measure"]): r for r in values(spc.draw(whole))}
    table = {(r["defense"], r["spc"]): r for r in whole.consistency.to_pylist()}
    assert drawn["fp", "10", "RA"]["low"] == pytest.approx(100 * table["fp", 10]["ra_grid_low"])
    assert drawn["fp", "2", "RA"]["mean"] == pytest.approx(100 * table["fp", 2]["ra_mean"])


def test_a_defense_without_data_is_dashed(tables):
    given = {row["defense"]: row["given"] for row in values(spc.draw(tables))}
    assert (given["clp"], given["fp"]) == (False, True)


def test_spread_is_over_settings(tables):
    rows = {row["defense"]: row for row in values(consistency.draw(tables)) if "defense" in row}
    summary = tables.summary.to_pandas()
    of_ft = summary[(summary["defense"] == "ft") & (summary["attack"] != "none")]
    settings = 100 * of_ft.groupby(["attack", "ratio"])["der_mean"].mean()
    assert rows["ft"]["settings"] == len(settings) == 6
    assert (rows["ft"]["lowest"], rows["ft"]["highest"]) == pytest.approx((settings.min(), settings.max()))
    assert rows["ft"]["median"] == pytest.approx(settings.median())


def test_the_front_has_what_no_other_beats_in_both():
    # Cost first, then score: a dear one that is no better is beaten, equal ones are not.
    points = [(1.0, 0.5), (2.0, 0.8), (3.0, 0.8), (2.0, 0.8), (0.5, 0.1)]
    assert layout.pareto(points) == [True, True, False, True, True]


@pytest.mark.parametrize(("measure", "best"), [("asr", "fast"), ("acc", "slow")])
def test_low_asr_and_high_acc_are_good(measure, best):
    cells = made.of_rows(
        made.untouched(),
        made.cell("fast", asr=0.1, acc=0.7, seconds=1.0),
        made.cell("slow", asr=0.2, acc=0.9, seconds=5.0),
        made.cell("grad_prune", asr=0.0, acc=0.95, seconds=0.1),
    )
    roles = {row["defense"]: row["role"] for row in values(cost.draw(tables_of(cells), measure))}
    assert roles["fast"] == cost.FRONT  # none is as fast
    assert roles["slow"] == cost.FRONT if best == "slow" else cost.BEATEN
    assert roles["grad_prune"] == cost.BOUND


def test_names_cover_neither_marks_nor_each_other():
    rows = [{"defense": f"d{place}", "seconds": 10.0, "mean": 50 + place / 10} for place in range(4)]
    rows.append({"defense": "far", "seconds": 2.0, "mean": 50.0, "above": True})
    placed = layout.named(rows, Axis(0.0, 2.0, 400.0), Axis(40.0, 60.0, 200.0))
    for side in ("left", "right"):
        heights = sorted(10 * row["label"] for row in placed[:4] if row["align"] == side)
        assert all(b - a >= layout.LINE - 1e-9 for a, b in itertools.pairwise(heights)), side
    assert placed[-1]["label"] > 50.5  # the line of the front leads to its right


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([made.untouched(attack="none")], "No model was attacked"),
        ([made.untouched(asr=0.1, attack_took=False)], "No attack took"),
    ],
)
def test_a_figure_without_anything_to_show_says_why(rows, said):
    figures = base.on_paper(tables_of(made.of_rows(*rows)))
    assert figures["effect"].alt.startswith(said)
    assert any(text.startswith(said) for text in texts(figures["effect"]))


def test_one_defense_at_one_budget_has_no_ranks_and_no_curves():
    figures = base.on_paper(tables_of(made.of_rows(made.untouched(), made.cell("ft"))))
    assert figures["ranking"].alt == "Fewer than two defenses can be ranked."
    assert figures["spc"].alt == "There is one SPC."
    assert figures["ratio"].alt == "There is one ratio."
    assert {row["SPC"] for row in values(figures["effect"]) if "SPC" in row} == {"10"}
