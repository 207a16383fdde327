"""What a user calls besides torch.compile: plan and load before it, report, refresh and restore after."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from aoquant_inductor.report import Report


def report(compiled: object) -> Report:
    """What became of every linear that `compiled` has run so far, over all its graphs.

    `compiled`: what torch.compile returned, or a module after module.compile(). Before the first call, and where Dynamo runs it
    eager, its linears are `not_called`. Raises TypeError for anything else, and then what `plan` raises for its options.
    """
    from aoquant_inductor import _inductor_dynamo as dynamo
    from aoquant_inductor.journal import Log, find_log
    from aoquant_inductor.names import Names
    from aoquant_inductor.options import parse

    origin = dynamo.origin_of(compiled)
    if origin is None:
        raise TypeError(f"report() wants what torch.compile returned, not {type(compiled).__name__}.")
    if (found := find_log(*origin)) is not None:
        return found.report()
    _, backend, root = origin
    log = Log(backend, root)
    if root is not None and (told := dynamo.told(backend)) is not None:
        log.plan(root, Names(root), parse(*told))
    log.hint("no graph of it was compiled: it was not called yet, or Dynamo runs it eager (TORCH_LOGS=graph_breaks says why).")
    return log.report()


def refresh(compiled: object) -> int:
    """Repack every weight of `compiled` in place, after writes that PyTorch does not count (`.data.fill_`, numpy views,
    fused optimizers); no recompilation. Returns the number of weights repacked. Raises TypeError as `report`.
    """
    from aoquant_inductor import _inductor_dynamo as dynamo
    from aoquant_inductor.journal import find_log
    from aoquant_inductor.weights import STORE

    origin = dynamo.origin_of(compiled)
    if origin is None:
        raise TypeError(f"refresh() wants what torch.compile returned, not {type(compiled).__name__}.")
    found, root = find_log(*origin), origin[-1]
    entries = [] if found is None else list(found.entries)
    # and those of its module that graphs of another compiled object of it look up for this one
    entries += [entry for p in (root.parameters() if root is not None else ()) if (entry := STORE.find(p)) is not None]
    return STORE.update([entry for entry in dict.fromkeys(entries) if entry.ref() is not None], everything=True)


def restore(model: nn.Module) -> int:
    """Brings the released originals of `model` back; the number of weights that came back. Compiled graphs stay valid.

    From the copy in host memory where "release_weights" was "cpu": then bit for bit. Otherwise what the pack dequantizes to,
    with a UserWarning that says so. Raises TypeError for anything but a module.
    """
    from aoquant_inductor import release

    _check_module("restore", model)
    exact, dequantized = release.restore(model)
    if dequantized:
        warnings.warn(
            f"aoquant: {dequantized} of {exact + dequantized} weights came back dequantized: what they were before packing is "
            'gone. "release_weights": "cpu" keeps a copy in host memory.',
            UserWarning,
            stacklevel=2,
        )
    return exact + dequantized


def load(
    model: nn.Module, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (), *,
    device: str | torch.device, options: Mapping[str, Any] | None = None,
) -> Report:
    """Puts `model` onto `device` layer by layer, each linear packed as it comes: its full-precision weights are never there
    together. The road to a device that the model does not fit on; compile with the same options afterwards.

    model: on the CPU, or on the meta device with `files`, safetensors that hold every parameter under its state_dict name
    (HF's checkpoints do). Linears with a scheme keep their pack alone, as under "release_weights"; all else, and what
    "release_weights" would keep, arrives as it is. Peak on the device: what is there so far + 2x the layer that comes.

    Raises CheckpointError, before anything is moved, for a file that is no whole safetensors file, a tensor that is missing
    or has another shape, or a buffer that no file holds; and what parse and plan raise for options. Nothing of a file is ever
    executed. A changed byte inside a tensor is not noticed: safetensors keeps no checksums. FileNotFoundError for a file
    that is not there, TypeError for what is no module.
    """
    from aoquant_inductor import loading

    _check_module("load", model)
    return loading.load(model, [files] if isinstance(files, str | os.PathLike) else list(files), torch.device(device), options)


def plan(model: nn.Module, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Report:
    """What `torch.compile(model, backend="aoquant", options=options)` would do with every nn.Linear; no data is read.

    Works on the meta device. bytes_after is the packed size in the portable layout; sqnr_db and kernel are unknown.
    Raises what the compile would raise: OptionError, UnmatchedPattern, NothingQuantized, ConflictingSchemes; TypeError for
    anything but a module.
    """
    from aoquant_inductor import eligible, packing
    from aoquant_inductor.errors import NothingQuantized
    from aoquant_inductor.names import Names
    from aoquant_inductor.options import parse
    from aoquant_inductor.report import by_module

    _check_module("plan", model)
    opts = parse(options, mode)
    names = Names(model)
    opts.check(names.linears, names.matrices)
    layers = []
    for weight, layer, scheme in eligible.plan(model, names, opts):
        if scheme is not None:
            layer = replace(layer, bytes_after=packing.packed_bytes(weight.shape, weight.dtype, scheme))
        layers.append(layer)
    found = Report(tuple(layers), {"others": by_module(names.others)})
    if layers and not found.quantized:
        matched = [layer for layer in layers if layer.scheme is not None]
        raise NothingQuantized(len(layers), len(matched), found.totals["reasons"] if matched else {})
    return found


def _check_module(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}() wants a module, not {type(model).__name__}.")
