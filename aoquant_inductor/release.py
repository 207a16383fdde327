"""Which originals of packed weights may go, and what their modules say without them.

An original goes if nothing but quantized linears reads it, as far as the graph and the compiled module show; a reader outside
of both (eager code, a parent of the compiled module) meets ReleasedWeights' text. `state_dict()` of such a linear is its copy
in host memory where there is one ("release_weights": "cpu"); else it is refused, since dequantized values that pass for a
checkpoint would be a loss that nobody asked for.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from aoquant_inductor import native
from aoquant_inductor.entry import Entry, Release
from aoquant_inductor.errors import OptionError, ReleasedWeights
from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.report import KEPT, RELEASED, RESTORED, Layer
from aoquant_inductor.weights import STORE

_hooks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def require() -> None:
    """Waits for the native part. Raises OptionError where it cannot be built."""
    try:
        native.module(STORE.turn)
    except RuntimeError as error:
        raise OptionError(
            f'"release_weights" needs a C++ compiler and Python\'s headers: without them a later use would crash. {error}'
        ) from None


def let_go(layer: Layer, entry: Entry, names: Names, opts: Options, read_elsewhere: bool = False) -> Layer:
    """Lets the original of a packed weight go; the layer with what became of it."""
    return replace(layer, original=_original(entry, Release(layer.name, opts.release_weights == "cpu"), names, read_elsewhere))


def _original(entry: Entry, how: Release, names: Names, read_elsewhere: bool) -> str:
    """`released`, or `kept: ` and why."""
    weight = entry.ref()
    owners = names.owners(weight) if weight is not None else []
    if read_elsewhere:
        return f"{KEPT}: the graph reads it elsewhere, too"
    if weight is not None and entry.trains and weight.requires_grad:  # its optimizer has it between evaluations, too
        return f"{KEPT}: it trains"
    if entry.restored:
        return RESTORED
    if weight is None or not owners:
        return f"{KEPT}: it is no parameter of the compiled module"
    if (alias := names.elsewhere(weight)) is not None:
        return f"{KEPT}: it is {alias}, too"
    with STORE.lock:  # nobody looks at a weight while it goes
        gone = entry.let_go(how)
    if not gone:
        return f"{KEPT}: another tensor shares its memory"
    for module in owners:
        if module not in _hooks:
            _hooks[module] = module.register_state_dict_post_hook(_state_dict)
    return RELEASED


def _state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any]) -> None:
    weight = module._parameters.get("weight")
    entry = None if weight is None else STORE.find(weight)
    if entry is None or entry.release is None or not entry.released:
        return
    if entry.copy is None:
        raise ReleasedWeights(entry.release.name)
    state_dict[f"{prefix}weight"] = entry.copy.clone()  # what is done to it is not to come back with `restore`


def check(gm: fx.GraphModule, inputs: Sequence[object], packed: Sequence[fx.Node]) -> None:
    """Raises ReleasedWeights if a graph reads a released weight other than by its packed linears."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        entry = STORE.find(value) if isinstance(value, torch.Tensor) else None
        if entry is not None and entry.release is not None and entry.released and set(node.users) - set(packed):
            raise ReleasedWeights(entry.release.name)


def restore(model: nn.Module) -> tuple[int, int]:
    """(weights that have their own values again, weights that are dequantized packs now)."""
    exact = dequantized = 0
    for module in model.modules():
        for weight in module._parameters.values():
            entry = None if weight is None else STORE.find(weight)
            if entry is None:
                continue
            if not entry.released:
                if entry.release is not None:  # it has new data, which the next call would have packed and let go
                    entry.keep()
                continue
            if entry.bring_back():
                exact += 1
            else:
                dequantized += 1
        if (hook := _hooks.pop(module, None)) is not None:
            hook.remove()
    return exact, dequantized
