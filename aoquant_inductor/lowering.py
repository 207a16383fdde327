"""torch.ops.aoquant.* -> Inductor IR: normalise the arguments, ask each backend for its choices, take the best.

A backend is a function (problem) -> (kernel name, IR) | None; the first of a device's list that can do it wins.
`portable` can do everything on every device.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from aoquant_inductor import _inductor, ops
from aoquant_inductor import _inductor_choices as inductor
from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import _inductor_machine as machine
from aoquant_inductor import lowering_cpu as cpu
from aoquant_inductor import lowering_portable as portable
from aoquant_inductor import lowering_triton as triton
from aoquant_inductor.errors import UnsafeMachineCode
from aoquant_inductor.layouts import WeightKey, rows_key
from aoquant_inductor.problem import Problem

log = logging.getLogger("aoquant_inductor")

Compiled = TypeVar("Compiled")
Kernels = dict[WeightKey, set[str]]
COUNTER = "aoquant kernel "
"""What the name of a counter begins with that says in JSON which kernel was taken for a weight."""
_recording: contextvars.ContextVar[Kernels | None] = contextvars.ContextVar("aoquant_kernels", default=None)

BACKENDS: dict[str, tuple[Callable[[Problem], tuple[str, Any] | None], ...]] = {
    "cpu": (cpu.linear,),
    "cuda": (triton.linear,),
    "xpu": (triton.linear,),
}
"""device type -> what to try before the portable lowering."""

QUANTIZING: dict[str, Callable[[Problem, Callable[[], tuple[str, Any]]], tuple[str, Any] | None]] = {"cuda": triton.quantizing}
"""device type -> what to try where x is given beside its quantization: one kernel for both."""

TOGETHER: frozenset[str] = frozenset(["cuda", "xpu"])
"""device types where linears that read one activation are worth one launch (siblings.py)."""

HINTS: dict[str, Callable[[torch.device, str, torch.dtype], str | None]] = {"cuda": triton.hint}
"""device type -> (device, layout, dtype of x) of a linear -> what its user can do for a faster kernel."""

M_RANGES: dict[str, tuple[int, ...]] = dict.fromkeys(("cuda", "xpu"), (16, 64, 256, 512, 1024))
"""device type -> the last M of each range but the last, where no kernel serves every M, as the CPU's do."""


@contextlib.contextmanager
def recording() -> Iterator[Kernels]:
    """Collects which kernel the lowerings inside took for which weight, or had taken when Inductor's cache got the graph."""
    install()
    kernels: Kernels = {}
    token = _recording.set(kernels)
    before = _inductor.counters().copy()
    try:
        yield kernels
    finally:
        _recording.reset(token)
    if not kernels:
        for counter in _inductor.counters() - before:
            if counter.startswith(COUNTER):
                key, name = json.loads(counter.removeprefix(COUNTER))
                kernels.setdefault(tuple(key), set()).add(name)


def safely(compile_graph: Callable[[], Compiled], told: Callable[[str], None]) -> Compiled:
    """compile_graph(), once more without carried sums where ptxas made wrong machine code of one, which `told` is told."""
    kernels = _recording.get()
    before = {key: set(names) for key, names in kernels.items()} if kernels is not None else {}
    try:
        return compile_graph()
    except UnsafeMachineCode as error:
        log.warning("%s Others were taken.", error)
        told(f"{error} Others were taken.")
    if kernels is not None:  # those of the first attempt do not run
        kernels.clear()
        kernels.update(before)
    with machine.nothing_carried():
        return compile_graph()


def hint(device: torch.device, layout: str, dtype: torch.dtype) -> str | None:
    """What the user can do for faster kernels of such linears."""
    return HINTS[device.type](device, layout, dtype) if device.type in HINTS else None


def _choose(problem: Problem) -> tuple[str, Any]:
    """(kernel name, y[M, N])."""
    measured = inductor.measuring()
    ours = () if measured is not None and measured.portable else BACKENDS.get(problem.device.type, ())
    return next(found for backend in (*ours, portable.linear) if (found := backend(problem)) is not None)


def _record(key: WeightKey, name: str) -> None:
    kernels = _recording.get()
    if kernels is not None and inductor.measuring() is None:
        kernels.setdefault(key, set()).add(name)
        _inductor.counters()[COUNTER + json.dumps([key, name])] += 1


def _finish(problem: Problem, name: str, result: Any) -> Any:
    _record(problem.key, name)
    return ir.view(result, [*problem.leading, problem.n])


def _lower(problem: Problem) -> Any:
    return _finish(problem, *_choose(problem))


def _linear_wo(x: Any, w: Any, scale: Any, zero: Any, bias: Any, *key: Any) -> Any:
    return _lower(Problem.of(x, None, None, w, scale, zero, None, bias, key, x.get_dtype()))


def _linear_dynamic(
    x_q: Any, x_scale: Any, x_zero: Any, w: Any, scale: Any, zero: Any, sums: Any, bias: Any, *key: Any, x: Any = None
) -> Any:
    if key[5] == "cuda_bf16":
        return _linear_dynamic_bf16(x_q, x_scale, x_zero, w, scale, zero, bias, key)
    weight = (w, scale, zero, sums, bias, key[:-1], key[-1])
    # x_q is not asked for before it is needed: an unread quantization is no kernel
    apart = lambda: Problem.of(x_q, x_scale, x_zero, *weight)  # noqa: E731
    # a copy of a strided x would be the launch that is to be saved
    if x is not None and x.get_device().type in QUANTIZING and ir.realized_dense(x):
        together = Problem.of(x, None, None, *weight, symmetric=x_zero is None)
        found = QUANTIZING[x.get_device().type](together, lambda: _choose(apart()))
        if found is not None:
            return _finish(together, *found)
    return _lower(apart())


def _linear_grad(grad: Any, w: Any, scale: Any, zero: Any, *key: Any) -> Any:
    problem = Problem.of(grad, None, None, w, scale, zero, None, None, key, grad.get_dtype())
    return ir.view(portable.grad(problem), [*problem.leading, problem.k])


def _requantize(w: Any, scale: Any, zero: Any, row: Any, *key: Any) -> Any:
    problem = Problem.of_weight(w, scale, zero, key[:-1], torch.int8)
    name, result = cpu.requantize(problem, row) or portable.requantize(problem, row, key[-1])
    _record(rows_key(problem.k, problem.n, key[-1]), name)
    return result


def _linear_dynamic_bf16(
    x_q: Any, x_scale: Any, x_zero: Any, w: Any, scale: Any, zero: Any, bias: Any, key: Sequence[Any]
) -> Any:
    """Groups too small for integer sums (packing.choose) go through the weight-only kernels: x_q - x_zero is within -255..255,
    which bf16 holds exactly.
    """
    aten = torch.ops.aten
    x = ir.to_dtype(x_q, torch.bfloat16)
    if x_zero is not None:
        x = ir.aten(aten.sub.Tensor, x, ir.to_dtype(x_zero, torch.bfloat16))
    y = _lower(Problem.of(x, None, None, w, scale, zero, None, None, key[:-1], torch.float32))
    y = ir.aten(aten.mul.Tensor, y, x_scale)
    if bias is not None:
        y = ir.aten(aten.add.Tensor, y, ir.to_dtype(bias, torch.float32))
    return ir.to_dtype(y, key[-1])


@functools.cache
def install() -> None:
    """Registers every lowering, once, at the first compile."""
    ns = torch.ops.aoquant
    assert ns.linear_wo.default._schema.name.startswith(ops.NAMESPACE)
    ir.register_lowering(ns.linear_wo.default, _linear_wo)
    ir.register_lowering(ns.linear_dynamic.default, _linear_dynamic)
    ir.register_lowering(ns.linear_grad.default, _linear_grad)
    ir.register_lowering(ns.requantize.default, _requantize)
