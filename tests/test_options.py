from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from util import error_of

from aoquant_inductor.errors import ConflictingSchemes, UnknownScheme, UnmatchedPattern
from aoquant_inductor.options import Choice, parse
from aoquant_inductor.scheme import SCHEMES

DOWN = "model.layers.0.mlp.down_proj"


def chosen(schemes: Any, *names: str, **more: Any) -> tuple[str | None, str | None]:
    choice = parse({"schemes": schemes, **more}).choose(names)
    return (choice.scheme.name if choice.scheme else None), choice.matched_by


@pytest.mark.parametrize("options", [None, {}])
def test_nothing_said_is_int8wo_everywhere(options: dict[str, Any] | None) -> None:
    parsed = parse(options)
    assert parsed.choose(["lm_head"]) == Choice(SCHEMES["int8wo"], "default")
    assert (parsed.on_unmatched, parsed.on_unsupported, parsed.weights) == ("error", "report", "checked")
    assert (parsed.release_weights, parsed.mode, parsed.inductor) == (False, None, {})


def test_one_word_is_for_all_linears() -> None:
    assert chosen("4w", "anything") == ("int4wo-128", "default")


def test_schemes_without_default_leave_the_others_alone() -> None:
    assert chosen({"lm_head": "int8wo"}, DOWN) == (None, None)
    assert chosen({}, DOWN) == (None, None)
    assert chosen({"lm_head": "int8wo"}, DOWN, default="int8dq") == ("int8dq", "default")


def test_default_none_alone_leaves_all_alone() -> None:
    assert parse({"default": None}).choose([DOWN]) == Choice(None, None)


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [
        ({"*": "int8dq", DOWN: "int8wo"}, ("int8wo", DOWN)),
        ({"*": "int8dq", DOWN: None}, (None, DOWN)),
        ({"*.mlp.*": "int8dq", "*.down_proj": "int8wo"}, ("int8dq", "*.mlp.*")),
        ({"*.down_proj": "int8wo", "*.mlp.*": "int8dq"}, ("int8wo", "*.down_proj")),
        ({"re:.*mlp.*": None, "*": "int8dq"}, (None, "re:.*mlp.*")),
        ({"*.MLP.*": "int8dq"}, ("int4wo-32", "default")),
        ({"re:mlp": "int8dq"}, ("int4wo-32", "default")),
        ({"model.layers.[1-9].*": "int8dq"}, ("int4wo-32", "default")),
        ({"model.layers.?.*": "int8dq"}, ("int8dq", "model.layers.?.*")),
        ({r"re:model\.layers\.(0|29)\..*": "int8dq"}, ("int8dq", r"re:model\.layers\.(0|29)\..*")),
        ({"*.mlp.*": {"weight": "int4", "group_size": 64}}, ("int4wo-64", "*.mlp.*")),
    ],
)
def test_precedence(schemes: dict[str, Any], expected: tuple[str | None, str]) -> None:
    assert chosen(schemes, DOWN, default="int4wo-32") == expected


@given(st.permutations(["*", "*.mlp.*", "*.down_proj", "model.*", "*.q_proj", DOWN]), st.booleans())
def test_the_first_pattern_in_order_wins_after_the_exact_name(keys: list[str], exact: bool) -> None:
    keys = [key for key in keys if exact or key != DOWN]
    first = DOWN if exact else next(key for key in keys if key != "*.q_proj")
    assert parse({"schemes": dict.fromkeys(keys, "int8wo")}).choose([DOWN]).matched_by == first


@pytest.mark.parametrize("names", [("lm_head", "model.embed"), ("model.embed", "lm_head")])
def test_a_tied_weight_takes_the_choice_of_the_name_that_a_key_names(names: tuple[str, str]) -> None:
    assert chosen({"lm_head": "int8dq"}, *names, default="int8wo") == ("int8dq", "lm_head")
    assert chosen({"lm_head": None}, *names, default="int8wo") == (None, "lm_head")


def test_a_tied_weight_may_be_chosen_twice_alike() -> None:
    schemes = {"lm_head": "W8A16", "*.embed": {"weight": "int8"}}
    assert chosen(schemes, "lm_head", "model.embed") == ("int8wo", "lm_head")


@pytest.mark.parametrize(
    ("schemes", "text"),
    [
        (
            {"lm_head": "int8dq", "*.embed": "8w"},
            'one tied weight, two schemes: lm_head is int8dq by "lm_head", '
            'model.embed is int8wo by "*.embed". Give both names the same scheme.',
        ),
        (
            {"lm_*": None, "model.embed": "8w"},
            'one tied weight, two schemes: lm_head is None by "lm_*", model.embed is int8wo by "model.embed".'
            " Give both names the same scheme.",
        ),
    ],
)
def test_a_tied_weight_with_two_schemes(schemes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConflictingSchemes) as caught:
        parse({"schemes": schemes}).choose(["lm_head", "model.embed"])
    assert str(caught.value) == text


def test_unmatched_counts_a_shadowed_key_as_matched() -> None:
    options = parse({"schemes": {"*": "int8wo", "*.mlp.*": "int8dq", "*.mpl.*": None, "re:lm": None}})
    assert options.unmatched(iter([DOWN, "lm_head"])) == ["*.mpl.*", "re:lm"]


def test_check_goes_through_when_every_key_names_something() -> None:
    parse({"schemes": {"lm_head": None, "*.mlp.*": "int8dq"}}).check(iter([DOWN, "lm_head"]))
    parse(None).check([])


def test_check_warns_when_asked_to() -> None:
    options = parse({"schemes": {"*.mpl.*": "int8wo"}, "on_unmatched": "warn"})
    with pytest.warns(UserWarning, match="names none") as caught:
        options.check([DOWN])
    assert [str(warning.message) for warning in caught] == [
        f'"*.mpl.*" names none of the 1 linears. Nearest: {DOWN}.'
    ]


def test_check_raises_by_default_and_does_not_warn() -> None:
    options = parse({"schemes": {"*.mpl.*": "int8wo"}})
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UnmatchedPattern):
        options.check([DOWN])
    assert warned == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"on_unmatched": "eror"},
            '"on_unmatched" is "eror" (did you mean "error"?). Known: error, warn.',
        ),
        ({"on_unsupported": "warn"}, '"on_unsupported" is "warn". Known: report, error.'),
        ({"weights": None}, '"weights" is None. Known: checked, frozen.'),
        ({"release_weights": 1}, '"release_weights" is 1. Known: True, False, cpu.'),
        ({"schemes": None}, '"schemes" is None; give one word, or a dict of names and patterns.'),
        (
            {"schemes": ["int8wo"]},
            "\"schemes\" is ['int8wo']; give one word, or a dict of names and patterns.",
        ),
        (
            {"schemes": {"weight": "int4", "group_size": 64}},
            '"schemes" holds the keys of one scheme, no names of linears: for all, give it as "default".',
        ),
        ({"schemes": {"*": 8}}, 'the scheme for "*" is 8; give a name or a dict.'),
        ({"schemes": {1: "int8wo"}}, '"schemes" has the key 1; a key is a string.'),
        (
            {"schemes": "int8wo", "default": "int8dq"},
            '"schemes" is "int8wo", one word for all linears: leave "default" out.',
        ),
        (
            {"schemes": {"re:(": None}},
            '"re:(" is not a regular expression: missing ), unterminated subpattern at position 0.',
        ),
        (
            {"default": {"weight": "int4", "group_size": math.nan}},
            '"default.group_size" is nan; give what JSON holds: text, number, bool, list or dict.',
        ),
    ],
)
def test_a_bad_value_is_told(options: dict[Any, Any], text: str) -> None:
    assert error_of(options) == text


@pytest.mark.parametrize(
    ("options", "where"), [({"schemes": "in8wo"}, "schemes"), ({"default": "in8wo"}, "default")]
)
def test_an_unknown_scheme_is_placed(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UnknownScheme) as caught:
        parse(options)
    assert str(caught.value) == f'unknown scheme "in8wo" for "{where}". Nearest: int8wo.'
