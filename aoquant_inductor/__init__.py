"""aoquant: quantization that lives purely in the compiled graph.

    torch.compile(model, backend="aoquant", options={"schemes": "int8wo"})

Importing this module imports no torch._inductor and touches no CUDA; the first compile does.
"""

from __future__ import annotations

from aoquant_inductor.api import load, plan, refresh, report, restore
from aoquant_inductor.errors import (
    AoquantError,
    CheckpointError,
    ConflictingSchemes,
    NothingQuantized,
    OptionError,
    ReleasedWeights,
    ShapeChanged,
    UnknownScheme,
    UnmatchedPattern,
    UnsafeMachineCode,
    UnsupportedLayers,
    UnsupportedTorch,
)
from aoquant_inductor.register import register
from aoquant_inductor.scheme import SCHEMES, QuantSpec, Scheme

__version__ = "0.1.0"
__all__ = [
    "SCHEMES", "AoquantError", "CheckpointError", "ConflictingSchemes", "NothingQuantized", "OptionError", "QuantSpec",
    "ReleasedWeights", "Scheme", "ShapeChanged", "UnknownScheme", "UnmatchedPattern", "UnsafeMachineCode", "UnsupportedLayers",
    "UnsupportedTorch", "load", "plan", "refresh", "report", "restore",
]

register()
