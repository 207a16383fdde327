"""What runs at every call of a compiled graph: the check for changed weights, and where the packs come from."""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from aoquant_inductor import _inductor, native
from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor.emit import Rewritten
from aoquant_inductor.errors import UnsupportedLayers
from aoquant_inductor.group import Group, Linear
from aoquant_inductor.journal import Log, log_of
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.qparams import NonFinite
from aoquant_inductor.report import SKIPPED, Layer, Report
from aoquant_inductor.watch import Watch

Compiled = Callable[..., Any]
MAX_CONSTANT_GRAPHS = 4

_warned: set[str] = set()


def warn_once(text: str) -> None:
    """A UserWarning, the first time in this process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"aoquant: {text}", UserWarning, stacklevel=3)


@dataclass
class Seen:
    """What one code object was compiled for with one set of options. The code is held: its id is the key."""

    code: object
    weights: set[int]
    graphs: set[tuple[int, ...]]

    def constant(self, identity: tuple[int, ...]) -> bool:
        """Whether these weights may be constants: the first ones seen, or an update of a few of them.

        Weights that are replaced again and again become inputs: each new constant graph would count against Dynamo's
        recompile limit, past which it runs eager without a word.
        """
        if identity not in self.graphs:
            if self.graphs and (not self.weights.intersection(identity) or len(self.graphs) >= MAX_CONSTANT_GRAPHS):
                return False
            self.graphs.add(identity)
            self.weights.update(identity)
        return True


def constant(function: Compiled, rewritten: Rewritten, checked: bool, journal: Log) -> Compiled:
    """The callable of a graph that holds its packs, and the journal of them."""
    packs = tuple(rewritten.packs)
    watch = Watch([site.entry for site in rewritten.sites if site.entry is not None])
    stale = watch.stale

    def call(*args: Any) -> Any:
        if stale():
            watch.update()
        return function(*packs, *args)

    def frozen(*args: Any) -> Any:
        return function(*packs, *args)

    chosen = call if checked else frozen
    chosen.journal = journal  # type: ignore[attr-defined]
    return chosen


class LookedUp:
    """The callable of a graph that serves any weights of its shapes: packs are looked up by the weights of the call."""

    def __init__(
        self, gm: fx.GraphModule, function: Compiled, rewritten: Rewritten, weights: list[int], kept: list[int],
        opts: Options, patches: Mapping[str, Any],
    ) -> None:
        """gm: the graph before the rewrite; weights, kept: which of its arguments are looked up, and which are passed on."""
        self.weights, self.kept = tuple(weights), tuple(kept)
        self.pick, self.keep = _picker(weights), _picker(kept)
        self.like = [[Linear.of(site) for site in unit] for unit in rewritten.units]
        self.function, self.opts, self.checked = function, opts, opts.weights == "checked"
        self.groups: dict[tuple[int, ...], Group | Compiled] = {}
        self.gm, self.patches, self.differentiable = gm, patches, rewritten.differentiable

    def compiled(self) -> Compiled:
        """What a call runs: in C++ (csrc/lookup.h), where that is built by now, all but the first call with its weights."""
        kind = native.lookup_type()
        if kind is None:
            return partial(self.call, None)
        fast: Compiled = kind(self.weights, self.kept, self.function, self.call)
        return fast

    def call(self, fast: Any, *args: Any) -> Any:
        """fast: the native Lookup that asks, if one does."""
        weights = self.pick(args)
        group = self.groups.get(tuple(map(id, weights)))
        if isinstance(group, Group) and self.checked and group.watch.stale():
            if group.closed:  # a weight has had another shape since
                group.forget()
                group = None
            else:
                group.watch.update()
        if group is None:
            group = self._add(weights, args, fast)
        if not isinstance(group, Group):
            return group(*args)
        if fast is not None and not (self.checked and group.watch.native is None):
            fast.remember(group.refs, group.packs, group.watch.native if self.checked else None)
        return self.function(*group.packs, *self.keep(args))

    def _add(self, weights: Sequence[torch.Tensor], args: Sequence[Any], fast: Any) -> Group | Compiled:
        key = tuple(map(id, weights))
        group: Group | Compiled
        try:
            group = Group(weights, self.like, self.opts)
        except (NonFinite, torch.OutOfMemoryError) as error:
            found = f"holds {error.found}" if isinstance(error, NonFinite) else None
            why, reason = found or "could not be packed in the memory that is free", "non_finite" if found else "out_of_memory"
            what = f"a weight of a block whose first one has shape {tuple(weights[0].shape)}"
            if self.opts.on_unsupported == "error":
                raise UnsupportedLayers({what: f"{why}."}) from None
            warn_once(f"{what} {why}; the whole block stays in full precision.")
            self._left(weights, reason, f"is in a block of which a weight {why}; all of it stays as it is.")
            with dynamo.compiling(), torch.set_grad_enabled(self.differentiable):
                group = _inductor.compile_graph(_inductor.copy_graph(self.gm)[0], args, self.patches)
        self.groups[key] = group
        for weight in weights:  # an id may be used again once its weight is gone
            weakref.finalize(weight, _drop, self.groups, None if fast is None else weakref.ref(fast), key).atexit = False
        return group

    def _left(self, weights: Sequence[torch.Tensor], reason: str, why: str) -> None:
        """Into the report of the compiled object that called with them: none is packed."""
        context, root = dynamo.calling()
        if context is None:
            return
        names, layers = Names(root), []
        for weight, layer in zip(weights, (linear.layer for unit in self.like for linear in unit), strict=True):
            name, size = names.known(weight) or layer.name, layer.bytes_before
            what = (name, names.aliases(weight), layer.shape, layer.scheme, layer.matched_by)
            layers.append(Layer(*what, SKIPPED, reason, why, size, size))
        log_of(context, dynamo.backend_of(context), root).graphs.append(Report(tuple(layers)))


def _drop(groups: dict[tuple[int, ...], Any], fast: Callable[[], Any] | None, key: tuple[int, ...]) -> None:
    group = groups.pop(key, None)
    if isinstance(group, Group):
        group.forget()
    if fast is not None and (lookup := fast()) is not None:
        lookup.forget(key[0])


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """args -> the args at these places, as fast as Python can."""
    if not indices:
        return lambda args: ()
    low, high = indices[0], indices[-1] + 1
    if list(indices) == list(range(low, high)):
        part = slice(low, high)
        return lambda args: args[part]
    return operator.itemgetter(*indices)
