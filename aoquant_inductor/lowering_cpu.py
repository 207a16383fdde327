"""The CPU's choices: our AVX512 and AVX2 kernels, inlined into Inductor's generated C++ (templates/cpu_linear.h).

Inductor compiles for the machine it runs on (-march=native), which is all that their instructions need.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import packing_cpu
from aoquant_inductor.problem import Problem

TEMPLATES = Path(__file__).parent / "templates"
TYPES = {torch.bfloat16: "aoquant::bf16", torch.float16: "aoquant::f16", torch.float32: "float"}
# Multiply-adds below which another thread costs more than it brings: ~10 us of one core.
THREAD_WORK = 1 << 20
ISA = {layout: name for name, layouts in packing_cpu.LAYOUTS.items() for layout in layouts}
"""layout -> the instruction set whose kernels read it."""


@functools.cache
def _preamble(isa: str) -> str:
    return (TEMPLATES / "cpu_linear.h").read_text().replace("#include AOQUANT_ISA", (TEMPLATES / f"cpu_{isa}.h").read_text())


KERNELS: dict[tuple[str, bool], dict[object, str]] = {
    ("avx512", True): {8: "VNNI", 4: "VNNI"}, ("avx512", False): {torch.bfloat16: "BF16"},
    ("avx2", True): {8: "VPMADDWD", 4: "VPMADDUBSW"}, ("avx2", False): {},
}
"""(instruction set, whether x is int8) -> bits of the weight, or dtype of x, -> the instruction that does the work; or FMA."""


def _kernel(isa: str, p: Problem) -> str:
    """Its name in reports."""
    return f"C++ {isa.upper()} {KERNELS[isa, p.dynamic].get(p.bits if p.dynamic else p.x.get_dtype(), 'FMA')}"


def _cast(ctype: str, name: str, node: Any) -> str:
    return f"(const {ctype}*){name}" if node is not None else f"(const {ctype}*)nullptr"


def _sizes(p: Problem) -> tuple[tuple[int, ...], str]:
    """(N, K and, where there are several, the size of groups), and the text that names them: the half of cpu_linear.h for the
    other number of groups is not compiled.
    """
    several = p.group_size < p.k
    known = "sizes[2];\n  if (group <= 0 || group >= K) __builtin_unreachable();" if several else "0;"
    return (p.n, p.k, *([p.group_size] if several else [])), f"  const int64_t N = sizes[0], K = sizes[1], group = {known}\n"


def linear(p: Problem) -> tuple[str, Any] | None:
    """(kernel name, y[M, N]) for the packed layouts."""
    isa = ISA.get(p.layout)
    if isa is None or ir.static(p.m) == 0 or p.k == 0 or p.n == 0:
        return None
    bias_type = TYPES[p.bias.get_dtype() if p.bias is not None else p.out_dtype]
    y, bias = f"({TYPES[p.out_dtype]}*)y", _cast(bias_type, "bias", p.bias)
    sizes, names = _sizes(p)
    weight = f"w, scale, {_cast('float', 'offset', p.zero)}, group"
    inputs = {"x": p.x, "w": p.w, "scale": p.scale, "offset": p.zero, "bias": p.bias}
    if p.dynamic:
        function = f"linear_dynamic<{p.bits}>"
        left = f"x, K, x_scale, {_cast('int32_t', 'x_zero', p.x_zero)}"
        weight += f", {_cast('float', 'w_sum', p.sums)}"
        inputs |= {"x_scale": p.x_scale, "x_zero": p.x_zero, "w_sum": p.sums}
    else:
        function = f"linear_weight_only<{p.bits}>"
        left = f"(const {TYPES[p.x.get_dtype()]}*)x, K"
    body = (
        f"{names}  const int64_t M = {{m}}, work = M * N * K;\n"
        f"  const int threads = (int)std::min<int64_t>({{threads}}, 1 + work / {THREAD_WORK});\n"
        f"  aoquant::{function}(M, N, K, {left}, {weight}, {bias}, {y}, N, threads);"
    )
    name = f"w{p.bits}_{p.layout}"
    node = ir.cpp_template(name, inputs, sizes, p.m, p.n, p.out_dtype, p.device, _preamble(isa), body)
    return _kernel(isa, p), node


def requantize(p: Problem, row: Any) -> tuple[str, Any] | None:
    """(kernel name, the weight-only weight as int8 in its instruction set's other layout, with the scales row[1, N])."""
    isa = ISA.get(p.layout)
    if isa is None or p.k == 0 or p.n == 0:
        return None
    to = packing_cpu.LAYOUTS[isa][1]
    columns, step = packing_cpu.columns(to), packing_cpu.step(to, 8)
    blocks, steps = -(-p.n // columns), -(-p.k // step)
    inputs = {"w": p.w, "scale": p.scale, "offset": p.zero, "row": row}
    sizes, names = _sizes(p)
    weight = f"w, scale, {_cast('float', 'offset', p.zero)}, group"
    body = (
        f"{names}  const int threads = (int)std::min<int64_t>({{threads}}, 1 + N * K / {THREAD_WORK});\n"
        f"  aoquant::requantize<{p.bits}>(N, K, {weight}, row, y, threads);"
    )
    name, width = f"w{p.bits}_{p.layout}_to_int8", columns * step
    node = ir.cpp_template(name, inputs, sizes, blocks * steps, width, torch.uint8, p.device, _preamble(isa), body)
    return f"C++ {isa.upper()} to int8", ir.view(node, [blocks, steps, width])
