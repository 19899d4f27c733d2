"""What every figure of the report keeps, beyond the numbers that its own test holds."""

import pytest

from detrojan import registry
from detrojan.analysis.report.figures import base
from detrojan.analysis.report.views import MEASURE_TEXTS
from tests.unit import pages
from tests.unit import tables as made

NAMES = registry.names(registry.FIGURES)


@pytest.fixture(scope="module")
def tables():
    return pages.random_study(draws=2)


@pytest.fixture(scope="module")
def bare():
    """Other people's results: no models, nothing to rank."""
    return pages.without_models(made.of_rows(made.untouched(attack="none")))


@pytest.mark.parametrize("name", NAMES)
def test_figure_shows_something_and_says_what(name, tables):
    figure, plan = base.load(name).on_paper(tables), base.load(name).plan
    assert not figure.nothing
    assert figure.draw(100).to_dict(validate=True)["datasets"]
    assert figure.alt.endswith(".")
    assert plan.caption.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_figure_without_anything_to_show_says_why(name, bare):
    figure = base.load(name).on_paper(bare)
    assert figure.nothing
    assert figure.alt.startswith("No model was attacked")


@pytest.mark.parametrize("name", NAMES)
def test_figure_has_words_for_each_measure_that_it_shows(name, tables):
    planned = base.load(name)
    if planned.by_measure:
        for measure in MEASURE_TEXTS:
            assert planned.draw(tables, measure).alt.endswith(".")


def test_figures_stand_in_the_order_of_the_page(monkeypatch):
    plans = {
        "first": base.Plan("effect", "."),
        "later": base.Plan("effect", ".", order=1),
        "own": base.Plan("A section of its own", "."),
        "top": base.Plan("ranking", ".", order=9),
    }
    monkeypatch.setattr(registry, "names", lambda _: list(plans))
    monkeypatch.setattr(base, "load", lambda name: base.Planned(lambda tables: None, plans[name]))
    assert list(base.ordered()) == ["top", "first", "later", "own"]
