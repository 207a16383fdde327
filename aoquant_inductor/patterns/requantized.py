"""Beyond LARGE_M rows, of a weight-only scheme with large_m: its packed weight -> int8 with one scale per row, then as dynamic.

The int8 weight lives for one matmul. Made at every call, so that one set of packs serves every M.
"""

from __future__ import annotations

import torch
from torch import fx

from aoquant_inductor import ops  # noqa: F401  (defines torch.ops.aoquant)
from aoquant_inductor.patterns import dynamic
from aoquant_inductor.patterns.site import PackNodes, Shared
from aoquant_inductor.scheme import Scheme


def emit(
    graph: fx.Graph, x: fx.Node, pack: PackNodes, bias: fx.Node | None, scheme: Scheme, out_dtype: torch.dtype,
    shared: Shared, rows: int | None,
) -> fx.Node:
    """Nodes for one linear at the graph's insertion point; returns the node of y."""
    left, key = dynamic.quantized(graph, x, True, shared), pack.packed.int8_key
    w = graph.call_function(
        torch.ops.aoquant.requantize.default, (pack.w, pack.scale, pack.zero, pack.row, *pack.weight_args, key[-1])
    )
    return graph.call_function(
        torch.ops.aoquant.linear_dynamic.default, (*left, w, pack.row, None, None, bias, *key, out_dtype)
    )
