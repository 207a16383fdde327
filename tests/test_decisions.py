"""Layers of one class with decisions of their own behind graph breaks: Dynamo has one code object for them all, and sees no scheme."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from util import Graph, assert_counts, compiled, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor.decisions import Decisions
from aoquant_inductor.options import parse
from aoquant_inductor.scheme import SCHEMES

WIDTH = 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + self.up(x).relu()


class Model(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: torch.Tensor, schemes: list[str | None]) -> torch.Tensor:
        x = x.double()
        for layer, scheme in zip(self.layers, schemes, strict=True):
            y = layer.up(x.float()).double() if scheme is None else linear64(x.float(), layer.up, SCHEMES[scheme])
            x = x + y.relu()
        return x


def schemes_of(function: object) -> list[str | None]:
    layers = {layer.name: layer for layer in aoquant_inductor.report(function).layers}
    return [layers[f"layers.{i}.up"].scheme if layers[f"layers.{i}.up"].status == "quantized" else None for i in range(5)]


@pytest.mark.parametrize("release", [False, "cpu"])
@pytest.mark.parametrize("scheme", ["int4wo-32", None])
@pytest.mark.parametrize("which", [0, 1, 3])
def test_each_layer_keeps_its_own_scheme(which: int, scheme: str | None, release: bool | str, graphs: list[Graph]) -> None:
    model, x = Model().eval(), torch.randn(4, WIDTH)
    wanted = ["int8wo" if i != which else scheme for i in range(5)]
    function = compiled(model, {f"layers.{which}.*": scheme, "head": None}, default="int8wo", release_weights=release)
    with torch.no_grad():
        want = model.reference(x, wanted)
        for _ in range(3):
            assert sqnr_db(function(x), want) > 100
    assert schemes_of(function) == wanted
    # of the first layer's constants, of any weights, and for the other decision
    assert len(graphs) <= 3


@pytest.mark.parametrize("release", [False, "cpu"])
def test_a_layer_that_is_not_finite_is_alone_with_its_graph(release: bool | str) -> None:
    layers, x = [Layer().eval() for _ in range(4)], torch.randn(4, WIDTH)
    wants = [x.double() + linear64(x, layer.up).relu() for layer in layers]
    layers[1].up.weight.data[0, 0] = float("inf")
    functions = [compiled(layer, release_weights=release) for layer in layers]
    with torch.no_grad():
        for i in (0, 1, 0, 2, 3, 1, 0):
            y = functions[i](x)
            assert i == 1 or sqnr_db(y, wants[i]) > 100, i
    for i, function in enumerate(functions):
        assert_counts(aoquant_inductor.report(function), int(i != 1), 1, **({"non_finite": 1} if i == 1 else {}))


def test_a_weight_that_became_not_finite_is_no_longer_quantized_in_the_report() -> None:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).eval(), torch.randn(4, WIDTH)
    function = compiled(model)
    with torch.no_grad():
        function(x)
        assert_counts(aoquant_inductor.report(function), 2)
        model[0].weight = nn.Parameter(torch.full((WIDTH, WIDTH), float("inf")))
        function(x)
    assert_counts(aoquant_inductor.report(function), 1, 2, non_finite=1)
    assert aoquant_inductor.refresh(function) == 1, "what has no pack is not counted"


def test_decisions_are_asked_again_of_a_weight_that_came_later_and_keep_nothing_alive() -> None:
    model = Model()
    decisions = Decisions(model, parse({"schemes": {"layers.0.*": "int4wo-32"}, "default": "int8wo"}, None))
    first, second = model.layers[0].up, model.layers[1].up
    assert decisions.vary(first.weight) and decisions.vary(second.weight) and not decisions.vary(model.head.weight)
    assert decisions.of(first.weight) == SCHEMES["int4wo-32"] and decisions.of(second.weight) == SCHEMES["int8wo"]
    first.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    assert decisions.of(first.weight) == SCHEMES["int4wo-32"]
    alone = nn.Parameter(torch.randn(WIDTH, WIDTH))
    assert decisions.of(alone) == SCHEMES["int8wo"]
    gone = weakref.ref(model), weakref.ref(second.weight)
    del model, first, second
    gc.collect()
    assert [one() for one in gone] == [None, None]
