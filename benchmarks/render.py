"""Inductor's generated code of one quantized linear, and what it takes to call its kernel: for tests and tuning."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from aoquant_inductor import activations, lowering, lowering_triton
from aoquant_inductor._inductor_choices import COUNTERS
from aoquant_inductor._inductor_reduction import rows_in_registers
from aoquant_inductor.card import Card
from aoquant_inductor.layouts import Packed
from aoquant_inductor.scheme import Scheme
from aoquant_inductor.templates import Config, Kernel

Tensors = dict[str, torch.Tensor]
Op = Callable[[dict[str, Any]], torch.Tensor]


def linear(
    p: Packed, x: torch.Tensor, bias: torch.Tensor | None, scheme: Scheme, quantizing: bool = False
) -> tuple[Op, Tensors]:
    """(the op as a function of tensors by name, those tensors) of y[M, N] = linear(x[M, K], p, bias).

    quantizing: x is quantized in the op, not before; the op is told it.
    """
    weight = {"w": p.w, "scale": p.scale, "zero": p.zero, "sums": p.sums, "bias": bias}
    named: dict[str, torch.Tensor | None]
    if scheme.activation is None:
        named = {"x": x, **weight}
        op: Op = lambda t: torch.ops.aoquant.linear_wo(t["x"], t["w"], t["scale"], t["zero"], t["bias"], *p.key)  # noqa: E731
    else:
        quantize = activations.quantize_per_token if scheme.activation.symmetric else activations.quantize_per_token_asym
        given = (x,) if quantizing else quantize(x)
        named = dict(zip(("x", "x_scale", "x_zero"), (*given, None, None), strict=False)) | weight

        def op(t: Tensors) -> torch.Tensor:
            left = (*quantize(t["x"]), None)[:3] if quantizing else (t["x"], t["x_scale"], t["x_zero"])
            told = {"x": t["x"]} if quantizing else {}
            return torch.ops.aoquant.linear_dynamic(
                *left, t["w"], t["scale"], t["zero"], t["sums"], t["bias"], *p.key, x.dtype, **told
            )

    present = {name: t for name, t in named.items() if t is not None}
    return lambda t: op({**dict.fromkeys(named), **t}), present


@dataclass(frozen=True)
class Rendered:
    """`code`: the wrapper module; `names`: what it calls its inputs, in the order of `tensors`; `config`: the one asked for,
    as it runs.
    """

    op: Op
    tensors: Tensors
    code: str
    names: tuple[str, ...]
    config: Config | None = None

    @property
    def expected(self) -> torch.Tensor:
        return self.op(self.tensors)


def render(op: Op, tensors: Tensors, config: tuple[Kernel, Config] | None = None) -> Rendered:
    """The op over `tensors`, alone in a graph on the current GPU; `config`: the kernel and config to take, not the default."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        inputs = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in tensors.values()]
    with _forced(*config) if config else contextlib.nullcontext([]) as ran:
        code, names = lower(lambda *args: op(dict(zip(tensors, args, strict=True))), inputs, fake)
    return Rendered(op, tensors, code, names, *ran)


def lower(run: Callable[..., torch.Tensor], inputs: Sequence[Any], fake: FakeTensorMode) -> tuple[str, tuple[str, ...]]:
    """(Inductor's code for run(*inputs), which are `fake`'s, and what it calls them)."""
    from torch._inductor import config as inductor_config
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    lowering.install()
    with fake:
        table = select_decomp_table()
        gm = make_fx(lambda *args: (run(*args),), decomposition_table=table, tracing_mode="real")(*inputs)
    with inductor_config.patch(compile_threads=1, fx_graph_cache=False), V.set_fake_mode(fake), rows_in_registers():
        graph = GraphLowering(gm, shape_env=fake.shape_env, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            if graph.wrapper_code is None:
                graph.init_wrapper_code()
            graph._update_scheduler()
            graph.scheduler.codegen()
            code = graph.wrapper_code.generate(graph.is_inference)[0]
    return getattr(code, "value", code), tuple(node.target for node in gm.graph.find_nodes(op="placeholder"))


class CannotRun(Exception):
    """The card or the problem is none for this config."""


@contextlib.contextmanager
def _forced(kernel: Kernel, config: Config) -> Iterator[list[Config]]:
    ran = []

    def default(p: Any, card: Card, kernels: list[Kernel]) -> tuple[Kernel, Config]:
        able = kernel.config(p, card, config) if kernel.fits(p, card) else None
        if able is None:
            raise CannotRun(f"{kernel.template} {config}")
        ran[:] = [able]
        return kernel, able

    with mock.patch.object(lowering_triton, "default", default):
        yield ran


def kernel(code: str) -> tuple[str, str, dict[str, str], dict[str, int]]:
    """(name, Python source, signature, {num_warps, num_stages}) of the template's kernel in a rendered module."""
    match = re.search(r"async_compile\.triton\('(triton_tem\w+)', '''(.*?)''', device_str", code, re.S)
    if match is None:
        raise AssertionError("our template did not run:\n" + code)
    name, text = match.groups()
    signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", text, re.S).group(1))  # type: ignore[union-attr]
    options = {key: int(re.search(rf"{key}=(\d+)", text).group(1)) for key in ("num_warps", "num_stages")}  # type: ignore[union-attr]
    return name, text[text.index("@triton.jit") :], signature, options


def call(rendered: Rendered, name: str, y: torch.Tensor) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """(the kernel's arguments: the inputs, zeroed counters, scratch, `y` for the output; the grid)."""
    inputs = dict(zip(rendered.names, rendered.tensors.values(), strict=True))
    match = re.search(rf"{name}\.run\(([^)]*?)(?:, stream=|\))", rendered.code)
    if match is None:
        raise AssertionError(f"{name} is not called:\n{rendered.code}")
    words = [word.strip() for word in match.group(1).split(",") if word.strip()]

    def argument(word: str) -> torch.Tensor:
        if word in inputs:
            return inputs[word]
        empty = rf"^ *{word} = empty_strided_cuda\(\((\d+), \), \(1, \), torch.(uint8|int32)\)"
        if (size := re.search(empty, rendered.code, re.M)) is None:
            return y
        if (int(size.group(1)), size.group(2)) == (COUNTERS, "int32"):
            return torch.zeros(COUNTERS, dtype=torch.int32, device=y.device)
        return torch.full((int(size.group(1)),), 127, dtype=torch.uint8, device=y.device)

    return [argument(word) for word in words[:-3]], tuple(int(size) for size in words[-3:])


def described(rendered: Rendered, args: Sequence[Any]) -> list[Any]:
    """`args` of a call, and behind them the descriptors that the kernel's launcher makes of some."""
    from aoquant_inductor._inductor_launcher import descriptor

    found = re.search(r"^@describing\(\d+, (\[.*\])\)$", rendered.code, re.M)
    places = ast.literal_eval(found.group(1)) if found else []
    return [*args, *(descriptor(args[at], columns, block) for at, columns, block in places)]


PRELUDE = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def load(name: str, source: str, folder: Path) -> Any:
    """The kernel as a Python object; Triton reads the source again from a real file."""
    path = folder / f"{name}_{abs(hash(source))}.py"
    path.write_text(PRELUDE + source)
    return load_file(path, name)


def load_file(path: Path, name: str) -> Any:
    import triton

    # where a kernel's descriptors of tensors lie; Inductor's launcher sets its own
    triton.set_allocator(lambda size, *_: torch.empty(size, dtype=torch.int8, device="cuda"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return getattr(module, name)
