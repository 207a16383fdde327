"""The linears of a Dynamo graph: every one is accounted for, with its pack or a reason why it was left."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor import _inductor_effects as effects
from aoquant_inductor import _inductor_shapes as shapes
from aoquant_inductor import packing, qparams
from aoquant_inductor.entry import Entry
from aoquant_inductor.layouts import Packed, WeightKey
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.report import KEPT, QUANTIZED, RELEASED, SKIPPED, Layer
from aoquant_inductor.scheme import LARGE_M, Scheme
from aoquant_inductor.weights import STORE

LINEAR: tuple[Any, ...] = tuple(dict.fromkeys((torch._C._nn.linear, nn.functional.linear, torch.ops.aten.linear.default)))
"""The first two are one object in some versions, two in others; the last is what torch.export makes of them."""
EMBEDDING = (torch.embedding, nn.functional.embedding)  # a tied head's weight: its linear may be in another graph
PARTS = (operator.getitem, torch.ops.aten.chunk.default, torch.ops.aten.split_with_sizes.default)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def plan(root: nn.Module, names: Names, options: Options) -> Iterator[tuple[torch.Tensor, Layer, Scheme | None]]:
    """Every weight of an nn.Linear of the module, decided; no data is read."""
    weights = [module._parameters.get("weight") for module in root.modules() if isinstance(module, nn.Linear)]
    for weight in {id(weight): weight for weight in weights if weight is not None and not is_lazy(weight)}.values():
        yield (weight, *decide(weight, names.of(weight), names.aliases(weight), options))
    for name, module in names.computed.items():
        dtype = next((parameter.dtype for parameter in module.parameters()), None)
        like = torch.empty(module.out_features, module.in_features, dtype=dtype, device="meta")
        yield (like, *_computed(like, name, options))


def hear(gm: fx.GraphModule, inputs: Sequence[object], names: Names) -> None:
    """Tells `names` where this graph's parameters come from, before it is asked for one."""
    names.hear(dynamo.source_name(node) for node, value in _values(gm, inputs).items() if isinstance(value, nn.Parameter))


def weights_of(gm: fx.GraphModule, inputs: Sequence[object], names: Names) -> dict[fx.Node, nn.Parameter]:
    """The placeholders of plain weights of nn.Linears."""
    real = _values(gm, inputs)
    return {node: value for node, value in real.items() if type(value) is nn.Parameter and names.is_linear(value)}


def wanted(gm: fx.GraphModule, inputs: Sequence[object], names: Names, options: Options, training: bool) -> set[fx.Node]:
    """The placeholders of plain matrices that have a scheme, whatever reads them; none that requires grad in `training`."""
    real = _values(gm, inputs).items()
    plain = {n: v for n, v in real if type(v) is nn.Parameter and v.dim() == 2 and not (training and v.requires_grad)}
    return {node for node, value in plain.items() if decide(value, *_called(value, node, names), options)[1] is not None}


def _values(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, object]:
    return dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))


def _called(value: torch.Tensor, placeholder: fx.Node, names: Names) -> tuple[list[str], tuple[str, ...]]:
    """(the names of a weight's linears, its other names)."""
    return names.of(value, dynamo.source_name(placeholder)), names.aliases(value)


def of_other_ops(gm: fx.GraphModule, inputs: Sequence[object], names: Names, options: Options) -> list[Layer]:
    """The weights of nn.Linears that this graph hands to other ops only, a fused encoder layer say: left, with the reason."""
    found = []
    for node, value in weights_of(gm, inputs, names).items():
        if not node.users or any(user.target in LINEAR for user in node.users):
            continue
        layer, scheme = decide(value, names.of(value), names.aliases(value), options)
        if scheme is not None and not any(user.target in EMBEDDING for user in node.users):
            op = getattr(next(iter(node.users)).target, "__name__", str(next(iter(node.users)).target))
            found.append(replace(layer, status=SKIPPED, reason="other_op", detail=f"is read by {op}, not by a linear."))
    return found


def decide(weight: object, names: Sequence[str], aliases: tuple[str, ...], options: Options) -> tuple[Layer, Scheme | None]:
    """What becomes of one linear by its options and its weight's kind; data is not looked at."""
    shape = tuple(getattr(weight, "shape", ()))
    layer = Layer(names[0], aliases, shape, None, None, SKIPPED)  # type: ignore[arg-type]
    if not isinstance(weight, torch.Tensor):
        return replace(layer, reason="not_parameter"), None
    size = weight.numel() * weight.element_size()
    choice = options.choose(names)
    layer = replace(layer, bytes_before=size, bytes_after=size, matched_by=choice.matched_by)
    if choice.scheme is None:
        return replace(layer, reason="no_match" if choice.matched_by is None else "user"), None
    layer = replace(layer, scheme=choice.scheme.name)
    if not isinstance(weight, nn.Parameter):
        return replace(layer, reason="not_parameter"), None
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


def _computed(weight: torch.Tensor, name: str, options: Options) -> tuple[Layer, Scheme | None]:
    """An nn.Linear whose weight a parametrization makes, weight_norm say, or pruning: it changes with what it is made of."""
    layer, scheme = decide(weight, [name], (), options)
    if layer.reason == "not_parameter":
        layer = replace(layer, detail="has a weight that is computed at every call (a parametrization?), which stays as it is.")
    return layer, scheme


def _part(
    weight: fx.Node, real: Mapping[fx.Node, object], names: Names, options: Options
) -> tuple[Layer, Scheme | None] | None:
    """A linear whose weight is cut out of a parameter, as the attention of torch.nn cuts q, k and v where they differ."""
    whole = weight
    while whole.target in PARTS and isinstance(whole.args[0], fx.Node):
        whole = whole.args[0]
    if whole is weight or not isinstance(value := real.get(whole), nn.Parameter):
        return None
    layer, scheme = decide(weight.meta["example_value"], *_called(value, whole, names), options)
    return replace(layer, detail="is cut into parts by the graph; only a whole parameter is packed."), scheme


def _of_another_kind(weight: torch.Tensor) -> tuple[str, str]:
    """The reason and the detail of what is no plain Parameter; DTensors by name, since torch.distributed may not be there."""
    if dynamo.is_fake(weight):
        return "ddp_optimizer", "is cut from its graph by Dynamo's DDPOptimizer: set torch._dynamo.config.optimize_ddp = False."
    distributed = any(kind.__module__.startswith("torch.distributed") for kind in type(weight).__mro__)
    return "dtensor" if distributed else "already_quantized", f"is {weight.dtype} in a {type(weight).__name__}."


@dataclass
class Site:
    """One linear of the graph."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    value: torch.Tensor
    layer: Layer
    scheme: Scheme | None
    out_dtype: torch.dtype
    read_elsewhere: bool = False  # the weight, by something in the graph that is no linear
    x_written: bool = False  # by the graph, in place: what another linear reads may be of before or after it
    entry: Entry | None = None
    packed: Packed | None = None
    launch: Packed | None = None  # what its kernel reads: `packed`, or that of several siblings
    whole: Packed | None = None  # what `packed` is a part of, whoever reads it

    @property
    def layout(self) -> str:
        assert self.scheme is not None
        return packing.choose(self.scheme, self.value.device, self.out_dtype, self.value.shape)

    @property
    def m(self) -> sympy.Expr:
        """The rows of x; a sympy.Integer where they are known."""
        return shapes.rows(self.x.meta["example_value"])

    @property
    def elements(self) -> tuple[sympy.Expr, ...]:
        """How many x[M, K], y[M, N] and what there is once per row have, as its kernel reads and writes them."""
        return () if self.launch is None else tuple(self.m * size for size in (1, *self.launch.shape))

    @property
    def keys(self) -> tuple[WeightKey, ...]:
        """What the ops that serve it are told about its weight."""
        if self.launch is None:
            return ()
        return (self.launch.key,) if self.launch.row is None else (self.launch.key, self.launch.int8_key)

    def requantized(self, many: sympy.Expr | None) -> bool:
        """Whether its activation is quantized since its M is large, in a graph for more than LARGE_M of the symbolic `many`."""
        large = self.scheme is not None and self.scheme.large_m is not None
        return large and (int(self.m) > LARGE_M if isinstance(self.m, sympy.Integer) else self.m == many)

    def skip(self, reason: str, detail: str | None = None) -> None:
        if self.scheme is not None:
            self.layer = replace(self.layer, status=SKIPPED, reason=reason, detail=detail)
            self.scheme = None

    def name_kernel(self, kernels: Mapping[WeightKey, set[str]]) -> None:
        """Into the report: which kernels the lowering took for weights like this one."""
        chosen = {name for key in self.keys for name in kernels.get(key, ())}
        if self.launch is not None:
            self.layer = replace(self.layer, kernel=", ".join(sorted(chosen)) or "as cached by Inductor")


def find(gm: fx.GraphModule, inputs: Sequence[object], names: Names, options: Options) -> list[Site]:
    """Every linear of the graph, decided."""
    real = _values(gm, inputs)
    sites = []
    for node in (node for node in gm.graph.nodes if node.op == "call_function" and node.target in LINEAR):
        bound = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        x, weight, bias, value = bound["input"], bound["weight"], bound.get("bias"), real.get(bound["weight"])
        if (computed := names.of_computed(dynamo.module_name(node))) is not None:
            layer, scheme = _computed(weight.meta["example_value"], computed, options)
        elif (part := _part(weight, real, names, options)) is not None:
            layer, scheme = part
        else:
            known, aliases = _called(value, weight, names) if isinstance(value, torch.Tensor) else ([node.name], ())
            layer, scheme = decide(value, known, aliases, options)
        sites.append(Site(node, x, weight, bias, value, layer, scheme, node.meta["example_value"].dtype))  # type: ignore[arg-type]
    written = effects.written(gm, inputs)
    for site in sites:
        site.x_written = written(site.x)
        if site.scheme is not None and site.bias is not None and site.bias.meta["example_value"].shape != site.value.shape[:1]:
            site.skip("bias", "has a bias that is broadcast, not one number for each of its outputs.")
        if site.x.meta["example_value"].is_nested:
            site.skip("nested", "has a nested tensor as its activation.")
        if effects.stream(site.node) is not None:
            site.skip("stream", "is on a stream of its own in the graph, where what kernels share is not safe.")
        if written(site.weight):
            site.skip("written", "is written to by the graph that reads it: a pack would be of before.")
    of_node = {site.node: site for site in sites}
    for site in sites:
        readers = [of_node.get(user) for user in site.weight.users]
        site.read_elsewhere = any(r is None or r.weight is not site.weight or site.weight in (r.x, r.bias) for r in readers)
    return sites


def pack(site: Site) -> None:
    """The pack of a site with a scheme; a weight that is not finite or finds no memory stays as it is, with its reason."""
    if site.scheme is None:
        return
    if site.value.is_meta:
        site.skip("meta", "has no data: it is on the meta device.")
        return
    kept = dict(zip(FLOATS, ("bf16", "fp16", "fp32"), strict=True))[site.value.dtype]
    try:
        site.entry, site.packed, sqnr = STORE.pack(site.value, site.scheme, site.layout)
    except qparams.NonFinite as error:
        site.skip("non_finite", f"holds {error.found}; it stays in {kept}.")
    except torch.OutOfMemoryError:
        site.skip("out_of_memory", f"could not be packed in the memory that is free; it stays in {kept}.")
    else:
        site.launch = site.packed
        original = RELEASED if site.entry.released else KEPT  # by an earlier compile, or by load
        site.layer = replace(site.layer, sqnr_db=sqnr, bytes_after=site.packed.nbytes, original=original)
