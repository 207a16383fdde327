"""Our Triton kernels without a GPU: Inductor's generated code for a pretended one, compiled to machine code or interpreted.

torch.cuda and Triton's driver are replaced by the little of them that Inductor asks while it renders; nothing is launched.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import fake_tensor

from aoquant_inductor import _inductor_reduction, activations, packing, qparams
from aoquant_inductor.layouts import Packed
from aoquant_inductor.scheme import SCHEMES, resolve
from aoquant_inductor.templates import Config, Kernel, int4_few
from benchmarks import render as render_module
from benchmarks.render import Rendered, call, described, kernel, load

__all__ = ["assemble", "call", "described", "kernel", "load", "pretended_gpu", "render"]

FIXED_ROWS = pytest.mark.skipif(not _inductor_reduction._one_row_can_be_fixed(), reason="rows have a config of ours from torch 2.13 on")

Properties = collections.namedtuple(
    "Properties",
    "name major minor total_memory multi_processor_count warp_size max_threads_per_multi_processor "
    "regs_per_multiprocessor gcnArchName shared_memory_per_block shared_memory_per_block_optin L2_cache_size uuid",
)


SHARED = {80: 166912, 86: 101376, 89: 101376, 120: 101376}
"""Bytes that a program may have, where that is less than a Hopper's."""


@contextlib.contextmanager
def pretended_gpu(arch: int = 90, sms: int = 132) -> Iterator[None]:
    """torch.cuda as a card of compute capability arch // 10, arch % 10, with `sms` multiprocessors."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    card = Properties(
        "pretended", arch // 10, arch % 10, 80 << 30, sms, 32, 2048, 65536, "", 49152, SHARED.get(arch, 232448), 50 << 20, "0"
    )

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, *_: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    class Device(contextlib.nullcontext):
        pass

    constant = lambda value: lambda *_, **__: value  # noqa: E731
    cuda = {
        "is_available": constant(True), "device_count": constant(1), "current_device": constant(0),
        "get_device_properties": constant(card), "get_device_capability": constant((arch // 10, arch % 10)),
        "is_initialized": constant(True), "_lazy_init": constant(None), "device": Device, "synchronize": constant(None),
        "is_tf32_supported": constant(True), "is_bf16_supported": constant(True),
    }
    interface = {
        "is_available": constant(True), "get_device_properties": constant(card), "is_triton_capable": constant(True),
        "raise_if_triton_unavailable": constant(None), "get_compute_capability": constant(arch),
    }
    worker = {"get_device_properties": constant(card), "current_device": constant(0)}
    from torch.utils import _triton

    with contextlib.ExitStack() as stack:
        for answer in (_triton.has_triton, _triton.has_triton_package):  # may have been asked before, without the GPU
            getattr(answer, "cache_clear", lambda: None)()
            stack.callback(getattr(answer, "cache_clear", lambda: None))
        for owner, names in ((torch.cuda, cuda), (CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, value in names.items():
                value = staticmethod(value) if isinstance(owner, type) else value
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        if hasattr(fake_tensor, "init_gpu_context"):  # until torch 2.12 it asks the driver, which a build for CUDA has none of here
            stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", constant(None)))
        before = driver._active if hasattr(driver, "_active") else None
        driver.set_active(Driver())
        stack.callback(lambda: setattr(driver, "_active", before))
        yield


def _operands(
    scheme: Any, m: int, n: int, k: int, dtype: torch.dtype, bias: bool, quantizing: bool = False
) -> tuple[Any, dict[str, torch.Tensor], Packed]:
    """(the op as a function of tensors by name, real tensors, its pack) for one linear on the CPU."""
    choice = resolve(scheme)
    weight = torch.randn(n, k).to(dtype)
    layout = packing.choose(choice, torch.device("cuda", 0), dtype, (n, k))
    p = packing.pack(qparams.quantize(weight, choice.weight), choice, layout)
    x = torch.randn(m, k).to(dtype)
    return (*render_module.linear(p, x, torch.randn(n).to(dtype) if bias else None, choice, quantizing), p)


def render(
    scheme: Any, m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True, arch: int = 90,
    config: tuple[Kernel, Config] | None = None, quantizing: bool = False,
    x: tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None = None, sms: int = 132,
) -> Rendered:
    """One linear with real CPU operands and the reference's result; `config`: the kernel and config to take, not the default;
    `quantizing`: its x is not quantized yet; `x`: what the graph is given, and what makes x[M, K] of it; `sms`: multiprocessors.
    """
    with pretended_gpu(arch):
        call, tensors, _ = _operands(scheme, m, n, k, dtype, bias, quantizing)
    if x is not None:
        of_x, (tensors["x"], view) = call, x
        call = lambda t: of_x(t | {"x": view(t["x"])})  # noqa: E731
    with pretended_gpu(arch, sms):
        return render_module.render(call, tensors, config)


def render_part(scheme: str, m: int, sizes: tuple[int, ...], k: int, dtype: torch.dtype) -> Rendered:
    """The last of linears that lie side by side, with a launch of its own."""
    choice = SCHEMES[scheme]
    with pretended_gpu():
        layout = packing.choose(choice, torch.device("cuda", 0), dtype, (sizes[-1], k))
    packs = [packing.pack(qparams.quantize(torch.randn(n, k).to(dtype), choice.weight), choice, layout) for n in sizes]
    joined = packing.join(packs)
    assert joined is not None
    part = joined[1][-1]
    # a part of what lies side by side: its rows' groups lie apart, or it begins behind the others'
    assert part.scale.stride(0) == sum(sizes) if part.scale.dim() == 2 else part.scale.storage_offset() > 0
    call, tensors = render_module.linear(part, torch.randn(m, k).to(dtype), None, choice, False)
    with pretended_gpu():
        return render_module.render(call, tensors)


def assemble(code: str, folder: Any, arch: int = 90) -> Any:
    """The compiled kernel for sm_<arch>: .asm["ptx"], .asm["cubin"], .metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, source, signature, options = kernel(code)
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if str(kind).startswith("*")}
    ast_source = ASTSource(fn=load(name, source, folder), signature=signature, constexprs={}, attrs=attrs)
    return triton.compile(ast_source, target=GPUTarget("cuda", arch, 32), options=options)


def ptxas_log(built: Any, folder: Path) -> str:
    """What ptxas says of a compiled kernel, with its counts of registers and spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = folder / "kernel.ptx"
    path.write_text(built.asm["ptx"])
    arch = re.search(r"^\.target (sm_\w+)", built.asm["ptx"], re.M).group(1)  # type: ignore[union-attr]
    command = [get_ptxas(int(re.sub(r"\D", "", arch))).path, "-v", f"--gpu-name={arch}", str(path), "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def render_grad(scheme: Any, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Rendered, str]:
    """The backward of one linear, and the layout of its weight."""
    choice = resolve(scheme)
    with pretended_gpu():
        layout = packing.choose(choice, torch.device("cuda", 0), dtype, (n, k))
    p = packing.pack(qparams.quantize(torch.randn(n, k).to(dtype), choice.weight), choice, layout)
    tensors = {"grad": torch.randn(m, n).to(dtype), "w": p.w, "scale": p.scale} | ({} if p.zero is None else {"zero": p.zero})
    op = lambda t: torch.ops.aoquant.linear_grad(t["grad"], t["w"], t["scale"], t.get("zero"), *p.key)  # noqa: E731
    with pretended_gpu():
        return render_module.render(op, tensors), layout


def render_rows(scheme: str, n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Rendered, Packed]:
    """The weight of a scheme with large_m as int8 rows, and its pack."""
    with pretended_gpu():
        p = _operands(scheme, 1, n, k, dtype, False)[2]
    tensors = {name: t for name, t in (("w", p.w), ("scale", p.scale), ("zero", p.zero), ("row", p.row)) if t is not None}
    op = lambda t: torch.ops.aoquant.requantize(t["w"], t["scale"], t.get("zero"), t["row"], *p.key, p.int8_key[-1])  # noqa: E731
    with pretended_gpu():
        return render_module.render(op, tensors), p


def render_large(scheme: str, m: int, n: int, k: int) -> Rendered:
    """linear(x) of a scheme with large_m as a graph writes it for many rows."""
    with pretended_gpu():
        p = _operands(scheme, m, n, k, torch.bfloat16, False)[2]
    tensors = {"x": torch.randn(m, k).bfloat16(), "w": p.w, "scale": p.scale, "row": p.row}

    def op(t: dict[str, Any]) -> torch.Tensor:
        w = torch.ops.aoquant.requantize(t["w"], t["scale"], None, t["row"], *p.key, p.int8_key[-1])
        left = (*activations.quantize_per_token(t["x"]), None)
        return torch.relu(torch.ops.aoquant.linear_dynamic(*left, w, t["row"], None, None, None, *p.int8_key, torch.bfloat16))

    with pretended_gpu():
        return render_module.render(op, tensors)


def _packs(scheme: str, n: int, k: int, count: int) -> tuple[list[Packed], dict[str, torch.Tensor]]:
    """Random weights, and their tensors by name and number."""
    choice = SCHEMES[scheme]
    with pretended_gpu():
        layout = packing.choose(choice, torch.device("cuda", 0), torch.bfloat16, (n, k))
    packs = [packing.pack(qparams.quantize(torch.randn(n, k).bfloat16(), choice.weight), choice, layout) for _ in range(count)]
    named = [(f"{name}{i}", t) for i, p in enumerate(packs) for name, t in (("w", p.w), ("scale", p.scale), ("sums", p.sums))]
    return packs, {name: t for name, t in named if t is not None}


def _dynamic(t: dict[str, Any], i: int, p: Packed, left: tuple[Any, ...], **told: Any) -> torch.Tensor:
    weight = (t[f"w{i}"], t[f"scale{i}"], None, t.get(f"sums{i}"))
    return torch.ops.aoquant.linear_dynamic(*left, *weight, None, *p.key, torch.bfloat16, **told)


def _quantize(scheme: str, x: torch.Tensor) -> tuple[Any, ...]:
    activation = SCHEMES[scheme].activation
    assert activation is not None
    return (*(activations.quantize_per_token if activation.symmetric else activations.quantize_per_token_asym)(x), None)[:3]


def render_chain(
    scheme: str, x: torch.Tensor, count: int, told: bool = True, patches: dict[str, Any] | None = None,
    of: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Rendered:
    """relu(linear(...)) of of(x)[..., N], `count` times, each N x N and told its x."""
    width = of(x).shape[-1]
    packs, weights = _packs(scheme, width, width, count)

    def op(t: dict[str, Any]) -> torch.Tensor:
        x = of(t["x"])
        for i, p in enumerate(packs):
            x = _dynamic(t, i, p, _quantize(scheme, x), **({"x": x} if told else {})).relu()
        return x

    from torch._inductor import config

    with pretended_gpu(), config.patch(patches or {}):
        return render_module.render(op, {"x": x, **weights})


def launches(code: str) -> list[str]:
    """The kinds of the kernels that a rendered module calls, in order: tem for ours."""
    return re.findall(r"^ *triton_([a-z]+)_\w+\.run\(", code, re.M)


def render_gated(scheme: str, m: int, n: int, k: int, told: bool = False) -> Rendered:
    """silu(a(h)) * b(h) + residual of h = RMSNorm(x), as a graph of quantize_per_token and two linears."""
    packs, weights = _packs(scheme, n, k, 2)
    tensors = {"x": torch.randn(m, k).bfloat16(), "residual": torch.randn(m, n).bfloat16(), **weights}

    def op(t: dict[str, Any]) -> torch.Tensor:
        x = t["x"].float()
        h = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
        left = _quantize(scheme, h)
        a, b = (_dynamic(t, i, p, left, **({"x": h} if told else {})) for i, p in enumerate(packs))
        return torch.nn.functional.silu(a) * b + t["residual"]

    with pretended_gpu():
        return render_module.render(op, tensors)


def crowded(scheme: str, m: int, kernel: Kernel, config: Config) -> bool:
    """Whether the kernel has no such config for the scheme: zeros, or more of them than registers, or more or fewer rows."""
    if kernel.template == "int4_fma":
        return scheme == "int4wo-32-asym" and config.block_n > 4
    if kernel.template == "int4_gemv":
        other = (m <= int4_few.FEW) != (config.block_m <= int4_few.FEW)
        one = config.num_warps == 1 and config.block_k > 128
        tight = (int4_few.GEMV_FOUR, replace(int4_few.GEMV_FULL, split_k=2)) if int4_few.spills_sooner() else ()
        return other or (scheme == "int4wo-32-asymfloat" and (one or config in (int4_few.GEMV_EIGHT_LONG, *tight)))
    return False
