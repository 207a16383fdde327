"""What was quantized, what was not, and why: one type for `report(compiled)` and `plan(model, options)`."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from aoquant_inductor.names import Other

VERSION = 1
WORTH_SAYING = 0.01  # of the linears' bytes
QUANTIZED, SKIPPED = "quantized", "skipped"
OF_THE_WEIGHT = ("not_parameter", "already_quantized", "dtensor", "subclass", "empty", "dtype")
"""Reasons that a weight is not quantized whatever graph reads it."""
KEPT, RELEASED = "kept", "released"
RESTORED = f"{KEPT}: it was restored"


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
    def by_weight(self) -> bool:
        """Whether it is skipped for what its weight is, whatever graph reads it."""
        return self.reason in OF_THE_WEIGHT

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
        """`quantized 224 of 225 linears (int4wo-128: 224; lm_head: user), 13.5 GB -> 3.6 GB`, and a line for every class of
        modules that has many other matrices, and for every hint.
        """
        t = self.totals
        parts = [f"{scheme}: {count}" for scheme, count in t["schemes"].items()]
        skipped = [layer for layer in self.layers if layer.status == SKIPPED]
        if len(skipped) <= 3:
            parts += [f"{layer.name}: {layer.reason}" for layer in skipped]
        else:
            parts += [f"{reason}: {count}" for reason, count in t["reasons"].items()]
        sizes = f"{_size(t['bytes_before'])} -> {_size(t['bytes_after'])}"
        line = f"quantized {t['quantized']} of {t['linears']} linears ({'; '.join(parts)}), {sizes}"
        others = [
            f"in no nn.Linear: {other['parameters']} parameter(s) of {module}, {_size(other['bytes'])}"
            for module, other in t.get("others", {}).items() if other["bytes"] >= WORTH_SAYING * t["bytes_before"]
        ]
        return "\n".join([line, *others, *t.get("hints", ())])

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
    """One Layer per name; a quantized one wins over a skipped one (a graph may be compiled again for training), unless what its
    weight became is not finite.
    """
    merged: dict[str, Layer] = {}
    for report in reports:
        for layer in report.layers:
            old = merged.get(layer.name)
            if old is None or old.status == SKIPPED or layer.status == QUANTIZED or layer.reason == "non_finite":
                kernels = {k for k in (old and old.kernel, layer.kernel) if k}
                kernel = ", ".join(sorted({p for k in kernels for p in k.split(", ")})) or None
                siblings = layer.siblings or (old.siblings if old is not None else ())
                merged[layer.name] = replace(layer, kernel=kernel, siblings=siblings)
    return tuple(merged.values())


def by_module(others: Iterable[Other]) -> dict[str, dict[str, int]]:
    """Class of module -> how many parameters it has that are no linear's, and their bytes."""
    found: dict[str, dict[str, int]] = {}
    for other in others:
        of = found.setdefault(other.module, {"parameters": 0, "bytes": 0})
        of["parameters"] += 1
        of["bytes"] += other.nbytes
    return found


def uncalled(layer: Layer) -> Layer:
    """A linear that no compiled graph called: one whose reason is known keeps it."""
    if layer.status == SKIPPED:
        return layer
    detail = "is called by no compiled graph: unused so far, in eager code, or its weight is read by a fused op."
    return replace(layer, status=SKIPPED, reason="not_called", detail=detail)
