"""The part of `_inductor` about what a graph of Dynamo's does besides what it computes: writes, gradients, streams."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import fx, nn

from aoquant_inductor._inductor import private, storage_id

AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift")
ENABLES = (("_set_grad_enabled", (True,)), ("_enter_inference_mode", (False,)))
IN_PLACE = frozenset([operator.setitem, *(getattr(operator, f"i{name}") for name in AUGMENTED)])


def differentiates(gm: fx.GraphModule, trains: bool) -> bool:
    """Whether the graph takes gradients itself: torch.func's, tangents among them, and where it enables grad on its own; or, of
    one that `trains`, has what our backward does not know: torch.vmap, inference mode.
    """
    (forward_ad,) = private("torch.autograd", "forward_ad")
    if forward_ad._current_level >= 0:  # tangents may come with the inputs
        return True
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", node.target)
        if (name, node.args[:1]) in ENABLES and not torch.is_grad_enabled():
            return True
        if trains and name in ("_vmap_increment_nesting", "_enter_inference_mode"):
            return True
        if name in ("_grad_increment_nesting", "_jvp_increment_nesting", "_autograd_grad"):
            return True
        if name == "requires_grad_" and torch.is_grad_enabled():  # else for nothing: transformers' hook on embeddings
            return True
    return False


def stream(node: fx.Node) -> object:
    """The stream that the function itself puts a node on (`with torch.cuda.stream(s)`), as Dynamo notes from torch 2.13 on."""
    return node.meta.get("custom", {}).get("stream")


def written(gm: fx.GraphModule, inputs: Sequence[object]) -> Callable[[fx.Node], bool]:
    """Whether the graph writes to what a node is, or to a part of it. Dynamo has run it on fake tensors, whose versions count
    that, but not what is written through .data, as one of a list or in inference mode: that is found by the ops.
    """
    values = ((node, node.meta.get("example_value")) for node in gm.graph.nodes)
    fakes = {node: value for node, value in values if isinstance(value, torch.Tensor) and value.layout is torch.strided}
    storages = {node: _storage(value) for node, value in fakes.items()}
    by_op = {storages.get(one) for node in gm.graph.nodes for one in _writes_to(node)} - {None}
    many = {node: value._version for node, value in fakes.items() if not value.is_inference() and value._version > 0}
    first = _at_first(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True), storages) if many else {}
    counted = {node for node, version in many.items() if version > first.get(storages[node], 0)}
    through = by_op | {storages[node] for node in counted} - {None}
    return lambda node: node in counted or storages.get(node) in through


def _at_first(inputs: Iterable[tuple[fx.Node, object]], storages: Mapping[fx.Node, int | None]) -> dict[int | None, int]:
    """By storage, the version of inputs' fake tensors before anything ran: one that begins within its storage, or shares it
    with another, has one already.
    """
    (mode,) = private("torch._subclasses.fake_tensor", "FakeTensorMode")
    fresh = mode()
    found: dict[int | None, int] = {}
    plain = [(node, fresh.from_tensor(value)) for node, value in inputs if type(value) in (torch.Tensor, nn.Parameter)]
    for node, fake in plain:
        found[storages.get(node)] = max(int(fake._version), found.get(storages.get(node), 0))
    return found


def _storage(value: torch.Tensor) -> int | None:
    try:
        return storage_id(value)
    except NotImplementedError:  # what torch.func wraps has none
        return None


def _writes_to(node: fx.Node) -> list[fx.Node]:
    """What an op writes to, as far as its name, its `out` or its schema say."""
    if node.op not in ("call_function", "call_method"):
        return []
    name, op = str(getattr(node.target, "__name__", node.target)), node.target
    if isinstance(op, torch._ops.OpOverloadPacket):
        op = getattr(op, "default", op)
    if isinstance(op, torch._ops.OpOverload):
        arguments = op._schema.arguments
        given = dict(zip((a.name for a in arguments), node.args, strict=False)) | node.kwargs
        found = [given.get(a.name) for a in arguments if a.is_write]
    elif op in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        found = [node.args[0] if node.args else None]
    else:
        found = [node.kwargs.get("out"), node.args[0] if node.kwargs.get("inplace") and node.args else None]
    flat = [one for value in found for one in (value if isinstance(value, (list, tuple)) else (value,))]
    return [one for one in flat if isinstance(one, fx.Node)]
