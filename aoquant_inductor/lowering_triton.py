"""The GPU's choices: the kernels of templates/ that fit a problem, and in a search the portable lowering beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from aoquant_inductor import _inductor_choices as inductor
from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import lowering_portable as portable
from aoquant_inductor.card import SAFE_PTXAS, UNKNOWN, Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates import KERNELS, QUANTIZING, Config, Kernel

NEAR, NEAR_ELSEWHERE, MOST = 1.35, 2.0, 16
"""A search measures what should take at most so many times as long as the cheapest config: where costs.csv was measured (of 363
problems two had their fastest config farther off), and on other cards; and not more configs than MOST.
"""


def linear(p: Problem) -> tuple[str, Any] | None:
    """(kernel name, y[M, N]), or None: the portable lowering is the better default, or the only one."""
    return _linear(p, KERNELS, inductor.Reference(p.call, lambda: portable.linear(p)))


def quantizing(p: Problem, apart: Callable[[], tuple[str, Any]]) -> tuple[str, Any] | None:
    """(kernel name, y[M, N]) of an x that is not quantized yet, or None: no kernel does both. `apart` builds the two as two
    kernels, which a search measures with the default of the second.
    """
    return _linear(p, QUANTIZING, inductor.Reference(p.call, apart, portable=False))


def hint(device: torch.device, layout: str, dtype: torch.dtype) -> str | None:
    """That a newer ptxas would allow carried configs (templates/kernel.py), where the linear has them."""
    card = Card.of(device)
    carried = card.arch == 90 and dtype == torch.bfloat16 and layout in ("wgmma", "cuda_bf16")
    if not carried or not UNKNOWN < card.ptxas < SAFE_PTXAS:
        return None
    own, wanted = (".".join(map(str, version)) for version in (card.ptxas, SAFE_PTXAS))
    return f'ptxas {own}: faster kernels for many rows need {wanted} (pip install "aoquant-inductor[cuda]", see its README).'


def _linear(p: Problem, known: Sequence[Kernel], reference: inductor.Reference) -> tuple[str, Any] | None:
    if ir.static(p.m) == 0 or p.k == 0 or p.n == 0 or p.beyond_32_bits:
        return None
    card = Card.of(p.device)
    kernels = [kernel for kernel in known if kernel.fits(p, card)]
    if not kernels:
        return None
    if ir.searching():
        return _select(p, search(p, card, kernels), [reference])
    found = default(p, card, kernels)
    return found and _select(p, [found])


def default(p: Problem, card: Card, kernels: list[Kernel]) -> tuple[Kernel, Config] | None:
    """What default mode takes: of the kernels in turn the first default that covers the problem and can run, or, where they
    have prices instead, the cheapest config of all that have.
    """
    for kernel in kernels:
        for row in kernel.defaults:
            if not row.covers(p, card):
                continue
            if row.config is None:
                return None
            if (config := kernel.config(p, card, row.config)) is not None:
                return kernel, config
        if kernel.label and (found := _priced(p, card, kernels)):
            us, one, config = found[0]
            return None if portable.us(p, card) < us else (one, config)
    return None


def _priced(p: Problem, card: Card, kernels: list[Kernel]) -> list[tuple[float, Kernel, Config]]:
    """(microseconds, kernel, config) of all that have a price, the cheapest first."""
    return sorted(((us, one, config) for one in kernels for us, config in one.priced(p, card)), key=lambda found: found[0])


def search(p: Problem, card: Card, kernels: list[Kernel]) -> list[tuple[Kernel, Config]]:
    """What a search measures, each once: of kernels with prices what may be the fastest by them, with the kernels before those
    every config whose tile is about as high as there are rows. A compile of what cannot win takes as long as one of the winner.
    """
    first = next((i for i, kernel in enumerate(kernels) if kernel.label), len(kernels))
    priced = _priced(p, card, kernels)
    most = (NEAR if card.arch == 90 else NEAR_ELSEWHERE) * priced[0][0] if priced else 0.0
    able = [(one, config) for one in kernels[: first if priced else None] for config in one.able(p, card)]
    rows = 1 << (ir.rows_hint(p.m) - 1).bit_length()
    high = [(one, config) for one, config in able if min(rows // 4, 64) <= config.block_m <= max(16, 2 * rows)]
    wanted = (high or able) + [(one, config) for us, one, config in priced[:MOST] if us <= most]
    return list({(kernel.template, config): (kernel, config) for kernel, config in reversed(wanted)}.values())[::-1]


def _select(
    p: Problem, candidates: list[tuple[Kernel, Config]], references: list[inductor.Reference] | None = None
) -> tuple[str, Any]:
    choices = [kernel.choice(p, config) for kernel, config in candidates]
    # the scales and zeros of linears that lie side by side have their rows apart
    inputs = [node if name in ("WS", "WZ") else ir.realize(node) for name, node in p.inputs.items()]
    counted = any(choice.scratch for choice in choices)
    if counted:
        inputs.append(inductor.counters(p.device))
    for choice in choices:
        choice.keywords["COUNTED"] = counted
    kind = f"aoquant_w{p.bits}a{8 if p.dynamic else 16}"
    return inductor.select(kind, inputs, (p.m, p.n), p.out_dtype, p.device, choices, references or ())
