"""The Dynamo graph -> the quantized graph; every linear seen is accounted for, with a reason where it was left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from aoquant_inductor import _inductor, packing, qparams
from aoquant_inductor.options import Options
from aoquant_inductor.packing import Packed, WeightKey
from aoquant_inductor.patterns import PATTERNS
from aoquant_inductor.patterns.site import PackNodes, Shared
from aoquant_inductor.report import QUANTIZED, SKIPPED, Layer
from aoquant_inductor.scheme import Scheme
from aoquant_inductor.weights import STORE, Entry

LINEAR = tuple(dict.fromkeys((torch._C._nn.linear, nn.functional.linear)))  # one object in some versions, two in others
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SOURCE_PART = re.compile(r"\['([^']+)'\]|\.(\w+)")


class Names:
    """Weight -> the names its linears have in the compiled module; a weight shared by several has them all."""

    def __init__(self, root: nn.Module | None) -> None:
        self.linears: list[str] = []
        self._names: dict[int, list[str]] = {}
        self._aliases: dict[int, list[str]] = {}
        for prefix, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            prefix = prefix.replace("_orig_mod.", "")
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                full = f"{prefix}.{key}" if prefix else key
                if isinstance(module, nn.Linear) and key == "weight":
                    name = prefix or key
                    self.linears.append(name)
                    self._names.setdefault(id(parameter), []).append(name)
                else:
                    self._aliases.setdefault(id(parameter), []).append(full)

    def of(self, weight: torch.Tensor, source: str = "") -> list[str]:
        """The linears of a weight; for one that no nn.Linear owns, its parameter name, or what its source says."""
        return self._names.get(id(weight)) or self._aliases.get(id(weight)) or [_from_source(source)]

    def known(self, weight: torch.Tensor) -> str | None:
        """The first name of a weight, if the module has it."""
        return next(iter(self._names.get(id(weight)) or self._aliases.get(id(weight)) or ()), None)

    def aliases(self, weight: torch.Tensor) -> tuple[str, ...]:
        return (*self._names.get(id(weight), [])[1:], *self._aliases.get(id(weight), []))


def _from_source(source: str) -> str:
    """`L['self']._modules['up']._parameters['weight']` -> `up`."""
    parts = [a or b for a, b in _SOURCE_PART.findall(source)][1:]
    parts = [p for p in parts if p not in ("_modules", "_parameters")]
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    return ".".join(parts) or source or "?"


def decide(weight: object, names: Sequence[str], aliases: tuple[str, ...], options: Options) -> tuple[Layer, Scheme | None]:
    """What becomes of one linear by its options and its weight's kind; data is not looked at."""
    shape = tuple(getattr(weight, "shape", ()))
    layer = Layer(names[0], aliases, shape, None, None, SKIPPED)  # type: ignore[arg-type]
    if not isinstance(weight, torch.Tensor):
        return replace(layer, reason="not_parameter"), None
    size = weight.numel() * weight.element_size()
    layer = replace(layer, bytes_before=size, bytes_after=size)
    choice = options.choose(names)
    layer = replace(layer, matched_by=choice.matched_by)
    if choice.scheme is None:
        return replace(layer, reason="no_match" if choice.matched_by is None else "user"), None
    layer = replace(layer, scheme=choice.scheme.name)
    if not isinstance(weight, nn.Parameter):
        return replace(layer, reason="not_parameter"), None
    if type(weight) is not nn.Parameter or weight.dtype in (torch.int8, torch.uint8):
        return replace(layer, reason="already_quantized"), None
    if weight.dtype not in FLOATS:
        return replace(layer, reason="dtype", detail=f"is {weight.dtype}, not bf16, fp16 or fp32."), None
    return replace(layer, status=QUANTIZED), choice.scheme


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
    entry: Entry | None = None
    packed: Packed | None = None

    def skip(self, reason: str, detail: str | None = None) -> None:
        if self.scheme is not None:
            self.layer = replace(self.layer, status=SKIPPED, reason=reason, detail=detail)
            self.scheme = None

    def name_kernel(self, kernels: Mapping[WeightKey, set[str]]) -> None:
        """Into the report: which kernels the lowering took for weights like this one."""
        if self.packed is not None:
            chosen = kernels.get(self.packed.key)
            self.layer = replace(self.layer, kernel=", ".join(sorted(chosen)) if chosen else "as cached by Inductor")


def find(gm: fx.GraphModule, inputs: Sequence[object], names: Names, options: Options) -> list[Site]:
    """Every linear of the graph, decided."""
    real = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    sites = []
    for target in LINEAR:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            bound = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
            x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
            value = real.get(weight)
            known = names.of(value, _inductor.source_name(weight)) if isinstance(value, torch.Tensor) else [node.name]
            aliases = names.aliases(value) if isinstance(value, torch.Tensor) else ()
            layer, scheme = decide(value, known, aliases, options)
            out_dtype = node.meta["example_value"].dtype
            sites.append(Site(node, x, weight, bias, value, layer, scheme, out_dtype))  # type: ignore[arg-type]
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    return sorted(sites, key=lambda site: order[site.node])


def pack(sites: Iterable[Site]) -> None:
    """Packs of every site with a scheme; a non-finite weight stays as it is, with its reason."""
    for site in sites:
        if site.scheme is None:
            continue
        layout = packing.choose(site.scheme, site.value.device, site.out_dtype, site.value.shape)
        try:
            site.entry, site.packed, sqnr = STORE.pack(site.value, site.scheme, layout)
        except qparams.NonFinite as error:
            kept = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[str(site.value.dtype).removeprefix("torch.")]
            site.skip("non_finite", f"holds {error}; it stays in {kept}.")
            continue
        site.layer = replace(site.layer, sqnr_db=sqnr, bytes_after=site.packed.nbytes)


@dataclass(frozen=True)
class Rewritten:
    """gm(*packs, *inputs that are left): `consumed` are the original's placeholders that it no longer needs."""

    gm: fx.GraphModule
    packs: list[torch.Tensor]
    consumed: list[fx.Node]
    sites: list[Site]  # one per packed weight, in the order of the packs


def apply(gm: fx.GraphModule, sites: Sequence[Site]) -> Rewritten:
    """A rewritten copy of gm, whose first inputs are the packs."""
    copy, env = _inductor.copy_graph(gm)
    graph = copy.graph
    first = next(iter(graph.nodes))
    packs: list[torch.Tensor] = []
    nodes: dict[int, PackNodes] = {}
    unique: list[Site] = []
    shared: Shared = {}

    def placeholder(value: torch.Tensor | None) -> fx.Node | None:
        if value is None:
            return None
        with graph.inserting_before(first):
            node = _inductor.static_placeholder(graph, f"aoquant_{len(packs)}", value)
        packs.append(value)
        return node

    for site in sites:
        packed = site.packed
        if packed is None or site.scheme is None:
            continue
        if id(packed) not in nodes:
            w, scale, zero, sums = (placeholder(t) for t in (packed.w, packed.scale, packed.zero, packed.sums))
            assert w is not None and scale is not None
            nodes[id(packed)] = PackNodes(packed, w, scale, zero, sums)
            unique.append(site)
        node, x = env[site.node], env[site.x]
        bias = None if site.bias is None else env[site.bias]
        with graph.inserting_before(node):
            if site.x.meta["example_value"].dtype != site.out_dtype:  # autocast
                x = graph.call_method("to", (x, site.out_dtype))
            y = PATTERNS[site.scheme.pattern](graph, x, nodes[id(packed)], bias, site.scheme, site.out_dtype, shared)
        y.meta.update(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
        env[site.node] = y  # what later sites read
    weights = dict.fromkeys(site.weight for site in sites if site.packed is not None)
    consumed = [w for w in weights if not env[w].users]
    for weight in consumed:
        graph.erase_node(env[weight])
    graph.lint()
    copy.recompile()
    return Rewritten(copy, packs, consumed, unique)
