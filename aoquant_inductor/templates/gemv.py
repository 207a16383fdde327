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
        and p.k % 16 == 0 and p.layout in ("plain", "wgmma") and card.arch >= 80  # prmt is NVIDIA's
        and p.by_tma and p.x.get_dtype() in (torch.bfloat16, torch.float16)  # 16 bytes of x at once
        and (p.groups == 1 or (p.group_size % 16 == 0 and p.group_size & (p.group_size - 1) == 0))
    )


TYPES = (torch.bfloat16, torch.float16, torch.float32)
OF_A_WARP = 512  # of K: a thread has 16, so that x moves between none


def _adapt(p: Problem, card: Card, config: Config) -> Config:
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


def _dynamic_adapt(p: Problem, card: Card, config: Config) -> Config:
    config = _adapt(p, card, config)
    return config if _split(p, config)[1] == 1 else replace(config, programs=0)  # x_q of several steps is too much to keep


def _split(p: Problem, config: Config) -> tuple[int, int]:
    """(parts of K in a step, steps): as many weights at once as registers hold, which are all of K in the best case, or as
    many parts as the config's STEPPED says.
    """
    parts = -(-p.k // config.block_k)
    at_once = int(dict(config.extra).get("STEPPED", max(1, 16 // config.block_n)))
    if parts > at_once and config.block_m > 1:
        at_once = max(1, at_once // 2)  # the next step's come beside the rows of x
    steps = -(-parts // at_once)
    return -(-parts // steps), steps


def _shared_keywords(p: Problem, config: Config) -> dict[str, Any]:
    parts, steps = _split(p, config)
    return {
        "ROWS": ir.static(p.m), "BFLOAT16": p.x.get_dtype() == torch.bfloat16, "PARTS": parts, "STEPS": steps,
        "WHOLE_PARTS": p.k // config.block_k,
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


def _of(rows: int, warps: int, **extra: Any) -> Config:
    return Config(MOST_ROWS, rows, warps * OF_A_WARP, warps, 1, extra=tuple(extra.items()))


# Measured by benchmarks/tune.py on an H200. STEPPED: a part at a time leaves registers for all programs at once (4096x14336
# 16.3 us, 18.4 without). From two tokens on the tensor core is faster at large weights, from four at all but the smallest.
FOUR, STEPPED, TWO, EIGHT, ONE_WARP, LONG = _of(4, 4), _of(4, 4, STEPPED=1), _of(2, 4), _of(8, 4), _of(4, 1), _of(4, 8)
CONFIGS = (FOUR, STEPPED, TWO, EIGHT, ONE_WARP, LONG, _of(4, 2, STEPPED=2))
DEFAULTS = (
    Default(TWO, upto=1, k=4097, elements=1 << 23), Default(FOUR, upto=1, n=16384),
    Default(LONG, upto=1, n=6144, elements=1 << 25), Default(STEPPED, upto=1),
    Default(EIGHT, upto=2, k=8192, elements=1 << 26),
    Default(FOUR, upto=3, k=4097, elements=1 << 23), Default(FOUR, k=4097, elements=5 << 20),
    Default(ONE_WARP, upto=2, elements=1 << 25), Default(ONE_WARP, upto=3, elements=1 << 23),
)
KERNEL = Kernel("gemv", _fits, CONFIGS, _keywords, _adapt, DEFAULTS)

EIGHT_WARPS = _of(8, 8)
# x is quantized once for all the tiles of a program
STAYING = replace(EIGHT, programs=4)
DYNAMIC_CONFIGS = (
    FOUR, EIGHT, EIGHT_WARPS, LONG, _of(8, 2), STAYING, replace(FOUR, programs=3), replace(EIGHT_WARPS, programs=2),
)
# Measured by benchmarks/tune.py on an H200, where a quantization of its own takes 2 us and more: one row in one launch 1.65x to
# 2.3x bf16; of four the largest weight 33.0 us, 33.5 apart.
DYNAMIC_DEFAULTS = (
    Default(FOUR, upto=1), Default(EIGHT, upto=2, n=1024), Default(EIGHT_WARPS, upto=2),
    Default(STAYING, n=8192, elements=1 << 27), Default(EIGHT, n=1024, elements=1 << 27),
    Default(EIGHT_WARPS, elements=1 << 27), Default(None),
)
DYNAMIC = Kernel("gemv_dynamic", _dynamic_fits, DYNAMIC_CONFIGS, _dynamic_keywords, _dynamic_adapt, DYNAMIC_DEFAULTS)
