"""gemv.py.jinja and gemv_dynamic.py.jinja: int8 weights at the smallest M, by bandwidth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.kernel import Config, Default, Kernel

MOST_ROWS = 4


def _fits(p: Problem, card: Card) -> bool:
    m = ir.static(p.m)
    return (
        m is not None and m <= MOST_ROWS and p.bits == 8 and not p.dynamic and p.zero is None
        and p.k % 16 == 0 and p.layout in ("plain", "wgmma") and p.by_tma  # 16 bytes of x at once
        and p.x.get_dtype() in (torch.bfloat16, torch.float16)
        and (p.groups == 1 or (p.group_size % 16 == 0 and p.group_size & (p.group_size - 1) == 0))
    )


TYPES = (torch.bfloat16, torch.float16, torch.float32)
OF_A_WARP = 512  # of K: a thread has 16, so that x moves between none


def _adapt(p: Problem, config: Config) -> Config:
    """What the rows need, whatever the config says; no more warps than have a part of K, and no more rows of W than stay in
    registers beside those of x.
    """
    warps = min(config.num_warps, max(1, (1 << (p.k - 1).bit_length()) // OF_A_WARP))
    most = 16 if p.m == 1 else 8 if int(p.m) == 2 or warps >= 4 else 4
    block_m, block_n = 1 << (int(p.m) - 1).bit_length(), min(config.block_n, most)
    return replace(config, block_m=block_m, block_n=block_n, block_k=warps * OF_A_WARP, num_warps=warps)


def _dynamic_fits(p: Problem, card: Card) -> bool:
    m = ir.static(p.m)
    return (
        m is not None and m <= MOST_ROWS and p.bits == 8 and p.symmetric is not None and p.zero is None and p.groups == 1
        and p.k % 16 == 0 and p.layout == "plain" and card.arch >= 80  # dp4a is NVIDIA's
        and p.by_tma and p.x.get_dtype() in TYPES  # 16 bytes of x at once
    )


def _dynamic_adapt(p: Problem, config: Config) -> Config:
    config = _adapt(p, config)
    return config if _split(p, config)[1] == 1 else replace(config, programs=0)  # x_q of several steps is too much to keep


def _split(p: Problem, config: Config) -> tuple[int, int]:
    """(parts of K in a step, steps): as many weights at once as registers hold, which are all of K in the best case."""
    parts = -(-p.k // config.block_k)
    at_once = max(1, 16 // config.block_n)
    if parts > at_once and config.block_m > 1:
        at_once = max(1, at_once // 2)  # the next step's come beside the rows of x
    steps = -(-parts // at_once)
    return -(-parts // steps), steps


def _shared_keywords(p: Problem, config: Config) -> dict[str, Any]:
    parts, steps = _split(p, config)
    return {
        "ROWS": ir.static(p.m), "BFLOAT16": p.x.get_dtype() == torch.bfloat16, "PARTS": parts, "STEPS": steps,
        "WHOLE_PARTS": p.k // config.block_k, "EVEN_N": p.n % config.block_n == 0,
    }


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    return {**_shared_keywords(p, config), "WGMMA": p.layout == "wgmma"}


def _dynamic_keywords(p: Problem, config: Config) -> dict[str, Any]:
    shared = _shared_keywords(p, config)
    x_bytes, all_parts = p.x.get_dtype().itemsize, -(-p.k // config.block_k)
    kept = shared["STEPS"] == 1 and config.block_m * shared["PARTS"] * x_bytes <= 8
    at_once = shared["PARTS"] if kept else min(all_parts, max(1, 16 // (config.block_m * x_bytes)))
    return {
        **shared, "SYMMETRIC": p.symmetric, "X_BYTES": x_bytes,
        "KEPT": kept, "AT_ONCE": at_once, "RANGE_STEPS": -(-all_parts // at_once),
    }


# Measured by benchmarks/tune.py on an H200: four rows of W for a load of x, all of x at once where there are many rows.
# From two tokens on the tensor core is as fast, or faster by up to 4 us.
CONFIGS = tuple(
    Config(1, *tile, 1)
    for tile in ((4, 2048, 4), (8, 4096, 8), (4, 512, 1), (2, 512, 1), (4, 1024, 2), (8, 2048, 4), (4, 4096, 8))
)
DEFAULTS = (
    Default(CONFIGS[1], upto=1, n=16384, k=2048), Default(CONFIGS[0], upto=1, k=1025), Default(CONFIGS[2], upto=1, n=16384),
    Default(CONFIGS[3], upto=1),
)
KERNEL = Kernel("gemv", _fits, CONFIGS, _keywords, _adapt, DEFAULTS)

FOUR_WARPS, EIGHT_WARPS, LOW = (Config(MOST_ROWS, n, w * OF_A_WARP, w, 1) for n, w in ((8, 4), (8, 8), (4, 4)))
# x is quantized once for all the tiles of a program
STAYING = replace(FOUR_WARPS, programs=4)
DYNAMIC_CONFIGS = (
    LOW, FOUR_WARPS, EIGHT_WARPS, replace(EIGHT_WARPS, block_n=4), Config(MOST_ROWS, 8, 2 * OF_A_WARP, 2, 1), STAYING,
    replace(LOW, programs=3), replace(EIGHT_WARPS, programs=2),
)
# Measured by benchmarks/tune.py on an H200, where a quantization of its own takes 2 us and more: one row in one launch 1.65x to
# 2.3x bf16; of four the largest weight 33.0 us, 33.5 apart.
DYNAMIC_DEFAULTS = (
    Default(LOW, upto=1), Default(FOUR_WARPS, upto=2, n=1024), Default(EIGHT_WARPS, upto=2),
    Default(STAYING, n=8192, elements=1 << 27), Default(FOUR_WARPS, n=1024, elements=1 << 27),
    Default(EIGHT_WARPS, elements=1 << 27), Default(None),
)
DYNAMIC = Kernel("gemv_dynamic", _dynamic_fits, DYNAMIC_CONFIGS, _dynamic_keywords, _dynamic_adapt, DYNAMIC_DEFAULTS)
