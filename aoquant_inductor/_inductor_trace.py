"""The part of `_inductor` about tracing: what a function does with a graph's values, as nodes of that graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from aoquant_inductor._inductor import private
from aoquant_inductor._inductor_regions import tags

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
    (results,) = body.output_node().args
    several = isinstance(results, tuple)
    users = list(node.users)
    if several and not all(user.target is operator.getitem for user in users):
        return False
    reads: dict[fx.Node, Any] = {user: results[user.args[1]] for user in users} if several else {node: results}  # type: ignore
    if body.find_nodes(op="get_attr") or not all(_alike(*read) for read in reads.items()):
        return False
    env: dict[fx.Node, fx.Node] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                env[inner] = gm.graph.node_copy(inner, lambda n: env[n])
                env[inner].meta = {"example_value": inner.meta.get("val"), **tags(node)}
    for read, result in reads.items():
        read.replace_all_uses_with(env[result])
    for done in dict.fromkeys((*reads, node)):
        gm.graph.erase_node(done)
    return True


def _alike(old: fx.Node, new: object) -> bool:
    return isinstance(new, fx.Node) and old.meta["example_value"].dtype == new.meta["val"].dtype
