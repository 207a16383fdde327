"""What a compiled object has become so far: the reports of its graphs, and what else `report(compiled)` says."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import nn

from aoquant_inductor import eligible, native
from aoquant_inductor.errors import OptionError
from aoquant_inductor.names import Names, Other
from aoquant_inductor.options import Options
from aoquant_inductor.report import QUANTIZED, RELEASED, RESTORED, SKIPPED, Layer, Report, by_module, merge, uncalled

log = logging.getLogger("aoquant_inductor")


@functools.cache
def versions() -> dict[str, str | None]:
    """Of what decides the generated code."""
    found: dict[str, str | None] = {"torch": torch.__version__}
    for key, name in (("triton", "triton"), ("aoquant", "aoquant-inductor")):
        try:
            found[key] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[key] = None
    return found


class Log:
    """The graphs of one compiled object, in the order they were compiled.

    backend, root: what was compiled by what. Dynamo hands the graphs of one to every other one that is equal in both.
    """

    def __init__(self, backend: object | None, root: nn.Module | None) -> None:
        self.backend, self.root = backend, None if root is None else weakref.ref(root)
        self.graphs: list[Report] = []
        # entry.Entry of every pack its graphs hold -> the name of its linear
        self.entries: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self.compilations = 0
        self.compiled: set[tuple[str, ...]] = set()  # the layers of each graph, whatever its shapes
        self.heard: set[str] = set()  # names in the graphs of a function with graph breaks
        self.names: set[str] = set()  # of every nn.Linear that the module had at a compile
        self.options: Options | None = None
        self.others: tuple[Other, ...] = ()  # parameters of the module that no nn.Linear has
        self.hints: list[str] = []  # what the user can do for faster kernels
        self.unmatched: list[str] = []  # keys of `schemes` that name no linear, under on_unmatched="warn"
        self.pack_seconds = 0.0
        self.compile_seconds = 0.0

    def add(self, graph: Report, entries: Mapping[Any, str]) -> None:
        """One compiled graph, and the packs it holds."""
        self.graphs.append(graph)
        self.compilations += 1
        self.compiled.add(tuple(layer.name for layer in graph.layers))
        self.entries.update(entries)
        log.info(graph.summary())

    def agree(self, options: Options) -> None:
        """Raises OptionError where they are not those of the graphs so far: torch.compile keeps the dict that it is given."""
        if self.compilations and self.options != options:
            raise OptionError("the dict of options was changed since torch.compile got it, which keeps it: give each its own.")
        self.options = options

    def plan(self, root: nn.Module, names: Names, options: Options) -> None:
        """What there is to be quantized in the module."""
        self.names.update(names.linears)
        self.others, self.options = tuple(names.others), options

    def hint(self, text: str | None) -> None:
        """Of one linear; the same is said once."""
        if text is not None and text not in self.hints:
            self.hints.append(text)

    def kernel_notes(self, layers: Sequence[tuple[Layer, Sequence[Any]]]) -> Callable[[Mapping[Any, set[str]] | str], None]:
        """layers: with the keys of their pack -> a function that notes the kernels of a graph compiled later, by such keys, or
        one for all that have a pack.
        """

        def note(kernels: Mapping[Any, set[str]] | str) -> None:
            of = (lambda key: {kernels}) if isinstance(kernels, str) else (lambda key: kernels.get(key, set()))
            named = [(layer, sorted({name for key in keys for name in of(key)})) for layer, keys in layers]
            self.graphs.append(Report(tuple(replace(layer, kernel=", ".join(names)) for layer, names in named if names)))

        return note

    def _as_they_are(self, layers: Sequence[Layer], now: Mapping[str, Layer]) -> tuple[Layer, ...]:
        """Without the linears that the module has no more, nor the packs of weights that since became what is not quantized:
        another dtype, computed, a tensor. With the size of the others as it is, and one row of those that since share a weight.
        """
        gone = self.names - {name for layer in now.values() for name in (layer.name, *layer.aliases)}
        first = {alias: layer.name for layer in now.values() for alias in layer.aliases}
        left: dict[str, Layer] = {}
        for one in layers:
            name = first.get(one.name, one.name)
            if one.name in gone or (name != one.name and name in left):
                continue
            known = now.get(name)
            if known is not None:
                size = known.bytes_before
                after = size if one.status == SKIPPED else one.bytes_after
                one = replace(one, name=name, aliases=known.aliases, shape=known.shape, bytes_before=size, bytes_after=after)
            left[name] = known if known is not None and known.by_weight else one
        return tuple(left.values())

    def _as_packed(self, layers: Sequence[Layer], names: Names | None) -> tuple[Layer, ...]:
        """With what became of their packs and originals since: packed again, restored, released by another compile."""
        entries = {}
        for entry, name in self.entries.items():
            if (weight := entry.ref()) is not None and entry.packs and entry.fits():
                entries[names.known(weight) if names is not None else name] = entry

        def now(layer: Layer) -> Layer:
            entry = entries.get(layer.name)
            if entry is None or layer.status != QUANTIZED:
                return layer
            for (scheme, *_), (packed, sqnr) in entry.packs.items():
                if scheme.name == layer.scheme:
                    layer = replace(layer, sqnr_db=sqnr, bytes_after=packed.nbytes)
            kept = RESTORED if entry.restored and layer.original == RELEASED else layer.original
            return replace(layer, original=RELEASED if entry.released else kept)

        return tuple(map(now, layers))

    def report(self) -> Report:
        layers: tuple[Layer, ...] = merge(self.graphs)
        planned: tuple[Layer, ...] = ()  # every nn.Linear of the module as its options decide it, for those that no graph calls
        root = None if self.root is None else self.root()
        names = None if root is None else Names(root)
        if root is not None and names is not None and self.options is not None:
            planned = tuple(layer for _, layer, _ in eligible.plan(root, names, self.options))
            layers = self._as_they_are(layers, {layer.name: layer for layer in planned})
        layers = self._as_packed(layers, names)
        called = {name for layer in layers for name in (layer.name, *layer.aliases)}
        layers += tuple(uncalled(layer) for layer in planned if layer.name not in called)
        # F.linear may read a module's own parameter: then it is a layer
        others = by_module(other for other in self.others if other.name not in called)
        return Report(
            layers,
            {
                "graphs": self.compilations,
                "recompiles": self.compilations - len(self.compiled),
                "repacks": sum(entry.repacks for entry in self.entries),  # of the weights that its graphs hold now
                "pack_seconds": round(self.pack_seconds, 3),
                "compile_seconds": round(self.compile_seconds, 3),
                "staleness_check": native.state(),
                "unmatched": self.unmatched,
                "others": others,
                "hints": self.hints,
                **versions(),
            },
        )


_LOGS: weakref.WeakKeyDictionary[Any, Log] = weakref.WeakKeyDictionary()
_alive: weakref.WeakSet[Log] = weakref.WeakSet()  # what runs a log's graphs holds it, when the compiled object is gone, too
_lock = threading.Lock()


def log_of(context: object, backend: object | None, root: nn.Module | None) -> Log:
    with _lock:
        if context not in _LOGS:
            _LOGS[context] = Log(backend, root)
            _alive.add(_LOGS[context])
        return _LOGS[context]


def find_log(context: object, backend: object | None, root: nn.Module | None) -> Log | None:
    """The log of a compiled object; of an equal one, whose graphs it runs, if it compiled none itself."""
    with _lock:
        if context in _LOGS or backend is None or root is None:
            return _LOGS.get(context)
        equal = (log for log in _alive if log.root is not None and log.root() is root and log.backend == backend)
        return max(equal, key=lambda log: log.compilations, default=None)
