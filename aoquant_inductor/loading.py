"""A model onto a device that it does not fit on: one tensor at a time, from the CPU or from files, its linears packed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from aoquant_inductor import eligible, packing, progress, qparams, release
from aoquant_inductor import options as options_module
from aoquant_inductor.entry import Entry
from aoquant_inductor.errors import CheckpointError, NothingQuantized
from aoquant_inductor.names import Names
from aoquant_inductor.report import SKIPPED, Layer, Report
from aoquant_inductor.scheme import Scheme
from aoquant_inductor.weights import STORE

Places = list[tuple[nn.Module, str, str]]
"""Where one tensor is registered: (module, key in it, full name)."""


def _tensors(model: nn.Module) -> Iterator[tuple[torch.Tensor, Places]]:
    """Every parameter and buffer once, with all its places: tied ones stay tied."""
    found: dict[int, tuple[torch.Tensor, Places]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                places = found.setdefault(id(tensor), (tensor, []))[1]
                places.append((module, key, f"{prefix}.{key}" if prefix else key))
    yield from found.values()


class _Files:
    """Tensors by name over safetensors files, read when asked for."""

    def __init__(self, files: Sequence[str | os.PathLike[str]], stack: ExitStack) -> None:
        paths = [str(Path(file)) for file in files]
        self.label = ", ".join(paths) or "no file"
        self._of: dict[str, tuple[str, Any]] = {}
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, "pt", device="cpu"))
            except SafetensorError as error:
                raise CheckpointError(path, f"no whole safetensors file ({error}).") from None
            for name in file.keys():  # noqa: SIM118 (no dict)
                if name in self._of:
                    raise CheckpointError(path, f"holds {name}, as {self._of[name][0]} does.")
                self._of[name] = (path, file)

    def find(self, tensor: torch.Tensor, places: Places) -> Callable[[], torch.Tensor]:
        """How to read a tensor by the first of its names that a file has; its own data if it has some and no file does."""
        name = next((name for _, _, name in places if name in self._of), None)
        if name is None:
            if tensor.device.type != "meta":
                return lambda: tensor
            text = f"{places[0][2]} is not there, and the model has it on the meta device."
            if isinstance(tensor, nn.Parameter):
                text += " If it is to be tied to another one, tie them first (transformers: model.tie_weights())."
            else:  # computed when the model is made, a table of rotations say
                text += " It is a buffer: make the model with parameters alone there, as accelerate.init_empty_weights does."
            raise CheckpointError(self.label, text)
        path, file = self._of[name]
        if (shape := tuple(file.get_slice(name).get_shape())) != tuple(tensor.shape):
            raise CheckpointError(path, f"{name} is {shape}, the model's is {tuple(tensor.shape)}.")
        return lambda: file.get_tensor(name)


def load(
    model: nn.Module, files: Sequence[str | os.PathLike[str]], device: torch.device, given: Mapping[str, Any] | None
) -> Report:
    """See api.load."""
    release.require()
    opts = options_module.parse(given)
    names = Names(model)
    opts.check(names.linears, names.matrices)
    layers: list[Layer] = []
    with ExitStack() as stack, torch.no_grad():
        source = _Files(files, stack)
        work = [(tensor, places, source.find(tensor, places)) for tensor, places in _tensors(model)]
        # the largest first, while there is room: a head of 1 GB beside an 8B model's packs would be the peak of all
        work.sort(key=lambda one: -one[0].nbytes)
        choices = [_decide(tensor, names, opts) for tensor, _, _ in work]
        if (linears := [c for c in choices if c is not None]) and not any(scheme for _, scheme in linears):
            raise NothingQuantized(len(linears), sum(layer.scheme is not None for layer, _ in linears))
        for (tensor, places, read), choice in progress.bar(list(zip(work, choices, strict=True))):
            arrived = read().to(device, tensor.dtype, copy=True)
            if isinstance(tensor, nn.Parameter):
                arrived = nn.Parameter(arrived, tensor.requires_grad)
            if choice is not None:
                layer, entry = _pack(arrived, *choice)
            for module, key, _ in places:
                registry = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
                registry[key] = arrived  # type: ignore[assignment]
            names.follow(tensor, arrived)
            if choice is not None:
                if entry is not None:
                    layer = release.let_go(layer, entry, names, opts)
                layers.append(layer)
    return Report(tuple(layers))


def _decide(tensor: torch.Tensor, names: Names, opts: options_module.Options) -> tuple[Layer, Scheme | None] | None:
    """What becomes of a linear's weight; None for any other tensor."""
    if not any(isinstance(module, nn.Linear) and module.weight is tensor for module in names.owners(tensor)):
        return None
    return eligible.decide(tensor, names.of(tensor), names.aliases(tensor), opts)


def _pack(weight: torch.Tensor, layer: Layer, scheme: Scheme | None) -> tuple[Layer, Entry | None]:
    if scheme is None:
        return layer, None
    layout = packing.choose(scheme, weight.device, weight.dtype, weight.shape)
    try:
        entry, packed, sqnr = STORE.pack(weight, scheme, layout, loose=True)
    except qparams.NonFinite as error:
        return replace(layer, status=SKIPPED, reason="non_finite", detail=f"holds {error.found}; it stays as it is."), None
    return replace(layer, sqnr_db=sqnr, bytes_after=packed.nbytes), entry
