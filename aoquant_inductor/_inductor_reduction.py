"""A part of `_inductor`: how a row of activations is quantized by the kernel that Inductor makes of it.

By itself Inductor loops over a row of more than 1024 elements once per reduction, so that a row that is quantized is read, and
what produces it computed, twice; and the rows of a few tokens it cuts into parts, which makes three kernels of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from aoquant_inductor._inductor import private

LONGEST = 16384
"""Elements of a row that one program holds in registers: 32 in each thread of 16 warps."""


QUANTIZE = frozenset(["quantize_per_token", "quantize_per_token_asym"])


def quantizing(graph: fx.Graph) -> contextlib.AbstractContextManager[None]:
    """What a graph that quantizes activations is compiled in; Inductor's own ways with all others stay as they are."""
    found = any(getattr(node.target, "_opname", "") in QUANTIZE for node in graph.nodes if node.op == "call_function")
    return rows_in_registers() if found else contextlib.nullcontext()


@contextlib.contextmanager
def rows_in_registers() -> Iterator[None]:
    """Kernels compiled inside that write int8 next to a reduction along its rows read a row once."""
    (v,) = private("torch._inductor.virtualized", "V")
    (hint,) = private("torch._inductor.runtime.hints", "ReductionHint")
    theirs = type(v.choices)

    class Choices(theirs):  # type: ignore[misc, valid-type]
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            length = features.reduction_numel
            short = getattr(length, "is_Integer", False) and int(length) <= LONGEST
            # DEFAULT: rows that are read or written in another order than they lie, as windows and heads are
            along = features.get_reduction_hint() in (hint.INNER, hint.DEFAULT)
            if short and not cooperative_reduction and along and _quantizes(features):
                return True
            return bool(theirs.should_use_persistent_reduction(features, cooperative_reduction))

        @staticmethod
        def reduction_split_factor(device: Any, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
            if inner_reduction and reduction_numel_hint <= LONGEST:
                return 1
            return int(theirs.reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction))

    with v.set_choices_handler(Choices()):
        yield


def _quantizes(features: Any) -> bool:
    return any(
        buffer.node.get_dtype() == torch.int8 for node in features.scheduler_nodes() for buffer in node.get_outputs()
    )
