"""What a pattern is given: the nodes of one packed weight, and what linears of one graph may share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from aoquant_inductor.layouts import Packed, WeightKey

Shared = dict[tuple[fx.Node, bool], tuple[fx.Node | None, ...]]
"""(x, symmetric) -> its quantization, already in the graph."""


@dataclass(frozen=True)
class PackNodes:
    """The inputs of the graph that hold one Packed, and the Packed itself for what the op must be told."""

    packed: Packed
    w: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    sums: fx.Node | None
    row: fx.Node | None

    @property
    def weight_args(self) -> WeightKey:
        """The tail of every linear op's schema."""
        return self.packed.key
