"""scheme.pattern -> the function that writes its nodes. A new family is a file here and a value in scheme.FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from aoquant_inductor.patterns import dynamic, weight_only
from aoquant_inductor.scheme import SCHEMES

PATTERNS: Mapping[str, Callable[..., fx.Node]] = {"weight_only": weight_only.emit, "dynamic": dynamic.emit}

__all__ = ["PATTERNS", "SCHEMES"]
