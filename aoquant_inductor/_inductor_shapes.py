"""The part of `_inductor` about symbolic sizes: what they are in a call, and compiling for others than the traced ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx

from aoquant_inductor._inductor import private


def rows(value: torch.Tensor) -> sympy.Expr:
    """M of a fake x[..., K]: the product of its leading sizes."""
    sizes = [size if isinstance(size, int) else size.node.expr for size in value.shape[:-1]]
    return sympy.Mul(*sizes)


def symbols(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """Symbol -> the place of the argument that is it."""
    placed = enumerate(node.meta.get("example_value") for node in graph.find_nodes(op="placeholder"))
    return {value.node.expr: i for i, value in placed if isinstance(value, torch.SymInt)}


def evaluator(expr: sympy.Expr, places: Mapping[sympy.Symbol, int]) -> Callable[[Sequence[Any]], int] | None:
    """args -> the value of `expr`, as fast as Python can; None if the arguments do not tell it."""
    free = sorted(expr.free_symbols, key=str)
    if not free or any(symbol not in places for symbol in free):
        return None
    if expr in places:
        place = places[expr]
        return lambda args: args[place]  # type: ignore[no-any-return]
    (printer,) = private("torch.utils._sympy.printers", "PythonPrinter")  # knows torch's own functions, FloorDiv and the like
    function = sympy.lambdify(free, expr, modules=[{"math": math}, "math"], printer=printer())
    at = [places[symbol] for symbol in free]
    return lambda args: int(function(*[args[i] for i in at]))


def hint(value: Any) -> Any:
    """What a symbolic size was when it was traced; asking the SymInt itself would make it a constant."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def _hints(env: Any) -> dict[sympy.Symbol, sympy.Integer]:
    """The traced values of the symbols that have one."""
    # renamed in torch 2.11
    return env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # type: ignore[no-any-return]


def guard_32_bits(inputs: Sequence[Any], counts: Iterable[sympy.Expr]) -> None:
    """Whether 32 bits tell so many elements apart becomes a guard of Dynamo's, which is still at work on this graph.

    Inductor asks it of every tensor that a Triton kernel reads or writes, and counts `M <= n` as known by itself only.
    """
    env = next(value.node.shape_env for value in inputs if isinstance(value, torch.SymInt))
    most = torch.iinfo(torch.int32).max
    for count in dict.fromkeys(counts):
        if count.free_symbols and count.free_symbols <= _hints(env).keys():  # of a symbol without a value it asks nothing
            env.evaluate_expr(sympy.Le(count, most))


@contextmanager
def sizes_of(
    graph: fx.Graph, packs: Sequence[torch.Tensor], args: Sequence[Any], inputs: Sequence[Any]
) -> Iterator[Callable[[], bool]]:
    """Inductor compiles a graph that Dynamo is done with, as if it had been traced with these arguments' sizes.

    packs: the graph's first arguments as it will be given them, whose sizes never change. inputs: the fake ones of the others
    that Dynamo traced with.

    Yields a question: whether the compile since then asked for a guard that Dynamo cannot add any more, so that its result is
    not good for every call that the graph is.
    """
    tracing, context = private("torch._guards", "tracing", "TracingContext")
    (fake_mode_of,) = private("torch._dynamo.utils", "detect_fake_mode")
    fake = fake_mode_of(inputs)
    env = fake.shape_env
    values = {symbol: sympy.Integer(args[i]) for symbol, i in symbols(graph).items()}
    asked = lambda: (env.counter["ignored_backward_guard"], len(env.guards))  # noqa: E731
    # known to the mode, and alive, while it compiles: else their sizes would be symbols where the user asked for dynamic=True
    static = [fake.from_tensor(pack, static_shapes=True) for pack in packs]
    before = asked()
    with mock.patch.dict(_hints(env), values), tracing(context(fake)):
        yield lambda: asked() != before
    del static
