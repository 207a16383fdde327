"""Options of Inductor, modes, frozen options, their key and their copies."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from util import error_of

from aoquant_inductor.options import Options, parse


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
    assert clone(options).choose(["model.layers.0.mlp.down_proj"]) == options.choose(["model.layers.0.mlp.down_proj"])


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
