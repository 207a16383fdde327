"""A symbolic M on a pretended GPU: Inductor's code for every range of M is good for all calls of the graph that Dynamo made."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from offline import pretended_gpu
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import _inductor_shapes as shapes
from aoquant_inductor import activations, lowering, packing, qparams
from aoquant_inductor.layouts import Packed
from aoquant_inductor.scheme import LARGE_M, SCHEMES
from benchmarks import render

N, K = 1536, 1024
RANGES = tuple(zip((0, *lowering.M_RANGES["cuda"]), (*lowering.M_RANGES["cuda"], None), strict=True))
PARTS = ("w", "scale", "zero", "row")


def packed(scheme: str) -> Packed:
    choice = SCHEMES[scheme]
    layout = packing.choose(choice, torch.device("cuda", 0), torch.bfloat16, (N, K))
    return packing.pack(qparams.quantize(torch.randn(N, K).bfloat16(), choice.weight), choice, layout)


def linear(p: Packed, x: Any, t: dict[str, Any], many: bool) -> Any:
    """As a graph writes it for few and for many rows."""
    op, w, scale, key = torch.ops.aoquant, t["w"], t["scale"], p.key
    if (p.layout == "cuda_bf16" and not many) or p.layout == "wgmma":
        return op.linear_wo(x, w, scale, t.get("zero"), None, *key)
    if p.w_dtype == "int4" and p.layout != "cuda_int8":
        w, scale, key = op.requantize(w, scale, t.get("zero"), t["row"], *key, p.int8_key[-1]), t["row"], p.int8_key
    return op.linear_dynamic(*activations.quantize_per_token(x), None, w, scale, None, None, None, *key, x.dtype)


@pytest.mark.parametrize("sizes", [{"m": 2}, {"b": 3, "t": 5}], ids=["one size", "two sizes"])
@pytest.mark.parametrize("scheme", ["int4wo-128-asym-large8", "int8wo", "int8dq", "int8dq-int4w"])
def test_no_range_asks_for_a_guard_that_was_not_asked_for_all(scheme: str, sizes: dict[str, int]) -> None:
    with pretended_gpu():
        p = packed(scheme)
        parts = {name: t for name in PARTS if (t := getattr(p, name)) is not None}
        env = ShapeEnv()
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
        symbols = [env.create_symbol(size, LocalSource(name), DimDynamic.DYNAMIC) for name, size in sizes.items()]
        hinted = zip(symbols, sizes.items(), strict=True)
        leading: list[Any] = [env.create_symintnode(s, hint=size, source=LocalSource(name)) for s, (name, size) in hinted]
        with fake:
            weight = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in parts.values()]
            inputs = [*leading, torch.empty(*leading, K, dtype=torch.bfloat16, device="cuda"), *weight]
        m = sympy.Mul(*symbols)
        shapes.guard_32_bits(inputs, [m, m * N, m * K])
        asked = len(env.guards)
        for low, last in RANGES:

            def run(*args: Any, many: bool = low >= LARGE_M) -> Any:
                x, *weight = args[len(leading) :]
                return linear(p, x, dict(zip(parts, weight, strict=True)), many).relu()

            traced = {symbols[-1]: sympy.Integer((last or 1500) // (3 if len(symbols) > 1 else 1))}
            with ir.rows_within(ir.Range(m, low + 1, last)), mock.patch.dict(shapes._hints(env), traced):
                code, _ = render.lower(run, inputs, fake)
            assert "triton_" in code
            assert len(env.guards) == asked, (low, [str(guard.expr) for guard in env.guards[asked:]])
