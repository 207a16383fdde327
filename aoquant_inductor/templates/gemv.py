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
        and p.k % 16 == 0 and p.layout in ("plain", "wgmma") and p.x.get_dtype() != torch.float32
        and (p.groups == 1 or (p.group_size % 16 == 0 and p.group_size & (p.group_size - 1) == 0))
    )


def _adapt(p: Problem, config: Config) -> Config | None:
    """block_m is what the rows need, whatever the config says."""
    return replace(config, block_m=1 << (int(p.m) - 1).bit_length())


def _dynamic_fits(p: Problem, card: Card) -> bool:
    m = ir.static(p.m)
    return (
        m is not None and m <= MOST_ROWS and p.bits == 8 and p.symmetric is not None and p.zero is None and p.groups == 1
        and p.k % 16 == 0 and p.layout == "plain" and card.arch >= 80  # dp4a is NVIDIA's
    )


def _dynamic_adapt(p: Problem, config: Config) -> Config | None:
    return _adapt(p, replace(config, block_k=max(64, min(config.block_k, 1 << (p.k - 1).bit_length()))))


def _dynamic_keywords(p: Problem, config: Config) -> dict[str, Any]:
    # as much of x at once for its range as registers hold: its latency is what the weights wait for
    wide = min(1 << (p.k - 1).bit_length(), (2048 if p.symmetric else 1024) * config.num_warps // config.block_m)
    return {"ROWS": ir.static(p.m), "EVEN_K": p.k % config.block_k == 0, "SYMMETRIC": p.symmetric, "WIDE": max(64, wide)}


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    return {"ROWS": ir.static(p.m), "EVEN_K": p.k % config.block_k == 0, "WGMMA": p.layout == "wgmma"}


# Measured by benchmarks/tune.py on an H200: four rows of W for a load of x, all of x at once where there are many rows.
# From two tokens on the tensor core is as fast, or faster by up to 4 us.
CONFIGS = tuple(
    Config(1, *tile, 1)
    for tile in ((4, 2048, 4), (8, 4096, 4), (4, 1024, 1), (2, 1024, 1), (4, 2048, 2), (4, 1024, 2), (8, 2048, 4))
)
DEFAULTS = (
    Default(CONFIGS[1], upto=1, n=16384, k=2048), Default(CONFIGS[0], upto=1, k=1025), Default(CONFIGS[2], upto=1, n=16384),
    Default(CONFIGS[3], upto=1),
)
KERNEL = Kernel("gemv", _fits, CONFIGS, _keywords, _adapt, DEFAULTS)

# On the same card, a quantization of its own counted to the other kernels: ahead of them by 2 to 4 us for one row, at 4096x4096
# for up to four; for two rows of 28672x4096 3 us behind, which a launch less is worth to the host.
DYNAMIC_CONFIGS = tuple(
    Config(MOST_ROWS, *tile, 1)
    for tile in ((16, 1024, 4), (8, 1024, 4), (4, 1024, 4), (8, 2048, 4), (32, 512, 4), (16, 1024, 8), (8, 512, 2))
)
DYNAMIC_DEFAULTS = (
    Default(DYNAMIC_CONFIGS[3], upto=2, k=8192), Default(DYNAMIC_CONFIGS[2], upto=2),
    # three and four rows of a large weight: 10 us faster apart
    Default(None, n=8192, k=1024), Default(None, n=1024, k=8192),
    Default(DYNAMIC_CONFIGS[0], waves=1), Default(DYNAMIC_CONFIGS[2]),
)
DYNAMIC = Kernel("gemv_dynamic", _dynamic_fits, DYNAMIC_CONFIGS, _dynamic_keywords, _dynamic_adapt, DYNAMIC_DEFAULTS)
