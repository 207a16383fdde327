"""What a weight is called, and which modules have it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

_SOURCE_PART = re.compile(r"\['([^']+)'\]|\.(\w+)")
NO_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm, nn.RMSNorm)
"""Whose parameters are not matrices of linears, however many dimensions they have."""


@dataclass(frozen=True)
class Other:
    """A parameter of two or more dimensions that may be a matrix and is no nn.Linear's: the experts of a mixture, say."""

    name: str
    module: str  # its class
    nbytes: int


class Names:
    """Weight -> the names its linears have in the compiled module; a weight shared by several has them all."""

    def __init__(self, root: nn.Module | None) -> None:
        self.linears: list[str] = []
        self.others: list[Other] = []
        self._names: dict[int, list[str]] = {}
        self._aliases: dict[int, list[str]] = {}
        self._owners: dict[int, list[nn.Module]] = {}
        for prefix, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            prefix = prefix.replace("_orig_mod.", "")
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                full = f"{prefix}.{key}" if prefix else key
                seen = id(parameter) in self._owners
                self._owners.setdefault(id(parameter), []).append(module)
                if isinstance(module, nn.Linear) and key == "weight":
                    name = prefix or key
                    self.linears.append(name)
                    self._names.setdefault(id(parameter), []).append(name)
                else:
                    self._aliases.setdefault(id(parameter), []).append(full)
                    if not seen and parameter.dim() > 1 and not isinstance(module, (nn.Linear, *NO_PRODUCTS)):
                        self.others.append(Other(full, type(module).__name__, parameter.nbytes))

    def of(self, weight: torch.Tensor, source: str = "") -> list[str]:
        """The linears of a weight; for one that no nn.Linear owns, its parameter name, or what its source says."""
        return self._names.get(id(weight)) or self._aliases.get(id(weight)) or [_from_source(source)]

    def is_linear(self, weight: torch.Tensor) -> bool:
        return id(weight) in self._names

    def known(self, weight: torch.Tensor) -> str | None:
        """The first name of a weight, if the module has it."""
        return next(iter(self._names.get(id(weight)) or self._aliases.get(id(weight)) or ()), None)

    def owners(self, weight: torch.Tensor) -> list[nn.Module]:
        """The modules that a weight is a parameter of."""
        return self._owners.get(id(weight), [])

    def follow(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """`new` was put into all places of `old`."""
        for known in (self._names, self._aliases, self._owners):
            if id(old) in known:
                known[id(new)] = known.pop(id(old))  # type: ignore[assignment]

    def elsewhere(self, weight: torch.Tensor) -> str | None:
        """A name that a weight has outside of nn.Linear."""
        return next(iter(self._aliases.get(id(weight), ())), None)

    def aliases(self, weight: torch.Tensor) -> tuple[str, ...]:
        return (*self._names.get(id(weight), [])[1:], *self._aliases.get(id(weight), []))


def _from_source(source: str) -> str:
    """`L['self']._modules['up']._parameters['weight']` -> `up`."""
    parts = [a or b for a, b in _SOURCE_PART.findall(source)][1:]
    parts = [p for p in parts if p not in ("_modules", "_parameters")]
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    return ".".join(parts) or source or "?"
