"""One graph of Dynamo's, one of Inductor's per range of M: a decode kernel must not serve a prefill, nor the other way.

A graph with a symbolic M holds for every M, but the tile of a kernel does not fit every M. So Inductor compiles such a graph
again at the first call in another range of lowering.M_RANGES. Dynamo does not recompile, and a call costs one comparison.
Where a scheme has large_m, LARGE_M ends a range on every device, and beyond it the second rewritten graph is compiled.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from aoquant_inductor import _inductor, lowering
from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import _inductor_shapes as shapes
from aoquant_inductor.emit import Rewritten
from aoquant_inductor.lowering import Kernels
from aoquant_inductor.scheme import LARGE_M

log = logging.getLogger("aoquant_inductor")

Compiled = Callable[..., Any]
Note = Callable[[Kernels | str], None]


def compile_graph(
    rewritten: Rewritten, inputs: Sequence[Any], patches: Mapping[str, Any], constant: bool, note: Note,
    hint: Callable[[str], None],
) -> Compiled:
    """Inductor over rewritten.gm(*packs, *inputs), for any M. `note` is told the kernels of the graphs that are made later, or
    what all linears run by; `hint`, what the user can do for faster ones.
    """
    gm, large, packs = rewritten.gm, rewritten.large, rewritten.packs  # not the sites: they hold the weights
    if rewritten.differentiable:
        # One graph for every M, since its backward is one. Both halves read the packs: inputs, not constants of one of them.
        return lowering.safely(lambda: _inductor.compile_graph(gm, inputs, patches, packs), hint)

    def form(within: ir.Range | None) -> fx.GraphModule:
        return large if large is not None and within is not None and within.first > LARGE_M else gm

    def build(values: Sequence[Any], within: ir.Range | None) -> Compiled:
        graph, variant = form(within), repr(within)
        with torch.no_grad(), ir.rows_within(within):
            return lowering.safely(
                lambda: _inductor.compile_graph(graph, values, patches, packs, constant, variant=variant), hint
            )

    device = rewritten.sites[0].value.device.type
    bounds = lowering.M_RANGES.get(device, ())
    if large is not None:
        bounds = tuple(sorted({*bounds, LARGE_M}))
    expr = rewritten.rows if bounds else None
    rows = None if expr is None else shapes.evaluator(expr, shapes.symbols(gm.graph))
    traced = [*packs, *map(shapes.hint, inputs)]
    if expr is None or rows is None or any(value is None for value in traced):  # None: mark_unbacked, which has no value yet
        return build(inputs, None)
    if device in lowering.M_RANGES:
        # now, for all ranges: a later one's kernels may read or write what none of the first's does (x itself, a scale per row)
        shapes.guard_32_bits(inputs, [count for site in rewritten.sites for count in site.elements])
    graphs = _Graphs(form, packs, expr, rows, bounds, build, note)
    graphs.start(traced, inputs)
    return graphs.call


class _Graphs:
    """The Inductor graphs of one rewritten graph, by range of M; one that is missing is compiled when a call needs it."""

    def __init__(
        self, form: Callable[[ir.Range | None], fx.GraphModule], packs: Sequence[torch.Tensor], expr: sympy.Expr,
        rows: Callable[[Sequence[Any]], int], bounds: tuple[int, ...], build: Callable[[Sequence[Any], ir.Range], Compiled],
        note: Note,
    ) -> None:
        """form: what a range compiles; packs: its first arguments. rows: inputs -> M, expr. bounds: the last M of all ranges
        but the last.
        """
        self.form, self.packs, self.expr = form, packs, expr
        self.rows, self.bounds, self.build, self.note = rows, bounds, build, note
        self.compiled: list[Compiled | None] = [None] * (len(bounds) + 1)
        self.lock = threading.Lock()

    def start(self, args: Sequence[Any], inputs: Sequence[Any]) -> None:
        """Compiles for the M of args, while Dynamo waits for it."""
        index = self.index(args)
        self.compiled[index] = self.build(inputs, self.range(index))

    def index(self, args: Sequence[Any]) -> int:
        return bisect.bisect_left(self.bounds, self.rows(args))

    def range(self, index: int) -> ir.Range:
        return ir.Range(self.expr, (0, *self.bounds)[index] + 1, (*self.bounds, None)[index])

    def call(self, *args: Any) -> Any:
        index = self.index(args)
        function = self.compiled[index]
        if function is None:
            function = self._add(index, args)
        return function(*args)

    def _add(self, index: int, args: Sequence[Any]) -> Compiled:
        with dynamo.compiling(), self.lock:
            found = self.compiled[index]
            if found is None:
                found = self._compile(index, args)
            self.compiled[index] = found
            return found

    def _compile(self, index: int, args: Sequence[Any]) -> Compiled:
        within = self.range(index)
        gm = self.form(within)
        inputs = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")[len(self.packs) :]]
        with shapes.sizes_of(gm.graph, self.packs, args, inputs) as guarded, lowering.recording() as kernels:
            found = self.build(inputs, within)
            holds = not guarded()
        if holds:
            self.note(kernels)
            return found
        # not by another range's kernels: their workspaces are made for its M
        log.warning(
            "M of %s runs op by op in plain PyTorch: a compile of its own would not hold for all of it (seen at M = %d).",
            within, self.rows(args),
        )
        self.note(f"plain PyTorch for M of {within}")
        return gm
