from __future__ import annotations

import ast
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aoquant_inductor.scheme
from aoquant_inductor.errors import OptionError, UnknownScheme
from aoquant_inductor.scheme import ALIASES, SCHEMES, QuantSpec, Scheme, resolve

GROUPS = (32, 64, 128, 256)
DICT_VALUES: dict[str, tuple[object, ...]] = {
    "weight": ("int8", "int4"),
    "group_size": (*GROUPS, None, "row"),
    "symmetric": (True, False),
    "zero_point": ("int", "float"),
    "activation": (None, "int8"),
    "activation_symmetric": (True, False),
    "qparams": ("minmax",),
    "large_m": (None, "int8"),
}


def test_the_names_are_these() -> None:
    names = {"int8wo", "int8dq", "int8dq-asymact", *(f"int8wo-{g}" for g in GROUPS)}
    names |= {
        f"int4wo-{g}{zero}{large}"
        for g in (*GROUPS, "row")
        for zero in ("", "-asym", "-asymfloat")
        for large in ("", "-large8")
    }
    names |= {
        f"int8dq-int4w{g}{zero}{act}"
        for g in ("", *(f"-{g}" for g in GROUPS))
        for zero in ("", "-asym")
        for act in ("", "-asymact")
    }
    assert set(SCHEMES) == names


@pytest.mark.parametrize(
    ("name", "weight", "activation", "pattern"),
    [
        ("int8wo", QuantSpec("int8"), None, "weight_only"),
        ("int8wo-64", QuantSpec("int8", 64), None, "weight_only"),
        ("int8dq", QuantSpec("int8"), QuantSpec("int8"), "dynamic"),
        ("int8dq-asymact", QuantSpec("int8"), QuantSpec("int8", symmetric=False), "dynamic"),
        ("int4wo-128", QuantSpec("int4", 128), None, "weight_only"),
        ("int4wo-row", QuantSpec("int4", None), None, "weight_only"),
        ("int4wo-32-asym", QuantSpec("int4", 32, False, "int"), None, "weight_only"),
        ("int4wo-256-asymfloat", QuantSpec("int4", 256, False, "float"), None, "weight_only"),
        ("int8dq-int4w", QuantSpec("int4"), QuantSpec("int8"), "dynamic"),
        (
            "int8dq-int4w-32-asym-asymact",
            QuantSpec("int4", 32, symmetric=False),
            QuantSpec("int8", symmetric=False),
            "dynamic",
        ),
    ],
)
def test_a_name_means(name: str, weight: QuantSpec, activation: QuantSpec | None, pattern: str) -> None:
    assert resolve(name) == Scheme(name, weight, activation, "minmax", pattern)


@pytest.mark.parametrize(
    ("spec", "bits", "qmin", "qmax"),
    [
        (QuantSpec("int8"), 8, -127, 127),
        (QuantSpec("int8", symmetric=False), 8, -128, 127),
        (QuantSpec("int4"), 4, -8, 7),
        (QuantSpec("int4", symmetric=False), 4, -8, 7),
    ],
)
def test_range(spec: QuantSpec, bits: int, qmin: int, qmax: int) -> None:
    assert (spec.bits, spec.qmin, spec.qmax) == (bits, qmin, qmax)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("int4wo", "int4wo-128"),
        ("8w", "int8wo"),
        ("4w", "int4wo-128"),
        ("8da8w", "int8dq"),
        ("8da4w", "int8dq-int4w-32"),
        ("W8A16", "int8wo"),
        ("W4A16", "int4wo-128"),
        ("W8A8", "int8dq"),
        ("W4A8", "int8dq-int4w"),
        ("Int8WeightOnlyConfig", "int8wo"),
        ("Int4WeightOnlyConfig", "int4wo-128-asymfloat"),
        ("Int8DynamicActivationInt8WeightConfig", "int8dq"),
        ("Int8DynamicActivationInt4WeightConfig", "int8dq-int4w-32"),
    ],
)
def test_alias(alias: str, name: str) -> None:
    assert resolve(alias) is SCHEMES[name]


def test_no_alias_hides_a_name() -> None:
    words = [word.lower() for word in (*SCHEMES, *ALIASES)]
    assert len(words) == len(set(words))


@given(st.sampled_from([*SCHEMES, *ALIASES]), st.data())
def test_case_does_not_count(word: str, data: st.DataObject) -> None:
    upper = data.draw(st.lists(st.booleans(), min_size=len(word), max_size=len(word)))
    spelled = "".join(char.upper() if up else char.lower() for char, up in zip(word, upper, strict=True))
    assert resolve(spelled) is resolve(word)


def test_a_scheme_is_itself() -> None:
    scheme = SCHEMES["int4wo-64"]
    assert resolve(scheme) is scheme


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_the_dict_of_an_entry_is_the_entry(scheme: Scheme) -> None:
    form: dict[str, Any] = {
        "weight": scheme.weight.dtype,
        "group_size": scheme.weight.group_size,
        "symmetric": scheme.weight.symmetric,
        "zero_point": scheme.weight.zero_point,
        "activation": scheme.activation and scheme.activation.dtype,
        "activation_symmetric": scheme.activation is None or scheme.activation.symmetric,
        "qparams": scheme.qparams,
        "large_m": scheme.large_m,
    }
    assert resolve(form) == scheme


def test_every_dict_is_a_scheme_of_its_own_name_or_a_named_contradiction() -> None:
    by_name: dict[str, Scheme] = {}
    refused = 0
    for values in product(*DICT_VALUES.values()):
        form = dict(zip(DICT_VALUES, values, strict=True))
        float_of_symmetric = form["symmetric"] and form["zero_point"] == "float"
        asymact_of_none = form["activation"] is None and not form["activation_symmetric"]
        large_of_other = form["large_m"] is not None and (form["weight"], form["activation"]) != ("int4", None)
        if float_of_symmetric or asymact_of_none or large_of_other:
            refused += 1
            with pytest.raises(OptionError, match="set |leave "):
                resolve(form)
            continue
        scheme = resolve(form)
        size, zero_point = form["group_size"], str(form["zero_point"])
        group = size if isinstance(size, int) else None
        assert scheme.weight == QuantSpec(str(form["weight"]), group, bool(form["symmetric"]), zero_point)
        act = QuantSpec("int8", symmetric=bool(form["activation_symmetric"])) if form["activation"] else None
        assert scheme.activation == act
        assert by_name.setdefault(scheme.name, scheme) == scheme
    assert set(SCHEMES) < set(by_name)
    assert len(by_name) == 2 * 5 * 3 * 3 + 5 * 3  # dtypes, groups, zero points, activations; int4wo with large_m
    # of each of large_m's: a float zero point with 4 activations, else 1 of 4 with 3; then what large_m has no part in
    assert refused == 2 * 2 * 6 * (4 + 3) + 6 * 3 * (3 + 2)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ({"weight": "int8"}, "int8wo"),
        ({"weight": "int4"}, "int4wo-row"),
        ({"weight": "int4", "group_size": 128, "large_m": "int8"}, "int4wo-128-large8"),
        ({"weight": "int8", "symmetric": False}, "int8wo-asym"),
        ({"weight": "int8", "group_size": 64, "symmetric": False}, "int8wo-64-asym"),
        ({"weight": "int8", "group_size": 32, "activation": "int8"}, "int8dq-32"),
        (
            {"weight": "int4", "symmetric": False, "zero_point": "float", "activation": "int8"},
            "int8dq-int4w-asymfloat",
        ),
    ],
)
def test_a_dict_is_called(form: dict[str, Any], name: str) -> None:
    assert resolve(form).name == name


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (
            {"wieght": "int4"},
            'unknown scheme key "wieght" for "*.q" (did you mean "weight"?). Known: weight, group_size, '
            "symmetric, zero_point, activation, activation_symmetric, qparams, large_m.",
        ),
        ({"group_size": 32}, 'the scheme for "*.q" has no "weight". Known: int8, int4.'),
        ({"weight": "int5x"}, '"weight" for "*.q" is "int5x" (did you mean "int8"?). Known: int8, int4.'),
        (
            {"weight": "int4", "group_size": 96},
            '"group_size" for "*.q" is 96. Known: 32, 64, 128, 256, None, row.',
        ),
        (
            {"weight": "int4", "group_size": 32.0},
            '"group_size" for "*.q" is 32.0. Known: 32, 64, 128, 256, None, row.',
        ),
        ({"weight": "int4", "symmetric": 1}, '"symmetric" for "*.q" is 1. Known: True, False.'),
        ({"weight": "int4", "qparams": ["minmax"]}, '"qparams" for "*.q" is [\'minmax\']. Known: minmax.'),
        (
            {"weight": "int4", "qparams": "minmx"},
            '"qparams" for "*.q" is "minmx" (did you mean "minmax"?). Known: minmax.',
        ),
        (
            {"weight": "int4", "zero_point": "float"},
            '"zero_point" for "*.q" is "float": set "symmetric" to False.',
        ),
        (
            {"weight": "int4", "activation_symmetric": False},
            '"activation_symmetric" for "*.q" is False: set "activation" to "int8".',
        ),
        ({"weight": "int4", "large_m": "int4"}, '"large_m" for "*.q" is "int4" (did you mean "int8"?). Known: None, int8.'),
        ({"weight": "int4", "large_m": 256}, '"large_m" for "*.q" is 256. Known: None, int8.'),
        ({"weight": "int8", "large_m": "int8"}, '"large_m" for "*.q" is "int8": set "weight" to "int4".'),
        (
            {"weight": "int4", "activation": "int8", "large_m": "int8"},
            '"large_m" for "*.q" is "int8": leave "activation" out, it is int8 at every M.',
        ),
    ],
)
def test_a_bad_dict_is_told(form: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve(form, "*.q")
    assert str(caught.value) == text


@pytest.mark.parametrize("word", [4, None, ["int8wo"]])
def test_what_is_no_word_at_all(word: Any) -> None:
    with pytest.raises(OptionError, match=r'the scheme for "lm_head" is .*; give a name or a dict'):
        resolve(word, "lm_head")


def test_the_nearest_of_an_alias_keeps_its_spelling() -> None:
    with pytest.raises(UnknownScheme, match="Nearest: Int8WeightOnlyConfig"):
        resolve("int8weightonlyconfg")


def test_scheme_imports_only_the_standard_library_and_errors() -> None:
    tree = ast.parse(Path(str(aoquant_inductor.scheme.__file__)).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    outside = {name for name in imported if str(name).partition(".")[0] not in sys.stdlib_module_names}
    assert outside == {"aoquant_inductor.errors"}
