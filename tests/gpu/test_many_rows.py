"""Schemes with large_m on the card: the int8 weight is the reference's, and one graph of Dynamo's serves both sides of LARGE_M."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from util import BF16, FP16, FP32, activation, assert_counts, compiled, from_pack, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor import lowering, packing, qparams
from aoquant_inductor.scheme import LARGE_M, SCHEMES, resolve

pytestmark = pytest.mark.gpu

LARGE = ("int4wo-128-large8", "int4wo-32-asym-large8", "int4wo-64-asymfloat-large8", "int4wo-256-asym-large8", "int4wo-row-asym-large8")


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", LARGE)
def test_the_int8_weight_is_the_references(name: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    lowering.install()
    for n, k in ((203, 300), (7, 65), (4096, 4096), (1280, 14336)):
        weight = torch.randn(n, k, device="cuda", dtype=dtype)
        layout = packing.choose(scheme, weight.device, dtype, weight.shape)
        q = qparams.quantize(weight, scheme.weight)
        p = packing.pack(q, scheme, layout)
        args = (p.w, p.scale, p.zero, p.row, *p.key, p.int8_key[-1])
        torch.compiler.reset()
        with lowering.recording() as kernels:
            got = torch.compile(lambda args=args: torch.ops.aoquant.requantize(*args))()
        assert kernels[p.int8_key] == {"Triton to int8" if layout == "cuda_bf16" else "portable to int8"}
        # a group that holds its row's largest weight has ties by the score, which may go either way
        dense = qparams.dequantize(q.w_q, q.scale, q.zero, scheme.weight.group_size, scheme.weight.zero_point, torch.float64)
        assert float((got.double() - dense / p.row[:, :n].t().double()).abs().max()) <= 0.5 + 1e-3, (n, k)


class Gated(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(1024, 1536, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(1536, 1024, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_one_graph_of_dynamo_serves_every_m(dtype: torch.dtype, mode: str) -> None:
    """Two siblings in one launch and one linear alone, by both forms over the same packs."""
    name = "int4wo-128-asym-large8"
    model = Gated(dtype).cuda().eval()
    function = compiled(model, name, dynamic=True, mode=mode)
    gate, up, down = (from_pack(layer.weight, SCHEMES[name]) for layer in (model.gate, model.up, model.down))
    for _ in range(2):
        for m in (2, 300, 40, LARGE_M, LARGE_M + 1, 1000):  # Dynamo has a graph of its own for 1
            x = torch.randn(m, 1024, device="cuda", dtype=dtype)
            scheme = resolve("int8dq") if m > LARGE_M else SCHEMES[name]
            with torch.no_grad():
                y = function(x).clone()
            left = activation(x, scheme)
            mid = (nn.functional.silu(left @ gate.t()) * (left @ up.t())).to(dtype)
            # the int8 weight is 41 dB from the int4 one
            assert sqnr_db(y, linear64(mid, model.down, scheme, down)) > (44 if m <= LARGE_M else 34), m
    report = aoquant_inductor.report(function)
    assert_counts(report, 3)
    assert report.totals["graphs"] == 1
    for layer in report.layers:
        kernels = str(layer.kernel)
        assert "to int8" in kernels and "W4A16" in kernels and "W8A8" in kernels, kernels


@pytest.mark.parametrize("m", [LARGE_M, 512, 2048])
def test_static_m(m: int) -> None:
    name = "int4wo-128-large8"
    linear = nn.Linear(4096, 4096, device="cuda", dtype=BF16).eval()
    function = compiled(linear, name)
    x = torch.randn(m, 4096, device="cuda", dtype=BF16)
    with torch.no_grad():
        y = function(x)
    w = from_pack(linear.weight, SCHEMES[name])
    assert sqnr_db(y, linear64(x, linear, resolve("int8dq") if m > LARGE_M else SCHEMES[name], w)) > (46 if m <= LARGE_M else 38)
    assert ("W8A8" in str(aoquant_inductor.report(function).layers[0].kernel)) == (m > LARGE_M)


@pytest.mark.parametrize(
    ("name", "dtype"), [("int8wo", BF16), ("int8wo", FP16), ("int8wo-64", BF16), ("int4wo-128-asym", BF16), ("int4wo-32", BF16)]
)
def test_a_weight_with_few_tiles_is_copied_for_cublas(name: str, dtype: torch.dtype) -> None:
    linear = nn.Linear(4160, 1040, bias=False, device="cuda", dtype=dtype).eval()
    x = torch.randn(1000, 4160, device="cuda", dtype=dtype)
    function = compiled(linear, name)
    with torch.no_grad():
        y, (code, *_) = run_and_get_code(function, x)
    assert sqnr_db(y, linear64(x, linear, SCHEMES[name], from_pack(linear.weight, SCHEMES[name]))) > 45
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    assert report.layers[0].kernel == "portable: dequantize + mm"
    assert re.findall(r"(triton_[a-z]+)_\w+\.run\(", code) == ["triton_tem"], code


@pytest.mark.parametrize("name", ["int8dq", "int8wo", "int4wo-128", "int8dq-int4w"])
def test_more_results_than_32_bits_count(name: str) -> None:
    """Rows around the first whose elements lie beyond 2**31, and the last."""
    linear = nn.Linear(128, 151936, bias=False, device="cuda", dtype=BF16).eval()
    function, x = compiled(linear, name), torch.randn(16384, 128, device="cuda", dtype=BF16)
    with torch.no_grad():
        y = function(x)
    first = 2**31 // 151936
    w = from_pack(linear.weight, SCHEMES[name])
    for row in (0, first, first + 1, 16383):
        assert sqnr_db(y[row : row + 1], linear64(x[row : row + 1], linear, SCHEMES[name], w)) > 40, row
    assert str(aoquant_inductor.report(function).layers[0].kernel).startswith("portable")
