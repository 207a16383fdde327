"""Schemes with large_m: x as it is up to LARGE_M rows and int8 beyond, by one set of packs, in static and in dynamic graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from util import BF16, FP16, FP32, Block, Graph, assert_counts, compiled, from_pack, linear64, our_kernel, run, sqnr_db

import aoquant_inductor
from aoquant_inductor import lowering, packing, packing_cpu, qparams
from aoquant_inductor.layouts import Packed, by_group
from aoquant_inductor.scheme import LARGE_M, SCHEMES, Scheme, resolve
from aoquant_inductor.weights import STORE

LARGE = ("int4wo-128-large8", "int4wo-32-asym-large8", "int4wo-64-asymfloat-large8", "int4wo-row-large8", "int4wo-row-asym-large8")
aoquant = torch.ops.aoquant
FEW, MANY = 7, LARGE_M + 1


def pack_of(weight: torch.Tensor, scheme: Scheme, layout: str | None = None) -> Packed:
    layout = layout or packing.choose(scheme, weight.device, weight.dtype, weight.shape)
    return packing.pack(qparams.quantize(weight.detach(), scheme.weight), scheme, layout)


def rows_of(p: Packed, w8: torch.Tensor) -> torch.Tensor:
    """float64 [N, K] of what requantize made of p."""
    n, k = p.shape
    assert p.row is not None
    return packing.unpack(w8, k, n, "int8", p.int8_key[-1]).double() * p.row[:, :n].t().double()


def requantize(p: Packed) -> torch.Tensor:
    return aoquant.requantize(p.w, p.scale, p.zero, p.row, *p.key, p.int8_key[-1])


def reference(x: torch.Tensor, linear: nn.Linear, scheme: Scheme) -> torch.Tensor:
    """float64 y by the pack that the graphs share: for many rows by int8 x and the int8 weight, else by the int4 weight."""
    if x.shape[:-1].numel() <= LARGE_M:
        return linear64(x, linear, scheme, from_pack(linear.weight, scheme))
    p = pack_of(linear.weight, scheme)
    return linear64(x, linear, resolve("int8dq"), rows_of(p, requantize(p)))


@pytest.mark.parametrize("layout", ["plain", "cpu_bf16", "cpu_fma", "cuda_bf16"])
@pytest.mark.parametrize("name", LARGE)
def test_the_int8_weight_is_the_int4_weight_but_for_its_rounding(name: str, layout: str) -> None:
    scheme = SCHEMES[name]
    for n, k in ((7, 65), (70, 1), (33, 4096)):
        weight = torch.randn(n, k, dtype=BF16)
        weight[0] = 0
        p = pack_of(weight, scheme, layout)
        q = packing.unpack(p.w, k, n, p.w_dtype, layout)
        zero = None if p.zero is None else by_group(p.zero)[:, :n]
        want = qparams.dequantize(q, by_group(p.scale)[:, :n], zero, p.group_size or None, p.zero_point, torch.float64)
        got = rows_of(p, requantize(p))
        assert p.row is not None
        assert ((got - want).abs() <= 0.5001 * p.row[:, :n].t()).all(), (n, k)
        assert got[0].abs().max() <= want[0].abs().max()
        # a row of integers is exact; 4096 normal values are 41 to 42 dB, the int4 weight itself is 19 to 24 from bf16
        assert sqnr_db(got, want) > (120 if name in ("int4wo-row-large8", "int4wo-row-asym-large8") else 38), (n, k)


@pytest.mark.parametrize("available", [True, False], ids=["kernel", "portable"])
@pytest.mark.parametrize("name", LARGE)
def test_the_lowering_makes_the_same_integers(name: str, available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available:
        monkeypatch.setattr(packing_cpu, "instruction_set", lambda: None)
    isa = packing_cpu.instruction_set()
    if available and isa is None:
        pytest.skip("no kernel for this CPU")
    lowering.install()
    for n, k in ((7, 65), (130, 322), (64, 3), (70, 256)):
        p = pack_of(torch.randn(n, k, dtype=BF16), SCHEMES[name])
        assert p.layout == (packing_cpu.LAYOUTS[isa][0] if isa else "plain")
        torch.compiler.reset()
        with lowering.recording() as kernels:
            got = torch.compile(lambda p=p: requantize(p))()
        assert kernels[p.int8_key] == {f"C++ {isa.upper()} to int8" if isa else "portable to int8"}
        want = requantize(p)
        layout = p.int8_key[-1]
        difference = (packing.unpack(got, k, n, "int8", layout).int() - packing.unpack(want, k, n, "int8", layout).int()).abs()
        assert difference.max() <= 1 and difference.sum() <= difference.numel() // 1000, (n, k)  # a tie may go the other way
        assert got.shape == want.shape


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", LARGE[:3])
def test_both_sides_of_the_threshold(name: str, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    linear = nn.Linear(322, 70, dtype=dtype).eval()
    for m, kernels in ((LARGE_M, 1), (LARGE_M + 1, 2)):
        x = torch.randn(m, 322, dtype=dtype)
        torch.compiler.reset()
        _, y, report = run(linear, x, schemes=name)
        assert_counts(report, 1)
        kernel = str(report.layers[0].kernel)
        assert len(kernel.split(", ")) == kernels and ("to int8" in kernel) == (kernels == 2) and our_kernel(kernel)
        assert report.layers[0].scheme == name
        assert sqnr_db(y, reference(x, linear, scheme)) > 46, m
        # against x as it is and the int4 weight: what the two roundings cost
        exact = x.double() @ from_pack(linear.weight, scheme).t() + linear.bias.double()
        assert sqnr_db(y, exact) > (46 if kernels == 1 else 36), m


class Gated(nn.Module):
    """Two linears over one activation and one over their product, as an MLP has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(64, 96, bias=False, dtype=BF16) for _ in range(2))
        self.down = nn.Linear(96, 64, dtype=BF16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_one_graph_of_dynamo_and_one_pack_serve_every_m(dynamic: bool | None, graphs: list[Graph]) -> None:
    model, name = Gated().eval(), "int4wo-32-asym-large8"
    function, packed = compiled(model, name, dynamic=dynamic), STORE.packed
    for m in (FEW, MANY, LARGE_M, 1000, 3):
        x = torch.randn(m, 64, dtype=BF16)
        with torch.no_grad():
            y = function(x)
        mid = nn.functional.silu(reference(x, model.gate, SCHEMES[name])) * reference(x, model.up, SCHEMES[name])
        assert sqnr_db(y, reference(mid.to(BF16), model.down, SCHEMES[name])) > 35, m
    assert STORE.packed - packed == 3, "one pack per weight"
    report = aoquant_inductor.report(function)
    assert_counts(report, 3)
    # "automatic": the first M is taken for static, the second makes it symbolic
    assert (report.totals["graphs"], report.totals["recompiles"]) == ((1, 0) if dynamic else (2, 1))
    assert all("to int8" in str(layer.kernel) and len(str(layer.kernel).split(", ")) == 3 for layer in report.layers), str(report)
    few, many = graphs[-2:] if "requantize" in graphs[-1].code else graphs[-1:-3:-1]
    calls = lambda graph, *ops: [graph.code.count(f"ops.aoquant.{op}.default(") for op in ops]  # noqa: E731
    assert calls(few, "linear_wo", "quantize_per_token", "requantize") == [3, 0, 0]
    # gate and up share their quantization
    assert calls(many, "linear_wo", "quantize_per_token", "requantize", "linear_dynamic") == [0, 2, 3, 3]
    assert [t.data_ptr() for t in few.packs] == [t.data_ptr() for t in many.packs]


def test_an_update_reaches_both_forms() -> None:
    model, name = nn.Linear(64, 32, dtype=BF16).eval(), "int4wo-32-large8"
    function = compiled(model, name, dynamic=True)
    xs = [torch.randn(m, 64, dtype=BF16) for m in (FEW, MANY)]
    for factor in (1, 10):  # rows of another scale, too
        with torch.no_grad():
            model.weight.mul_(factor)
            for x in xs:
                assert sqnr_db(function(x), reference(x, model, SCHEMES[name])) > 46, (factor, len(x))
    assert aoquant_inductor.report(function).totals["graphs"] == 1


def test_blocks_that_share_a_graph_have_their_own_packs() -> None:
    name = "int4wo-32-large8"
    for _ in range(3):
        block = Block().eval()
        function = compiled(block, name, dynamic=True)
        for m in (FEW, MANY):
            x = torch.randn(m, 32, dtype=BF16)
            with torch.no_grad():
                y = function(x)
            assert sqnr_db(y, x.double() + reference(x, block.a, SCHEMES[name]).relu()) > 44, m


def test_mark_dynamic_keeps_its_meaning() -> None:
    model = nn.Linear(64, 32, dtype=BF16).eval()
    function = compiled(model, "int4wo-32-large8")
    for m in (FEW, MANY):
        x = torch.randn(m, 64, dtype=BF16)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert sqnr_db(function(x), reference(x, model, SCHEMES["int4wo-32-large8"])) > 46, m
    assert aoquant_inductor.report(function).totals["graphs"] == 1


class Head(nn.Module):
    """The last token's logits: M of the head is 1 whatever that of the body is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(64, 64, dtype=BF16) for _ in range(2))
        self.head = nn.Linear(64, 32, dtype=BF16)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
        return self.head(self.b(self.a(x))[-1:]), self.head(other)


def test_a_linear_is_judged_by_its_own_m() -> None:
    model, name = Head().eval(), "int4wo-32-large8"
    function = compiled(model, {"a": name, "b": name, "head": None}, dynamic=True)
    only = compiled(model, {"a": None, "b": None, "head": name}, dynamic=True)
    x, other = torch.randn(MANY, 64, dtype=BF16), torch.randn(LARGE_M + 7, 64, dtype=BF16)
    with torch.no_grad():
        function(x, other)
        y, z = only(x, other)
    kernels = {layer.name: str(layer.kernel) for layer in aoquant_inductor.report(function).quantized}
    assert set(kernels) == {"a", "b"} and all("to int8" in kernel for kernel in kernels.values())
    hidden = model.b(model.a(x))[-1:].detach()
    assert sqnr_db(y, reference(hidden, model.head, SCHEMES[name])) > 44, "one row: x as it is"
    assert sqnr_db(z, reference(other, model.head, SCHEMES[name])) > 46, "its own symbol is that of most linears here"


class Unlike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64, dtype=BF16) for _ in range(3))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Any:
        return self.b(self.a(x)), self.c(z)


def test_a_linear_of_another_symbol_is_named_in_the_report() -> None:
    model, name = Unlike().eval(), "int4wo-32-large8"
    function = compiled(model, name, dynamic=True)
    x, z = torch.randn(MANY, 64, dtype=BF16), torch.randn(MANY + 5, 64, dtype=BF16)
    with torch.no_grad():
        _, y = function(x, z)
    assert sqnr_db(y, linear64(z, model.c, SCHEMES[name], from_pack(model.c.weight, SCHEMES[name]))) > 46
    report = aoquant_inductor.report(function)
    assert_counts(report, 3)
    details = {layer.name: layer.detail for layer in report.layers}
    assert details["a"] is details["b"] is None
    assert details["c"] == "keeps its activation as it is at every M: its M is not that of most linears of the graph."


def test_a_graph_with_a_backward_keeps_its_activations() -> None:
    model, name = nn.Linear(64, 32, dtype=BF16).requires_grad_(False).eval(), "int4wo-32-large8"
    function = compiled(model, name)
    x = torch.randn(MANY, 64, dtype=BF16, requires_grad=True)
    y = function(x)
    y.sum().backward()
    w = from_pack(model.weight, SCHEMES[name])
    assert sqnr_db(y.detach(), linear64(x.detach(), model, SCHEMES[name], w)) > 46
    assert x.grad is not None and sqnr_db(x.grad, w.sum(0).expand(MANY, 64)) > 40
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    assert report.layers[0].detail == "keeps its activation as it is at every M: the graph has a backward."
    assert "to int8" not in str(report.layers[0].kernel)


def test_it_trains_and_infers_with_one_pack() -> None:
    model, name, packed = nn.Linear(64, 32, dtype=BF16).requires_grad_(False).eval(), "int4wo-32-large8", STORE.packed
    function = compiled(model, name)
    x = torch.randn(MANY, 64, dtype=BF16)
    with torch.no_grad():
        y = function(x)
    function(x.requires_grad_()).sum().backward()
    assert sqnr_db(y, reference(x.detach(), model, SCHEMES[name])) > 46
    assert STORE.packed - packed == 1


def test_the_int8_weight_is_made_by_every_call_and_not_kept() -> None:
    """Folded at compile time it would take twice the memory of the int4 weight, for good."""
    model = nn.Linear(512, 512, bias=False, dtype=BF16).eval()
    function, _, _ = run(model, torch.randn(MANY, 512, dtype=BF16), schemes="int4wo-128-large8")
    model.weight.data.zero_()
    aoquant_inductor.refresh(function)
    with torch.no_grad():
        assert not function(torch.randn(MANY, 512, dtype=BF16)).any()
