"""The third part of `_inductor`: Triton templates and references as the choices of one autotuning."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aoquant_inductor._inductor import plain_tensors, private
from aoquant_inductor._inductor_descriptors import kernel_type
from aoquant_inductor._inductor_ir import IR, Expr, aten, most_rows, realize

EARLY = 16
"""The most rows of a kernel that is launched early."""


def triton_template(name: str, source: str) -> Any:
    """A template whose grid is (tiles of y[M, N], but not more than PROGRAMS, and SPLIT_K), or, with TAIL, SPLIT_K only
    for a tile beyond the last multiple of TAIL. BY_N: y is a weight, whose rows are BLOCK_N of a tile. Names are global to the
    process.
    """
    (template,) = private("torch._inductor.select_algorithm", "TritonTemplate")
    (symbolic,) = private("torch._inductor.select_algorithm", "SymbolicGridFn")

    def grid(m: Expr, n: Expr, meta: dict[str, Any], *, cdiv: Any, min: Any) -> tuple[Expr, int, int]:
        high, wide = ("BLOCK_N", "BLOCK_M") if meta.get("BY_N") else ("BLOCK_M", "BLOCK_N")
        tiles = cdiv(m, meta[high]) * cdiv(n, meta[wide])
        if at_once := meta.get("TAIL"):
            whole = cdiv(tiles - at_once + 1, at_once) * at_once
            return whole + (tiles - whole) * meta["SPLIT_K"], 1, 1
        return min(tiles, meta["PROGRAMS"]) if meta.get("PROGRAMS") else tiles, meta.get("SPLIT_K", 1), 1

    made = template(name=name, grid=symbolic(grid), source=source)
    made.kernel_type = kernel_type()
    return made


def early_launch(device: torch.device, m: Expr) -> bool:
    """Whether a kernel for m rows is launched while the one before it ends (programmatic dependent launch): for few rows, by
    Inductor's option "triton.enable_pdl", which itself leaves templates out.

    On an H100 one linear after the other is faster by it (int4wo-128, 4096x4096, M = 1: 7.7 us, not 8.3), a model in a CUDA
    graph not (Qwen2.5-0.5B int8wo .99 ms a token, not .87), and many rows take the place of what still runs (int8dq, M = 1024:
    37 us, not 33).
    """
    (config,) = private("torch._inductor", "config")
    able = device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9
    return able and bool(getattr(config.triton, "enable_pdl", False)) and (most_rows(m) or EARLY + 1) <= EARLY


@dataclass(frozen=True)
class TritonChoice:
    """One config of one template. `scratch`: bytes of a workspace, `ws_ptr` in the kernel, that starts with anything in it."""

    label: str
    template: Any
    keywords: dict[str, Any]
    scratch: int = 0


@dataclass(frozen=True)
class Reference:
    """The same result in Inductor's own IR, as a choice: `call` over tensors is measured, `build` is what the graph gets.

    portable: its linear is measured as the portable lowering; else as what default mode takes.
    """

    call: Callable[..., torch.Tensor]
    build: Callable[[], tuple[str, IR]]
    portable: bool = True


_measuring: contextvars.ContextVar[Reference | None] = contextvars.ContextVar("aoquant_measuring", default=None)


def measuring() -> Reference | None:
    """The reference that is lowered now to be measured, which must not choose again."""
    return _measuring.get()


def _reference(name: str, nodes: Sequence[IR], layout: Any, reference: Reference, note: Callable[[str], None]) -> Any:
    (base,) = private("torch._inductor.codegen.subgraph", "SubgraphChoiceCaller")
    (make_fx,) = private("torch.fx.experimental.proxy_tensor", "make_fx")
    (decompositions,) = private("torch._inductor.decomposition", "select_decomp_table")

    def graph_of(*tensors: torch.Tensor) -> Any:
        return make_fx(lambda *args: (reference.call(*args),), decomposition_table=decompositions())(*tensors)

    class Caller(base):  # type: ignore[misc, valid-type]
        def benchmark(self, *args: Any, out: torch.Tensor) -> Any:
            token = _measuring.set(reference)
            try:
                return super().benchmark(*args, out=out)
            finally:
                _measuring.reset(token)

        def output_node(self) -> IR:
            label, node = reference.build()
            note(label)
            return node

    return Caller(name=f"{name}_portable", input_nodes=nodes, layout=layout, description="", make_fx_graph=graph_of)


def select(
    name: str, inputs: Sequence[IR], size: Sequence[Expr], dtype: torch.dtype, device: torch.device,
    choices: Sequence[TritonChoice], references: Sequence[Reference] = (),
) -> tuple[str, IR]:
    """(label, y of `size`) by the fastest choice, measured when there is more than one. Every choice gets all the inputs, as
    they lie in memory: a kernel asks for what it does not know of their strides.
    """
    (ir,) = private("torch._inductor", "ir")
    (algorithm,) = private("torch._inductor.select_algorithm", "autotune_select_algorithm")
    nodes = [ir.ExternKernel.realize_input(node) for node in inputs]
    layout = ir.FixedLayout(device, dtype, list(size))
    callers: list[Any] = []
    errors: list[Any] = []
    taken: list[str] = []
    for choice in choices:
        count = len(callers)
        rest: dict[str, Any] = {"workspace_arg": _workspace(choice.scratch, device)} if choice.scratch else {}
        if choice.keywords.get("PDL"):
            rest["triton_meta"] = {"launch_pdl": True}  # a dict of its own: the template adds to it
        errors.append(choice.template.maybe_append_choice(callers, input_nodes=nodes, layout=layout, **choice.keywords, **rest))
        for caller in callers[count:]:
            caller.output_node = _noted(caller.output_node, choice.label, taken)
    callers += [_reference(name, nodes, layout, reference, taken.append) for reference in references]
    if not callers:
        raise NotImplementedError(f"{name}: no config compiles: {errors}")
    # chosen now, not with the fusions: a reference is several nodes, and the report is to name what was taken
    result = algorithm(name, callers, nodes, layout, return_multi_template=False)
    return taken[-1], result[0] if isinstance(result, tuple) else result  # a pair from torch 2.12 on


def _noted(output_node: Callable[[], IR], label: str, taken: list[str]) -> Callable[[], IR]:
    """output_node that says that its choice was taken: torch 2.11 returns the node alone."""

    def noted() -> IR:
        taken.append(label)
        return output_node()

    return noted


def _workspace(size: int, device: torch.device) -> Any:
    argument, mode = private("torch._inductor.codegen.common", "WorkspaceArg", "WorkspaceZeroMode")
    return argument(
        count=size, zero_mode=mode.UNINITIALIZED, device=device, outer_name=argument.unique_name()
    )


COUNTERS = 4096


def counters(device: torch.device) -> IR:
    """int32[COUNTERS] of zeros, the same for all kernels of a graph, which leave what they begin with (common.jinja, `summed`).

    Under CUDA graphs, whose replays share memory and so never run at the same time, a constant that nobody fills again;
    otherwise filled once per call, so that calls on two streams have their own.
    """
    config, virtualized = private("torch._inductor", "config", "virtualized")
    graph = virtualized.V.graph
    known: dict[torch.device, IR] = graph.__dict__.setdefault("_aoquant_counters", {})
    if device not in known:
        if config.triton.cudagraphs:
            with plain_tensors(), torch.utils._python_dispatch._disable_current_modes():
                zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
            known[device] = graph.add_tensor_constant(zeros, name="aoquant_counters")
        else:
            full = torch.ops.aten.full.default
            known[device] = realize(aten(full, [COUNTERS], 0, dtype=torch.int32, device=device))
    return known[device]
