"""Linears that a model writes out, x @ w.T, as some of its subclasses of nn.Linear do, become calls of F.linear; casts of a
weight to what it is, w.to(x.dtype), go.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.nn.functional import linear

from aoquant_inductor.eligible import LINEAR

CALLS = ("call_function", "call_method")
PRODUCTS = (operator.matmul, torch.matmul, torch.mm, "matmul", "mm")
PAIRS = ((0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0))
FLIPS: Mapping[object, tuple[tuple[object, ...], ...]] = MappingProxyType(
    {
        getattr: (("T",), ("mT",)), torch.ops.aten.numpy_T: ((),), torch.ops.aten.mT: ((),),  # the last two from torch 2.14 on
        torch.t: ((),), "t": ((),), torch.transpose: PAIRS, "transpose": PAIRS,
        torch.permute: (((1, 0),),), "permute": ((1, 0), ((1, 0),)),
    }
)
"""What transposes a tensor of two dimensions, and with which further arguments."""
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous")
"""What returns its tensor itself where there is nothing to be done."""


def as_linears(gm: fx.GraphModule, weights: Container[fx.Node]) -> None:
    """In place: the products of an activation with a transposed w[N, K] that is one of `weights`, placeholders, and addmm with
    one and a bias[N].

    x @ w.T + bias stays a linear without a bias and a sum: so it rounds as before.
    """
    done = _without_casts(gm)
    flips = ((node, _transposed(node)) for node in gm.graph.nodes)
    transposed = {node: of for node, of in flips if of is not None and of in weights}
    for node in list(gm.graph.nodes):
        bias, x, right = _operands(node)
        if right not in transposed or x in weights or not all(_is_bias(b, transposed[right]) for b in bias):
            continue
        with gm.graph.inserting_before(node):
            call = gm.graph.call_function(linear, (x, transposed[right], *bias))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
        done = True
    for node in transposed if done else ():
        if not node.users:
            gm.graph.erase_node(node)
    if done:
        gm.graph.lint()
        gm.recompile()


def _without_casts(gm: fx.GraphModule) -> bool:
    """Lets linears read a weight itself where a cast of it is nothing else: whether there was one."""
    idle = {node: of for node in gm.graph.nodes if (of := _of_cast(node)) is not None and of is not node}
    for node, of in idle.items():
        for user in list(node.users):
            if user.target in LINEAR or _transposed(user) is node:
                user.replace_input_with(node, of)
    for node in reversed(idle):
        if not node.users:
            gm.graph.erase_node(node)
    return bool(idle)


def _of_cast(node: Any) -> fx.Node | None:
    """The placeholder whose very tensor casts have returned; itself if it is one."""
    of = node
    while isinstance(of, fx.Node) and of.op == "call_method" and of.target in CASTS:
        of = of.args[0]
    same = isinstance(of, fx.Node) and of.op == "placeholder" and of.meta.get("example_value") is node.meta.get("example_value")
    return of if same else None


def may_be_linear(node: fx.Node) -> bool:
    """Whether it is a product with a matrix; that it is transposed Dynamo may have taken out of a region."""
    right = _operands(node)[2]
    return isinstance(right, fx.Node) and len(_shape(right)) == 2


def _operands(node: fx.Node) -> tuple[tuple[Any, ...], Any, Any]:
    """((), x, right) of a product, ((bias,), x, right) of an addmm; Nones of what is neither."""
    args: tuple[Any, ...] = node.args
    if not node.kwargs and node.op in CALLS and all(isinstance(arg, fx.Node) for arg in args):
        if node.target in PRODUCTS and len(args) == 2:
            return (), *args
        if node.target is torch.addmm and len(args) == 3:
            return args[:1], *args[1:]
    return (), None, None


def _transposed(node: fx.Node) -> fx.Node | None:
    """What this is the transpose of, if that has two dimensions."""
    if node.op not in CALLS or node.target not in FLIPS or node.kwargs:
        return None
    of, *how = (tuple(arg) if isinstance(arg, list) else arg for arg in node.args)
    if tuple(how) not in FLIPS[node.target] or not isinstance(of, fx.Node):
        return None
    return of if len(_shape(of)) == 2 else None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return tuple(getattr(node.meta.get("example_value"), "shape", ()))


def _is_bias(bias: fx.Node, weight: fx.Node) -> bool:
    """Whether it is a value for each output; addmm takes one for all, too."""
    return _shape(bias) == _shape(weight)[:1]
