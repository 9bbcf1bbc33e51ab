"""Options: parsing of their textual form, validation, and the way back to text."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field, PositiveFloat, PositiveInt

from harness.options import (
    MAX_SEEDS,
    Configurable,
    UserError,
    configure,
    defaults,
    parse_seeds,
    parse_selection,
    schema,
    seeds_text,
    unknown,
)


@dataclass(frozen=True, kw_only=True)
class Thing(Configurable):
    name: str = "thing"
    n: PositiveInt = 3
    lr: PositiveFloat = 1e-3
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.5
    form: Literal["residual", "inner-product"] = "residual"
    learn: bool = False
    scale: float = 1.0
    most: int | None = None
    widths: tuple[float, ...] = (1.0, 2.0)
    sizes: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1, 2))


@dataclass(frozen=True, kw_only=True)
class Plain(Configurable):
    name: str = "plain"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("avb", [("avb", {})]),
        (" avb , vae ", [("avb", {}), ("vae", {})]),
        ("avb[lr=1e-4]", [("avb", {"lr": "1e-4"})]),
        ("avb[ n = 3 , lr=1e-4 ],vae", [("avb", {"n": "3", "lr": "1e-4"}), ("vae", {})]),
        ("avb[lr=1|2]", [("avb", {"lr": "1"}), ("avb", {"lr": "2"})]),
        (
            "a[x=1|2,y=3|4]",
            [("a", {"x": x, "y": y}) for x in "12" for y in "34"],
        ),
        ("file:images.npz[latent_dim=2]", [("file:images.npz", {"latent_dim": "2"})]),
        ("a[x=b=c]", [("a", {"x": "b=c"})]),
    ],
)
def test_a_selection_is_parsed(text: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_selection(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty entry"),
        (",", "empty entry"),
        ("avb,,vae", "empty entry"),
        ("avb,", "empty entry"),
        ("[lr=1]", "empty entry"),
        ("avb[lr=1", "unbalanced bracket"),
        ("avb]", "unbalanced bracket"),
        ("avb[[lr=1]]", "unbalanced bracket"),
        ("]avb[", "unbalanced bracket"),
        ("avb[lr=1]x", "unexpected text after ']'"),
        ("avb[lr=1]x[n=2]", "unexpected text after ']'"),
        ("avb[lr=1][n=2]", "unexpected text after ']'"),
        ("avb[]", "expected option=value"),
        ("avb[lr]", "expected option=value"),
        ("avb[lr=]", "expected option=value"),
        ("avb[=1]", "expected option=value"),
        ("avb[lr=1|]", "expected option=value"),
        ("avb[lr=1,]", "expected option=value"),
        ("avb[lr=1,lr=2]", "'lr' is given twice"),
    ],
)
def test_a_malformed_selection_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("]", r"\]")):
        parse_selection(text)


CHANGES: list[dict[str, Any]] = [
    {},
    {"n": 7},
    {"lr": 1e-4, "beta": 0.0},
    {"lr": 0.1 + 0.2, "scale": -1e300},
    {"form": "inner-product", "learn": True},
    {"most": 4},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_label_gives_the_thing_back(changes: dict[str, Any]) -> None:
    thing = Thing(**changes)
    [(name, options)] = parse_selection(thing.label)
    assert name == "thing"
    assert set(options) == set(changes)  # only what differs from the defaults is said
    assert configure(Thing(), options) == thing
    assert dataclasses.replace(Thing(), **thing.config) == thing  # what a store keeps gives it back too


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("n", "0", "greater than 0"),
        ("n", "2.5", "integer"),
        ("n", "many", "integer"),
        ("n", "true", "integer"),
        ("lr", "-1", "greater than 0"),
        ("lr", "nan", "greater than 0"),
        ("lr", "inf", "finite"),
        ("lr", "1e999", "finite"),
        ("lr", "1,5", "number"),
        ("beta", "1", "less than 1"),
        ("form", "residua", "'residual' or 'inner-product'"),
        ("learn", "perhaps", "boolean"),
        ("scale", "nan", "finite"),
        ("scale", "-inf", "finite"),
        ("nn", "3", "did you mean 'n'"),
        ("name", "avb", "unknown option of thing 'name'"),
    ],
)
def test_a_wrong_value_in_text_is_refused(key: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        configure(Thing(), {key: text})
    assert "thing" in str(caught.value)
    assert key in str(caught.value)


WRONG_VALUES: list[dict[str, Any]] = [
    {"n": 0},
    {"n": 1.5},
    {"n": "x"},
    {"lr": math.nan},
    {"scale": math.inf},
    {"scale": "nan"},
    {"scale": None},
    {"widths": (1.0, math.nan)},
    {"sizes": (1, "x")},
]


@pytest.mark.parametrize("values", WRONG_VALUES)
def test_a_wrong_value_in_python_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"thing: option {next(iter(values))}="):
        Thing(**values)


def test_a_thing_without_options_says_so() -> None:
    with pytest.raises(UserError, match="plain has no options"):
        configure(Plain(), {"lr": "1"})


def test_values_are_of_the_declared_type_and_equal_configurations_are_equal() -> None:
    assert type(Thing(scale=2).scale) is float
    assert Thing(scale=2) == Thing(scale=2.0)
    assert hash(Thing(scale=2)) == hash(Thing(scale=2.0))
    assert Thing(scale=2).config == Thing(scale=2.0).config


def test_schema_and_defaults_cover_every_option() -> None:
    assert set(schema(Thing)) == set(Thing().config)
    assert schema(Thing)["n"] == {"type": "integer", "exclusiveMinimum": 0}
    assert {key: value for key, value in defaults(Thing).items() if key != "name"} == {
        key: getattr(Thing(), key) for key in Thing().config
    }


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("abv", "did you mean 'avb'?"),
        ("AVB", "did you mean 'avb'?"),
        ("four_points", "did you mean 'four-points'?"),
        ("xyzzy", "known: avb, four-points, vae"),
    ],
)
def test_the_nearest_name_is_suggested(name: str, hint: str) -> None:
    assert unknown("method", name, ["vae", "four-points", "avb"]) == f"unknown method {name!r}; {hint}"


def test_nothing_known_is_said() -> None:
    assert unknown("method", "avb", []) == "unknown method 'avb'; known: none"


@pytest.mark.parametrize(
    ("seeds", "expected"),
    [
        (3, [0, 1, 2]),
        ("3", [0, 1, 2]),
        (" 1 ", [0]),
        ("0,1,2", [0, 1, 2]),
        ("5, 3", [5, 3]),
        ("7,", [7]),
        ([7], [7]),
        ((2, 0), [2, 0]),
        (range(2), [0, 1]),
        (np.int64(2), [0, 1]),
        (np.arange(2), [0, 1]),
        (f"0,{2**63 - 1}", [0, 2**63 - 1]),
    ],
)
def test_seeds_are_parsed(seeds: Any, expected: list[int]) -> None:
    parsed = parse_seeds(seeds)
    assert parsed == expected
    assert all(type(seed) is int for seed in parsed)


@pytest.mark.parametrize("seeds", [[0], [7], [0, 1], [5, 3]])
def test_seeds_as_text_are_the_same_seeds(seeds: list[int]) -> None:
    assert parse_seeds(seeds_text(seeds)) == seeds


WRONG_TEXTS = [
    "",
    " ",
    "0",
    "-1",
    "three",
    "1.5",
    "1e3",
    "nan",
    "0,0",
    "0,1,",
    ",",
    ",0",
    "0,,",
    "0,x",
    "0,-1",
    "9" * 30,
    f"0,{2**63}",
]
WRONG_NUMBERS = [
    2.0,
    None,
    0,
    -1,
    MAX_SEEDS + 1,
    True,
    [],
    [0, 0],
    [-1],
    [1.5],
    ["1"],
    [True],
    [None],
    range(MAX_SEEDS + 1),
]


@pytest.mark.parametrize("seeds", [*WRONG_TEXTS, *WRONG_NUMBERS])
def test_wrong_seeds_are_refused(seeds: Any) -> None:
    with pytest.raises(UserError, match="seeds"):
        parse_seeds(seeds)
