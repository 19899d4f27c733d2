"""The one grammar of ``KEY=VALUE`` that all commands share."""

import re

import pytest

from detrojan.cells import Draws, Model, Shard, untouched
from detrojan.study import conditions

MODEL = Model("digits", "preactresnet18", "badnets", 0.05, 0)
FT = Shard(MODEL, "ft", 10, Draws(2, 4))


def one(text):
    (condition,) = conditions.parse([text])
    return condition


@pytest.mark.parametrize(
    ("text", "admitted", "refused"),
    [
        ("attack=badnets", ["badnets"], ["badnet", "sig"]),
        ("defense=ft,fp", ["ft", "fp"], ["ft_sam", "ft,fp"]),
        ("dataset=my-data", ["my-data"], ["my"]),  # a name is no range
        ("seed=3", [3], [0, 2, 4]),
        ("draw=0-4", [0, 2, 4], [5]),
        ("draw=0-1,4,7-8", [0, 1, 4, 7, 8], [2, 3, 5, 6, 9]),
        ("spc=2,10", [2, 10], [0, 5]),
        ("spc=0", [0], [2]),
        ("spc=>=10", [10, 100], [0, 2]),
        ("spc=>10", [11], [0, 10]),
        ("spc=<= 10", [2, 10], [0, 11]),  # 0 means that a method is given no samples
        ("seed=<1", [0], [1]),
        ("ratio=0.10", [0.1], [0.01]),
        ("ratio=1e-2,0.1", [0.01, 0.1], [0.0]),
        ("ratio=<0.1", [0.05], [0.0, 0.1]),
    ],
)
def test_what_a_condition_admits(text, admitted, refused):
    condition = one(text)
    assert str(condition) == text
    assert [value for value in [*admitted, *refused] if condition.admits(value)] == admitted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ft", "'ft' should be KEY=VALUE, such as spc=10"),
        ("spc=", "should be KEY=VALUE"),
        ("spc= ", "should be KEY=VALUE"),
        ("draws=0-9", "'draws=0-9': unknown key 'draws'; did you mean 'draw'?"),
        (
            "zzz=1",
            "'zzz=1': unknown key 'zzz'; there are dataset, architecture, attack, ratio, seed, defense",
        ),
        (
            "spc=ten",
            "'spc=ten': spc should be a whole number or a range, as 0-4, several with commas between",
        ),
        ("spc=2.5", "spc should be a whole number"),
        ("spc=>ten", "spc should be a whole number"),
        ("spc=2,>=10", "spc should be a whole number"),
        ("draw=1,", "draw should be a whole number"),
        ("draw=4-0", "draw should be a whole number"),
        ("ratio=0.1-0.2", "'ratio=0.1-0.2': ratio should be a number, several with commas between, or a com"),
        ("ratio=nan", "ratio should be a number"),
    ],
)
def test_what_is_no_condition(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        conditions.parse(["attack=badnets", text])


@pytest.mark.parametrize("text", ["draw=4", "draw=0-9", "defense=ft", "ratio=0.05", "spc=>2", "seed=0"])
def test_a_shard_with_one_such_cell_holds(text):
    assert one(text).holds(FT)


@pytest.mark.parametrize(
    "text", ["draw=5", "draw=0-1", "defense=fp", "ratio=0.1", "spc=<=2", "dataset=gtsrb"]
)
def test_a_shard_without_such_a_cell_does_not(text):
    assert not one(text).holds(FT)


def test_an_untouched_model_is_named_as_tables_write_it():
    assert one("spc=0").holds(untouched(MODEL))
    assert not one("spc=<5").holds(untouched(MODEL))


@pytest.mark.parametrize(
    ("text", "value"),
    [("draw=03", 3), ("draw=3-3", 3), ("ratio=0.10", 0.1), ("attack=badnets", "badnets"), ("spc=0", 0)],
)
def test_one_value_is_itself(text, value):
    assert one(text).only() == value


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("draw=2-4", "draw=2"),
        ("attack=sig,lf", "attack=sig"),
        ("ratio=<0.1", "ratio=0.1"),
        ("spc=>=10", "spc=10"),
    ],
)
def test_several_values_are_not_one_cell(text, instead):
    with pytest.raises(ValueError, match="this needs exactly one: write one value, as ") as error:
        one(text).only()
    assert str(error.value).startswith(repr(text))
    assert str(error.value).endswith(f"as {instead}")
