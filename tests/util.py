"""Shared by the tests: SQNR, references computed from the quantized weight in float64, small models, counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

import aoquant_inductor
from aoquant_inductor import Scheme, activations, packing, packing_cpu, qparams
from aoquant_inductor.errors import OptionError
from aoquant_inductor.layouts import by_group
from aoquant_inductor.options import parse
from aoquant_inductor.report import Report
from aoquant_inductor.scheme import resolve

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
INT8 = resolve("int8wo")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Graph:
    """One call of Inductor: the graph's code, the packs it was given, and whether they are constants."""

    code: str
    packs: tuple[torch.Tensor, ...]
    constant: bool


def sqnr_db(got: torch.Tensor, want: torch.Tensor) -> float:
    """10 log10(|want|^2 / |got - want|^2) in float64; inf when equal, -inf when `got` is not finite."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double(), want.double()
    if not got.isfinite().all():
        return -math.inf
    signal, noise = float(want.square().sum()), float((got - want).square().sum())
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def compiled(model: nn.Module, schemes: object = "int8wo", *, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="aoquant", dynamic=dynamic, options={"schemes": schemes, **options})


def run(model: nn.Module, *args: Any, schemes: object = "int8wo", **options: Any) -> tuple[Any, Any, Report]:
    """Compiled and called once without grad: (compiled, its output, its report)."""
    function = compiled(model, schemes, **options)
    with torch.no_grad():
        y = function(*args)
    return function, y, aoquant_inductor.report(function)


def error_of(options: Any, mode: Any = None) -> str:
    """What parse says of options that it refuses."""
    with pytest.raises(OptionError) as caught:
        parse(options, mode)
    return str(caught.value)


def assert_counts(report: Report, quantized: int, of: int | None = None, **reasons: int) -> None:
    """`quantized` layers, each by a named kernel, of `of` linears; the others for exactly these reasons."""
    totals = report.totals
    assert (totals["quantized"], totals["linears"], totals["reasons"]) == (quantized, of or quantized, reasons), str(report)
    assert all(layer.kernel for layer in report.quantized), str(report)


def dequantized(weight: torch.Tensor, scheme: Scheme = INT8) -> torch.Tensor:
    """float64 [N, K] of what `scheme` makes of the weight as it is now; asks no store, so that a stale pack shows."""
    q = qparams.quantize(weight.detach(), scheme.weight)
    return qparams.dequantize(q.w_q, q.scale, q.zero, scheme.weight.group_size, scheme.weight.zero_point, torch.float64)


def dequantized_twin(model: Model, scheme: str, within: str = "") -> Model:
    """A copy whose linears, of names that begin with `within`, have the weights that `scheme` makes of them."""
    twin = copy.deepcopy(model)
    for name, linear in twin.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(within):
            linear.weight.data = dequantized(linear.weight, resolve(scheme)).to(linear.weight.dtype)
    return twin


def from_pack(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """float64 [N, K] of the pack that the compiled graphs share."""
    from aoquant_inductor.weights import STORE

    _, packed, _ = STORE.pack(weight, scheme, packing.choose(scheme, weight.device, weight.dtype, weight.shape))
    n, k = packed.shape
    q = packing.unpack(packed.w, k, n, packed.w_dtype, packed.layout)
    zero = None if packed.zero is None else by_group(packed.zero)[:, :n]
    return qparams.dequantize(q, by_group(packed.scale)[:, :n], zero, packed.group_size or None, packed.zero_point, torch.float64)


def activation(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """float64 of x as the scheme's matmul sees it: quantized per token if it is dynamic."""
    if scheme.activation is None:
        return x.double()
    if scheme.activation.symmetric:
        q, scale = activations.quantize_per_token(x)
        return q.double() * scale.double()
    q, scale, zero = activations.quantize_per_token_asym(x)
    return (q.double() - zero.double()) * scale.double()


def linear64(x: torch.Tensor, linear: nn.Linear, scheme: Scheme = INT8, weight: torch.Tensor | None = None) -> torch.Tensor:
    """float64 reference of one quantized linear; its weight from `weight`, else quantized afresh."""
    w = dequantized(linear.weight, scheme) if weight is None else weight
    y = activation(x, scheme) @ w.t()
    return y if linear.bias is None else y + linear.bias.detach().double()


class Two(nn.Module):
    """Two linears that read the same activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16, dtype=BF16), nn.Linear(32, 16, dtype=BF16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


class Block(nn.Module):
    """x + relu(a(x)): the smallest block whose equals share one code object."""

    def __init__(self, d: int = 32, dtype: torch.dtype = BF16) -> None:
        super().__init__()
        self.a = nn.Linear(d, d, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(x).relu()

    def reference(self, x: torch.Tensor, scheme: Scheme = INT8) -> torch.Tensor:
        return x.double() + linear64(x, self.a, scheme).relu()


def block() -> Block:
    return Block().eval()


def tokens(m: int = 4, d: int = 32, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(m, d, dtype=dtype)


def our_kernel(name: str | None) -> bool:
    """Whether a kernel of ours ran, not Inductor's fallback, where this CPU has one."""
    isa = packing_cpu.instruction_set()
    return name is not None and (isa is None or name.startswith(f"C++ {isa.upper()}"))


def peak_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(the most CPU memory that tensors took beyond the start while `call` ran, what is left of it), exactly."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now
