"""Our Triton kernels without a GPU: Inductor's generated code for a pretended one, compiled to machine code or interpreted.

torch.cuda and Triton's driver are replaced by the little of them that Inductor asks while it renders; nothing is launched.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aoquant_inductor import lowering, lowering_triton, packing, qparams
from aoquant_inductor._inductor_choices import COUNTERS
from aoquant_inductor.card import Card
from aoquant_inductor.scheme import SCHEMES
from aoquant_inductor.templates import Config, Kernel

Properties = collections.namedtuple(
    "Properties",
    "name major minor total_memory multi_processor_count warp_size max_threads_per_multi_processor "
    "regs_per_multiprocessor gcnArchName shared_memory_per_block shared_memory_per_block_optin L2_cache_size uuid",
)


@contextlib.contextmanager
def pretended_gpu(arch: int = 90) -> Iterator[None]:
    """torch.cuda as a card of compute capability arch // 10, arch % 10."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    card = Properties(
        "pretended", arch // 10, arch % 10, 80 << 30, 132, 32, 2048, 65536, "", 49152, 232448, 50 << 20, "0"
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
    with contextlib.ExitStack() as stack:
        for owner, names in ((torch.cuda, cuda), (CudaInterface, interface), (CudaInterface.Worker, worker)):
            for name, value in names.items():
                value = staticmethod(value) if isinstance(owner, type) else value
                stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "12.8"))
        before = driver._active if hasattr(driver, "_active") else None
        driver.set_active(Driver())
        stack.callback(lambda: setattr(driver, "_active", before))
        yield


def _operands(scheme: str, m: int, n: int, k: int, dtype: torch.dtype, bias: bool) -> tuple[Any, Any, dict[str, Any]]:
    """(op, its arguments as a function of the tensors, the tensors by name) for one linear, real values on the CPU."""
    choice = SCHEMES[scheme]
    weight = torch.randn(n, k).to(dtype)
    p = packing.pack(qparams.quantize(weight, choice.weight), choice, packing.choose(choice, torch.device("cuda", 0), dtype, (n, k)))
    x = torch.randn(m, k).to(dtype)
    tensors = {"w": p.w, "scale": p.scale, "zero": p.zero, "sums": p.sums, "bias": torch.randn(n).to(dtype) if bias else None}
    if choice.activation is None:
        call = lambda t: torch.ops.aoquant.linear_wo(t["x"], t["w"], t["scale"], t["zero"], t["bias"], *p.key)  # noqa: E731
        return p, call, {"x": x, **tensors}
    quantized = (qparams.quantize_per_token if choice.activation.symmetric else qparams.quantize_per_token_asym)(x)
    tensors |= dict(zip(("x", "x_scale", "x_zero"), (*quantized, None), strict=False))
    call = lambda t: torch.ops.aoquant.linear_dynamic(  # noqa: E731
        t["x"], t["x_scale"], t["x_zero"], t["w"], t["scale"], t["zero"], t["sums"], t["bias"], *p.key, dtype
    )
    return p, call, tensors


def render(
    scheme: str, m: int, n: int, k: int, dtype: torch.dtype, bias: bool = True, arch: int = 90,
    config: tuple[Kernel, Config] | None = None,
) -> dict[str, Any]:
    """Inductor's text of one linear: {"code": wrapper module, "tensors": real CPU operands, "expected": y[M, N]}.

    `config`: the kernel and the config to take instead of the default.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    lowering.install()
    with pretended_gpu(arch):
        _, call, tensors = _operands(scheme, m, n, k, dtype, bias)
    present = {name: t for name, t in tensors.items() if t is not None}
    expected = call({**tensors})
    with pretended_gpu(arch):
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            inputs = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in present.values()]

            def run(*args: torch.Tensor) -> tuple[torch.Tensor]:
                return (call({**dict.fromkeys(tensors), **dict(zip(present, args, strict=True))}),)

            gm = make_fx(run, tracing_mode="real")(*inputs)
        with (
            inductor_config.patch(compile_threads=1, fx_graph_cache=False), V.set_fake_mode(fake),
            _forced(config) if config else contextlib.nullcontext(),
        ):
            graph = GraphLowering(gm, shape_env=None, example_inputs=inputs, is_inference=True)
            with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
                graph.run(*inputs)
                if graph.wrapper_code is None:
                    graph.init_wrapper_code()
                graph._update_scheduler()
                graph.scheduler.codegen()
                code = graph.wrapper_code.generate(graph.is_inference)[0]
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    return {"code": getattr(code, "value", code), "tensors": present, "names": names, "expected": expected}


def _forced(wanted: tuple[Kernel, Config]) -> Any:
    def default(p: Any, card: Card, kernels: list[Kernel]) -> tuple[Kernel, Config]:
        kernel, config = wanted
        assert kernel.fits(p, card), kernel.name
        able = kernel.config(p, card, config)
        assert able is not None, config
        return kernel, able

    return mock.patch.object(lowering_triton, "default", default)


def kernel(code: str) -> tuple[str, str, dict[str, str], dict[str, int]]:
    """(name, Python source, signature, {num_warps, num_stages}) of the template's kernel in a rendered module."""
    match = re.search(r"async_compile\.triton\('(triton_tem\w+)', '''(.*?)''', device_str", code, re.S)
    if match is None:
        raise AssertionError("our template did not run:\n" + code)
    name, text = match.groups()
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", text, re.S).group(1))  # type: ignore[union-attr]
    options = {key: int(re.search(rf"{key}=(\d+)", text).group(1)) for key in ("num_warps", "num_stages")}  # type: ignore[union-attr]
    return name, text[text.index("@triton.jit") :], signature, options


def call(rendered: dict[str, Any], name: str, y: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """(the kernel's arguments: real inputs, zeroed counters, scratch, `y` for the output; the grid)."""
    inputs = dict(zip(rendered["names"], rendered["tensors"].values(), strict=True))
    code = rendered["code"]
    order, grid = _call_order(code, name)

    def argument(word: str) -> torch.Tensor:
        if word in inputs:
            return inputs[word]
        size = re.search(rf"^ *{word} = empty_strided_cuda\(\((\d+), \), \(1, \), torch.(\w+)\)", code, re.M)
        if size is None or (int(size.group(1)) == y.numel() and size.group(2) not in ("uint8", "int32")):
            return y
        counters = (int(size.group(1)), size.group(2)) == (COUNTERS, "int32")
        return torch.zeros(COUNTERS, dtype=torch.int32) if counters else torch.full((int(size.group(1)),), 127, dtype=torch.uint8)

    return [argument(word) for word in order], grid


def _call_order(code: str, name: str) -> tuple[list[str], tuple[int, ...]]:
    """(the names of the kernel's arguments, the grid)."""
    match = re.search(rf"{name}\.run\(([^)]*?)(?:, stream=|\))", code)
    if match is None:
        raise AssertionError(f"{name} is not called:\n{code}")
    arguments = [argument.strip() for argument in match.group(1).split(",") if argument.strip()]
    return arguments[:-3], tuple(int(size) for size in arguments[-3:])


PRELUDE = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def load(name: str, source: str, folder: Any) -> Any:
    """The kernel as a Python object; Triton reads the source again from a real file."""
    import importlib.util

    path = folder / f"{name}_{abs(hash(source))}.py"
    path.write_text(PRELUDE + source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return getattr(module, name)


def assemble(code: str, folder: Any, arch: int = 90) -> Any:
    """The compiled kernel for sm_<arch>: .asm["ptx"], .asm["cubin"], .metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, source, signature, options = kernel(code)
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if str(kind).startswith("*")}
    ast_source = ASTSource(fn=load(name, source, folder), signature=signature, constexprs={}, attrs=attrs)
    return triton.compile(ast_source, target=GPUTarget("cuda", arch, 32), options=options)
