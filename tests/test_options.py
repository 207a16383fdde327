from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from aoquant_inductor.errors import ConflictingSchemes, OptionError, UnknownScheme, UnmatchedPattern
from aoquant_inductor.options import Choice, Options, parse
from aoquant_inductor.scheme import SCHEMES

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture
def inductor() -> Any:
    return pytest.importorskip("aoquant_inductor._inductor")


def error_of(options: Any, mode: Any = None) -> str:
    with pytest.raises(OptionError) as caught:
        parse(options, mode)
    return str(caught.value)


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


def test_every_mode_of_inductor_is_a_mode(inductor: Any) -> None:
    names = inductor.mode_names()
    assert {"default", "reduce-overhead", "max-autotune"} <= set(names)
    for name in names:
        assert (
            parse({"mode": name}).mode == parse(None, name).mode == parse({"mode": name}, name).mode == name
        )


def test_a_bad_mode_is_told(inductor: Any) -> None:
    known = f"Known: {', '.join(inductor.mode_names())}."
    assert error_of(None, "max-autotun") == f'"mode" is "max-autotun" (did you mean "max-autotune"?). {known}'
    assert error_of({"mode": 3}) == f'"mode" is 3. {known}'


def test_two_modes_are_one_too_many() -> None:
    text = 'mode is "default" as an argument and "max-autotune" in options; give one.'
    assert error_of({"mode": "max-autotune"}, "default") == text


def test_inductor_keys_go_through(inductor: Any) -> None:
    patches = {"triton.cudagraphs": True, "epilogue_fusion": False, "max_autotune_gemm_backends": "TRITON"}
    assert parse({"schemes": "int8wo", **patches}).inductor == patches


def test_an_inductor_key_may_be_written_with_hyphens_as_torch_compile_reads_it(inductor: Any) -> None:
    assert parse({"epilogue-fusion": False}).inductor == {"epilogue_fusion": False}


@pytest.mark.parametrize("value", [object(), {1}, b"x", 1j, [object()], {"a": {2: 3}}, math.inf])
def test_an_inductor_value_is_json(inductor: Any, value: object) -> None:
    assert '"triton.cudagraphs' in error_of({"triton.cudagraphs": value})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("inductor", ""),
        ("inductor_json", ""),
        ("triton.cudagraph", ' (did you mean "triton.cudagraphs"?)'),
        ("epilog_fusion", ' (did you mean "epilogue_fusion"?)'),
        ("on_unsuported", ' (did you mean "on_unsupported"?)'),
    ],
)
def test_an_unknown_option_is_told(inductor: Any, key: str, hint: str) -> None:
    assert error_of({key: "x"}).startswith(f'unknown option "{key}"{hint}')
    assert hint or "did you mean" not in error_of({key: "x"})


def test_an_option_that_is_not_a_string(inductor: Any) -> None:
    assert error_of({3: "x"}).startswith("unknown option 3. Known: ")


FULL: dict[str, Any] = {
    "schemes": {"lm_head": None, "*.mlp.*": {"weight": "int8", "group_size": 64, "symmetric": False}},
    "default": "int8dq",
    "weights": "frozen",
    "release_weights": True,
}


def test_options_are_frozen_and_keep_no_hold_on_the_users_dict(inductor: Any) -> None:
    given: dict[str, Any] = {**copy.deepcopy(FULL), "post_grad_fusion_options": {"a": {}}}
    options = parse(given)
    key = options.key()
    given["schemes"]["lm_head"] = "int8wo"
    given["post_grad_fusion_options"]["a"]["b"] = 1
    options.inductor["c"] = 1  # type: ignore[index]
    assert options.key() == key
    assert options.inductor == {"post_grad_fusion_options": {"a": {}}}
    with pytest.raises(ValidationError):
        options.weights = "checked"  # type: ignore[misc]


def test_equal_options_are_one_dictionary_key(inductor: Any) -> None:
    one = parse({**FULL, "epilogue_fusion": True, "triton.cudagraphs": True})
    two = parse({"triton.cudagraphs": True, "epilogue_fusion": True, **dict(reversed(FULL.items()))})
    assert {one: "found"}[two] == "found"
    assert one.key() == two.key()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda options: pickle.loads(pickle.dumps(options))])
def test_options_are_copied_whole(clone: Any) -> None:
    options = parse(FULL)
    assert clone(options) == options
    assert clone(options).choose([DOWN]) == options.choose([DOWN])


@pytest.mark.parametrize(
    "change",
    [
        {"schemes": dict(reversed(FULL["schemes"].items()))},
        {"schemes": {**FULL["schemes"], "lm_head": "int8wo"}},
        {"default": None},
        {"weights": "checked"},
        {"release_weights": False},
        {"on_unmatched": "warn"},
        {"on_unsupported": "error"},
    ],
)
def test_a_change_changes_the_key(change: dict[str, Any]) -> None:
    assert parse({**FULL, **change}).key() != parse(FULL).key()


def test_mode_and_inductor_change_the_key(inductor: Any) -> None:
    plain, mode, patched = parse(FULL), parse(FULL, "max-autotune"), parse({**FULL, "epilogue_fusion": True})
    assert len({plain.key(), mode.key(), patched.key()}) == 3


def test_the_key_is_canonical_json() -> None:
    key = parse(FULL).key()
    assert json.dumps(json.loads(key), sort_keys=True, separators=(",", ":")) == key
    assert json.loads(key)["default"]["name"] == "int8dq"


def test_options_go_through_json() -> None:
    assert parse(json.loads(json.dumps(FULL))) == parse(FULL)


def test_an_option_of_pydantics_own_is_refused() -> None:
    with pytest.raises(ValidationError):
        Options(scheme="int8wo")  # type: ignore[call-arg]


def test_importing_options_leaves_inductor_unimported() -> None:
    code = "import sys, aoquant_inductor.options; print([m for m in sys.modules if m == 'torch._inductor'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
