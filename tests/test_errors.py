from __future__ import annotations

import pickle
import random
import string
from collections.abc import Callable
from functools import partial

import pytest

from aoquant_inductor.errors import (
    AoquantError,
    ConflictingSchemes,
    NothingQuantized,
    OptionError,
    ShapeChanged,
    UnknownScheme,
    UnmatchedPattern,
    UnsafeMachineCode,
    UnsupportedTorch,
)
from aoquant_inductor.options import OWN_KEYS, parse
from aoquant_inductor.scheme import ALIASES, SCHEMES, resolve

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = [f"model.layers.{i}.{linear}" for i in range(30) for linear in ATTENTION + MLP] + ["lm_head"]


def text_of(call: Callable[[], object], error: type[AoquantError]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_unknown_option_text() -> None:
    pytest.importorskip("aoquant_inductor._inductor")
    assert text_of(lambda: parse({"schema": "int8wo"}), OptionError) == (
        'unknown option "schema" (did you mean "schemes"?). Known: schemes, default, on_unmatched, '
        "on_unsupported, weights, release_weights, mode, and every Inductor config key."
    )


def test_unknown_scheme_text() -> None:
    call = partial(parse, {"schemes": {"*.mlp.*": "int4wo-127"}})
    assert text_of(call, UnknownScheme) == 'unknown scheme "int4wo-127" for "*.mlp.*". Nearest: int4wo-128.'


def test_unknown_scheme_far_from_all_lists_them() -> None:
    text = text_of(lambda: resolve("banana"), UnknownScheme)
    assert text == f'unknown scheme "banana". Known: {", ".join(SCHEMES)}.'


def test_unmatched_pattern_text() -> None:
    options = parse({"schemes": {"*.mpl.*": "int8wo"}})
    assert text_of(lambda: options.check(LINEARS), UnmatchedPattern) == (
        '"*.mpl.*" names none of the 211 linears. Nearest: model.layers.0.mlp.up_proj. '
        'Set on_unmatched="warn" to go on.'
    )


def test_unmatched_patterns_are_all_named() -> None:
    options = parse({"schemes": {"lm_haed": None, "lm_head": None, r"re:.*\.self_atn\.q_proj": "int8wo"}})
    assert text_of(lambda: options.check(LINEARS), UnmatchedPattern) == (
        '"lm_haed" names none of the 211 linears. Nearest: lm_head.\n'
        r'"re:.*\.self_atn\.q_proj" names none of the 211 linears. '
        "Nearest: model.layers.0.self_attn.q_proj. "
        'Set on_unmatched="warn" to go on.'
    )


def test_unmatched_pattern_without_linears_names_no_nearest() -> None:
    options = parse({"schemes": {"*": "int8wo"}})
    assert text_of(lambda: options.check([]), UnmatchedPattern) == (
        '"*" names none of the 0 linears. Set on_unmatched="warn" to go on.'
    )


OTHER_PTXAS = (
    "Set TRITON_PTXAS_PATH before Python starts (TRITON_PTXAS_BLACKWELL_PATH if Triton reads that for this card) to what "
    '`python -m aoquant_inductor.ptxas` prints after `pip install -U "aoquant-inductor[cuda]"`; or to a ptxas older than 13.3, with '
    "which other kernels are taken."
)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NothingQuantized(211, 0), "nothing was quantized: 211 linears seen, 0 matched."),
        (NothingQuantized(211, 0, {"grad": 2}), "nothing was quantized: 211 linears seen, 0 matched."),
        (
            NothingQuantized(211, 3, {"non_finite": 3}),
            "nothing was quantized: 211 linears seen, 3 matched (non_finite: 3).",
        ),
        (
            NothingQuantized(211, 3, {"non_finite": 2, "dtype": 1}),
            "nothing was quantized: 211 linears seen, 3 matched (non_finite: 2, dtype: 1).",
        ),
        (
            ConflictingSchemes(("lm_head", "lm_head", None), ("embed", "em*", "int8wo")),
            'one tied weight, two schemes: lm_head is None by "lm_head", embed is int8wo by "em*". '
            "Give both names the same scheme.",
        ),
        (UnknownScheme("x", "", None, ("a", "b")), 'unknown scheme "x". Known: a, b.'),
        (UnmatchedPattern({"x": "y"}, 1), '"x" names none of the 1 linears. Nearest: y. '
         'Set on_unmatched="warn" to go on.'),
        (
            UnsafeMachineCode("triton_tem_0", ["0x20 MOV R9, R2", "0x30 MOV R8, R2"]),
            "ptxas made machine code of triton_tem_0 that touches registers which the tensor core still works on, at 2 places, "
            'first "0x20 MOV R9, R2": its results would be wrong. ' + OTHER_PTXAS,
        ),
        (
            UnsafeMachineCode("triton_tem_0", []),
            "the machine code of triton_tem_0 cannot be read, so that nobody knows whether ptxas made it right. " + OTHER_PTXAS,
        ),
        (
            ShapeChanged((64, 64), (32, 64)),
            "a weight that was packed as (64, 64) has the shape (32, 64) now, by `.data =`. "
            "Give its module a new nn.Parameter: then it is compiled again.",
        ),
        (OptionError("as given"), "as given"),
        (UnsupportedTorch("as given"), "as given"),
    ],
)  # fmt: skip
def test_text_survives_pickling(error: AoquantError, text: str) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), str(error)) == (type(error), text, text)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (OptionError, ValueError),
        (UnknownScheme, ValueError),
        (UnmatchedPattern, ValueError),
        (NothingQuantized, ValueError),
        (ConflictingSchemes, ValueError),
        (UnsafeMachineCode, RuntimeError),
        (ShapeChanged, RuntimeError),
        (UnsupportedTorch, ImportError),
    ],
)
def test_one_except_catches_all(error: type[AoquantError], builtin: type[Exception]) -> None:
    assert issubclass(error, AoquantError)
    assert issubclass(error, builtin)


def typos(word: str, count: int) -> list[str]:
    """`count` of the strings one insertion, deletion, substitution or swap away, the same at every run."""
    found: set[str] = set()
    for i in range(len(word) + 1):
        head, tail = word[:i], word[i:]
        found |= {head + tail[1:], head + tail[1:2] + tail[:1] + tail[2:]}
        for char in string.ascii_lowercase + string.digits + "-_":
            found |= {head + char + tail, head + char + tail[1:]}
    return random.Random(word).sample(sorted(found - {word}), count)


def test_scheme_typos_name_the_scheme() -> None:
    known = {name.lower() for name in (*SCHEMES, *ALIASES)}
    cases = [(name, typo) for name in SCHEMES for typo in typos(name, 40) if typo not in known]
    texts = [(name, text_of(partial(resolve, typo), UnknownScheme)) for name, typo in cases]
    right = sum(f" Nearest: {name}." in text for name, text in texts)
    assert len(cases) > 1500
    assert right / len(cases) >= 0.95


def hint_of(option: str) -> str:
    text = text_of(lambda: parse({option: 1}), OptionError)
    return text.partition('(did you mean "')[2].partition('"?)')[0]


def test_option_typos_name_the_option() -> None:
    pytest.importorskip("aoquant_inductor._inductor")
    cases = [(name, typo) for name in OWN_KEYS for typo in typos(name, 40)]
    assert sum(hint_of(typo) == name for name, typo in cases) / len(cases) >= 0.95


def test_inductor_option_typos_name_the_inductor_key() -> None:
    inductor = pytest.importorskip("aoquant_inductor._inductor")
    keys = [key for key in inductor.config_keys() if len(key) > 4]
    cases = [(key, typos(key, 1)[0]) for key in random.Random(0).sample(sorted(keys), 100)]
    right = sum(hint_of(typo) == key for key, typo in cases if not inductor.is_config_key(typo))
    assert right / len(cases) >= 0.95
