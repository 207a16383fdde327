"""The part of `_inductor` about tracing: what a function does with a graph's values, as nodes of that graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from aoquant_inductor import _inductor_regions as regions
from aoquant_inductor._inductor import private

(ENCODER_LAYER,) = private("torch", "_transformer_encoder_layer_fwd")


def trace(function: Callable[..., Any], inputs: Sequence[fx.Node]) -> fx.Graph:
    """The ops that `function` calls with what `inputs` stand for; a linear is one of them, torch.ops.aten.linear.

    It runs on Dynamo's fake tensors, whose sizes may be symbols. Raises what it raises.
    """
    values = (node.meta["example_value"] for node in inputs)
    module: fx.GraphModule = make_fx(function, tracing_mode="fake", pre_dispatch=True)(*values)
    return module.graph


def replace(gm: fx.GraphModule, node: fx.Node, body: fx.Graph, inputs: Sequence[fx.Node]) -> bool:
    """Puts `body`, traced with `inputs`, in the place of a node that returns the same, in place.

    False, and nothing is done, where it does not: another dtype, as under an autocast, which tracing does not see; or where a
    constant is in it.
    """
    several = not isinstance(node.meta["example_value"], torch.Tensor)
    if body.find_nodes(op="get_attr") or (several and any(user.target is not operator.getitem for user in node.users)):
        return False
    if not all(_alike(*read) for read in regions.reads(node, body).items()):
        return False

    def finish(copy: fx.Node) -> None:
        copy.meta = {"example_value": copy.meta.get("val"), **regions.tags(node)}

    regions.put(gm, node, body, inputs, finish)
    return True


def _alike(old: fx.Node, new: object) -> bool:
    return isinstance(new, fx.Node) and old.meta["example_value"].dtype == new.meta["val"].dtype
