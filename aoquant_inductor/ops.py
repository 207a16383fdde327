"""torch.ops.aoquant.*: schema, meta and eager reference of every op a rewritten graph may hold.

The reference is the definition: fp32 arithmetic on the unpacked weight. Kernels are judged against it, and it is what runs
where nothing better exists. Rewriter and kernels meet here and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch

from aoquant_inductor import activations, packing, qparams
from aoquant_inductor.layouts import by_group

NAMESPACE = "aoquant"
_lib = torch.library.Library(NAMESPACE, "DEF")

# What every linear op says about its weight, after its tensors. group_size 0 is one group per row.
_WEIGHT = "int in_features, int out_features, str w_dtype, int group_size, str zero_point, str layout"


def _define(name: str, schema: str) -> None:
    _lib.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))


_define("quantize_per_token", "(Tensor x) -> (Tensor, Tensor)")
_define("quantize_per_token_asym", "(Tensor x) -> (Tensor, Tensor, Tensor)")
_define("linear_wo", f"(Tensor x, Tensor w, Tensor w_scale, Tensor? w_zero, Tensor? bias, {_WEIGHT}) -> Tensor")
_define("linear_grad", f"(Tensor grad, Tensor w, Tensor w_scale, Tensor? w_zero, {_WEIGHT}) -> Tensor")
_define(
    "linear_dynamic",
    "(Tensor x_q, Tensor x_scale, Tensor? x_zero, Tensor w, Tensor w_scale, Tensor? w_zero, Tensor? w_sums, "
    f"Tensor? bias, {_WEIGHT}, ScalarType out_dtype, *, Tensor? x=None) -> Tensor",
)
_define("requantize", f"(Tensor w, Tensor w_scale, Tensor? w_zero, Tensor row_scale, {_WEIGHT}, str to_layout) -> Tensor")


def _unpacked(
    w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, k: int, n: int, w_dtype: str, layout: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    zero = None if w_zero is None else by_group(w_zero)[:, :n]
    return packing.unpack(w, k, n, w_dtype, layout), by_group(w_scale)[:, :n], zero


def dequantize(
    w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None,
    in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str, dtype: torch.dtype,
) -> torch.Tensor:
    """(w packed, w_scale[G, N], w_zero[G, N]) -> w[N, K] in `dtype`; fp32 arithmetic."""
    q, scale, zero = _unpacked(w, w_scale, w_zero, in_features, out_features, w_dtype, layout)
    return qparams.dequantize(q, scale, zero, group_size or None, zero_point).to(dtype)


def linear_wo(
    x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, bias: torch.Tensor | None,
    in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str,
) -> torch.Tensor:
    """(x[..., K] floating, w packed, w_scale[G, N], w_zero[G, N], bias[N]) -> y[..., N] in x's dtype; fp32 accumulation."""
    spec = (in_features, out_features, w_dtype, group_size, zero_point, layout)
    dense = dequantize(w, w_scale, w_zero, *spec, torch.float32)
    return torch.nn.functional.linear(x.float(), dense, None if bias is None else bias.float()).to(x.dtype)


def linear_grad(
    grad: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None,
    in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str,
) -> torch.Tensor:
    """(grad[..., N] floating, w packed, w_scale[G, N], w_zero[G, N]) -> grad_x[..., K] = grad . dequantize(w), in grad's dtype.

    One op, not a dequantization and a matmul: what does not depend on grad would be moved into the forward and saved, dense.
    """
    return grad @ dequantize(w, w_scale, w_zero, in_features, out_features, w_dtype, group_size, zero_point, layout, grad.dtype)


def linear_dynamic(
    x_q: torch.Tensor, x_scale: torch.Tensor, x_zero: torch.Tensor | None,
    w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, w_sums: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str,
    out_dtype: torch.dtype, *, x: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x_q[..., K] int8, x_scale[..., 1], x_zero[..., 1], w packed, w_scale[G, N], ...) -> y[..., N]; exact integer sums.

    y = x_scale * (x_q - x_zero) . dequantize(w) + bias. w_sums[1, N] is what x_zero multiplies: sum_k w_q where G = 1, else
    sum_k w_q * w_scale. x[..., K], where it is given, is what was quantized, for a kernel that does it itself.
    """
    q, scale, zero = _unpacked(w, w_scale, w_zero, in_features, out_features, w_dtype, layout)
    g = group_size or max(in_features, 1)
    shape = x_q.shape[:-1]
    # float64 holds every int32 sum exactly and has a fast matmul everywhere
    left, right = x_q.reshape(-1, in_features).double(), q.double()
    y = torch.zeros(left.shape[0], out_features, dtype=torch.float64, device=x_q.device)
    offset = None if x_zero is None else x_zero.reshape(-1, 1).double()
    if offset is not None and w_sums is None:
        raise ValueError("linear_dynamic: asymmetric activations need w_sums")
    correction = 0 if offset is None or w_sums is None else offset * w_sums[:, :out_features].double()
    for i, part in enumerate(left.split(g, 1)):
        s, total = scale[i].double(), part @ right[:, i * g : i * g + part.shape[1]].t()
        y += (total - correction) * s if scale.shape[0] == 1 else total * s
        if zero is not None:
            z = zero[i].double()
            x_sum = part.sum(1, keepdim=True) - (0 if offset is None else offset * part.shape[1])
            y -= x_sum * (z * s if zero_point == "int" else -z)
    if scale.shape[0] > 1:
        y -= correction
    y = y * x_scale.reshape(-1, 1).double()
    if bias is not None:
        y = y + bias.double()
    return y.to(out_dtype).reshape(*shape, out_features)


def requantize(
    w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, row_scale: torch.Tensor,
    in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str, to_layout: str,
) -> torch.Tensor:
    """(w packed, w_scale[G, N], w_zero[G, N], row_scale[1, N] fp32) -> round(dequantize(w) / row_scale) int8 in `to_layout`.

    linear_dynamic reads it as an int8 weight with the scales row_scale.
    """
    q, scale, zero = _unpacked(w, w_scale, w_zero, in_features, out_features, w_dtype, layout)
    rows = qparams.to_rows(q, scale, zero, row_scale[:, :out_features], group_size or None, zero_point)
    return packing.pack_rows(rows, to_layout)


# Implicit: AOTAutograd traces through these two, so that Inductor fuses a row reduction and a pointwise node into the producer.
_lib.impl("quantize_per_token", activations.quantize_per_token, "CompositeImplicitAutograd")
_lib.impl("quantize_per_token_asym", activations.quantize_per_token_asym, "CompositeImplicitAutograd")
_lib.impl("linear_wo", linear_wo, "CompositeExplicitAutograd")
_lib.impl("linear_grad", linear_grad, "CompositeExplicitAutograd")
_lib.impl("linear_dynamic", linear_dynamic, "CompositeExplicitAutograd")
_lib.impl("requantize", requantize, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::linear_grad", lib=_lib)
def _(grad: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None,
      in_features: int, *spec: object) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@torch.library.register_fake(f"{NAMESPACE}::linear_wo", lib=_lib)
def _(x: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, bias: torch.Tensor | None,
      in_features: int, out_features: int, *spec: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake(f"{NAMESPACE}::linear_dynamic", lib=_lib)
def _(x_q: torch.Tensor, x_scale: torch.Tensor, x_zero: torch.Tensor | None, w: torch.Tensor, w_scale: torch.Tensor,
      w_zero: torch.Tensor | None, w_sums: torch.Tensor | None, bias: torch.Tensor | None,
      in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str,
      out_dtype: torch.dtype, *, x: torch.Tensor | None = None) -> torch.Tensor:
    return x_q.new_empty((*x_q.shape[:-1], out_features), dtype=out_dtype)


@torch.library.register_fake(f"{NAMESPACE}::requantize", lib=_lib)
def _(w: torch.Tensor, w_scale: torch.Tensor, w_zero: torch.Tensor | None, row_scale: torch.Tensor,
      in_features: int, out_features: int, w_dtype: str, group_size: int, zero_point: str, layout: str,
      to_layout: str) -> torch.Tensor:
    return packing.pack_rows(w.new_empty((out_features, in_features), dtype=torch.int8), to_layout)


def _more_rows(op: str) -> None:
    """Under torch.vmap a batch of what the op reads first is that many more rows: one call, not one for each."""

    def rule(info: object, in_dims: tuple[int | None, ...], first: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, int]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(f"{NAMESPACE}::{op}: torch.vmap over a weight or a bias.")
        return getattr(torch.ops.aoquant, op)(first.movedim(in_dims[0], 0), *rest), 0

    torch.library.register_vmap(f"{NAMESPACE}::{op}", rule, lib=_lib)


# not linear_dynamic: register_vmap takes no op with a keyword-only tensor
_more_rows("linear_wo")
_more_rows("linear_grad")
