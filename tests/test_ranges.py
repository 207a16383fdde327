"""A graph with a symbolic M: one of Dynamo's, one of Inductor's per range of M, each compiled at the first call in it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv
from util import Graph, assert_counts, block, compiled, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import _inductor_shapes, lowering

BOUNDS = (4, 16)


@pytest.fixture(autouse=True)
def hints(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The M that each lowering was asked to choose a kernel for; the CPU has the ranges of a GPU here."""
    asked: list[int] = []
    original = lowering.cpu.linear

    def linear(p):  # type: ignore[no-untyped-def]
        asked.append(ir.rows_hint(p.m))
        name, node = original(p) or lowering.portable.linear(p)
        return f"{name} for {asked[-1]}", node

    monkeypatch.setitem(lowering.M_RANGES, "cpu", BOUNDS)
    monkeypatch.setitem(lowering.BACKENDS, "cpu", (linear,))
    return asked


@pytest.mark.parametrize("instances", [1, 2], ids=["constant", "looked up"])
def test_each_range_has_its_kernel_and_dynamo_one_graph(graphs: list[Graph], hints: list[int], instances: int) -> None:
    for _ in range(instances):
        model = block()
        function = compiled(model, dynamic=True)
        with torch.no_grad():
            function(tokens(7))
    del graphs[:-1], hints[:-1]
    with torch.no_grad():
        for m in (7, 3, 40, 16, 17, 4, 5, 100):
            x = tokens(m)
            assert sqnr_db(function(x), model.reference(x)) > 45, m
    assert hints == [16, 4, 40], "the last M of a range, or the first that came where it has no last"
    assert len(graphs) == 3
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    if instances == 1:
        assert (report.totals["graphs"], report.totals["recompiles"]) == (1, 0)
        kernels = str(report.layers[0].kernel).split(", ")
        assert sorted(kernel.rpartition(" for ")[2] for kernel in kernels) == ["16", "4", "40"]


def test_m_is_a_product_of_two_sizes(graphs: list[Graph], hints: list[int]) -> None:
    model = block()
    function = compiled(model, dynamic=True)
    with torch.no_grad():
        for b, t in ((2, 3), (2, 2), (5, 20), (3, 5)):
            x = torch.randn(b, t, 32, dtype=torch.bfloat16)
            assert sqnr_db(function(x), model.reference(x)) > 45, (b, t)
    assert hints == [16, 4, 100]
    assert len(graphs) == 3


def test_m_is_half_of_a_size(graphs: list[Graph], hints: list[int]) -> None:
    """As behind a patch embedding."""
    stem, model = nn.Conv1d(32, 32, 3, stride=2, padding=1).bfloat16(), block()
    function = torch.compile(
        lambda x: model(stem(x).transpose(1, 2)), backend="aoquant", dynamic=True, options={"schemes": "int8wo"}
    )
    with torch.no_grad():
        for t in (7, 3, 40, 6):
            x = torch.randn(2, 32, t, dtype=torch.bfloat16)
            assert sqnr_db(function(x), model.reference(stem(x).transpose(1, 2))) > 45, t
    assert hints == [16, 4, 40]
    assert len(graphs) == 3


def test_static_m_is_one_graph(graphs: list[Graph], hints: list[int]) -> None:
    function = compiled(block(), dynamic=False)
    with torch.no_grad():
        function(tokens(7))
    assert hints == [7]
    assert len(graphs) == 1


def test_mark_dynamic_keeps_its_meaning(graphs: list[Graph]) -> None:
    """A guard on M would be a constraint violation."""
    model = block()
    function = compiled(model)
    for m in (7, 3, 40):
        x = tokens(m)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert sqnr_db(function(x), model.reference(x)) > 45, m
    assert len(graphs) == 3
    assert aoquant_inductor.report(function).totals["graphs"] == 1


def test_an_update_reaches_every_range() -> None:
    model = block()
    function = compiled(model, dynamic=True)
    with torch.no_grad():
        for m in (7, 3, 40):
            function(tokens(m))
        model.a.weight.copy_(torch.randn(32, 32))
        for m in (3, 40, 7):
            x = tokens(m)
            assert sqnr_db(function(x), model.reference(x)) > 45, m


def test_an_m_without_a_value_has_one_graph(graphs: list[Graph]) -> None:
    model = block()
    function = compiled(model)
    x = tokens(7)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    with torch.no_grad():
        assert sqnr_db(function(x), model.reference(x)) > 45
    assert len(graphs) == 1
    assert_counts(aoquant_inductor.report(function), 1)


def test_a_compile_that_would_not_hold_for_its_range_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, graphs: list[Graph]
) -> None:
    model = block()
    function = compiled(model, dynamic=True)
    with torch.no_grad():
        function(tokens(7))
        original = lowering.BACKENDS["cpu"][0]

        def guarding(p):  # type: ignore[no-untyped-def]
            from torch._inductor.virtualized import V

            V.graph.sizevars.shape_env.evaluate_expr(p.m < 4)
            return original(p)

        monkeypatch.setitem(lowering.BACKENDS, "cpu", (guarding,))
        with caplog.at_level(logging.WARNING, "aoquant_inductor"):
            for m in (3, 4):
                x = tokens(m)
                assert sqnr_db(function(x), model.reference(x)) > 45, m
    assert [r.message for r in caplog.records if r.name == "aoquant_inductor"] == [
        "M of 1..4 runs op by op in plain PyTorch: a compile of its own would not hold for all of it (seen at M = 3)."
    ]
    layers = aoquant_inductor.report(function).layers
    assert all("plain PyTorch for M of 1..4" in str(layer.kernel) for layer in layers), [layer.kernel for layer in layers]


@pytest.mark.parametrize("first", ["a kernel", "a matmul of cuBLAS"])
def test_a_later_range_may_index_what_the_first_does_not(
    first: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, graphs: list[Graph]
) -> None:
    """Inductor guards on the size of all that a Triton kernel reads and writes: beyond LARGE_M also the scales of x."""
    original = lowering.BACKENDS["cpu"][0]

    def indexing(p):  # type: ignore[no-untyped-def]
        from torch._inductor.codegen.triton import TritonScheduling

        if ir.rows_hint(p.m) != 16 or first == "a kernel":
            assert TritonScheduling.can_use_32bit_indexing(p.m * p.n, [ir.realize(node) for node in p.inputs.values()])
        return original(p)

    monkeypatch.setitem(lowering.BACKENDS, "cpu", (indexing,))
    model = nn.Linear(64, 32, dtype=torch.bfloat16).eval()
    function = compiled(model, "int4wo-32-large8", dynamic=True)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "aoquant_inductor"):
        for m in (7, 300, 3, 40):
            function(tokens(m, 64))
    assert [r.message for r in caplog.records if r.name == "aoquant_inductor"] == []
    assert len(graphs) == 4
    assert "to int8" in str(aoquant_inductor.report(function).layers[0].kernel)


def test_sizes_that_need_64_bits_make_a_graph_of_their_own() -> None:
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbol = env.create_symbol(5000, LocalSource("m"), DimDynamic.DYNAMIC)
    m = env.create_symintnode(symbol, hint=5000, source=LocalSource("m"))
    free = env.create_unbacked_symint()
    _inductor_shapes.guard_32_bits([m], [symbol * 1024, symbol * 2**20, free.node.expr * 1024])
    assert [bool(guard.expr.subs(symbol, 5000)) for guard in env.guards] == [True, True]
    assert [bool(guard.expr.subs(symbol, 40)) for guard in env.guards] == [True, False]


def test_the_cost_of_choosing_is_one_call() -> None:
    import sympy

    a, b = sympy.symbols("a b")
    assert _inductor_shapes.evaluator(a, {a: 1})([0, 7]) == 7
    assert _inductor_shapes.evaluator(a * b, {a: 1, b: 0})([3, 7]) == 21
    assert _inductor_shapes.evaluator(a * b, {a: 1}) is None
    half = FloorDiv(a - 1, 2) + 1
    assert _inductor_shapes.evaluator(half * b, {a: 1, b: 0})([3, 8]) == 12
    assert _inductor_shapes.rows(nn.Parameter(torch.zeros(3, 5, 8))) == 15
