"""(the Dynamo graph, its sites) -> the quantized graph: a copy, in which every packed linear is what its pattern writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from aoquant_inductor import _inductor, backward
from aoquant_inductor import _inductor_regions as regions
from aoquant_inductor import _inductor_shapes as shapes
from aoquant_inductor.patterns import PATTERNS, REQUANTIZED
from aoquant_inductor.patterns.site import PackNodes, Shared
from aoquant_inductor.rewrite import Site
from aoquant_inductor.scheme import LARGE_M


@dataclass(frozen=True)
class Rewritten:
    """gm(*packs, *inputs that are left): `consumed` are the original's placeholders that it no longer needs."""

    gm: fx.GraphModule
    packs: list[torch.Tensor]
    consumed: list[fx.Node]
    units: list[list[Site]]  # the sites of each packed weight or of siblings that share a launch, in the order of the packs
    differentiable: bool
    rows: sympy.Expr | None = None  # the symbolic M of most linears, if there is one and the inputs tell it
    large: fx.GraphModule | None = None  # the same for more than LARGE_M rows, where a scheme makes a difference of it

    @property
    def sites(self) -> list[Site]:
        return [site for unit in self.units for site in unit]


def apply(gm: fx.GraphModule, sites: Sequence[Site], differentiable: bool = False) -> Rewritten:
    """Rewritten copies of gm, whose first inputs are the packs; `differentiable`: with a backward for x and the biases.

    A symbolic M gives two copies if there are schemes with large_m, over the same packs. Their activations stay as they are in
    a differentiable graph, which is one for all M, and where the inputs do not tell M.
    """
    rows = _rows(gm.graph, sites)
    rewritten = replace(_write(gm, sites, differentiable, None), rows=rows)
    if not differentiable and rows is not None and any(site.requantized(rows) and not site.requantized(None) for site in sites):
        rewritten = replace(rewritten, large=_write(gm, sites, False, rows).gm)
    for site in sites:
        few = isinstance(site.m, sympy.Integer) and site.m <= LARGE_M
        if site.scheme is not None and site.scheme.large_m and not few and (differentiable or not site.requantized(rows)):
            why = "the graph has a backward" if differentiable else "its M is not that of most linears of the graph"
            site.layer = replace(site.layer, detail=f"keeps its activation as it is at every M: {why}.")
    return rewritten


def _rows(graph: fx.Graph, sites: Sequence[Site]) -> sympy.Expr | None:
    found = Counter(site.m for site in sites if site.launch is not None)
    expr = next((expr for expr, _ in found.most_common() if expr.free_symbols), None)
    return None if expr is None or shapes.evaluator(expr, shapes.symbols(graph)) is None else expr


def _write(gm: fx.GraphModule, sites: Sequence[Site], differentiable: bool, many: sympy.Expr | None) -> Rewritten:
    """many: the symbolic M that the copy is for more than LARGE_M of."""
    copy, env = _inductor.copy_graph(gm)
    graph = copy.graph
    first = next(iter(graph.nodes))
    packs: list[torch.Tensor] = []
    nodes: dict[int, PackNodes] = {}
    units: dict[int, list[Site]] = {}
    results: dict[tuple[int, fx.Node], tuple[fx.Node, int]] = {}  # (launch for several sites, its x): and the columns taken
    shared: Shared = {}
    detached: dict[fx.Node, fx.Node] = {}

    def placeholder(value: torch.Tensor | None) -> fx.Node | None:
        if value is None:
            return None
        with graph.inserting_before(first):
            node = _inductor.static_placeholder(graph, f"aoquant_{len(packs)}", value)
        packs.append(value)
        return node

    def emit(site: Site, pack: PackNodes) -> fx.Node:
        assert site.scheme is not None and site.packed is not None
        x, bias = env[site.x], None if site.bias is None else env[site.bias]
        if site.x.meta["example_value"].dtype != site.out_dtype:  # autocast
            x = graph.call_method("to", (x, site.out_dtype))
        name = REQUANTIZED if site.requantized(many) and not differentiable else site.scheme.pattern
        rows = int(site.m) if isinstance(site.m, sympy.Integer) else None
        pattern, rest = PATTERNS[name], (site.scheme, site.out_dtype, {} if site.x_written else shared, rows)
        if pack.packed is site.packed:
            if not differentiable:
                return pattern(graph, x, pack, bias, *rest)
            inner = [backward.detach(graph, t, detached) for t in (x, bias)]
            return backward.attach(graph, pattern(graph, inner[0], pack, inner[1], *rest), (x, bias), pack)
        shares = (id(pack.packed), site.x)  # a layer that is called twice launches twice
        y, start = results.get(shares) or (pattern(graph, x, pack, None, *rest), 0)
        n = site.packed.shape[0]
        results[shares] = y, start + n
        part = graph.call_function(torch.narrow, (y, -1, start, n))
        # contiguous, as the linear's result was where Dynamo traced what follows; Inductor inlines the copy into what reads it
        return graph.call_method("contiguous", (part,)) if bias is None else graph.call_function(torch.add, (part, bias))

    for site in sites:
        launch = site.launch
        if launch is None:
            continue
        if id(launch) not in nodes:
            w, scale, *rest = (placeholder(t) for t in launch.parts)
            assert w is not None and scale is not None
            nodes[id(launch)] = PackNodes(launch, w, scale, *rest)
        unit = units.setdefault(id(launch), [])
        if launch is not site.packed or not unit:
            unit.append(site)
        node = env[site.node]
        before, again = node.prev, regions.tags(node)
        with graph.inserting_before(node):
            y = emit(site, nodes[id(launch)])
        while again and (before := before.next) is not node:
            before.meta.update(again)
        y.meta.update(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        env[site.node] = y  # what later sites read
    weights = dict.fromkeys(site.weight for site in sites if site.packed is not None)
    consumed = [w for w in weights if not env[w].users]
    for weight in consumed:
        graph.erase_node(env[weight])
    graph.lint()
    copy.recompile()
    return Rewritten(copy, packs, consumed, list(units.values()), differentiable)
