"""The part of `_inductor` about regions: what Dynamo leaves as a graph of its own within a graph."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from aoquant_inductor._inductor import private

TAGS = ("recompute", "ac_graph_id")  # what AOTAutograd's partitioner reads, and copies from a traced graph

_count = itertools.count()


def inline(gm: fx.GraphModule, wanted: Callable[[fx.Node], bool], recompute: bool) -> None:
    """Puts the body of every region with a `wanted` node into the graph around it, in place: of torch.utils.checkpoint, and of
    torch.compiler.nested_compile_region, whose one body may be called with many weights.

    recompute: a checkpoint's nodes are tagged as AOTAutograd itself tags a body when it traces through it, so that a backward
    computes them again; without a backward there is nothing to save. A checkpoint with a policy of its own (context_fn) stays
    as it is.
    """
    while found := [node for node in gm.graph.nodes if node.target in _regions() and _can(gm, node, wanted)]:
        for node in found:
            _inline(gm, node, recompute)
        gm.graph.lint()
        gm.recompile()


def tags(node: fx.Node) -> dict[str, Any]:
    """Of a node that stands for another one: whether a backward computes it again."""
    return {key: node.meta[key] for key in TAGS if key in node.meta}


class _Regions(NamedTuple):
    """The ops that call a region: (body, *inputs), and (body, its name, *inputs)."""

    checkpoint: Any
    nested: Any


@functools.cache
def _regions() -> _Regions:
    (checkpoint,) = private("torch._higher_order_ops.wrap", "tag_activation_checkpoint")
    (nested,) = private("torch._higher_order_ops.invoke_subgraph", "invoke_subgraph")
    return _Regions(checkpoint, nested)


def _body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    body = gm.get_submodule(str(node.args[0].target))  # type: ignore[union-attr]
    assert isinstance(body, fx.GraphModule)
    return body


def _can(gm: fx.GraphModule, node: fx.Node, wanted: Callable[[fx.Node], bool]) -> bool:
    body = _body(gm, node)
    graphs = [module.graph for module in body.modules() if isinstance(module, fx.GraphModule)]
    calls = any(wanted(n) for graph in graphs for n in graph.nodes)
    return calls and "_checkpoint_context_fn" not in body.meta and all(user.target is operator.getitem for user in node.users)


def _inline(gm: fx.GraphModule, node: fx.Node, recompute: bool) -> None:
    body, getter, number = _body(gm, node), node.args[0], next(_count)
    again = tags(node)  # of a region within a checkpoint
    if recompute and node.target is _regions().checkpoint:
        again = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": number}

    def finish(copy: fx.Node) -> None:
        copy.meta.update(again)
        if copy.op == "get_attr":  # a graph or a constant of the body
            value = operator.attrgetter(copy.target)(body)  # type: ignore[arg-type]
            copy.target = f"aoquant_{number}_{copy.target}".replace(".", "_")
            setattr(gm, copy.target, value)

    put(gm, node, body.graph, node.args[2 if node.target is _regions().nested else 1 :], finish)
    if not getter.users:  # type: ignore[union-attr]
        gm.graph.erase_node(getter)  # type: ignore[arg-type]


def put(gm: fx.GraphModule, node: fx.Node, body: fx.Graph, inputs: Sequence[Any], finish: Callable[[fx.Node], None]) -> None:
    """`body`, called with `inputs`, in the place of a node that returns the same, in place. finish: mends a copied node."""
    env: dict[fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op not in ("placeholder", "output"):
                env[inner] = gm.graph.node_copy(inner, lambda n: env[n])
                finish(env[inner])
    read = reads(node, body)
    for user, result in read.items():
        user.replace_all_uses_with(env[result])
    for done in dict.fromkeys((*read, node)):
        gm.graph.erase_node(done)


def reads(node: fx.Node, body: fx.Graph) -> dict[fx.Node, Any]:
    """What reads the results of a node, or is its one result -> which of the body's it is."""
    (results,) = body.output_node().args
    several = isinstance(results, (tuple, list))
    return {user: results[user.args[1]] for user in node.users} if several else {node: results}  # type: ignore
