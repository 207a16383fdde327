"""Every other option is Inductor's: in force while this model compiles, gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from util import assert_counts, block, compiled, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import OptionError, lowering

KEYS = ("epilogue_fusion", "max_autotune", "coordinate_descent_tuning", "max_fusion_size")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Inductor's config as each of our lowerings finds it."""
    import torch._inductor.config as config

    found: list[dict[str, Any]] = []
    lower = lowering._lower

    def spy(problem: Any) -> Any:
        found.append({key: getattr(config, key) for key in KEYS})
        return lower(problem)

    monkeypatch.setattr(lowering, "_lower", spy)
    return found


def compile_and_run(**kwargs: Any) -> None:
    model, x = block(), tokens()
    function = torch.compile(model, backend="aoquant", **kwargs)
    with torch.no_grad():
        assert sqnr_db(function(x), model.reference(x)) > 45
    assert_counts(aoquant_inductor.report(function), 1)


def test_inductor_keys_reach_inductor_for_this_compile_only(seen: list[dict[str, Any]]) -> None:
    import torch._inductor.config as config

    before = config.get_config_copy()
    assert before["epilogue_fusion"] is True
    compile_and_run(options={"epilogue_fusion": False, "max-fusion-size": 17})
    assert seen == [{"epilogue_fusion": False, "max_autotune": before["max_autotune"], "coordinate_descent_tuning": False,
                     "max_fusion_size": 17}]
    assert config.get_config_copy() == before
    compile_and_run(options={"schemes": "int8wo"})
    assert seen[1] == {key: before[key] for key in KEYS}


@pytest.mark.parametrize(
    "kwargs",
    [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}}],
    ids=["argument", "option"],
)
def test_mode(seen: list[dict[str, Any]], kwargs: dict[str, Any]) -> None:
    import torch._inductor.config as config

    before = config.get_config_copy()
    compile_and_run(**kwargs)
    assert len(seen) == 1
    assert seen[0]["max_autotune"] is True
    assert seen[0]["coordinate_descent_tuning"] is True
    assert seen[0]["epilogue_fusion"] is ("mode" in kwargs)
    assert config.get_config_copy() == before


def test_an_unknown_option_is_an_error_and_leaves_no_trace() -> None:
    import torch._inductor.config as config

    before = config.get_config_copy()
    function = torch.compile(block(), backend="aoquant", options={"epilog_fusion": True})
    with pytest.raises(Exception, match="did you mean \"epilogue_fusion\"") as caught:
        function(tokens())
    errors = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
    assert any(isinstance(error, OptionError) for error in errors)
    assert config.get_config_copy() == before


@pytest.mark.parametrize(("scheme", "times"), [("int8wo", 0), ("int8dq", 1), ("int8dq-asymact", 1)])
def test_only_graphs_that_quantize_activations_reduce_rows_otherwise(scheme: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from aoquant_inductor import _inductor_reduction as reduction

    entered: list[object] = []
    inside = reduction.rows_in_registers
    monkeypatch.setattr(reduction, "rows_in_registers", lambda: entered.append(scheme) or inside())
    linear = nn.Linear(64, 32, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        compiled(linear, scheme)(torch.randn(3, 64, dtype=torch.bfloat16))
    assert len(entered) == times


@pytest.mark.parametrize(("key", "value", "kind"), [("max_autotune", "yes", "bool"), ("cpp.threads", "a", "int"), ("shape-padding", 1, "bool")])
def test_a_value_that_inductor_would_refuse_is_an_error(key: str, value: object, kind: str) -> None:
    function = torch.compile(block(), backend="aoquant", options={key: value})
    with pytest.raises(OptionError, match=f"Inductor takes {kind} there"):
        function(tokens())


@pytest.mark.parametrize("name", ["prepare_freezing", "install_free_tensors"])
def test_dynamos_own_freezing_is_an_error(name: str) -> None:
    if not hasattr(torch._dynamo.config, name):
        pytest.skip("another torch's")
    model = nn.Linear(32, 32).eval()
    with torch.no_grad(), torch._dynamo.config.patch({name: True}), pytest.raises(OptionError, match="does not see the weights"):
        torch.compile(model, backend="aoquant")(torch.randn(4, 32))


def test_a_dict_of_options_that_changes_is_an_error() -> None:
    """torch.compile keeps it, and a later graph would be of other schemes than the first."""
    options = {"default": "int8wo"}
    function = torch.compile(nn.Linear(32, 32).eval(), backend="aoquant", options=options, dynamic=False)
    with torch.no_grad():
        function(torch.randn(4, 32))
        options["default"] = "int8dq"
        with pytest.raises(OptionError, match="was changed"):
            function(torch.randn(5, 32))


def test_freezing_for_the_whole_process_is_an_error_and_as_an_option_is_not() -> None:
    import torch._inductor.config as config

    function, x = torch.compile(block(), backend="aoquant"), tokens()
    with torch.no_grad(), config.patch(freezing=True), pytest.raises(OptionError, match="does not see the weights"):
        function(x)
    compile_and_run(options={"freezing": True})
