"""What becomes of a linear, by the options and by what its weight is; no data is read."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.report import QUANTIZED, SKIPPED, Layer
from aoquant_inductor.scheme import Scheme

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LINEAR: tuple[Any, ...] = tuple(dict.fromkeys((torch._C._nn.linear, nn.functional.linear, torch.ops.aten.linear.default)))
"""The first two are one object in some versions, two in others; the last is what torch.export makes of them."""
PARTS = (
    operator.getitem, torch.chunk, torch.split, torch.ops.aten.chunk.default, torch.ops.aten.split_with_sizes.default, "chunk",
    "split",
)


def plan(root: nn.Module, names: Names, options: Options) -> Iterator[tuple[torch.Tensor, Layer, Scheme | None]]:
    """Every weight of an nn.Linear of the module, decided; no data is read."""
    weights = [module._parameters.get("weight") for module in root.modules() if isinstance(module, nn.Linear)]
    for weight in {id(weight): weight for weight in weights if weight is not None and not is_lazy(weight)}.values():
        yield (weight, *decide(weight, names.of(weight), names.aliases(weight), options))
    for name, module in names.computed.items():
        dtype = next((parameter.dtype for parameter in module.parameters()), None)
        like = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
        yield (like, *computed(like, name, options))


def called(value: torch.Tensor, placeholder: fx.Node, names: Names) -> tuple[list[str], tuple[str, ...]]:
    """(the names of a weight's linears, its other names)."""
    return names.of(value, dynamo.source_name(placeholder)), names.aliases(value)


def decide(weight: object, names: Sequence[str], aliases: tuple[str, ...], options: Options) -> tuple[Layer, Scheme | None]:
    """What becomes of one linear by its options and its weight's kind; data is not looked at."""
    shape = tuple(getattr(weight, "shape", ()))
    layer = Layer(names[0], aliases, shape, None, None, SKIPPED)  # type: ignore[arg-type]
    if not isinstance(weight, torch.Tensor):
        return replace(layer, reason="not_parameter", detail="has a weight that the graph computes."), None
    size = weight.numel() * weight.element_size()
    choice = options.choose(names)
    layer = replace(layer, bytes_before=size, bytes_after=size, matched_by=choice.matched_by)
    if choice.scheme is None:
        return replace(layer, reason="no_match" if choice.matched_by is None else "user"), None
    layer = replace(layer, scheme=choice.scheme.name)
    if not isinstance(weight, nn.Parameter):
        return replace(layer, reason="not_parameter", detail="is a tensor of the call, no Parameter (functional_call?)."), None
    if type(weight) is not nn.Parameter or weight.dtype in (torch.int8, torch.uint8):
        reason, detail = _of_another_kind(weight)
        return replace(layer, reason=reason, detail=detail), None
    if weight.dim() != 2:
        return replace(layer, reason="not_matrix", detail=f"has {weight.dim()} dimensions."), None
    if weight.numel() == 0:
        return replace(layer, reason="empty", detail="has no elements."), None
    if weight.dtype not in FLOATS:
        return replace(layer, reason="dtype", detail=f"is {weight.dtype}, not bf16, fp16 or fp32."), None
    if weight.shape[1] > choice.scheme.most_inputs:
        return replace(layer, reason="overflow", detail="has more inputs than 32 bits hold the sum of, of int8 products."), None
    return replace(layer, status=QUANTIZED), choice.scheme


def computed(weight: torch.Tensor, name: str, options: Options) -> tuple[Layer, Scheme | None]:
    """An nn.Linear whose weight a parametrization makes, weight_norm say, or pruning: it changes with what it is made of."""
    layer, scheme = decide(weight, [name], (), options)
    if layer.reason == "not_parameter":
        layer = replace(layer, detail="has a weight that is computed at every call (a parametrization?), which stays as it is.")
    return layer, scheme


def made(weight: fx.Node, real: Mapping[fx.Node, object], names: Names, options: Options) -> Layer | None:
    """A linear whose weight the graph makes of parameters and nothing else: cut out of one, as the attention of torch.nn cuts
    q, k and v where they differ, cast, scaled, merged. None: what it is made of does not say which linear it is.
    """
    everything, near = _made_of(weight, through=True), _made_of(weight, through=False)
    tensors = [node for node in everything if node.op != "placeholder" or isinstance(real.get(node), torch.Tensor)]  # no sizes
    if tensors == [weight] or not all(isinstance(real.get(node), nn.Parameter) for node in tensors):
        return None
    like, cut = weight.meta["example_value"], weight.target in PARTS
    of = {node: value for node in near if isinstance(value := real.get(node), nn.Parameter)}
    for asked in (lambda value: True, names.is_linear, lambda value: value.shape == like.shape):
        if len(which := [source for source, value in of.items() if asked(value)]) == 1:
            value = of[which[0]]
            layer, _ = decide(value if value.dim() == 2 else like, *called(value, which[0], names), options)
            how = "cut into parts by the graph" if cut else f"computed by the graph ({word(weight)})"
            detail = f"is {how}; only a whole parameter is packed."
            wanted = layer.scheme is not None
            return replace(layer, status=SKIPPED, reason="not_parameter", detail=detail) if wanted else layer
    return None


def _made_of(node: fx.Node, through: bool) -> list[fx.Node]:
    """What stands at the beginning of a node's computation; not what other linears read, unless `through`."""
    found, left, seen = [], [node], set()
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op not in ("call_function", "call_method"):
            found.append(one)
        elif through or one.target not in LINEAR:
            left += one.all_input_nodes
    return found


def word(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _of_another_kind(weight: torch.Tensor) -> tuple[str, str]:
    """The reason and the detail of what is no plain Parameter; DTensors by name, since torch.distributed may not be there."""
    if dynamo.is_fake(weight):
        return "ddp_optimizer", "is cut from its graph by Dynamo's DDPOptimizer: set torch._dynamo.config.optimize_ddp = False."
    if issubclass(type(weight), nn.Parameter) and weight.dtype in FLOATS:
        return "subclass", f"is a {type(weight).__name__}, and what such a Parameter does is not known."
    distributed = any(kind.__module__.startswith("torch.distributed") for kind in type(weight).__mro__)
    return "dtensor" if distributed else "already_quantized", f"is {weight.dtype} in a {type(weight).__name__}."
