"""What a scheme is, and what it is called: plain frozen data.

A scheme says how a weight [N, K] and, for the dynamic ones, its activation [M, K] are quantized.
`FAMILIES` is the table: one entry expands to every group size, zero point and activation of that family,
under one canonical name each. The dict form reaches what the table leaves out, and equals the table's own
entry wherever the two agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Any

from aoquant_inductor.errors import (
    OptionError,
    UnknownScheme,
    check_value,
    did_you_mean,
    nearest,
    place,
    show,
)

DTYPES: Mapping[str, tuple[int, int, int]] = MappingProxyType({"int8": (8, -128, 127), "int4": (4, -8, 7)})
"""name -> (bits, qmin, qmax), the whole range."""

SYMMETRIC_QMIN: Mapping[str, int] = MappingProxyType({"int8": -127})
"""qmin of a symmetric spec, where that is not the whole range: int4 has too few values to give one up."""

GROUP_SIZES = (32, 64, 128, 256)
QPARAMS = ("minmax",)
LARGE_M = 256
"""The largest M at which a scheme with `large_m` leaves its activation alone. At 28672x4096 on an H100 int4wo-128's kernel is
1.04x bf16 at 256 and .81x at 512; int8 x int8 is 1.6x at both, but its weight has to be made first, for at least as long as
bf16 takes for M = 140.
"""
ZERO_POINTS: Mapping[str, tuple[bool, str]] = MappingProxyType(
    {"": (True, "int"), "asym": (False, "int"), "asymfloat": (False, "float")}
)
"""Part of a canonical name -> (symmetric, zero_point)."""


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor becomes integers: t ~ (q - zero_point) * scale, or q * scale + zero (float zero point).

    `group_size` counts along K; None is one group per row: per-channel for a weight, per-token for an
    activation.
    """

    dtype: str
    group_size: int | None = None
    symmetric: bool = True
    zero_point: str = "int"

    @property
    def bits(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def qmin(self) -> int:
        whole = DTYPES[self.dtype][1]
        return SYMMETRIC_QMIN.get(self.dtype, whole) if self.symmetric else whole

    @property
    def qmax(self) -> int:
        return DTYPES[self.dtype][2]


@dataclass(frozen=True)
class Scheme:
    """A weight's spec, an activation's (None: left in floating point), and the rules for them, by name.

    large_m: what an activation that is left alone becomes beyond LARGE_M rows: "int8", per token, or None, left alone.
    """

    name: str
    weight: QuantSpec
    activation: QuantSpec | None = None
    qparams: str = "minmax"
    pattern: str = "weight_only"
    large_m: str | None = None

    @property
    def most_inputs(self) -> float:
        """in_features up to which the sums of integer products have 32 bits, whatever their values; inf without such sums."""
        if self.activation is None and self.large_m is None:
            return float("inf")
        activation = 127 if self.activation is None or self.activation.symmetric else 255
        weight = 128 if self.large_m is not None else 1 << (self.weight.bits - 1)
        return (2**31 - 1) // (activation * weight)


@dataclass(frozen=True)
class Family:
    """One line of the table; its names are `<name>[-<group>][-<zero>][-asymact][-<qparams>][-large8]`.

    `row` spells the whole row as a group; min-max, the default, is not spelled. large: what `large_m` may be.
    """

    name: str
    weight: str
    activation: str | None
    pattern: str
    groups: tuple[int | None, ...]
    zeros: tuple[str, ...] = ("",)
    row: str = ""
    large: tuple[str | None, ...] = (None,)

    def scheme(
        self, group: int | None, zero: str, asymact: bool, large_m: str | None = None, qparams: str = "minmax"
    ) -> Scheme:
        size = self.row if group is None else str(group)
        parts = (
            self.name, size, zero, "asymact" if asymact else "", "" if qparams == "minmax" else qparams,
            "large8" if large_m else "",
        )
        symmetric, zero_point = ZERO_POINTS[zero]
        return Scheme(
            name="-".join(part for part in parts if part),
            weight=QuantSpec(self.weight, group, symmetric, zero_point),
            activation=QuantSpec(self.activation, symmetric=not asymact) if self.activation else None,
            qparams=qparams,
            pattern=self.pattern,
            large_m=large_m,
        )

    def schemes(self) -> list[Scheme]:
        asymacts = (False, True) if self.activation else (False,)
        return [self.scheme(*choice) for choice in product(self.groups, self.zeros, asymacts, self.large)]


FAMILIES = (
    Family("int8wo", "int8", None, "weight_only", groups=(None, *GROUP_SIZES)),
    Family("int8dq", "int8", "int8", "dynamic", groups=(None,)),
    Family(
        "int4wo", "int4", None, "weight_only", (*GROUP_SIZES, None), ("", "asym", "asymfloat"), row="row", large=(None, "int8")
    ),
    Family("int8dq-int4w", "int4", "int8", "dynamic", (None, *GROUP_SIZES), ("", "asym")),
)

SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {scheme.name: scheme for family in FAMILIES for scheme in family.schemes()}
)

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "int4wo": "int4wo-128",
        # ExecuTorch
        "8w": "int8wo",
        "4w": "int4wo-128",
        "8da8w": "int8dq",
        "8da4w": "int8dq-int4w-32",
        # vLLM
        "W8A16": "int8wo",
        "W4A16": "int4wo-128",
        "W8A8": "int8dq",
        "W4A8": "int8dq-int4w",
        # torchao's config classes
        "Int8WeightOnlyConfig": "int8wo",
        "Int4WeightOnlyConfig": "int4wo-128-asymfloat",
        "Int8DynamicActivationInt8WeightConfig": "int8dq",
        "Int8DynamicActivationInt4WeightConfig": "int8dq-int4w-32",
    }
)

_WORDS: Mapping[str, Scheme] = MappingProxyType(
    {name.lower(): scheme for name, scheme in SCHEMES.items()}
    | {alias.lower(): SCHEMES[name] for alias, name in ALIASES.items()}
)


def resolve(word: str | Mapping[str, Any] | Scheme, where: str = "") -> Scheme:
    """The scheme of a canonical name, an alias (upper and lower case alike) or a dict.

    `where` is the key or option that holds the word, for the error text.
    Raises: UnknownScheme for a name, OptionError for a dict or any other value.
    """
    if isinstance(word, Scheme):
        return word
    if isinstance(word, Mapping):
        return _from_dict(word, where)
    if not isinstance(word, str):
        raise OptionError(f"the scheme{place(where)} is {show(word)}; give a name or a dict.")
    scheme = _WORDS.get(word.lower())
    if scheme is None:
        raise UnknownScheme(word, where, nearest(word, (*SCHEMES, *ALIASES)), tuple(SCHEMES))
    return scheme


_KEYS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "weight": tuple(DTYPES),
        "group_size": (*GROUP_SIZES, None, "row"),
        "symmetric": (True, False),
        "zero_point": ("int", "float"),
        "activation": (None, "int8"),
        "activation_symmetric": (True, False),
        "qparams": QPARAMS,
        "large_m": (None, "int8"),
    }
)
"""Key of the dict form -> its values."""


def is_dict_scheme(given: Mapping[Any, Any]) -> bool:
    """Whether these are the keys of a scheme's dict form, and its values."""
    return given.keys() <= _KEYS.keys() and given.get("weight") in tuple(DTYPES)


def _from_dict(given: Mapping[str, Any], where: str) -> Scheme:
    for key, value in given.items():
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            hint = did_you_mean(key, _KEYS)
            raise OptionError(f"unknown scheme key {show(key)}{place(where)}{hint}. Known: {known}.")
        check_value(key, value, _KEYS[key], where)
    if "weight" not in given:
        raise OptionError(f'the scheme{place(where)} has no "weight". Known: {", ".join(DTYPES)}.')
    symmetric, zero_point = given.get("symmetric", True), given.get("zero_point", "int")
    activation, asymact = given.get("activation"), not given.get("activation_symmetric", True)
    if symmetric and zero_point == "float":
        raise OptionError(f'"zero_point"{place(where)} is "float": set "symmetric" to False.')
    if asymact and activation is None:
        raise OptionError(f'"activation_symmetric"{place(where)} is False: set "activation" to "int8".')
    large_m = given.get("large_m")
    if large_m is not None and activation is not None:
        raise OptionError(f'"large_m"{place(where)} is "{large_m}": leave "activation" out, it is int8 at every M.')
    family = next(f for f in FAMILIES if (f.weight, f.activation) == (given["weight"], activation))
    if large_m not in family.large:
        raise OptionError(f'"large_m"{place(where)} is "{large_m}": set "weight" to "int4".')
    zero = next(part for part, meaning in ZERO_POINTS.items() if meaning == (symmetric, zero_point))
    group = given.get("group_size")
    return family.scheme(None if group == "row" else group, zero, asymact, large_m, given.get("qparams", "minmax"))
