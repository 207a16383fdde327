"""torch's own attention modules call one op for several linears; it is written out, so that these are found."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from aoquant_inductor import _inductor_trace as tracing

log = logging.getLogger("aoquant_inductor")


def encoder_layer(
    x: torch.Tensor, width: int, heads: int, qkv: torch.Tensor, qkv_bias: torch.Tensor, out: torch.Tensor,
    out_bias: torch.Tensor, gelu: bool, norm_first: bool, eps: float, scale_1: torch.Tensor, shift_1: torch.Tensor,
    scale_2: torch.Tensor, shift_2: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor, down: torch.Tensor,
    down_bias: torch.Tensor, mask: torch.Tensor | None = None, mask_type: int | None = None,
) -> torch.Tensor:
    """What torch._transformer_encoder_layer_fwd computes of x[B, L, width]: nn.TransformerEncoderLayer without grad. But for a
    row that is all padding: it looks at nothing, as it does with grad, and is not NaN.

    mask: what not to look at is True, or not 0, since that op adds no mask of floats; of type 0 [L, L], 1 [B, L], 2 [B, heads,
    L, L].
    """
    seen = None if mask is None else ~mask.to(torch.bool)
    if seen is not None and mask_type == 1:
        seen = seen[:, None, None]

    def attend(x: torch.Tensor) -> torch.Tensor:
        each = F.linear(x, qkv, qkv_bias).unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        q, k, v = each.unbind()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return F.linear(y.transpose(1, 2).flatten(-2), out, out_bias)

    def feed(x: torch.Tensor) -> torch.Tensor:
        return F.linear((F.gelu if gelu else F.relu)(F.linear(x, up, up_bias)), down, down_bias)

    first = functools.partial(F.layer_norm, normalized_shape=(width,), weight=scale_1, bias=shift_1, eps=eps)
    second = functools.partial(F.layer_norm, normalized_shape=(width,), weight=scale_2, bias=shift_2, eps=eps)
    if norm_first:
        x = x + attend(first(x))
        return x + feed(second(x))
    x = first(x + attend(x))
    return second(x + feed(x))


WRITTEN_OUT: Mapping[object, Callable[..., Any]] = MappingProxyType(
    {F.multi_head_attention_forward: F.multi_head_attention_forward, tracing.ENCODER_LAYER: encoder_layer}
)
"""What stands in a graph for several linears -> a function of the same arguments that calls them."""


def is_one(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in WRITTEN_OUT


def write_out(gm: fx.GraphModule, wanted: Container[fx.Node]) -> None:
    """In place: every such op that reads one of the placeholders `wanted`. One that cannot be traced stays, and is reported."""
    done = False
    for node in filter(is_one, list(gm.graph.nodes)):
        inputs = node.all_input_nodes  # each once: what is one tensor in two places stays one
        if any(read in wanted for read in inputs):
            try:
                body = tracing.trace(_function(node, inputs), inputs)
            except Exception:  # whatever torch raises of sizes or subclasses that it cannot trace
                log.debug("%s cannot be written out", node.format_node(), exc_info=True)
            else:
                done |= tracing.replace(gm, node, body, inputs)
    if done:
        gm.graph.lint()
        gm.recompile()


def _function(node: fx.Node, inputs: Sequence[fx.Node]) -> Callable[..., Any]:
    """What the node computes, written out, as a function of its inputs alone."""
    leaves, form = tree_flatten((node.args, node.kwargs))

    def function(*values: object) -> Any:
        of = dict(zip(inputs, values, strict=True))
        args, kwargs = tree_unflatten([of[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves], form)
        return WRITTEN_OUT[node.target](*args, **kwargs)

    return function
