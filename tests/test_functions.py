"""Compiled functions with graph breaks: each graph has some of their linears."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from util import assert_counts, dequantized, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import NothingQuantized, UnmatchedPattern

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


class Pipe:
    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.function(x)
        return y


WRAPPERS: dict[str, Any] = {
    "no_grad": lambda function: torch.no_grad()(function),
    "wraps": lambda function: functools.wraps(function)(lambda x: function(x)),
    "partial": lambda function: functools.partial(function),
    "object": Pipe,
    "lambda": lambda function: lambda x: function(x),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_whatever_is_called(wrap: Any) -> None:
    x = tokens(dtype=FP32)
    with torch.no_grad():
        with pytest.raises(UnmatchedPattern, match='"haed" names none of the 2 linears'):
            compiled(wrap(step_of(False)[0]), schemes={"haed": "int8wo"})(x)
        with pytest.raises(NothingQuantized):
            compiled(wrap(step_of(False)[0]), default=None)(x)
        function = compiled(wrap(step_of(True)[0]), schemes={"head": "int8wo", "body": None})
        function(x)
    assert_counts(aoquant_inductor.report(function), 1, 2, user=1)


def test_modules_with_breaks_of_their_own_are_all_in_the_report() -> None:
    class Broken(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.names = names
            for name in names:
                self.add_module(name, nn.Linear(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = getattr(self, self.names[0])(x)
            torch._dynamo.graph_break()
            y: torch.Tensor = getattr(self, self.names[1])(x)
            return y

    first, second, x = Broken("a", "b"), Broken("c", "d"), tokens(dtype=FP32)
    function = compiled(lambda x: second(first(x)), default="int8wo")
    with torch.no_grad():
        assert 30 < sqnr_db(function(x), second(first(x))) < 80
    report = aoquant_inductor.report(function)
    assert_counts(report, 4)
    assert {layer.name for layer in report.layers} == {"a", "b", "c", "d"}


def test_a_repack_is_in_the_report_of_a_function() -> None:
    step, _, head = step_of(False)
    function, x = compiled(step, default="int8wo"), tokens(dtype=FP32)
    with torch.no_grad():
        function(x)
        head.weight.copy_(torch.randn(32, 32).exp() ** 2)  # of few large values
        function(x)
    dequantized_db = sqnr_db(dequantized(head.weight), head.weight)
    assert aoquant_inductor.report(function).layers[1].sqnr_db == pytest.approx(dequantized_db, abs=0.1)


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
