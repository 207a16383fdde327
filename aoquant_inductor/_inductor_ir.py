"""The second part of `_inductor`: the private building blocks of Inductor's IR that our lowerings are made of."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from aoquant_inductor._inductor import private

Expr = Any  # int or sympy.Expr
IR = Any  # TensorBox


def register_lowering(op: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    (register,) = private("torch._inductor.lowering", "register_lowering")
    register(op, type_promotion_kind=None)(function)


def aten(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> IR:
    """Inductor's own lowering of an aten op."""
    (lowerings,) = private("torch._inductor.lowering", "lowerings")
    return lowerings[op](*args, **kwargs)


def to_dtype(x: IR, dtype: torch.dtype) -> IR:
    (convert,) = private("torch._inductor.lowering", "to_dtype")
    return convert(x, dtype)


def view(x: IR, sizes: Sequence[Expr]) -> IR:
    (reshape,) = private("torch._inductor.lowering", "view")
    return reshape(x, list(sizes))


def fallback(op: torch._ops.OpOverload, *args: Any) -> IR:
    """The op's eager implementation, called from the wrapper."""
    (handler,) = private("torch._inductor.lowering", "fallback_handler")
    return handler(op, add_to_fallback_set=False)(*args)


def pointwise(sizes: Sequence[Expr], dtype: torch.dtype, device: torch.device, body: Callable[..., Any]) -> IR:
    """An elementwise node: body(ops, index) -> value."""
    (ir,) = private("torch._inductor", "ir")
    (virtualized,) = private("torch._inductor", "virtualized")
    return ir.Pointwise.create(
        device=device, dtype=dtype, inner_fn=functools.partial(body, virtualized.ops), ranges=list(sizes)
    )


def floor_div(a: Expr, b: int) -> Expr:
    (division,) = private("torch.utils._sympy.functions", "FloorDiv")
    return division(a, b)


def modulo(a: Expr, b: int) -> Expr:
    (mod,) = private("torch.utils._sympy.functions", "ModularIndexing")
    return mod(a, 1, b)


def realize(x: IR) -> IR:
    """x as a dense row-major buffer."""
    (ir,) = private("torch._inductor", "ir")
    return ir.ExternKernel.require_contiguous(x)


def strides(x: IR) -> tuple[Expr, ...]:
    """Of a node that lies in memory."""
    return tuple(x.get_stride())


def realized_dense(x: IR) -> bool:
    """Realizes x; whether that is a dense row-major buffer or a part of one, so that `realize` copies nothing."""
    (contiguous,) = private("torch._inductor.ir", "is_contiguous_storage_and_layout")
    x.realize()
    return bool(contiguous(x))


def by_tma(x: IR) -> bool:
    """Realizes x[M, K]; whether a tensor memory accelerator can read it as it lies: dense, rows on multiples of 16 bytes."""
    (unaligned,) = private("torch._inductor.ir", "is_unaligned")
    bytes_per_row = static(x.get_size()[-1] * x.get_dtype().itemsize)
    return bytes_per_row is not None and bytes_per_row % 16 == 0 and realized_dense(x) and not unaligned(x)


def static(x: Expr) -> int | None:
    """The value of a size if it is known at compile time."""
    return int(x) if isinstance(x, int | sympy.Integer) else None


def product(sizes: Sequence[Expr]) -> Expr:
    return functools.reduce(lambda a, b: a * b, sizes, sympy.Integer(1))


def cpp_template(
    name: str, inputs: dict[str, IR | None], sizes: Sequence[int], m: Expr, n: int, dtype: torch.dtype, device: torch.device,
    preamble: str, body: str,
) -> IR:
    """A C++ kernel of ours in Inductor's generated code: y[M, N] dense, in `dtype`.

    `inputs`: argument name -> node, in order; None is left out. `body` is the function's text and uses those names, `y`, the
    integers `sizes[i]`, and `{m}` and `{threads}`, which are filled in. Sizes are read at every call and stand in no text, so
    that kernels which differ in nothing else are compiled once. Nothing fuses into it.
    """
    (base,) = private("torch._inductor.codegen.cpp_template", "CppTemplate")
    (ir,) = private("torch._inductor", "ir")
    (virtualized,) = private("torch._inductor", "virtualized")
    (threads,) = private("torch._inductor.utils", "parallel_num_threads")
    (index_text,) = private("torch._inductor.codegen.cpp_utils", "cexpr_index")
    rows = static(m)
    numbers = torch.tensor([*sizes, *([] if rows is None else [rows])], dtype=torch.int64, device="cpu")
    inputs = inputs | {"sizes": virtualized.V.graph.add_tensor_constant(numbers)}
    present = {key: realize(node) for key, node in inputs.items() if node is not None}
    names = {key: ir.ExternKernel.realize_input(node) for key, node in present.items()}
    layout = ir.FixedLayout(device, dtype, [m, n])

    # An argument is the buffer, and a dense view may start inside of it: x[1:], one sibling's columns of a common result.
    views = {key: node.get_layout().offset for key, node in names.items() if node.get_layout().offset != 0}
    arguments = {f"{key}_buffer" if key in views else key: node for key, node in names.items()}

    class Template(base):  # type: ignore[misc, valid-type]
        def render(self, kernel: Any, template_buffer_node: Any = None, **kwargs: Any) -> str:
            out = self.output_node if template_buffer_node is None else template_buffer_node
            # names the symbolic sizes, too
            definition = kernel.def_kernel(inputs=arguments, outputs={"y": out}, extra_sizevars=list(views.values()))
            starts = {key: index_text(kernel.rename_indexing(offset)) for key, offset in views.items()}
            begin = "".join(f"  const auto* {key} = {key}_buffer + {start};\n" for key, start in starts.items())
            # nothing unless cpp.enable_kernel_profile is set; then a profiler would call all our kernels "kernel"
            record = kernel.maybe_codegen_profile().replace(str(kernel.kernel_name), f"aoquant_{name}_n{n}") + "\n"
            of_m = kernel.size(out, 0) if rows is None else f"sizes[{len(sizes)}]"
            text = record + begin + body.replace("{m}", of_m).replace("{threads}", str(self.num_threads))
            return f'{self.header().getvalue()}\n{preamble}\nextern "C" {definition}\n{{\n{text}\n}}\n'

    template = Template(f"aoquant_{name}", list(names.values()), layout, threads())
    with _sizes_without_a_value(virtualized.V.graph.sizevars):
        node = template.generate().output_node()
    virtualized.V.graph.no_fuse_buffer_names.add(node.get_name())
    return node


@contextlib.contextmanager
def _sizes_without_a_value(sizevars: Any) -> Iterator[None]:
    """torch 2.11 asks for a number of every size while it makes a choice, to measure it by, which nobody does here."""
    if not hasattr(sizevars, "size_hints"):
        yield
        return
    sizevars.size_hints = functools.partial(sizevars.size_hints, fallback=1)
    try:
        yield
    finally:
        del sizevars.size_hints


def searching() -> bool:
    """Whether this compile asked for autotuning."""
    (config,) = private("torch._inductor", "config")
    return bool(config.max_autotune or config.max_autotune_gemm)


@dataclass(frozen=True)
class Range:
    """A graph is compiled for first <= M <= last (None: no last), M the symbolic `rows` of most of its linears."""

    rows: sympy.Expr
    first: int
    last: int | None

    def __str__(self) -> str:
        return f"{self.first}..{self.last or ''}"


_within: contextvars.ContextVar[Range | None] = contextvars.ContextVar("aoquant_rows", default=None)


@contextlib.contextmanager
def rows_within(within: Range | None) -> Iterator[None]:
    """What is lowered inside is for these M."""
    token = _within.set(within)
    try:
        yield
    finally:
        _within.reset(token)


def most_rows(m: Expr) -> int | None:
    """No call has a larger M; None where nobody knows."""
    within = _within.get()
    if (known := static(m)) is not None or within is None or m != within.rows:
        return known
    return within.last


def rows_hint(m: Expr) -> int:
    """The M to choose a kernel for: the largest where there is one, since it must do that one, too."""
    most = most_rows(m)
    return size_hint(m) if most is None else most


def size_hint(size: Expr) -> int:
    """The value a symbolic size had when it was traced."""
    known = static(size)
    if known is not None:
        return known
    (virtualized,) = private("torch._inductor", "virtualized")
    sizevars = virtualized.V.graph.sizevars
    hint = getattr(sizevars, "optimization_hint", None) or sizevars.size_hint  # renamed in torch 2.12
    return int(hint(size))
