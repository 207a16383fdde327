"""Linears that read the same activation (q, k, v; gate, up): packed side by side, so that one launch serves them.

Each keeps its name, its scheme and its own pack, a view of the common one. A kernel has a fixed cost of about 2 us on an H200,
which is what the weights of an 8B model's q, k and v take to read at 4 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from aoquant_inductor import lowering, rewrite
from aoquant_inductor.qparams import NonFinite
from aoquant_inductor.rewrite import Site
from aoquant_inductor.weights import STORE

# Beyond, a launch of its own lets gate and up keep their activation in the epilogue: one pass less over y[M, N].
MOST_ROWS = 256


def groups(sites: Sequence[Site]) -> list[list[Site]]:
    """The sites in order, those together that one launch can serve."""
    found: dict[Any, list[Site]] = {}
    for i, site in enumerate(sites):
        together = site.scheme is not None and not site.x_written and site.value.device.type in lowering.TOGETHER
        key: Any = (site.x, site.scheme, site.layout, site.value.dtype, site.out_dtype) if together else i
        if any(other.value is site.value for other in found.get(key, ())):
            key = i
        found.setdefault(key, []).append(site)
    return list(found.values())


def pack(group: Sequence[Site]) -> None:
    """Packs siblings side by side, and lets one launch serve them where that is faster; else they are left to rewrite.pack.

    A weight that is not finite or finds no memory keeps its siblings apart, too.
    """
    scheme, layout = group[0].scheme, group[0].layout
    assert scheme is not None
    with contextlib.suppress(NonFinite, torch.OutOfMemoryError):
        whole = STORE.pack_together([site.value for site in group], scheme, layout)
        for site in group:
            site.whole = whole
        if whole is not None and one_launch(group):
            names = tuple(site.layer.name for site in group)
            for site in group:
                rewrite.pack(site)
                site.launch = whole
                site.layer = replace(site.layer, siblings=tuple(name for name in names if name != site.layer.name))


def one_launch(group: Sequence[Site]) -> bool:
    """Whether one launch is faster for the M of this graph; one for every M is taken for a small one."""
    m, scheme = group[0].m, group[0].scheme
    integers = scheme is not None and (scheme.activation is not None or scheme.large_m is not None)
    return integers or not isinstance(m, sympy.Integer) or int(m) <= MOST_ROWS
