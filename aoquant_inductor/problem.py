"""One linear as a lowering sees it: IR nodes, sizes and what the weight is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor.layouts import WeightKey
from aoquant_inductor.scheme import DTYPES


@dataclass(frozen=True)
class Problem:
    """x[M, K] (int8 with x_scale[M, 1], x_zero[M, 1] when dynamic), the packed weight, bias[N] -> y[M, N] in out_dtype.

    symmetric: x is floating and quantized per token by the kernel itself, like this; None: it is not. by_tma: a GPU's tensor
    memory accelerator can read x.

    Of a backward x is grad[M, N], and the result grad_x[M, K].
    """

    x: Any
    x_scale: Any
    x_zero: Any
    w: Any
    scale: Any
    zero: Any
    sums: Any
    bias: Any
    key: WeightKey
    out_dtype: torch.dtype
    leading: tuple[Any, ...]
    m: Any
    device: torch.device
    symmetric: bool | None = None
    by_tma: bool = False

    @classmethod
    def of(
        cls, x: Any, x_scale: Any, x_zero: Any, w: Any, scale: Any, zero: Any, sums: Any, bias: Any,
        key: Sequence[Any], out_dtype: torch.dtype, symmetric: bool | None = None,
    ) -> Problem:
        # before any view of it: what reads a view of an unrealized node gets a copy of its own, one per linear
        for node in (x, x_scale, x_zero):
            if node is not None:
                node.realize()
        leading = tuple(x.get_size()[:-1])
        m = ir.product(leading)
        scale, zero = _alike(scale, zero)
        rows = lambda t: None if t is None else ir.view(t, [m, 1])  # noqa: E731
        device, x = x.get_device(), ir.view(x, [m, x.get_size()[-1]])
        return cls(
            x, rows(x_scale), rows(x_zero), w, scale, zero, sums, bias, tuple(key), out_dtype,  # type: ignore[arg-type]
            leading, m, device, symmetric, device.type == "cuda" and ir.by_tma(x),
        )

    @classmethod
    def of_weight(cls, w: Any, scale: Any, zero: Any, key: Sequence[Any], out_dtype: torch.dtype) -> Problem:
        """The weight[N, K] alone: it is what has M rows."""
        scale, zero = _alike(scale, zero)
        return cls(
            None, None, None, w, scale, zero, None, None, tuple(key), out_dtype, (), key[1], w.get_device()  # type: ignore[arg-type]
        )

    @property
    def k(self) -> int:
        return self.key[0]

    @property
    def n(self) -> int:
        return self.key[1]

    @property
    def bits(self) -> int:
        return DTYPES[self.key[2]][0]

    @property
    def group_size(self) -> int:
        """Elements along K of one scale; K for per-channel."""
        return self.key[3] or max(self.k, 1)

    @property
    def groups(self) -> int:
        size = self.scale.get_size()
        return int(size[0] if len(size) == 2 else size[1] * size[3])  # packing_cuda.lay_groups

    @property
    def zero_point(self) -> str:
        return self.key[4]

    @property
    def layout(self) -> str:
        return self.key[5]

    @property
    def dynamic(self) -> bool:
        return self.x_scale is not None or self.symmetric is not None

    @property
    def beyond_32_bits(self) -> bool:
        """Whether x, y or the weight have more elements than the indices of a Triton kernel of ours tell apart."""
        m = 0 if self.x is None else ir.rows_hint(self.m)
        return max(m * self.k, m * self.n, self.n * self.k) > torch.iinfo(torch.int32).max

    @property
    def inputs(self) -> dict[str, Any]:
        """The nodes that this problem has, by their names in every kernel (templates/common.jinja)."""
        sums = None if self.x_zero is None and self.symmetric is not False else self.sums
        named = {
            "X": self.x, "W": self.w, "WS": self.scale, "XS": self.x_scale, "XZ": self.x_zero, "WSUM": sums,
            "WZ": self.zero, "BIAS": self.bias,
        }
        return {name: node for name, node in named.items() if node is not None}

    def call(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The op itself over tensors in the order of `inputs`; what follows them is ignored."""
        t = dict(zip(self.inputs, tensors, strict=False))
        weight = (t["W"], t["WS"], t.get("WZ"))
        op = torch.ops.aoquant
        if self.dynamic:
            quantize = {None: None, True: op.quantize_per_token, False: op.quantize_per_token_asym}[self.symmetric]
            left = (t["X"], t["XS"], t.get("XZ")) if quantize is None else (*quantize(t["X"]), None)[:3]
            y = op.linear_dynamic(*left, *weight, t.get("WSUM"), t.get("BIAS"), *self.key, self.out_dtype)
        else:
            y = op.linear_wo(t["X"], *weight, t.get("BIAS"), *self.key)
        return cast(torch.Tensor, y)


def _alike(scale: Any, zero: Any) -> tuple[Any, Any]:
    """Both in the same strides, which a kernel asks of one of them: as they are, where both are parts of the same."""
    if zero is None or ir.strides(scale) == ir.strides(zero):
        return scale, zero
    return ir.realize(scale), ir.realize(zero)
