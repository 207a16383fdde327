"""scheme.pattern -> the function that writes its nodes; REQUANTIZED is for the many rows of a scheme with large_m.

A new family is a file here and a value in scheme.FAMILIES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from aoquant_inductor.patterns import dynamic, requantized, weight_only
from aoquant_inductor.scheme import SCHEMES

REQUANTIZED = "requantized"
PATTERNS: Mapping[str, Callable[..., fx.Node]] = {
    "weight_only": weight_only.emit, "dynamic": dynamic.emit, REQUANTIZED: requantized.emit,
}

__all__ = ["PATTERNS", "REQUANTIZED", "SCHEMES"]
