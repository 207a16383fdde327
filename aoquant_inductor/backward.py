"""Gradients beside a frozen packed weight: for x and the bias, exactly those of the dequantized weight.

The forward is whatever the scheme's pattern wrote, over detached inputs; this ties its result back to them. Dynamic schemes are
straight-through: rounding x counts as the identity, so grad_x = grad_y . dequantize(w) for every scheme. The weight
itself gets no gradient: a linear whose weight requires one is not quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from aoquant_inductor import ops  # noqa: F401  (defines torch.ops.aoquant)
from aoquant_inductor.layouts import WeightKey
from aoquant_inductor.patterns.site import PackNodes


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, w: torch.Tensor, scale: torch.Tensor,
        zero: torch.Tensor | None, key: WeightKey,
    ) -> torch.Tensor:
        ctx.save_for_backward(w, scale, zero)
        ctx.key = key
        ctx.mark_dirty(y)  # nobody else has it, and a view of it could not be written to in place
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        grad_x = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_x = torch.ops.aoquant.linear_grad(grad, *ctx.saved_tensors, *ctx.key)
        if ctx.needs_input_grad[2]:
            rows = tuple(range(grad.dim() - 1))
            grad_bias = grad.sum(rows) if rows else grad  # of x[K]; a sum over () is one over all
        return None, grad_x, grad_bias, None, None, None, None


def differentiable(
    y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, w: torch.Tensor, scale: torch.Tensor,
    zero: torch.Tensor | None, *key: Any,
) -> torch.Tensor:
    """y[..., N], with the gradient of linear(x, dequantize(w), bias); AOTAutograd traces through it."""
    tied: torch.Tensor = _Linear.apply(y, x, bias, w, scale, zero, key)
    return tied


def detach(graph: fx.Graph, node: fx.Node | None, known: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The node without its gradient, made once: linears that share an activation go on sharing its quantization."""
    if node is None:
        return None
    if node not in known:
        known[node] = graph.call_method("detach", (node,))
    return known[node]


def attach(graph: fx.Graph, y: fx.Node, inputs: Sequence[fx.Node | None], pack: PackNodes) -> fx.Node:
    """y tied to its inputs (x, bias)."""
    return graph.call_function(differentiable, (y, *inputs, pack.w, pack.scale, pack.zero, *pack.weight_args))
