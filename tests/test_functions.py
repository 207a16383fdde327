"""Compiled functions with graph breaks: each graph has some of their linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from util import assert_counts, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import UnmatchedPattern

FP32 = torch.float32


def step_of(broken: bool) -> tuple[Any, nn.Linear, nn.Linear]:
    body, head = nn.Linear(32, 32), nn.Linear(32, 32)

    def step(x: torch.Tensor) -> torch.Tensor:
        hidden = body(x)
        if broken:
            torch._dynamo.graph_break()
        y: torch.Tensor = head(hidden)
        return y

    return step, body, head


def compiled(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="aoquant", options=options)


@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.parametrize("options", [{"schemes": {"head": None}, "default": "int8wo"}, {"schemes": {"body": "int8wo", "head": None}}])
def test_a_variable_is_a_name_on_either_side_of_a_break(broken: bool, options: dict[str, Any]) -> None:
    step, body, head = step_of(broken)
    function, x = compiled(step, **options), tokens(dtype=FP32)
    with torch.no_grad():
        y = function(x)
        assert 30 < sqnr_db(y, step(x)) < 80
        assert torch.allclose(y, head(of_int8(body, x)), atol=1e-5)
    report = aoquant_inductor.report(function)
    assert_counts(report, 1, 2, user=1)
    assert [(layer.name, layer.scheme) for layer in report.layers] == [("body", "int8wo"), ("head", None)]
    assert report.totals["unmatched"] == []


def of_int8(body: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What int8wo alone makes of body(x)."""
    y: torch.Tensor = torch.compile(body, backend="aoquant", options={"schemes": "int8wo"})(x)
    return y


def test_a_name_of_none_is_refused_where_all_linears_are_known_and_in_the_report_elsewhere() -> None:
    options, x = {"schemes": {"haed": None}, "default": "int8wo"}, tokens(dtype=FP32)
    with torch.no_grad():
        with pytest.raises(UnmatchedPattern, match='"haed" names none of the 2 linears. Nearest: head.'):
            compiled(step_of(False)[0], **options)(x)
        function = compiled(step_of(True)[0], **options)
        function(x)
    report = aoquant_inductor.report(function)
    assert_counts(report, 2)
    assert report.totals["unmatched"] == ["haed"]
