"""Every op in Inductor's own IR: right on every device, fused where Inductor fuses; fast only by luck.

Weight-only: the dequantization is a pointwise node in front of a matmul; for one row the whole is one fused reduction.
Dynamic: aten._int_mm with the rescale fused behind it where it can run, else exact sums another way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import packing_cuda
from aoquant_inductor.card import Card
from aoquant_inductor.layouts import LAYOUTS
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates import costs, whole

aten = torch.ops.aten
F32 = torch.float32


def _integers(p: Problem) -> Any:
    """w_q[N, K] as a node, int8."""
    layout = LAYOUTS[p.layout]
    if (p.layout, p.bits) == ("plain", 8):
        return p.w
    load = p.w.make_loader()

    def body(ops: Any, index: Any) -> Any:
        if layout.locate is None:
            raise NotImplementedError(f"{p.layout} is for kernels of its own")
        place, bit = layout.locate(p.bits, *index, ir.floor_div, ir.modulo)
        if p.bits == 8:
            return load(place)
        word, shift = ops.to_dtype(load(place), torch.int32), ops.index_expr(bit, torch.int32)
        nibble = ops.bitwise_and(ops.bitwise_right_shift(word, shift), ops.constant(15, torch.int32))
        if layout.signed:
            nibble = ops.bitwise_xor(nibble, ops.constant(8, torch.int32))
        return ops.to_dtype(ops.sub(nibble, ops.constant(8, torch.int32)), torch.int8)

    return ir.pointwise((p.n, p.k), torch.int8, p.device, body)


def _dense(p: Problem, dtype: torch.dtype) -> Any:
    """The dequantized weight[N, K] in `dtype`: a pointwise node, computed in fp32; a kernel of ours where a layout is out
    of K's order, which is two to three times as fast (28672x4096 of int4 on an H100: 104 us, not 317).
    """
    if (written := whole.dense(p, dtype)) is not None:
        return ir.to_dtype(written, dtype)
    load = _values(p)
    return ir.pointwise((p.n, p.k), dtype, p.device, lambda ops, index: ops.to_dtype(load(ops, index), dtype))


def _values(p: Problem, row: Any = None) -> Callable[[Any, Any], Any]:
    """(ops, (n, k)) -> the dequantized weight there, fp32; with row[1, N] in units of it, as qparams.to_rows."""
    q = _integers(p).make_loader()
    scale = p.scale.make_loader()
    blocks = len(p.scale.get_size()) > 2
    zero = None if p.zero is None else p.zero.make_loader()
    unit = None if row is None else row.make_loader()

    def value(ops: Any, index: Any) -> Any:
        n, k = index
        # k // size. Inductor's C++ loops are split by a division of k alone, and lose what is left of K (torch 2.11 to 2.13)
        even = p.k % p.group_size == 0
        group = (ir.floor_div(k, p.group_size) if even else ir.floor_div(2 * k + 1, 2 * p.group_size), n)
        if blocks:
            group = packing_cuda.locate_group(*group, p.group_size, ir.floor_div, ir.modulo)
        value, s = (ops.to_dtype(t, F32) for t in (q((n, k)), scale(group)))
        z = None if zero is None else ops.to_dtype(zero(group), F32)
        if unit is not None:
            one = ops.truediv(ops.constant(1.0, F32), unit((0, n)))
            s = ops.mul(s, one)
            z = z if z is None or p.zero_point == "int" else ops.mul(z, one)
        if z is None:
            return ops.mul(value, s)
        return ops.mul(ops.sub(value, z), s) if p.zero_point == "int" else ops.add(ops.mul(value, s), z)

    return value


def _matmul(x: Any, w: Any, p: Problem, dtype: torch.dtype) -> Any:
    """x[M, K] @ w[N, K]^T in `dtype`; one row is a reduction that fuses with what makes w."""
    if ir.static(p.m) == 1:
        partial = ir.aten(aten.mul.Tensor, ir.to_dtype(x, F32), ir.to_dtype(w, F32))
        return ir.to_dtype(ir.view(ir.aten(aten.sum.dim_IntList, partial, [1]), [1, p.n]), dtype)
    return ir.aten(aten.mm.default, ir.to_dtype(x, dtype), ir.aten(aten.permute.default, ir.realize(w), [1, 0]))


def _add_bias(y: Any, p: Problem) -> Any:
    if p.bias is None:
        return ir.to_dtype(y, p.out_dtype)
    return ir.to_dtype(ir.aten(aten.add.Tensor, ir.to_dtype(y, F32), ir.to_dtype(p.bias, F32)), p.out_dtype)


def _int_mm(p: Problem) -> Any | None:
    """int32[M, N] exact, or None where aten._int_mm cannot: CUDA's wants M > 16 and K, N of 8; the CPU's is wrong for K = 1."""
    m = ir.static(p.m)
    if p.groups > 1 or p.k < 2:
        return None
    if p.device.type == "cuda" and (m is None or m <= 16 or p.k % 8 or p.n % 8):
        return None
    w = ir.realize(_integers(p))
    return ir.aten(aten._int_mm.default, ir.realize(p.x), ir.aten(aten.permute.default, w, [1, 0]))


def _dynamic(p: Problem) -> tuple[str, Any]:
    row = lambda t: ir.to_dtype(t, F32)  # noqa: E731
    total = _int_mm(p)
    if total is None:
        # Values of both sides on the model's own scale: an integer product in fp16 would overflow before its rescale.
        x = row(p.x)
        if p.x_zero is not None:
            x = ir.aten(aten.sub.Tensor, x, row(p.x_zero))
        x = ir.aten(aten.mul.Tensor, x, p.x_scale)
        dtype = F32 if p.device.type == "cpu" else p.out_dtype
        return "portable: dequantize + mm", _add_bias(_matmul(x, _dense(p, dtype), p, dtype), p)
    columns = lambda t: row(ir.aten(aten.slice.Tensor, t, 1, 0, p.n))  # noqa: E731
    total, scale = row(total), columns(p.scale)
    sums = None if p.sums is None else columns(p.sums)
    x_sum = None
    if p.zero is not None:
        x_sum = row(ir.aten(aten.sum.dim_IntList, ir.to_dtype(p.x, torch.int32), [1], True))
    if p.x_zero is not None:
        total = ir.aten(aten.sub.Tensor, total, ir.aten(aten.mul.Tensor, row(p.x_zero), sums))
        if x_sum is not None:
            x_sum = ir.aten(aten.sub.Tensor, x_sum, ir.aten(aten.mul.Tensor, row(p.x_zero), float(p.k)))
    y = ir.aten(aten.mul.Tensor, total, scale)
    if x_sum is not None:
        zero = columns(p.zero)
        if p.zero_point == "int":
            zero = ir.aten(aten.neg.default, ir.aten(aten.mul.Tensor, zero, scale))
        y = ir.aten(aten.add.Tensor, y, ir.aten(aten.mul.Tensor, x_sum, zero))
    return "portable: _int_mm + rescale", _add_bias(ir.aten(aten.mul.Tensor, y, p.x_scale), p)


def linear(p: Problem) -> tuple[str, Any]:
    """(kernel name, y[M, N])."""
    if ir.static(p.m) == 0 or p.n == 0:
        return "nothing to do", ir.aten(aten.full.default, [p.m, p.n], 0, dtype=p.out_dtype, device=p.device)
    if p.dynamic:
        return _dynamic(p)
    dtype = p.x.get_dtype()
    return "portable: dequantize + mm", _add_bias(_matmul(p.x, _dense(p, dtype), p, dtype), p)


def us(p: Problem, card: Card) -> float:
    """Microseconds of `linear` on a GPU where it may be the fastest: weight-only, for rows that are worth a copy in bf16."""
    m = ir.rows_hint(p.m)
    if p.dynamic or m <= costs.NOT_COPIED:
        return math.inf
    return costs.of_copy(m, p.n, p.k, p.bits, card.sms)


def grad(p: Problem) -> Any:
    """grad_x[M, K] = grad[M, N] . dequantize(w): the weight is dense for the time of one matmul."""
    if p.layout.startswith("cpu_") or ir.static(p.m) == 0 or p.k == 0 or p.n == 0:
        return ir.fallback(torch.ops.aoquant.linear_grad.default, p.x, p.w, p.scale, p.zero, *p.key)
    return ir.aten(aten.mm.default, p.x, ir.realize(_dense(p, p.out_dtype)))


def requantize(p: Problem, row: Any, layout: str) -> tuple[str, Any]:
    """(kernel name, the weight as int8[N, K] with the scales row[1, N]), written to memory once."""
    if p.layout == "cuda_bf16" and p.k and p.n and not p.beyond_32_bits:
        return "Triton to int8", whole.rows(p, row)
    if layout != "plain" or p.k == 0 or p.n == 0:
        return "eager to int8", ir.fallback(torch.ops.aoquant.requantize.default, p.w, p.scale, p.zero, row, *p.key, layout)
    load = _values(p, row)
    body = lambda ops, index: ops.to_dtype(ops.round(load(ops, index)), torch.int8)  # noqa: E731
    return "portable to int8", ir.realize(ir.pointwise((p.n, p.k), torch.int8, p.device, body))
