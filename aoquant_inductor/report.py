"""What was quantized, what was not, and why: one type for `report(compiled)` and `plan(model, options)`."""

from __future__ import annotations

import functools
import json
import logging
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any

import torch

from aoquant_inductor import native

log = logging.getLogger("aoquant_inductor")
VERSION = 1

QUANTIZED, SKIPPED = "quantized", "skipped"
KEPT, RELEASED = "kept", "released"


@dataclass(frozen=True)
class Layer:
    """One linear. bytes_before / bytes_after of its weight; sqnr_db of the quantized weight; reason: why it was skipped.

    siblings: the linears that its kernel serves with it in one launch.
    original: what became of a packed weight's own memory under "release_weights": `released`, or `kept: ` and why.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, int]  # [N, K]
    scheme: str | None
    matched_by: str | None
    status: str
    reason: str | None = None
    detail: str | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr_db: float | None = None
    kernel: str | None = None
    original: str = KEPT
    siblings: tuple[str, ...] = ()

    @property
    def bytes_resident(self) -> int:
        """What the layer's weight takes: its pack, and the original unless that was released."""
        both = self.status == QUANTIZED and self.original != RELEASED
        return self.bytes_after + (self.bytes_before if both else 0)


def _size(n: int) -> str:
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 1)):
        if n < 1000 or unit == "GB":
            return f"{n:.{digits}f} {unit}"
        n /= 1000  # type: ignore[assignment]
    raise AssertionError


def _status(layer: Layer) -> str:
    if layer.reason is not None:
        return f"{layer.status}: {layer.reason}"
    return f"{layer.status}, original released" if layer.original == RELEASED else layer.status


def _kernel(layer: Layer) -> str:
    together = ", ".join(name.rpartition(".")[2] for name in layer.siblings)
    return (layer.kernel or "-") + (f", with {together}" if together else "")


@dataclass(frozen=True)
class Report:
    """`.layers`, `.totals`, `.summary()`, `.to_json()`; `print()` gives the table."""

    layers: tuple[Layer, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.status == QUANTIZED)

    @property
    def totals(self) -> dict[str, Any]:
        before = sum(layer.bytes_before for layer in self.layers)
        return {
            "linears": len(self.layers),
            "quantized": len(self.quantized),
            "schemes": dict(Counter(str(layer.scheme) for layer in self.quantized)),
            "reasons": dict(Counter(str(layer.reason) for layer in self.layers if layer.status == SKIPPED)),
            "bytes_before": before,
            "bytes_after": sum(layer.bytes_after for layer in self.layers),
            "bytes_resident": sum(layer.bytes_resident for layer in self.layers),
            **self.extra,
        }

    def summary(self) -> str:
        """`quantized 224 of 225 linears (int4wo-128: 224; lm_head: user), 13.5 GB -> 3.6 GB`, and a line for every hint."""
        t = self.totals
        parts = [f"{scheme}: {count}" for scheme, count in t["schemes"].items()]
        skipped = [layer for layer in self.layers if layer.status == SKIPPED]
        if len(skipped) <= 3:
            parts += [f"{layer.name}: {layer.reason}" for layer in skipped]
        else:
            parts += [f"{reason}: {count}" for reason, count in t["reasons"].items()]
        sizes = f"{_size(t['bytes_before'])} -> {_size(t['bytes_after'])}"
        line = f"quantized {t['quantized']} of {t['linears']} linears ({'; '.join(parts)}), {sizes}"
        return "\n".join([line, *t.get("hints", ())])

    def to_json(self) -> str:
        layers = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(layer).items()}
            for layer in self.layers
        ]
        return json.dumps({"version": VERSION, "totals": self.totals, "layers": layers}, indent=1)

    def __str__(self) -> str:
        head = ("name", "shape", "scheme", "matched by", "status", "bytes", "dB", "kernel")
        rows = [head] + [
            (
                layer.name, "x".join(map(str, layer.shape)), layer.scheme or "-", layer.matched_by or "-",
                _status(layer),
                f"{_size(layer.bytes_before)} -> {_size(layer.bytes_after)}",
                "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}", _kernel(layer),
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        details = [f"{layer.name} {layer.detail}" for layer in self.layers if layer.detail]
        details += [f"{layer.name} {layer.original}" for layer in self.layers if layer.original not in (KEPT, RELEASED)]
        return "\n".join([*lines, *details, self.summary()])


def merge(reports: Iterable[Report]) -> tuple[Layer, ...]:
    """One Layer per name; a quantized one wins over a skipped one (a graph may be compiled again for training)."""
    merged: dict[str, Layer] = {}
    for report in reports:
        for layer in report.layers:
            old = merged.get(layer.name)
            if old is None or old.status == SKIPPED or layer.status == QUANTIZED:
                kernels = {k for k in (old and old.kernel, layer.kernel) if k}
                kernel = ", ".join(sorted({p for k in kernels for p in k.split(", ")})) or None
                siblings = layer.siblings or (old.siblings if old is not None else ())
                merged[layer.name] = replace(layer, kernel=kernel, siblings=siblings)
    return tuple(merged.values())


def uncalled(layer: Layer) -> Layer:
    """A linear that no compiled graph called: one whose reason is known keeps it."""
    if layer.status == SKIPPED:
        return layer
    detail = "is called by no compiled graph: unused so far, in eager code, or its weight is read by a fused op."
    return replace(layer, status=SKIPPED, reason="not_called", detail=detail)


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
    """The graphs of one compiled object, in the order they were compiled."""

    def __init__(self) -> None:
        self.graphs: list[Report] = []
        self.entries: list[Any] = []  # entry.Entry of every pack its graphs hold, for refresh()
        self.compilations = 0
        self.compiled: set[tuple[str, ...]] = set()  # the layers of each graph, whatever its shapes
        self.planned: tuple[Layer, ...] = ()  # every nn.Linear of the module as its options decide it, for those no graph calls
        self.hints: list[str] = []  # what the user can do for faster kernels
        self.unmatched: list[str] = []  # keys of `schemes` that name no linear, under on_unmatched="warn"
        self.pack_seconds = 0.0
        self.compile_seconds = 0.0

    def add(self, graph: Report, entries: Iterable[Any]) -> None:
        """One compiled graph, and the packs it holds."""
        self.graphs.append(graph)
        self.compilations += 1
        self.compiled.add(tuple(layer.name for layer in graph.layers))
        self.entries += entries
        log.info(graph.summary())

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

    def report(self) -> Report:
        layers = merge(self.graphs)
        called = {name for layer in layers for name in (layer.name, *layer.aliases)}
        layers += tuple(uncalled(layer) for layer in self.planned if layer.name not in called)
        return Report(
            layers,
            {
                "graphs": self.compilations,
                "recompiles": self.compilations - len(self.compiled),
                "pack_seconds": round(self.pack_seconds, 3),
                "compile_seconds": round(self.compile_seconds, 3),
                "staleness_check": native.state(),
                "unmatched": self.unmatched,
                "hints": self.hints,
                **versions(),
            },
        )


_LOGS: weakref.WeakKeyDictionary[Any, Log] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def log_of(context: object) -> Log:
    with _lock:
        return _LOGS.setdefault(context, Log())


def find_log(context: object | None) -> Log | None:
    return None if context is None else _LOGS.get(context)
