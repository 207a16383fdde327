"""Dynamic int8 activations: linear(x, w, b) -> quantize_per_token(x), then aoquant.linear_dynamic with both scales.

Linears that read the same activation share one quantization. For the few rows of a decode the op is told x as well.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from aoquant_inductor import ops  # noqa: F401  (defines torch.ops.aoquant)
from aoquant_inductor.patterns.site import PackNodes, Shared
from aoquant_inductor.scheme import Scheme

TOLD_ROWS = {"cuda": 4}
"""device type -> up to this M a kernel may quantize x itself (templates/gemv.py), which saves a launch. With more rows each of
its programs would do too much over again; there the quantization fuses into what makes x.
"""


def quantized(graph: fx.Graph, x: fx.Node, symmetric: bool, shared: Shared) -> tuple[fx.Node | None, ...]:
    """(x_q, x_scale, x_zero), made once for all that read x."""
    key = (x, symmetric)
    if key not in shared:
        name = "quantize_per_token" if symmetric else "quantize_per_token_asym"
        made = graph.call_function(getattr(torch.ops.aoquant, name).default, (x,))
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(2 if symmetric else 3)]
        shared[key] = (*parts, *[None] * (3 - len(parts)))
    return shared[key]


def emit(
    graph: fx.Graph, x: fx.Node, pack: PackNodes, bias: fx.Node | None, scheme: Scheme, out_dtype: torch.dtype,
    shared: Shared, rows: int | None,
) -> fx.Node:
    """Nodes for one linear at the graph's insertion point; returns the node of y."""
    symmetric = scheme.activation is not None and scheme.activation.symmetric
    left = quantized(graph, x, symmetric, shared)
    told = rows is not None and rows <= TOLD_ROWS.get(pack.packed.w.device.type, 0)
    return graph.call_function(
        torch.ops.aoquant.linear_dynamic.default,
        (*left, pack.w, pack.scale, pack.zero, pack.sums, bias, *pack.weight_args, out_dtype),
        {"x": x} if told else {},
    )
