"""What a weight is called, and which modules have it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_SOURCE_PART = re.compile(r"\[(?:'([^']+)'|(\d+))\]|\.(\w+)")
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
        self.computed: dict[str, nn.Linear] = {}  # those whose weight is no parameter of theirs: parametrized, pruned
        self.matrices: list[str] = []  # of no nn.Linear, but F.linear may read them: the router of a mixture
        self.others: list[Other] = []
        self.several = False
        self._names: dict[int, list[str]] = {}
        self._aliases: dict[int, list[str]] = {}
        self._owners: dict[int, list[nn.Module]] = {}
        for prefix, module in root.named_modules(remove_duplicate=False) if root is not None else ():
            prefix = ".".join(part for part in prefix.split(".") if part != "_orig_mod")
            if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
                self.linears.append(prefix)
                self.computed[prefix] = module
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                matrix = not is_lazy(parameter) and parameter.dim() > 1
                full = f"{prefix}.{key}" if prefix else key
                seen = id(parameter) in self._owners
                self._owners.setdefault(id(parameter), []).append(module)
                if isinstance(module, nn.Linear) and key == "weight":
                    name = prefix or key
                    self.linears.append(name)
                    self._names.setdefault(id(parameter), []).append(name)
                else:
                    self._aliases.setdefault(id(parameter), []).append(full)
                    if not seen and matrix and not isinstance(module, (nn.Linear, *NO_PRODUCTS)):
                        self.others.append(Other(full, type(module).__name__, parameter.nbytes))
                        if parameter.dim() == 2:
                            self.matrices.append(_of_module(full))

    def of(self, weight: torch.Tensor, source: str = "") -> list[str]:
        """The linears of a weight; for one that no nn.Linear owns, what owns it, or what its source says."""
        if (names := self._names.get(id(weight))) is not None:
            return names
        return [_of_module(name) for name in self._aliases.get(id(weight), ())] or [_from_source(source, self.several)]

    def of_computed(self, source: str) -> str | None:
        """The nn.Linear at this place of the module, if its weight is computed."""
        name = _from_source(source)
        return name if name in self.computed else None

    def hear(self, sources: Iterable[str]) -> None:
        """Where a graph's parameters come from. A function that has them from several modules names each by its variable."""
        parts = [_parts(source) for source in sources]
        self.several = len({part[0] for part in parts if len(part) > 1}) > 1

    def is_linear(self, weight: torch.Tensor) -> bool:
        return id(weight) in self._names

    def known(self, weight: torch.Tensor) -> str | None:
        """The first name of a weight, if the module has it: as `of` has it."""
        return self.of(weight)[0] if id(weight) in self._owners else None

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


def _parts(source: str) -> list[str]:
    return [a or b or c for a, b, c in _SOURCE_PART.findall(source)]


def _from_source(source: str, whole: bool = False) -> str:
    """`L['self']._modules['up']._parameters['weight']` -> `up`; whole: `self.up`."""
    parts = [p for p in _parts(source) if p not in ("_modules", "_parameters")]
    linear = parts[1:] == ["weight"] and "_parameters" in source  # that is a function's own variable
    parts = parts if whole or linear else parts[1:]
    return _of_module(".".join(parts)) or source or "?"


def _of_module(name: str) -> str:
    """`layers.0.router.weight` -> `layers.0.router`"""
    return name.removesuffix(".weight")
