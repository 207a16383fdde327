"""The packs of one set of weights that a graph is called with, where it serves several (runtime.LookedUp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor import release
from aoquant_inductor.entry import Entry
from aoquant_inductor.journal import log_of
from aoquant_inductor.layouts import Packed, Strides
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.report import KEPT, RELEASED, Layer, Report
from aoquant_inductor.rewrite import Site
from aoquant_inductor.scheme import Scheme
from aoquant_inductor.watch import Watch
from aoquant_inductor.weights import STORE


@dataclass(frozen=True)
class Linear:
    """A packed linear of a graph, without the weight it was compiled with: a graph outlives its first weights.

    whole: a number that those share whose packs lie in one; strides: how its own lies, which the graph relies on.
    """

    scheme: Scheme
    shape: tuple[int, int]
    layout: str
    layer: Layer
    read_elsewhere: bool
    whole: int | None
    strides: Strides

    @classmethod
    def of(cls, site: Site) -> Linear:
        assert site.scheme is not None and site.packed is not None
        whole = None if site.whole is None else id(site.whole)
        p = site.packed
        return cls(site.scheme, p.shape, p.layout, site.layer, site.read_elsewhere, whole, p.strides)


class Group:
    """The packs of one set of weights, one block of many; in the report of the compiled object that called with them."""

    def __init__(self, weights: Sequence[torch.Tensor], like: Sequence[Sequence[Linear]], opts: Options) -> None:
        """like: the units of the graph that the packs are for."""
        packs: list[torch.Tensor] = []
        self.entries: list[Entry] = []
        context, root = dynamo.calling()
        names, layers, coming = Names(root), [], iter(weights)
        linears = [linear for unit in like for linear in unit]
        for weight, linear in zip(weights, linears, strict=True):
            if tuple(weight.shape) != linear.shape:
                raise RuntimeError(f"{linear.layer.name}: compiled for {linear.shape}, called with {tuple(weight.shape)}.")
        STORE.overwritten(weights)
        self._join(linears, weights)
        for unit in like:
            packs += self._pack(unit, [next(coming) for _ in unit]).tensors
        self.packs = tuple(packs)
        for weight, linear in zip(weights, linears, strict=True):
            entry, _, sqnr = STORE.pack(weight, linear.scheme, linear.layout)
            self.entries.append(entry)
            name = names.known(weight) or linear.layer.name
            original = RELEASED if entry.released else KEPT
            layer = replace(linear.layer, name=name, aliases=names.aliases(weight), sqnr_db=sqnr, original=original)
            if opts.release_weights:
                layer = release.let_go(layer, entry, names, opts, linear.read_elsewhere)
            layers.append(layer)
        self.refs = tuple(entry.ref for entry in self.entries)
        self.watch = Watch(self.entries)
        self.journal = None if context is None else log_of(context, dynamo.backend_of(context), root)
        self.report = Report(tuple(layers))
        if self.journal is not None:
            self.journal.graphs.append(self.report)
            self.journal.entries.update(zip(self.entries, (layer.name for layer in layers), strict=True))

    @property
    def closed(self) -> bool:
        """Whether its packs are of weights that have had data of another shape since."""
        return any(entry.closed is not None for entry in self.entries)

    def forget(self) -> None:
        """Out of the report: its weights are gone."""
        if self.journal is not None:
            self.journal.graphs[:] = [graph for graph in self.journal.graphs if graph is not self.report]

    def _join(self, linears: Sequence[Linear], weights: Sequence[torch.Tensor]) -> None:
        """Packs side by side what lay so in the block that the graph was compiled for."""
        together: dict[int, list[tuple[Linear, torch.Tensor]]] = {}
        for linear, weight in zip(linears, weights, strict=True):
            if linear.whole is not None:
                together.setdefault(linear.whole, []).append((linear, weight))
        self.parts: dict[tuple[int, Scheme, str], Packed] = {}
        for group in together.values():
            linear, members = group[0][0], [weight for _, weight in group]
            found = STORE.parts(members, linear.scheme, linear.layout)
            for weight, part in zip(members, found, strict=True):
                self.parts[id(weight), linear.scheme, linear.layout] = part

    def _pack(self, unit: Sequence[Linear], weights: Sequence[torch.Tensor]) -> Packed:
        if len(unit) == 1:
            weight, scheme, layout, strides = weights[0], unit[0].scheme, unit[0].layout, unit[0].strides
            packed = self.parts.get((id(weight), scheme, layout)) or STORE.pack(weight, scheme, layout)[1]
            return packed if packed.lies(strides) else STORE.pack(weight, scheme, layout, strides=strides)[1]
        whole = STORE.pack_together(weights, unit[0].scheme, unit[0].layout, always=True)
        assert whole is not None
        return whole
