"""int4_gemv_dynamic.py.jinja: int4 weights and a few rows of x that the kernel quantizes itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import packing_cuda
from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates import int4, int4_few
from aoquant_inductor.templates.gemv import MOST_ROWS
from aoquant_inductor.templates.kernel import Config, Default, Kernel


def _fits(p: Problem, card: Card) -> bool:
    m = ir.static(p.m)
    return (
        p.symmetric is not None and p.layout == "cuda_int8" and card.arch >= 80  # dp4a is NVIDIA's
        and m is not None and m <= MOST_ROWS and (p.groups == 1 or p.group_size % packing_cuda.CHUNK == 0)
        and p.by_tma and p.x.get_dtype() == torch.bfloat16  # 16 bytes at once, two elements a word
    )


def _adapt(p: Problem, card: Card, config: Config) -> Config | None:
    """As many rows as there are, and no more warps than have a part of K."""
    k = 1 << (p.k - 1).bit_length()
    warps = min(config.num_warps, max(1, k // int4_few.OF_A_WARP))
    # a thread loads eight scales at once: of more rows they would be another's
    most = 16 if p.groups == 1 and p.m == 1 else 8
    zeros = p.groups > 1 and p.zero is not None and not p.symmetric
    if int(p.m) > 2:  # more would not stay in registers, with zeros of both sides for every group
        tight = int4_few.spills_sooner()
        most = 4 if warps < 4 or zeros or (tight and not p.symmetric) else most
        warps = min(warps, 4) if zeros and tight else warps
    return replace(
        config, block_m=1 << (int(p.m) - 1).bit_length(), block_n=min(config.block_n, most), block_k=warps * int4_few.OF_A_WARP,
        num_warps=warps,
    )


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    parts = -(-p.k // config.block_k)
    # two at once are as much as registers hold beside x, of which a second row takes as much as eight of W
    each = min(parts, 2 if config.block_m == 1 and config.block_n <= 8 else 1)
    steps = -(-parts // each)
    return int4.keywords(p, config) | {
        "ROWS": ir.static(p.m), "SYMMETRIC": p.symmetric, "PARTS": each, "STEPS": steps,
        "KEPT": steps == 1 and config.block_m <= 2,
    }


CONFIGS = tuple(
    Config(MOST_ROWS, n, warps * int4_few.OF_A_WARP, warps, 1)
    for n, warps in ((8, 4), (8, 8), (4, 4), (4, 8), (16, 4), (8, 2), (4, 2))
)
FOUR_WARPS, EIGHT_WARPS, TWO_WARPS = CONFIGS[0], CONFIGS[1], CONFIGS[5]
# Measured by benchmarks/tune.py on an H200: one row in one launch is 2 to 3.5 us faster everywhere; two rows of a large weight,
# and more of a smaller one, are as fast apart, where the tensor core multiplies all rows at once.
DEFAULTS = (
    Default(TWO_WARPS, upto=1, n=16384), Default(FOUR_WARPS, upto=1),
    Default(FOUR_WARPS, upto=2, n=1024, elements=1 << 26), Default(EIGHT_WARPS, upto=2, elements=1 << 26),
    Default(FOUR_WARPS, n=1024, elements=20_000_000), Default(EIGHT_WARPS, elements=20_000_000), Default(None),
)
KERNEL = Kernel("int4_gemv_dynamic", _fits, CONFIGS, _keywords, _adapt, DEFAULTS)
