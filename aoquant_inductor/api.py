"""plan before, report and refresh after: what a user calls besides torch.compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from aoquant_inductor.report import Report


def report(compiled: object) -> Report:
    """What became of every linear that `compiled` has run so far, over all its graphs.

    `compiled`: what torch.compile returned, or a module after module.compile(). Before the first call it is empty.
    Raises TypeError for anything else.
    """
    from aoquant_inductor import _inductor
    from aoquant_inductor.report import find_log

    context = _inductor.context_of(compiled)
    if context is None:
        raise TypeError(f"report() wants what torch.compile returned, not {type(compiled).__name__}.")
    found = find_log(context)
    return Report(()) if found is None else found.report()


def refresh(compiled: object) -> int:
    """Repack every weight of `compiled` in place, after writes that PyTorch does not count (`.data.fill_`, numpy views,
    fused optimizers); no recompilation. Returns the number of weights repacked. Raises TypeError as `report`.
    """
    from aoquant_inductor import _inductor
    from aoquant_inductor.report import find_log
    from aoquant_inductor.weights import STORE

    context = _inductor.context_of(compiled)
    if context is None:
        raise TypeError(f"refresh() wants what torch.compile returned, not {type(compiled).__name__}.")
    found = find_log(context)
    return 0 if found is None else STORE.update(list(dict.fromkeys(found.entries)), everything=True)


def plan(model: nn.Module, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Report:
    """What `torch.compile(model, backend="aoquant", options=options)` would do with every nn.Linear; no data is read.

    Works on the meta device. bytes_after is the packed size in the portable layout; sqnr_db and kernel are unknown.
    Raises what the compile would raise: OptionError, UnmatchedPattern, NothingQuantized, ConflictingSchemes.
    """
    from aoquant_inductor import packing, rewrite
    from aoquant_inductor.errors import NothingQuantized
    from aoquant_inductor.options import parse

    opts = parse(options, mode)
    names = rewrite.Names(model)
    opts.check(names.linears)
    layers = []
    for weight, layer, scheme in rewrite.plan(model, names, opts):
        if scheme is not None:
            layer = replace(layer, bytes_after=packing.packed_bytes(weight.shape, weight.dtype, scheme))
        layers.append(layer)
    found = Report(tuple(layers))
    if layers and not found.quantized:
        matched = [layer for layer in layers if layer.scheme is not None]
        raise NothingQuantized(len(layers), len(matched), found.totals["reasons"] if matched else {})
    return found
