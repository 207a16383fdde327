"""One code object, many modules: each keeps its own weights, all are quantized, nothing is packed twice."""

from __future__ import annotations

import contextlib
import copy
import gc
import math

import pytest
import torch
from torch import nn
from util import BF16, Block, Graph, assert_counts, block, compiled, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor.errors import UnsupportedLayers
from aoquant_inductor.weights import STORE


class Broken(Block):
    """A block with a graph break: Dynamo compiles it apart from its stack."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + self.a(x).relu()


class Stack(nn.Module):
    def __init__(self, kind: type[Block], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for one in self.blocks:
            x = one(x)
        return x

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        for one in self.blocks:
            x = one.reference(x).to(x.dtype)
        return x


def test_three_instances(graphs: list[Graph]) -> None:
    blocks, x = [block() for _ in range(3)], tokens()
    functions = [compiled(b) for b in blocks]
    packed = STORE.packed
    with torch.no_grad():
        for _ in range(2):
            outputs = [f(x) for f in functions]
            assert [sqnr_db(y, b.reference(x)) > 45 for y, b in zip(outputs, blocks, strict=True)] == [True] * 3
    assert STORE.packed == packed + 3
    assert len(graphs) <= 2
    assert all(graph.code.count("torch.ops.aoquant.linear_wo") == 1 for graph in graphs)


def test_three_instances_are_all_reported() -> None:
    functions = [run(block(), tokens())[0] for _ in range(3)]
    assert [aoquant_inductor.report(f).totals["quantized"] for f in functions] == [1] * 3


def test_twelve_blocks_compiled_one_by_one(graphs: list[Graph]) -> None:
    stack, x = Stack(Block, 12).eval(), tokens()
    for one in stack.blocks:
        one.compile(backend="aoquant", options={"schemes": "int8wo"})
    packed = STORE.packed
    with torch.no_grad():
        y = stack(x)
        assert sqnr_db(y, stack.reference(x)) > 40
        for one in stack.blocks:
            assert sqnr_db(one(x), one.reference(x)) > 45
    assert STORE.packed == packed + 12
    assert len(graphs) <= 2
    assert all(graph.code.count("torch.ops.aoquant.linear_wo") == 1 for graph in graphs)


class Seven(nn.Module):
    """A block of seven linears, as a Llama's has them."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False, dtype=BF16) for _ in range(4))
        self.gate, self.up = (nn.Linear(d, 2 * d, bias=False, dtype=BF16) for _ in range(2))
        self.down = nn.Linear(2 * d, d, bias=False, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(self.q(x) + self.k(x) * self.v(x).sigmoid())
        return x + self.down(self.gate(x).relu() * self.up(x))


def test_thirty_two_blocks_of_seven(graphs: list[Graph]) -> None:
    """Two compilations for all of them, in every later call: nothing runs eager past Dynamo's recompile limit."""
    blocks, x = [Seven().eval() for _ in range(32)], tokens()
    packed = STORE.packed
    for one in blocks:
        one.compile(backend="aoquant", options={"schemes": "int8wo"})
    with torch.no_grad():
        for _ in range(2):
            for one in blocks:
                exact = Seven.forward(one, x)  # the uncompiled
                y = one(x)
                assert 30 < sqnr_db(y, exact) < 60, "near bf16's, and not bf16's own"
    assert [aoquant_inductor.report(one).totals["quantized"] for one in blocks] == [7] * 32
    assert (STORE.packed, len(graphs)) == (packed + 224, 2)
    assert [graph.constant for graph in graphs] == [True, False]


def test_the_last_graph_that_dynamo_allows_is_told() -> None:
    model = block()
    function = compiled(model, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        function(tokens(3))
        with pytest.warns(UserWarning, match="forward in .*util.py has all the graphs of torch._dynamo.config.recompile_limit"):
            function(tokens(4))


def test_graph_broken_stack(graphs: list[Graph]) -> None:
    stack, x = Stack(Broken, 12).eval(), tokens()
    packed = STORE.packed
    _, y, _ = run(stack, x)
    assert sqnr_db(y, stack.reference(x)) > 40
    assert STORE.packed == packed + 12
    assert len([graph for graph in graphs if "linear" in graph.code]) <= 2


def test_every_block_of_a_graph_broken_stack_is_reported() -> None:
    _, _, report = run(Stack(Broken, 12).eval(), tokens())
    assert_counts(report, 12)
    assert {layer.name for layer in report.layers} == {f"blocks.{i}.a" for i in range(12)}


def test_graph_broken_stack_refreshes_every_block() -> None:
    stack, x = Stack(Broken, 4).eval(), tokens()
    function, _, _ = run(stack, x)
    for one in stack.blocks:
        one.a.weight.data.copy_(torch.randn(32, 32))
    assert aoquant_inductor.refresh(function) == 4
    with torch.no_grad():
        assert sqnr_db(function(x), stack.reference(x)) > 40


def test_a_deepcopy_is_independent() -> None:
    first, x = block(), tokens()
    function, y, _ = run(first, x)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.a.weight.neg_()
    _, z, report = run(second, x)
    assert_counts(report, 1)
    assert sqnr_db(z, second.reference(x)) > 45
    with torch.no_grad():
        assert torch.equal(function(x), y)
    assert sqnr_db(y, first.reference(x)) > 45
    assert sqnr_db(z, y) < 10


def test_a_deepcopy_of_the_compiled_module() -> None:
    first, x = block(), tokens()
    function, y, _ = run(first, x)
    twin = copy.deepcopy(function)
    with torch.no_grad():
        twin.a.weight.neg_()
        assert sqnr_db(twin(x), twin._orig_mod.reference(x)) > 45
        assert torch.equal(function(x), y)


def test_recompiles_share_the_packs(graphs: list[Graph]) -> None:
    gc.collect()  # what earlier tests left behind must not die in between
    model = Stack(Block, 2).eval()
    function = compiled(model)
    packed, held = STORE.packed, len(STORE)
    inputs = [tokens(m) for m in (4, 5, 9)]
    model.requires_grad_(False)
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        for x in inputs:
            with mode():
                assert sqnr_db(function(x), model.reference(x)) > 40, (mode, x.shape)
    assert STORE.packed == packed + 2
    assert len(STORE) == held + 2
    assert 2 <= len(graphs) <= 6
    totals = aoquant_inductor.report(function).totals
    assert (totals["quantized"], totals["linears"], totals["graphs"]) == (2, 2, len(graphs))
    assert totals["recompiles"] == len(graphs) - 1
    addresses = {tuple(t.data_ptr() for t in graph.packs) for graph in graphs}
    assert len(addresses) == 1, "every graph holds the very same packs"


def test_dynamic_m_is_two_graphs(graphs: list[Graph]) -> None:
    model = block()
    function = compiled(model)
    with torch.no_grad():
        for m in range(3, 40, 3):
            x = tokens(m)
            assert sqnr_db(function(x), model.reference(x)) > 45, m
    assert len(graphs) == 2


@pytest.mark.parametrize("on_unsupported", ["report", "error"])
def test_a_later_instance_with_a_weight_that_is_not_finite(on_unsupported: str) -> None:
    """Its graph is that of the first ones; it is left as a whole, and said so."""
    blocks, x = [block() for _ in range(4)], tokens()
    with torch.no_grad():
        blocks[2].a.weight[0, 0] = math.nan
        functions = [compiled(b, on_unsupported=on_unsupported) for b in blocks]
        for i, function in enumerate(functions):
            fails = pytest.raises(UnsupportedLayers, match="first at") if (i, on_unsupported) == (2, "error") else contextlib.nullcontext()
            with fails:
                function(x)
    reports = [aoquant_inductor.report(function) for function in functions]
    assert_counts(reports[3], 1)
    if on_unsupported == "report":
        assert_counts(reports[2], 0, 1, non_finite=1)
        assert "a weight holds a non-finite value (first at [0, 0])" in str(reports[2])


def test_refresh_of_a_second_compiled_object_over_one_model() -> None:
    """Its graphs are the first one's, which looks the weights up for both."""
    model, x = Stack(Broken, 3).eval(), tokens()
    first, second = compiled(model), compiled(model)
    with torch.no_grad():
        first(x), second(x)
        for one in model.blocks:
            one.a.weight.data.mul_(-2)
        assert aoquant_inductor.refresh(second) == 3
        assert sqnr_db(second(x), model.reference(x)) > 40
