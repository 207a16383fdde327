"""linear.py.jinja: every scheme over the plain layout, at every size and on every card; the fastest for int8 activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.kernel import FILL, FILL_TWICE, Config, Default, Kernel


def _words(p: Problem) -> bool:
    return p.layout == "wgmma" and p.x.get_dtype() == torch.bfloat16


def _adapt(p: Problem, card: Card, config: Config) -> Config | None:
    if config.carried and not _words(p):
        return None  # ptxas 13.5 miscompiled Triton's own conversion, too: wrong on an H100
    # fp32 operands are four times an int8's bytes in shared memory; tl.dot wants at least 32 of K for int8
    block_k = min(config.block_k, 32 if p.x.get_dtype() == torch.float32 else config.block_k, 1 << (p.k - 1).bit_length())
    least = 64 if p.layout == "wgmma" else 32
    block_k = max(least, block_k if p.groups == 1 else min(block_k, p.group_size))
    if p.groups > 1 and config.block_m * config.block_n > 64 * 32 * config.num_warps:
        return None  # the product of one step and the sums side by side do not fit a thread's registers
    if p.zero is not None and p.groups == 1:  # the sums of x are not shared by the programs of a tile
        return None if config.tail else replace(config, block_k=block_k, split_k=1)
    return replace(config, block_k=block_k)


def _persistent_adapt(p: Problem, card: Card, config: Config) -> Config:
    # the sums of a tile come all at once from a memory of their own: by four warps they spill beside a bias
    wide = card.has_tensor_memory and config.block_m * config.block_n >= 1 << 14
    return replace(config, num_warps=8) if wide else config


def _dynamic_adapt(p: Problem, card: Card, config: Config) -> Config | None:
    return _adapt(p, card, _persistent_adapt(p, card, config))


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    dots = dict(config.extra).get("DOTS", 1)
    return {
        "EVEN_K": p.k % (dots * config.block_k) == 0, "WGMMA": p.layout == "wgmma", "HELD": False, "DOTS": dots,
        "WORDS": _words(p),
    }


def _general(p: Problem, card: Card) -> bool:
    """Before sm_80 (0 is another vendor's card) Triton does not compile int8 x int8."""
    return p.layout in ("plain", "wgmma") and not (p.dynamic and 0 < card.arch < 80)


GENERAL_CONFIGS = (
    Config(16, 32, 128, 4, 4),
    Config(64, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 3),
    Config(128, 128, 64, 8, 3),
)
GENERAL = Kernel(
    "linear", _general, GENERAL_CONFIGS, _keywords, _adapt,
    (
        Default(GENERAL_CONFIGS[0], upto=16), Default(GENERAL_CONFIGS[1], upto=64), Default(GENERAL_CONFIGS[2], upto=256),
        # it waits for each converted weight: a third to a half of bf16's speed at 256 and 512 rows (H100). A copy in bf16 takes
        # what its bytes do, once, beside torch.mm
        Default(GENERAL_CONFIGS[3], upto=512), Default(None, weight_only=True), Default(GENERAL_CONFIGS[3]),
    ),
)

# int8 x int8 is exact with every ptxas. Large tiles want two programs per multiprocessor: Triton waits for every int32 dot, and
# only a second program hides that. Few rows: x is the narrow side, and K is split until enough loads are in flight.
D16 = Config(16, 64, 256, 4, 4, swap=True)
D32 = replace(D16, block_m=32)
D64_WIDE = Config(64, 64, 128, 4, 5, swap=True)
D64 = Config(64, 32, 256, 4, 4)
D256 = Config(64, 64, 128, 4, 5)
D512 = Config(64, 128, 128, 8, 4, swap=True)
D512_HIGH = Config(128, 64, 128, 4, 4, swap=True)  # 2 to 5 % faster than not swapped (H200)
D_LARGE = Config(128, 128, 128, 4, 3, group_m=16)
INT8_DYNAMIC = Kernel(
    "linear", lambda p, card: p.dynamic and p.bits == 8 and card.arch >= 90,
    (
        *(replace(config, split_k=split) for config in (D16, D32, D64_WIDE, D64) for split in (1, FILL, FILL_TWICE)),
        D256, D512, replace(D512, split_k=FILL), D_LARGE, replace(D_LARGE, group_m=8), replace(D_LARGE, swap=True),
        D512_HIGH, replace(D512_HIGH, tail=1),
    ),
    _keywords, _dynamic_adapt, label="W8A8",
)

# Many rows: 1.7x cuBLAS's bf16 at M = 1024 and 4096 (28672x4096), where a program per tile is 1.5x; 8192^3: 1331 TOP/s.
P_LARGE = Config(128, 128, 128, 4, 3, programs=2)
PERSISTENT = Kernel(
    "persistent",
    lambda p, card: p.dynamic and p.bits == 8 and p.zero is None and p.by_tma and card.has_tma,
    (P_LARGE, replace(P_LARGE, group_m=4), replace(P_LARGE, group_m=16), Config(128, 256, 128, 8, 4, group_m=16, programs=1)),
    lambda p, config: {}, _persistent_adapt, label="W8A8 persistent",
)

# int8 weights on the left, converted to bf16 in registers; the three ways to wait for a dot are in linear.py.jinja.
W16 = Config(16, 64, 128, 4, 4, swap=True)
W32 = Config(32, 64, 128, 4, 4, swap=True)
W64 = Config(64, 64, 128, 4, 4, swap=True)
W64_WIDE = Config(64, 128, 128, 8, 4, swap=True)
W64_CARRIED = Config(64, 128, 128, 4, 3, swap=True, carried=True)  # 6 % faster at 28672x4096 (H200), less so by TMA
W128 = Config(128, 64, 128, 4, 3, swap=True)
HELD = (("HELD", True),)
W128_HELD = replace(W128, extra=HELD)
W128_CARRIED = replace(W128, carried=True, tma=True, split_k=FILL_TWICE)
W128_TAIL = replace(W128_CARRIED, split_k=1, tail=1)  # 3 to 16 % faster, as two programs fit a multiprocessor (H200)
W128_ALONE = replace(W128_CARRIED, num_stages=4, alone=True, split_k=FILL)  # 1 to 25 % faster than three stages as alone (H200)
W256 = Config(256, 64, 64, 4, 3, swap=True, extra=HELD)
W256_ALONE = Config(256, 64, 64, 4, 5, swap=True, carried=True, tma=True, alone=True, split_k=FILL)
W_LARGE = Config(128, 128, 64, 4, 2, swap=True, extra=(("DOTS", 2),))
# .9x to 1.1x cuBLAS's bf16 from M = 256 on, where the best of the others is .7x to .9x
W_CARRIED = Config(256, 128, 64, 8, 4, swap=True, carried=True, tma=True)
INT8_WEIGHT_ONLY = Kernel(
    "linear", lambda p, card: p.layout == "wgmma",
    (
        *(
            replace(config, split_k=split)
            for config in (W16, W32, W64, W64_WIDE, W128, W128_HELD, W256) for split in (1, FILL, FILL_TWICE)
        ),
        replace(W64_CARRIED, split_k=FILL_TWICE), W_LARGE, W_CARRIED, replace(W_CARRIED, split_k=FILL),
        replace(W_CARRIED, tail=1),
        replace(W_CARRIED, block_m=128, split_k=FILL), W128_CARRIED, W128_TAIL, W128_ALONE, W256_ALONE,
        *(replace(config, tail=1) for config in (W16, W32, W64)),  # 1 to 24 % faster at 10240 columns and more (H200)
    ),
    _keywords, _adapt, label="W8A16",
)
KERNELS = (PERSISTENT, INT8_DYNAMIC, INT8_WEIGHT_ONLY, GENERAL)
