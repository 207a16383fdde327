"""(gm, example_inputs, mode, options) -> a compiled callable. The pipeline, read downwards in `aoquant`.

One compiled graph may serve many modules: Dynamo compiles a block once for all its equals. The first weights that a code
object is seen with become constants of its graph, guarded by identity; when other weights come to the same code, a second
graph takes its packs as inputs and looks them up by the weights of each call. So a model compiled whole pays nothing for its
weights per call, and any number of equal blocks costs two compilations.
"""

from __future__ import annotations

import logging
import operator
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from aoquant_inductor import _inductor, lowering, progress, rewrite
from aoquant_inductor import options as options_module
from aoquant_inductor.errors import NothingQuantized
from aoquant_inductor.options import Options
from aoquant_inductor.qparams import NonFinite
from aoquant_inductor.report import Report, log_of
from aoquant_inductor.rewrite import Names, Rewritten, Site
from aoquant_inductor.weights import STORE, Entry, any_stale

log = logging.getLogger("aoquant_inductor")
Compiled = Callable[..., Any]

_warned: set[str] = set()
_seen: dict[tuple[int, str], tuple[object, tuple[int, ...]]] = {}  # (code, options) -> the code, the weights it was first seen with


def aoquant(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Compiled:
    """The torch.compile backend "aoquant"."""
    opts = options_module.parse(options, mode)
    frame = _inductor.frame()
    names = Names(frame.root)
    sites = rewrite.find(gm, example_inputs, names, opts)
    _judge(opts, names, sites)
    patches = {**_inductor.mode_options(opts.mode), **opts.inductor}
    journal = log_of(frame.context)
    started = time.perf_counter()
    if any(site.scheme for site in sites):
        _inductor.guard_training(frame.local_self)
    if (reason := _needs_grad(gm, example_inputs, frame.root)) and any(site.scheme for site in sites):
        _warn_once(f"{reason}: compiling in full precision. Quantized graphs are for inference.")
        for site in sites:
            site.skip("grad")
    rewrite.pack(progress.bar(sites))
    journal.pack_seconds += time.perf_counter() - started
    _check_unsupported(opts, sites)
    if not any(site.packed for site in sites):
        compiled: Compiled = _inductor.compile_graph(gm, example_inputs, patches)
    else:
        with torch.no_grad(), lowering.recording() as kernels:
            compiled = _compile(gm, example_inputs, sites, opts, patches, frame)
        for site in sites:
            site.name_kernel(kernels)
    journal.compile_seconds += time.perf_counter() - started
    if sites:
        graph = Report(tuple(site.layer for site in sites))
        journal.graphs.append(graph)
        journal.entries += [site.entry for site in sites if site.entry is not None]
        log.info(graph.summary())
    return compiled


def _compile(
    gm: fx.GraphModule, inputs: Sequence[Any], sites: Sequence[Site], opts: Options, patches: Mapping[str, Any],
    frame: _inductor.Frame,
) -> Compiled:
    rewritten = rewrite.apply(gm, sites)
    identity = tuple(id(site.value) for site in rewritten.sites)
    _, first = _seen.setdefault((id(frame.code), opts.key()), (frame.code, identity))
    kept = [(i, p) for i, p in enumerate(gm.graph.find_nodes(op="placeholder")) if p not in rewritten.consumed]
    rest = [inputs[i] for i, _ in kept]
    checked = opts.weights == "checked"
    if first != identity:
        function = _inductor.compile_graph(rewritten.gm, rest, patches, rewritten.packs, False, lowering.decompositions())
        return _LookedUp(gm, function, rewritten, [i for i, _ in kept], checked, patches).call
    function = _inductor.compile_graph(rewritten.gm, rest, patches, rewritten.packs, True, lowering.decompositions())
    _inductor.guard_identity([site.weight for site in rewritten.sites], frame.local_self)
    # Dynamo writes the call's bytecode after this, from the placeholders of a graph that never runs: what is gone from it is
    # never loaded.
    for site in sites:
        if site.packed is not None:
            site.node.args, site.node.kwargs = (site.x,), {}
    for weight in rewritten.consumed:
        gm.graph.erase_node(weight)
    gm.recompile()
    return _constant(function, rewritten.packs, _entries(rewritten), checked)


def _entries(rewritten: Rewritten) -> list[Entry]:
    return [site.entry for site in rewritten.sites if site.entry is not None]


def _constant(function: Compiled, packs: Sequence[torch.Tensor], entries: Sequence[Entry], checked: bool) -> Compiled:
    """The callable of a graph that holds its packs."""
    packs, entries = tuple(packs), tuple(entries)

    def call(*args: Any) -> Any:
        if any_stale(entries):
            STORE.update(entries)
        return function(*packs, *args)

    def frozen(*args: Any) -> Any:
        return function(*packs, *args)

    return call if checked else frozen


class _Group:
    """The packs of one set of weights: one block of many."""

    def __init__(self, weights: Sequence[torch.Tensor], like: Sequence[Site]) -> None:
        self.packs: list[torch.Tensor] = []
        self.entries: list[Entry] = []
        for weight, site in zip(weights, like, strict=True):
            assert site.scheme is not None and site.packed is not None
            entry, packed, _ = STORE.pack(weight, site.scheme, site.packed.layout)
            self.packs += packed.tensors
            self.entries.append(entry)


class _LookedUp:
    """The callable of a graph that serves any weights of its shapes: packs are looked up by the weights of the call."""

    def __init__(
        self, gm: fx.GraphModule, function: Compiled, rewritten: Rewritten, kept: list[int], checked: bool,
        patches: Mapping[str, Any],
    ) -> None:
        order = {p: i for i, p in enumerate(gm.graph.find_nodes(op="placeholder"))}
        where = [order[site.weight] for site in rewritten.sites]
        self.pick = _picker(where)
        self.keep = _picker(kept)
        self.like = rewritten.sites
        self.function, self.checked = function, checked
        self.groups: dict[tuple[int, ...], _Group | Compiled] = {}
        self.gm, self.patches = _inductor.copy_graph(gm)[0], patches

    def call(self, *args: Any) -> Any:
        weights = self.pick(args)
        group = self.groups.get(tuple(map(id, weights)))
        if group is None:
            group = self._add(weights, args)
        if not isinstance(group, _Group):
            return group(*args)
        if self.checked and any_stale(group.entries):
            STORE.update(group.entries)
        return self.function(*group.packs, *self.keep(args))

    def _add(self, weights: Sequence[torch.Tensor], args: Sequence[Any]) -> _Group | Compiled:
        key = tuple(map(id, weights))
        group: _Group | Compiled
        try:
            group = _Group(weights, self.like)
        except NonFinite as error:
            _warn_once(f"a weight of shape {tuple(weights[0].shape)} holds {error}; its whole block stays in full precision.")
            with torch.no_grad():
                group = _inductor.compile_graph(_inductor.copy_graph(self.gm)[0], args, self.patches)
        self.groups[key] = group
        for weight in weights:  # an id may be used again once its weight is gone
            weakref.finalize(weight, self.groups.pop, key, None).atexit = False
        return group


def _picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """args -> the args at these places, as fast as Python can."""
    if not indices:
        return lambda args: ()
    low, high = indices[0], indices[-1] + 1
    if list(indices) == list(range(low, high)):
        part = slice(low, high)
        return lambda args: args[part]
    return operator.itemgetter(*indices)


def _judge(opts: Options, names: Names, sites: Sequence[Site]) -> None:
    """Patterns that name nothing, and options under which nothing can be quantized: judged over the whole module."""
    known = list(dict.fromkeys([*names.linears, *(site.layer.name for site in sites)]))
    opts.check(known)
    if known and not any(opts.choose([name]).scheme for name in known):
        raise NothingQuantized(len(known), 0)


def _check_unsupported(opts: Options, sites: Sequence[Site]) -> None:
    wanted = [site.layer for site in sites if site.layer.scheme is not None]
    missed = [layer for layer in wanted if layer.reason not in (None, "grad")]
    for layer in missed:
        log.warning("%s %s", layer.name, layer.detail or layer.reason)
    if missed and opts.on_unsupported == "error":
        reasons: dict[str, int] = {}
        for layer in missed:
            reasons[str(layer.reason)] = reasons.get(str(layer.reason), 0) + 1
        if len(missed) == len(wanted):
            raise NothingQuantized(len(sites), len(wanted), reasons)
        raise ValueError("\n".join(f"{layer.name} {layer.detail or layer.reason}" for layer in missed))


def _needs_grad(gm: fx.GraphModule, inputs: Sequence[Any], root: nn.Module | None) -> str | None:
    """Why this graph has to be differentiable, if it has to."""
    if not torch.is_grad_enabled():
        return None
    floats = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if any(t.requires_grad and not isinstance(t, nn.Parameter) for t in floats):
        return "an activation requires grad"
    trainable = [t.requires_grad for t in floats if isinstance(t, nn.Parameter)]
    if root is not None and root.training and any(trainable):
        return "the model is in training mode with grad enabled"
    if any(trainable) and not all(trainable):
        return "some parameters require grad and others are frozen"
    if any(trainable):
        _warn_once("grad is enabled, but nothing asks for it: compiling for inference. Use torch.no_grad() to say so.")
    return None


def _warn_once(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"aoquant: {text}", UserWarning, stacklevel=3)
