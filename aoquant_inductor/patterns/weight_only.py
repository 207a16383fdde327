"""Weight-only: linear(x, w, b) -> aoquant.linear_wo(x, packed w, b)."""

from __future__ import annotations

import torch
from torch import fx

from aoquant_inductor import ops  # noqa: F401  (defines torch.ops.aoquant)
from aoquant_inductor.patterns.site import PackNodes, Shared
from aoquant_inductor.scheme import Scheme


def emit(
    graph: fx.Graph, x: fx.Node, pack: PackNodes, bias: fx.Node | None, scheme: Scheme, out_dtype: torch.dtype,
    shared: Shared, rows: int | None,
) -> fx.Node:
    """Nodes for one linear at the graph's insertion point; returns the node of y."""
    return graph.call_function(
        torch.ops.aoquant.linear_wo.default, (x, pack.w, pack.scale, pack.zero, bias, *pack.weight_args)
    )
