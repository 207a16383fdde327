"""The part of `_inductor` about regions: what Dynamo leaves as a graph of its own within a graph."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

TAGS = ("recompute", "ac_graph_id")  # what AOTAutograd's partitioner reads, and copies from a traced graph

_regions = itertools.count()


def inline_checkpoints(gm: fx.GraphModule, targets: Container[Any], recompute: bool) -> None:
    """Puts the body of every torch.utils.checkpoint that calls one of `targets` into the graph around it, in place.

    recompute: its nodes are tagged as AOTAutograd itself tags a body when it traces through it, so that a backward computes
    them again; without a backward there is nothing to save. A checkpoint with a policy of its own (context_fn) stays as it is.
    """
    checkpoint = torch.ops.higher_order.tag_activation_checkpoint
    found = [node for node in gm.graph.find_nodes(op="call_function", target=checkpoint) if _plain(gm, node, targets)]
    for node in found:
        _inline(gm, node, recompute)
    if found:
        gm.graph.lint()
        gm.recompile()


def tags(node: fx.Node) -> dict[str, Any]:
    """Of a node that stands for another one: whether a backward computes it again."""
    return {key: node.meta[key] for key in TAGS if key in node.meta}


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    body = gm.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    return body


def _plain(gm: fx.GraphModule, node: fx.Node, targets: Container[Any]) -> bool:
    body = _body(gm, node)
    calls = any(n.op == "call_function" and n.target in targets for n in body.graph.nodes)
    # a policy, or a graph or a constant of its own
    own = "_checkpoint_context_fn" in body.meta or any(n.op == "get_attr" for n in body.graph.nodes)
    return calls and not own and all(user.target is operator.getitem for user in node.users)


def _inline(gm: fx.GraphModule, node: fx.Node, recompute: bool) -> None:
    body, region = _body(gm, node), next(_regions)
    graph, (getter, *operands) = gm.graph, node.args
    env: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            env[inner] = graph.node_copy(inner, lambda n: env[n])
            if recompute:
                env[inner].meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": region}
    (results,) = body.graph.output_node().args
    for user in list(node.users):
        user.replace_all_uses_with(env[results[user.args[1]]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
    if not getter.users:  # type: ignore[union-attr]
        graph.erase_node(getter)  # type: ignore[arg-type]
