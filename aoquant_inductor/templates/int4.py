"""int4_*.py.jinja: int4 weights on CUDA at every M, over the two layouts of packing_cuda.py.

A wide weight has tiles for every multiprocessor; a narrower one splits K until the card is full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import packing_cuda
from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.kernel import FILL, FILL_TWICE, Config, Default, Kernel

SCALED = (("SCALED", True),)


def keywords(p: Problem, config: Config) -> dict[str, Any]:
    n_pad, k_pad = packing_cuda.padded_shape(p.n, p.k)
    one_sum = p.groups == 1 or config.extra == SCALED
    return {
        "N": p.n, "N_PAD": n_pad, "K_PAD": k_pad, "EVEN_K": p.k == k_pad, "WARPS": config.num_warps,
        "WIDE_SCALE": p.scale.get_dtype() == torch.float32,
        # a sum of all groups that stays in the accumulator, although not `carried`: a dot waited for, twice in a chunk
        "SCALED": False, "PARTS": 2 if one_sum and config.block_k == 128 and not config.carried else 1,
    }


def _small_groups(p: Problem) -> bool:
    """Several in a chunk of K, whose scales lie as packing_cuda.lay_groups."""
    return p.groups > 1 and p.group_size < packing_cuda.CHUNK


def _gemv_adapt(p: Problem, config: Config) -> Config | None:
    n_pad, k_pad = packing_cuda.padded_shape(p.n, p.k)
    # a float zero for every word does not fit beside two chunks of a single warp's
    zeros = _small_groups(p) and _float_zeros(p)
    full = zeros and config.num_warps == 1 and config.block_k > packing_cuda.CHUNK
    return None if n_pad % config.block_n or k_pad < config.block_k or full else config


GEMV_WIDE, GEMV_PAIR = Config(8, 16, 256, 2, 1), Config(8, 32, 256, 2, 1)
GEMV_FULL = Config(8, 16, 512, 2, 1, split_k=8 * FILL)
GEMV_SHORT = Config(8, 16, 128, 1, 1)


def _float_zeros(p: Problem) -> bool:
    """A zero off the grid for each of several groups."""
    return p.groups > 1 and p.zero is not None and p.zero_point == "float"


def _gemv(wanted: Callable[[Problem], bool], *defaults: Default) -> Kernel:
    def fits(p: Problem, card: Card) -> bool:
        m = ir.static(p.m)
        return p.layout == "cuda_bf16" and m is not None and m <= 8 and wanted(p)

    configs = (
        GEMV_WIDE, GEMV_PAIR, GEMV_FULL, Config(8, 16, 256, 1, 1, split_k=16 * FILL),
        Config(8, 16, 1024, 4, 1, split_k=4 * FILL), replace(GEMV_PAIR, split_k=8 * FILL), GEMV_SHORT,
    )
    return Kernel("int4_gemv", fits, configs, keywords, _gemv_adapt, defaults)


# Two to four tokens (H200): with enough tiles 32 rows at once are 2 us ahead of int4_linear; a split of K is .5 us behind it.
FEW_TOKENS = (Default(GEMV_PAIR, upto=4, waves=3), Default(GEMV_FULL, upto=1), Default(GEMV_SHORT, upto=1))
LM_HEAD = Default(GEMV_SHORT, upto=4, waves=40)
GEMV = _gemv(lambda p: not _small_groups(p) and not _float_zeros(p), LM_HEAD, Default(GEMV_WIDE, upto=1, waves=6), *FEW_TOKENS)
GEMV_GROUPS = _gemv(_small_groups, *FEW_TOKENS)
# int4_linear rounds such a weight times its scale to bf16; here the scale waits for the sums
GEMV_FLOAT = _gemv(
    lambda p: not _small_groups(p) and _float_zeros(p),
    LM_HEAD, Default(GEMV_WIDE, upto=4, waves=6), Default(GEMV_FULL, upto=4), Default(GEMV_SHORT, upto=4),
)


def _fma_fits(p: Problem, card: Card) -> bool:
    return p.layout == "cuda_bf16" and ir.static(p.m) == 1


def _fma_adapt(p: Problem, config: Config) -> Config | None:
    _, k_pad = packing_cuda.padded_shape(p.n, p.k)
    # a scale and a zero for every word of a row: not for so many rows
    crowded = config.block_n > 4 and p.zero is not None and _small_groups(p)
    return None if 2 * k_pad <= config.block_k or crowded else config


def _fma_keywords(p: Problem, config: Config) -> dict[str, Any]:
    parts = -(-p.k // config.block_k)
    # two parts of four rows at once are as much as registers hold beside x; in a loop zeros of groups are more
    crowded = config.block_n > 4 or (parts > 2 and p.groups > 1 and p.zero is not None)
    each = 1 if crowded else min(parts, 2)
    return keywords(p, config) | {"WORDS": p.by_tma, "PARTS": each, "STEPS": -(-parts // each)}


# One token and a small weight, where the others split K: .5 to 2 us faster (H200), and slower where the weight is larger.
SMALL = 1 << 25
OF_A_WARP = 1024  # of K: a thread has 32, so that x moves between none but those of a chunk
FMA_FULL, FMA_HALF, FMA_SHORT, FMA_LONG = (Config(1, 4, OF_A_WARP * warps, warps, 1) for warps in (4, 2, 1, 8))
FMA_MANY = replace(FMA_HALF, block_n=8)
FMA = Kernel(
    "int4_fma", _fma_fits, (FMA_FULL, replace(FMA_FULL, block_n=8), FMA_HALF, FMA_MANY, FMA_SHORT, FMA_LONG),
    _fma_keywords, _fma_adapt,
    (
        Default(FMA_LONG, upto=1, k=4097, elements=SMALL), Default(FMA_MANY, upto=1, k=4096, waves=5, elements=SMALL),
        Default(FMA_FULL, upto=1, k=4096, elements=SMALL), Default(FMA_HALF, upto=1, k=1025, elements=SMALL),
        Default(FMA_SHORT, upto=1, elements=SMALL),
    ),
)


def _one_sum(p: Problem) -> bool:
    """Whether all groups are summed up in one accumulator: there is one, or their scales cannot wait for the sum over a group,
    which is smaller than a dot, or has a zero off the grid.
    """
    return p.groups == 1 or _small_groups(p) or _float_zeros(p)


def _one_sum_adapt(p: Problem, config: Config) -> Config | None:
    return replace(config, extra=()) if p.groups == 1 else config


def _scaled(config: Config) -> Config:
    return replace(config, extra=SCALED)


L16 = Config(16, 64, 128, 4, 4, split_k=3 * FILL)
L16_LONG = Config(16, 64, 256, 4, 3, split_k=FILL_TWICE)
L32 = Config(32, 64, 128, 4, 4, split_k=FILL_TWICE)
L64 = Config(64, 64, 128, 4, 4, split_k=FILL_TWICE)
L64_WIDE = Config(64, 128, 128, 8, 3)
L128 = Config(128, 64, 128, 4, 3, split_k=FILL_TWICE)
L128_WIDE = _scaled(Config(128, 128, 128, 8, 3))
L256 = _scaled(Config(256, 128, 128, 8, 3))
L_CARRIED = replace(L256, carried=True, tma=True)
L128_CARRIED = replace(L_CARRIED, block_m=128, num_warps=4)  # 2 to 10 % faster than with 8, but for groups below 128 (H200)

LARGE = (
    L128_WIDE, L256, replace(L256, split_k=FILL_TWICE), L_CARRIED, replace(L_CARRIED, split_k=FILL), replace(L_CARRIED, tail=1),
    replace(L_CARRIED, block_m=128, split_k=FILL),
)
SUMS = Kernel(
    "int4_linear", lambda p, card: p.layout == "cuda_bf16" and not _one_sum(p),
    (
        L16, L16_LONG, replace(L16_LONG, split_k=4 * FILL), L32, Config(32, 128, 128, 8, 4, split_k=FILL), L64, L64_WIDE,
        Config(64, 64, 256, 4, 3, split_k=FILL_TWICE), _scaled(L64_WIDE), L128, _scaled(L128),
        replace(_scaled(L128), carried=True, tma=True), replace(L128_CARRIED, split_k=FILL), *LARGE,
    ),
    keywords, label="W4A16",
)
L32_LONG = Config(32, 64, 256, 4, 3, split_k=FILL_TWICE)
S16, S32, S64_WIDE, S64, S128 = (_scaled(config) for config in (L16_LONG, L32_LONG, L64_WIDE, L64, L128))
ONE_SUM = Kernel(
    "int4_linear", lambda p, card: p.layout == "cuda_bf16" and _one_sum(p),
    (S16, replace(S16, split_k=4 * FILL), S32, S64_WIDE, S64, S128, *LARGE),
    keywords, _one_sum_adapt, label="W4A16 one sum",
)

D16 = Config(16, 64, 256, 4, 4, split_k=FILL_TWICE)
D64 = Config(64, 64, 256, 4, 4, split_k=FILL_TWICE)
D256_WIDE = Config(128, 128, 128, 4, 4)
D256 = Config(128, 64, 128, 4, 4, split_k=FILL_TWICE)
D_LARGE = Config(128, 128, 128, 8, 3)
D_SMALL = Config(64, 64, 128, 4, 4, split_k=FILL_TWICE)


def _crowded(p: Problem) -> bool:
    """Zeros of both sides and of every group take a thread's last registers."""
    return p.groups > 1 and p.zero is not None and p.x_zero is not None


# x by the tensor memory accelerator, where a group is a dot: fewer registers, 3 to 6 % faster at many rows on an H200. Programs
# that stay make the descriptor once: 1 to 8 % more, but they need 25 registers, which at 64 columns cost a program of three.
T_ROW = Config(128, 128, 128, 8, 3, tma=True, programs=2)
T_GROUPS = Config(128, 64, 128, 4, 3, tma=True)


def _dynamic_adapt(p: Problem, config: Config) -> Config | None:
    return replace(config, num_warps=8) if _crowded(p) and config.block_m * config.block_n >= 64 * 128 else config


def _dynamic_keywords(p: Problem, config: Config) -> dict[str, Any]:
    return keywords(p, config) | ({"FEW": False} if _crowded(p) else {})


def _dynamic(groups: bool, configs: tuple[Config, ...], label: str) -> Kernel:
    fits = lambda p, card: p.layout == "cuda_int8" and (p.groups > 1) == groups  # noqa: E731
    return Kernel("int4_dynamic", fits, configs, _dynamic_keywords, _dynamic_adapt, label=label)


DYNAMIC_ROW = _dynamic(
    False,
    (
        D16, D64, D256_WIDE, D256, D_LARGE, replace(D_LARGE, split_k=FILL), D_SMALL, Config(64, 128, 256, 4, 3),
        Config(128, 128, 128, 4, 3), T_ROW, replace(T_ROW, group_m=16),
    ),
    "W4A8",
)
G16 = Config(16, 64, 256, 4, 3, split_k=FILL_TWICE)
DYNAMIC_GROUPS = _dynamic(
    True,
    (
        G16, D_SMALL, D256, Config(64, 128, 128, 8, 4), Config(64, 128, 256, 4, 3),
        Config(64, 64, 256, 4, 3, split_k=FILL_TWICE), T_GROUPS, replace(T_GROUPS, group_m=16),
    ),
    "W4A8 groups",
)
KERNELS = (FMA, GEMV, GEMV_GROUPS, GEMV_FLOAT, SUMS, ONE_SUM, DYNAMIC_ROW, DYNAMIC_GROUPS)
