"""The linears of a Dynamo graph: every one is accounted for, with its pack or a reason why it was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx, nn

from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor import _inductor_effects as effects
from aoquant_inductor import _inductor_shapes as shapes
from aoquant_inductor import packing, qparams
from aoquant_inductor.eligible import FLOATS, LINEAR, called, computed, decide, made, word
from aoquant_inductor.entry import Entry
from aoquant_inductor.layouts import Packed, WeightKey
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.report import KEPT, RELEASED, SKIPPED, Layer
from aoquant_inductor.scheme import LARGE_M, Scheme
from aoquant_inductor.weights import STORE

EMBEDDING = (torch.embedding, nn.functional.embedding)  # a tied head's weight: its linear may be in another graph


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
    return {node for node, value in plain.items() if decide(value, *called(value, node, names), options)[1] is not None}


def _values(gm: fx.GraphModule, inputs: Sequence[object]) -> dict[fx.Node, object]:
    return dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))


def of_other_ops(
    gm: fx.GraphModule, inputs: Sequence[object], names: Names, options: Options, sites: Sequence[Site]
) -> list[Layer]:
    """The weights of nn.Linears that this graph hands to other ops only, a fused encoder layer say: left, with the reason.
    Not those that the ops make the weight of a linear of, which is one of `sites`.
    """
    found, known = [], {site.layer.name for site in sites}
    for node, value in weights_of(gm, inputs, names).items():
        if not node.users or any(user.target in LINEAR for user in node.users) or known.intersection(names.of(value)):
            continue
        layer, scheme = decide(value, names.of(value), names.aliases(value), options)
        if scheme is not None and not any(user.target in EMBEDDING for user in node.users):
            detail = f"is read by {word(next(iter(node.users)))}, not by a linear."
            found.append(replace(layer, status=SKIPPED, reason="other_op", detail=detail))
    return found


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
        if (name := names.of_computed(dynamo.module_name(node))) is not None:
            layer, scheme = computed(weight.meta["example_value"], name, options)
        elif (found := made(weight, real, names, options)) is not None:
            layer, scheme = found, None
        else:
            known, aliases = called(value, weight, names) if isinstance(value, torch.Tensor) else ([node.name], ())
            layer, scheme = decide(value, known, aliases, options)
        sites.append(Site(node, x, weight, bias, value, layer, scheme, node.meta["example_value"].dtype))  # type: ignore[arg-type]
    whole = {site.layer.name: site for site in sites if isinstance(site.value, torch.Tensor)}
    for site in sites:
        own = whole.get(site.layer.name)
        if site.value is None and own is not None and own.scheme is not None:  # made of a weight that is read as it is, too
            site.layer = replace(site.layer, scheme=None)
            own.layer = replace(own.layer, detail=f"is read as it is, too, to compute a weight ({word(site.weight)}).")
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
