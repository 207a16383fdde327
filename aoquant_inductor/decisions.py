"""The scheme of every weight of a module by its options: what a graph is guarded by that Dynamo may take for several weights.

Layers of one class are one code object. Behind a graph break Dynamo traces each call of it by itself, with the weights as
inputs, and takes a graph for every layer whose weights look like the first one's: a scheme is nothing that it sees.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from aoquant_inductor.names import Names
from aoquant_inductor.options import Options
from aoquant_inductor.scheme import Scheme


class Decisions:
    """By identity, for guards that ask at every call; the module and its weights are not kept alive."""

    def __init__(self, root: nn.Module, options: Options) -> None:
        self._root, self._options = weakref.ref(root), options
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], Scheme | None]] = {}
        self._read()

    def _read(self) -> None:
        root = self._root()
        names = Names(root)
        for weight in root.parameters() if root is not None else ():
            if not is_lazy(weight) and weight.dim() == 2:
                self._add(weight, names)

    def _add(self, weight: torch.Tensor, names: Names) -> Scheme | None:
        scheme = self._options.choose(names.of(weight)).scheme
        self._known[id(weight)] = weakref.ref(weight), scheme
        return scheme

    def of(self, weight: torch.Tensor) -> Scheme | None:
        """The scheme that the options say, whether or not it can be had; of a weight that came to the module later, too."""
        for again in (False, True):
            if again:
                self._read()
            known = self._known.get(id(weight))
            if known is not None and known[0]() is weight:
                return known[1]
        return self._add(weight, Names(None))

    def vary(self, weight: torch.Tensor) -> bool:
        """Whether a weight of the same shape has another one: Dynamo takes no graph for another shape."""
        mine = self.of(weight)
        others = [(other(), scheme) for other, scheme in self._known.values()]
        return any(other is not None and other.shape == weight.shape and scheme != mine for other, scheme in others)
