"""(gm, example_inputs, mode, options) -> a compiled callable. The pipeline, read downwards in `_pipeline`.

One compiled graph may serve many modules: Dynamo compiles a block once for all its equals. The first weights that a code
object is seen with become constants of its graph, guarded by identity; when other weights come to the same code, a second
graph takes its packs as inputs and looks them up by the weights of each call. So a model compiled whole pays nothing for its
weights per call, and any number of equal blocks costs two compilations, and one for each further way in which the options
decide their weights (decisions.py). Measured (EPYC, one thread, 32 blocks of 7 linears compiled one by one, torch 2.13, cold
caches): 19 s against plain Inductor's 12 to 14, of which the second graph is 0.9; then 50 us per call of a block, as constants
or looked up, against bf16's 205.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from aoquant_inductor import _inductor, attention, emit, lowering, progress, ranges, release, rewrite, siblings, spellings
from aoquant_inductor import _inductor_dynamo as dynamo
from aoquant_inductor import _inductor_effects as effects
from aoquant_inductor import _inductor_regions as regions
from aoquant_inductor import options as options_module
from aoquant_inductor.decisions import Decisions
from aoquant_inductor.eligible import LINEAR
from aoquant_inductor.errors import AoquantError, NothingQuantized, OptionError, UnsupportedLayers
from aoquant_inductor.journal import Log, log_of
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.report import Layer, Report
from aoquant_inductor.rewrite import Site
from aoquant_inductor.runtime import Compiled, LookedUp, Seen, constant, warn_once
from aoquant_inductor.weights import STORE

log = logging.getLogger("aoquant_inductor")

_seen: dict[tuple[int, str], Seen] = {}
"""(code object, options) -> what it was compiled for."""


def aoquant(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Compiled:
    """The torch.compile backend "aoquant". Raises AoquantError's subclasses for what the user can mend."""
    try:
        return _pipeline(gm, example_inputs, mode, options)
    except AoquantError as error:
        raise dynamo.users(error) from None


def _pipeline(
    gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any] | None
) -> Compiled:
    opts = options_module.parse(options, mode)
    if opts.release_weights:
        release.require()
    if dynamo.hides_weights():
        raise OptionError(
            "Inductor's freezing is on for the whole process (TORCHINDUCTOR_FREEZING, torch._inductor.config.freezing), where "
            'a backend does not see the weights of linears. Turn it off, or say options={"freezing": True} here. So it is '
            "with Dynamo's prepare_freezing and install_free_tensors."
        )
    frame = dynamo.frame()
    names = Names(frame.root)
    rewrite.hear(gm, example_inputs, names)
    differentiable = _needs_grad(gm, example_inputs, frame.root)
    regions.inline(gm, _may_be_linear, recompute=differentiable is not None)
    attention.write_out(gm, rewrite.wanted(gm, example_inputs, names, opts, differentiable is not None))
    spellings.as_linears(gm, rewrite.weights_of(gm, example_inputs, names))
    sites = rewrite.find(gm, example_inputs, names, opts)
    if any(site.scheme for site in sites) and effects.differentiates(gm, differentiable is not None):
        warn_once("gradients are taken within the compiled function: the linears of that graph stay in full precision.")
        for site in sites:
            site.skip("grad", "is in a graph that takes gradients itself (torch.func, torch.enable_grad).")
    root = None if frame.partial else frame.root  # of a function over several modules one is not all
    journal = log_of(frame.context, dynamo.backend_of(frame.context), root)
    journal.agree(opts)
    others = rewrite.of_other_ops(gm, example_inputs, names, opts, sites)
    _judge(opts, names, sites, journal, frame.partial)
    if root is not None:
        journal.plan(root, names, opts)
    patches = {**_inductor.mode_options(opts.mode), **opts.inductor}
    started = time.perf_counter()
    if any(site.scheme for site in sites):
        dynamo.guard_training(frame)
    for site in sites:
        if differentiable and site.scheme is not None and site.value.requires_grad:
            site.skip("grad")
            STORE.entry(site.value).trains = True
            warn_once(f"{differentiable}: linears that train stay in full precision, frozen ones are quantized.")
    _pack(sites, others, opts, names, together=differentiable is None)
    journal.pack_seconds += time.perf_counter() - started
    release.check(gm, example_inputs, [site.node for site in sites if site.packed is not None])
    if not any(site.packed for site in sites):
        _guard_decisions(sites, opts, frame.root)
        compiled: Compiled = _inductor.compile_graph(gm, example_inputs, patches)
    else:
        with torch.set_grad_enabled(differentiable is not None):
            compiled = _compile(gm, example_inputs, sites, opts, patches, frame, journal)
    journal.compile_seconds += time.perf_counter() - started
    if sites or others:
        _note(Report((*(site.layer for site in sites), *others)), sites, frame, journal)
    return compiled


def _guard_decisions(sites: Sequence[Site], opts: Options, root: nn.Module | None) -> None:
    """Of a graph for any weights: those of which the options say the same. What could not be packed has it for itself."""
    failed = [site.weight for site in sites if site.layer.reason in ("non_finite", "out_of_memory")]
    dynamo.guard_identity(failed, None)
    if root is None or not opts.schemes:
        return
    decisions = Decisions(root, opts)
    for site in sites:
        if isinstance(site.value, nn.Parameter) and decisions.vary(site.value):
            scheme = decisions.of(site.value)
            same = lambda weight, scheme=scheme: decisions.of(weight) == scheme  # noqa: E731
            dynamo.guard_values([site.weight], same, f"the scheme of this weight is {scheme and scheme.name}")


def _may_be_linear(node: fx.Node) -> bool:
    return node.target in LINEAR or spellings.may_be_linear(node) or attention.is_one(node)


def _pack(sites: Sequence[Site], others: Sequence[Layer], opts: Options, names: Names, together: bool) -> None:
    """Packs every site with a scheme, siblings side by side if `together`; the originals go as the options say."""

    def release_site(site: Site) -> None:
        if site.entry is not None:
            site.layer = release.let_go(site.layer, site.entry, names, opts, site.read_elsewhere)

    if STORE.overwritten([site.value for site in sites if site.scheme is not None]):
        warn_once(
            "a weight was written to in a way that PyTorch does not count (`.data +=`, as PEFT merges) and is packed again. "
            "Only a compile looks for that: call aoquant_inductor.refresh(compiled) after every such write."
        )
    later = opts.on_unsupported == "error"  # may refuse it all after packing: until then nothing may be gone
    for group in progress.bar(siblings.groups(sites)):
        if len(group) > 1 and together:
            siblings.pack(group)
        for site in group:
            if site.packed is None:
                rewrite.pack(site)
            if opts.release_weights and not later:
                release_site(site)
    _check_unsupported(opts, [*(site.layer for site in sites), *others])
    for site in sites if opts.release_weights and later else ():
        release_site(site)


def _note(graph: Report, sites: Sequence[Site], frame: dynamo.Frame, journal: Log) -> None:
    """Into the report and the log."""
    journal.add(graph, {site.entry: site.layer.name for site in sites if site.entry is not None})
    if (folder := _inductor.debug_folder()) is not None:
        number = 1 + len(list(folder.glob("graph*.json")))  # of all compiled objects
        (folder / f"graph{number}.json").write_text(journal.report().to_json())
    if sites and dynamo.graphs_left(frame.code) <= 0:
        warn_once(
            f"{frame.code.co_name} in {frame.code.co_filename} has all the graphs of torch._dynamo.config.recompile_limit: "
            "Dynamo runs what fits none of them eager, in full precision."
        )


def _compile(
    gm: fx.GraphModule, inputs: Sequence[Any], sites: Sequence[Site], opts: Options, patches: Mapping[str, Any],
    frame: dynamo.Frame, journal: Log,
) -> Compiled:
    rewritten = emit.apply(gm, sites, torch.is_grad_enabled())
    note = journal.kernel_notes([(site.layer, site.keys) for site in sites])
    identity = tuple(id(site.value) for site in rewritten.sites)
    seen = _seen.setdefault((id(frame.code), opts.key()), Seen(frame.code, set(), set()))
    place = {p: i for i, p in enumerate(gm.graph.find_nodes(op="placeholder"))}
    kept = [i for p, i in place.items() if p not in rewritten.consumed]
    rest = [inputs[i] for i in kept]
    is_constant = seen.constant(identity)
    with lowering.recording() as kernels:
        function = ranges.compile_graph(rewritten, rest, patches, is_constant, note, journal.hint)
    for site in sites:
        site.name_kernel(kernels)
        if site.packed is not None:
            journal.hint(lowering.hint(site.value.device, site.packed.layout, site.out_dtype))
    if not is_constant:
        _guard_decisions(sites, opts, frame.root)
        weights = [place[site.weight] for site in rewritten.sites]
        plain = _inductor.copy_graph(gm)[0]
        return LookedUp(plain, function, rewritten, weights, kept, opts, patches).compiled()
    dynamo.guard_identity([site.weight for site in rewritten.sites], frame.local_self)
    # Dynamo writes the call's bytecode after this, from the placeholders of a graph that never runs: what is gone from it is
    # never loaded.
    for site in sites:
        if site.packed is not None:
            site.node.args, site.node.kwargs = (site.x,), {}
    for weight in rewritten.consumed:
        gm.graph.erase_node(weight)
    gm.recompile()
    return constant(function, rewritten, opts.weights == "checked", journal)


def _judge(opts: Options, names: Names, sites: Sequence[Site], journal: Log, partial: bool) -> None:
    """Patterns that name nothing, and options under which nothing can be quantized: judged over the whole module.

    partial: of a function with graph breaks this is one graph. The report has the patterns that name nothing in all so far.
    """
    known = list(dict.fromkeys([*names.linears, *(site.layer.name for site in sites)]))
    if partial:
        journal.heard.update([*known, *names.matrices])
        journal.unmatched = opts.unmatched(journal.heard)
        return
    opts.check(known, names.matrices)
    journal.unmatched = opts.unmatched([*known, *names.matrices])
    if known and not any(opts.choose([name]).scheme for name in known):
        raise NothingQuantized(len(known), 0)


def _check_unsupported(opts: Options, layers: Sequence[Layer]) -> None:
    wanted = [layer for layer in layers if layer.scheme is not None]
    missed = [layer for layer in wanted if layer.reason not in (None, "grad")]
    for text in dict.fromkeys(f"{layer.name} {layer.detail or layer.reason}" for layer in missed):
        log.warning(text)
    if missed and opts.on_unsupported == "error":
        if len(missed) == len(wanted):
            raise NothingQuantized(len(layers), len(wanted), Counter(str(layer.reason) for layer in missed))
        raise UnsupportedLayers({layer.name: layer.detail or str(layer.reason) for layer in missed})


def _needs_grad(gm: fx.GraphModule, inputs: Sequence[Any], root: nn.Module | None) -> str | None:
    """Why this graph has to be differentiable, if it has to."""
    if not torch.is_grad_enabled():
        return None
    floats = [t for t in inputs if isinstance(t, torch.Tensor) and t.is_floating_point()]
    # a learned latent or prompt is a Parameter, too, and none of the compiled module's
    own = {id(parameter) for parameter in root.parameters()} if root is not None else set()
    if any(t.requires_grad and not (isinstance(t, nn.Parameter) and (root is None or id(t) in own)) for t in floats):
        return "an activation requires grad"
    trainable = [t.requires_grad for t in floats if isinstance(t, nn.Parameter)]
    if root is not None and root.training and any(trainable):
        return "the model is in training mode with grad enabled"
    if root is None and any(trainable):  # a function: whether its modules train cannot be seen
        return "a function over parameters that require grad is compiled with grad enabled"
    everything = trainable if root is None else [parameter.requires_grad for parameter in root.parameters()]  # of every graph
    if any(trainable) and not all(everything):
        return "some parameters require grad and others are frozen"
    if any(trainable):
        warn_once("grad is enabled, but nothing asks for it: compiling for inference. Use torch.no_grad() to say so.")
    return None
