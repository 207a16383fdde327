"""Models and their compiled objects, such that no measurement can touch another one's graph.

Dynamo keeps compiled graphs per code object of `forward`. So every compiled object gets a class whose `forward` is a code
object of its own; two of them neither recompile for nor evict each other.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

import aoquant_inductor

Step = Callable[[], torch.Tensor]
Made = tuple[nn.Module, Callable[[Any], Step]]  # models.py
BF16 = torch.bfloat16

_count = itertools.count()


class Linear(nn.Module):
    """y[M, N] = x[M, K] @ w[N, K].T, as a child: compiling nn.Linear itself would compile a wrapper that all share."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.linear = nn.Linear(k, n, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


class Toy(nn.Module):
    """512 -> 1024 -> ReLU -> 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(512, 1024, bias=False), nn.Linear(1024, 1024, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.relu(self.first(x)))
        return y


class Stack(nn.Module):
    """`depth` times x + w x, or w x."""

    def __init__(self, depth: int, width: int, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x) if self.residual else layer(x)
        return x


class Block(nn.Module):
    """Seven linears as a Llama's block has them, without its attention: what is compiled once for all its equals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(self.q(x) + self.k(x) * self.v(x))
        y: torch.Tensor = x + self.down(self.gate(x).relu() * self.up(x))
        return y


def fill(model: nn.Module, seed: int) -> None:
    """Weights ~ N(0, 0.25 / K) of this seed."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.5 * weight.shape[-1] ** -0.5, generator=torch.Generator(weight.device).manual_seed(seed))
            seed += 1


def fresh(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """A bf16 model in eval mode, always with the same weights, and with a `forward` code object of its own."""
    model = make()
    kind, forward = type(model), type(model).forward
    code = forward.__code__.replace(co_name=f"forward_{next(_count)}")
    own = FunctionType(code, forward.__globals__, "forward", forward.__defaults__, forward.__closure__)
    model.__class__ = type(kind.__name__, (kind,), {"forward": own})
    model = model.to(device, torch.bfloat16).eval().requires_grad_(False)
    fill(model, 0)
    return model


def seeded(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """A bf16 model made on the device, in eval mode; same values every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def first(compiled: Any, x: torch.Tensor) -> Step:
    """A step that returns the first output of a model, whatever it packs it into."""

    def step() -> torch.Tensor:
        y = compiled(x)
        found: torch.Tensor = y if isinstance(y, torch.Tensor) else y[0]
        return found

    return step


def compile_bf16(model: nn.Module, mode: str = "default") -> Callable[..., Any]:
    return torch.compile(model, mode=mode, dynamic=False, fullgraph=True)


def compile_quantized(model: nn.Module, scheme: str, mode: str = "default", release: bool = False) -> Callable[..., Any]:
    options: dict[str, Any] = {"schemes": scheme, "release_weights": release} | ({} if mode == "default" else {"mode": mode})
    return torch.compile(model, backend="aoquant", options=options, dynamic=False, fullgraph=True)


@contextlib.contextmanager
def no_caches() -> Iterator[None]:
    """Inductor's graph caches off while compiling: a cached graph does not say which kernel it holds."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


def graphs() -> int:
    """How many graphs Dynamo compiled in this process: a timed section must not raise it."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


class Refused(Exception):
    """This is no measurement of a quantized layer; the message says why."""


def kernels(compiled: object, linears: int, y: torch.Tensor, reference: torch.Tensor) -> str:
    """The kernels that serve `compiled`. Raises Refused unless all `linears` are quantized and y points reference's way."""
    report = aoquant_inductor.report(compiled)
    totals: Mapping[str, Any] = report.totals
    if totals["quantized"] != linears:
        raise Refused(f"{totals['quantized']} of {linears} linears are quantized; skipped: {totals['reasons']}")
    found = {layer.kernel for layer in report.layers}
    if None in found or "as cached by Inductor" in found:
        raise Refused(f"the report names no kernel: {found}")
    check(y, reference)
    return ", ".join(sorted(str(kernel) for kernel in found))


def check(y: torch.Tensor, reference: torch.Tensor) -> None:
    """Raises Refused unless y points reference's way."""
    a, b = y.double().flatten(), reference.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()))  # cosine_similarity() has an eps that outputs of 1e-15 fall below
    if not cosine > 0.5:  # int4 through 50 layers is far off too; a wrong kernel is at 0
        raise Refused(f"the output is wrong: its cosine to bf16's is {cosine:.3f}")
