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
SHORT = 1024  # up to here Inductor itself keeps rows in registers, several in a program
ONCE, MOST = 256, 40
"""Elements of bf16 that a warp loads at once, and that a thread has at most."""


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
    (fixed,) = private("torch._inductor.codegen.triton", "FixedTritonConfig")
    theirs = type(v.choices)

    # methods, and asked by super(): which of Inductor's are static differs from one torch to the next
    class Choices(theirs):  # type: ignore[misc, valid-type]
        def should_use_persistent_reduction(self, features: Any, cooperative_reduction: bool) -> bool:
            length = features.reduction_numel
            short = getattr(length, "is_Integer", False) and int(length) <= LONGEST
            # DEFAULT: rows that are read or written in another order than they lie, as windows and heads are
            along = features.get_reduction_hint() in (hint.INNER, hint.DEFAULT)
            if short and not cooperative_reduction and along and _quantizes(features):
                return True
            return bool(super().should_use_persistent_reduction(features, cooperative_reduction))

        def reduction_split_factor(self, device: Any, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
            if inner_reduction and reduction_numel_hint <= LONGEST:
                return 1
            return int(super().reduction_split_factor(device, reduction_numel_hint, numel_hint, inner_reduction))

        def triton_kernel_kwargs(self, kernel: Any, features: Any, groups: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            kwargs = super().triton_kernel_kwargs(kernel, features, groups, kwargs)
            ours = set(groups[0]) == {"x", "r0_"} and _quantizes(features) and not _chosen_by_inductor(features)
            if not ours or not _one_row_can_be_fixed() or not self.should_use_persistent_reduction(features, False):
                return kwargs
            length = int(features.reduction_numel)
            return kwargs | ({"fixed_config": fixed({"XBLOCK": 1, "num_warps": warps(length)})} if length > SHORT else {})

    with v.set_choices_handler(Choices()):
        yield


def _chosen_by_inductor(features: Any) -> bool:
    """Where Inductor measures configs of such kernels itself, and on cards that are not NVIDIA's, which alone were measured."""
    (config,) = private("torch._inductor", "config")
    measures = config.max_autotune or config.max_autotune_pointwise or config.coordinate_descent_tuning
    device = next(iter(features.scheduler_nodes())).get_device()
    return bool(measures or device.type != "cuda" or torch.version.hip)


def _one_row_can_be_fixed() -> bool:
    """Before 2.13 Inductor fails at an index of the row alone, as of its statistics, where XBLOCK is fixed to 1."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def _quantizes(features: Any) -> bool:
    return any(
        buffer.node.get_dtype() == torch.int8 for node in features.scheduler_nodes() for buffer in node.get_outputs()
    )


def warps(length: int) -> int:
    """Of a program that has a row of so many elements in registers.

    Its threads hold 16 bytes each at a time. Triton's row is as long as the next power of two, but what is beyond its end costs
    nothing where that is known of all threads at once: K = 5120 is 5 times what four warps hold, in a row of 8192, and 3 times
    what eight do. Measured on an H200: gelu and quantize of it 119 us by four warps, 160 by eight, Inductor's own choice.
    """
    times = {count: -(-length // (ONCE * count)) for count in (16, 8, 4, 2, 1)}
    few = [count for count in times if times[count] * ONCE <= MOST * 32]
    return min(few or [16], key=lambda count: (times[count] * count, abs(count - 8)))
