"""int4_gemv.py.jinja and int4_fma.py.jinja: int4 weights with bf16 activations on CUDA for a few tokens, over "cuda_bf16"."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor import packing_cuda
from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.int4 import float_zeros, keywords, small_groups
from aoquant_inductor.templates.kernel import FILL, Config, Default, Kernel


@functools.cache
def triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def spills_sooner() -> bool:
    """Of what Triton 3.8 makes its ptxas 12.9 spills some bytes, where that of 3.9 spills none."""
    return triton_version() == (3, 8)


FEW = 4  # tokens for which the columns of the tensor core that they leave are parts of K


def _gemv_adapt(p: Problem, card: Card, config: Config) -> Config | None:
    n_pad, k_pad = packing_cuda.padded_shape(p.n, p.k)
    m = ir.static(p.m) or FEW + 1
    few = m <= FEW and p.by_tma  # x is then read in words; eight columns of tokens would read it 4 to 16 times as often
    if (config.block_m <= FEW) != few or m > config.block_m:
        return None
    # a float zero for every word does not fit beside two chunks of a single warp's; of eight warps' ptxas 13.4 spills some
    # without the flag that Triton 3.9 gives it
    zeros = small_groups(p) and float_zeros(p)
    full = zeros and (
        config == GEMV_EIGHT_LONG or (config.num_warps == 1 and config.block_k > packing_cuda.CHUNK)
        or (spills_sooner() and (config == GEMV_FOUR or (config.block_m > FEW and config.block_k == GEMV_FULL.block_k)))
    )
    if n_pad % config.block_n or k_pad < config.block_k or full:
        return None
    return replace(config, block_m=1 << (m - 1).bit_length()) if few else config


# In the order of the tiles that a multiprocessor gets: of narrow weights all is asked for at once
GEMV_ALL, GEMV_ALL_PAIR = Config(FEW, 16, 2048, 16, 1), Config(FEW, 32, 2048, 16, 1)
GEMV_ALL_LONG = Config(FEW, 16, 4096, 16, 1)
GEMV_EIGHT, GEMV_EIGHT_LONG = Config(FEW, 16, 1024, 8, 1), Config(FEW, 16, 2048, 8, 1)
GEMV_FOUR, GEMV_FOUR_SHORT = Config(FEW, 16, 2048, 4, 1), Config(FEW, 16, 1024, 4, 1)
GEMV_TWO, GEMV_TWO_PAIR, GEMV_ONE = Config(FEW, 16, 256, 2, 1), Config(FEW, 32, 256, 2, 1), Config(FEW, 16, 128, 1, 1)
# for tokens that fill the columns, and for x that is not read in words
GEMV_WIDE, GEMV_PAIR = Config(8, 16, 256, 2, 1), Config(8, 32, 256, 2, 1)
GEMV_FULL = Config(8, 16, 512, 2, 1, split_k=8 * FILL)
GEMV_SHORT = Config(8, 16, 128, 1, 1)


def _gemv_keywords(p: Problem, config: Config) -> dict[str, Any]:
    # in what order this Triton gives threads what they load, and K of a dot's operands (int4_gemv.py.jinja)
    return keywords(p, config) | {"LAST_FIRST": triton_version() >= (3, 7), "BY_TWO": triton_version() >= (3, 8)}


def _gemv(wanted: Callable[[Problem], bool], *defaults: Default, without: tuple[Config, ...] = ()) -> Kernel:
    def fits(p: Problem, card: Card) -> bool:
        m = ir.static(p.m)
        return p.layout == "cuda_bf16" and m is not None and m <= 8 and wanted(p)

    configs = (
        GEMV_ALL, GEMV_ALL_LONG, GEMV_ALL_PAIR, GEMV_EIGHT, GEMV_EIGHT_LONG, GEMV_FOUR, GEMV_FOUR_SHORT, GEMV_TWO,
        GEMV_TWO_PAIR, GEMV_ONE, GEMV_WIDE, GEMV_PAIR, GEMV_FULL, Config(8, 16, 256, 1, 1, split_k=16 * FILL),
        Config(8, 16, 1024, 4, 1, split_k=4 * FILL), replace(GEMV_PAIR, split_k=8 * FILL), GEMV_SHORT,
    )
    kept = tuple(config for config in configs if config not in without)
    return Kernel("int4_gemv", fits, kept, _gemv_keywords, _gemv_adapt, defaults)


# One to four tokens (H200): 4.6 to 5.4 us at 4096x4096, where columns of tokens alone and a split of K took 5.8 to 7.
SHORTEST = (Default(GEMV_TWO, upto=4), Default(GEMV_ONE, upto=4))
SHORT = (Default(GEMV_EIGHT, upto=4, waves=1), Default(GEMV_EIGHT, upto=4, k=1024), *SHORTEST)
NARROW = (
    Default(GEMV_EIGHT, upto=4, waves=2), Default(GEMV_ALL, upto=2, k=2048), Default(GEMV_EIGHT, upto=4, k=2048, waves=1),
    Default(GEMV_ALL, upto=4, k=2048), *SHORT,
)
# x in single elements: with enough tiles 32 rows at once are 2 us ahead of int4_linear; a split of K is .5 us behind it.
BY_ELEMENT = (Default(GEMV_PAIR, upto=4, waves=3), Default(GEMV_FULL, upto=1), Default(GEMV_SHORT, upto=1))
GEMV = _gemv(
    lambda p: not small_groups(p) and not float_zeros(p),
    Default(GEMV_TWO, upto=4, waves=6), Default(GEMV_ALL, upto=4, k=8193), *NARROW,
    Default(GEMV_SHORT, upto=4, waves=40), Default(GEMV_WIDE, upto=1, waves=6), *BY_ELEMENT,
)
# A scale for every four words: with two chunks of K a warp 3 to 12 % faster than with one, for K of 2048 and more (H200).
GEMV_GROUPS = _gemv(
    lambda p: small_groups(p) and p.zero is None,
    Default(GEMV_FOUR_SHORT, upto=1, waves=6), Default(GEMV_TWO_PAIR, upto=4, waves=3),
    Default(GEMV_ALL_PAIR, upto=1, k=8193), Default(GEMV_EIGHT_LONG, upto=4, k=8193),
    Default(GEMV_EIGHT_LONG, upto=2, k=2048, waves=2), Default(GEMV_EIGHT, upto=4, waves=2),
    Default(GEMV_ALL_LONG, upto=3, k=4096, waves=1), Default(GEMV_EIGHT, upto=2, k=2048),
    Default(GEMV_EIGHT_LONG, upto=4, k=2048), *SHORT, *BY_ELEMENT,
)
GEMV_GROUPS_ZERO = _gemv(
    lambda p: small_groups(p) and p.zero is not None,
    Default(GEMV_ALL_PAIR, upto=4, k=8193), Default(GEMV_FOUR, upto=1, k=2048, waves=1),
    Default(GEMV_TWO_PAIR, upto=4, waves=3), Default(GEMV_EIGHT, upto=4, waves=2),
    Default(GEMV_EIGHT_LONG, upto=4, k=2048, waves=1), Default(GEMV_EIGHT, upto=2),
    Default(GEMV_EIGHT_LONG, upto=4, k=2048), Default(GEMV_EIGHT, upto=4, k=2048), Default(GEMV_FOUR_SHORT, upto=4),
    *SHORTEST, *BY_ELEMENT,
)
# int4_linear rounds such a weight times its scale to bf16; here the scale waits for the sums. A zero beside each scale makes
# ptxas spill where a program has two warps.
GEMV_FLOAT = _gemv(
    lambda p: not small_groups(p) and float_zeros(p),
    Default(GEMV_FOUR_SHORT, upto=4, waves=6), Default(GEMV_ALL, upto=4, k=8193),
    *(row for row in NARROW if row.config != GEMV_TWO),
    Default(GEMV_SHORT, upto=4, waves=40), Default(GEMV_WIDE, upto=4, waves=6),
    Default(GEMV_FULL, upto=4), Default(GEMV_SHORT, upto=4), without=(GEMV_TWO,),
)


def _fma_fits(p: Problem, card: Card) -> bool:
    return p.layout == "cuda_bf16" and ir.static(p.m) == 1


def _fma_adapt(p: Problem, card: Card, config: Config) -> Config | None:
    _, k_pad = packing_cuda.padded_shape(p.n, p.k)
    # a scale and a zero for every word of a row: not for so many rows
    crowded = config.block_n > 4 and p.zero is not None and small_groups(p)
    return None if 2 * k_pad <= config.block_k or crowded else config


def _fma_keywords(p: Problem, config: Config) -> dict[str, Any]:
    parts = -(-p.k // config.block_k)
    # two parts of four rows at once are as much as registers hold beside x; in a loop zeros of groups are more
    crowded = config.block_n > 4 or (parts > 2 and p.groups > 1 and p.zero is not None)
    each = 1 if crowded else min(parts, 2)
    return keywords(p, config) | {"WORDS": p.by_tma, "PARTS": each, "STEPS": -(-parts // each)}


# One token and a weight with fewer tiles of 16 rows than there are multiprocessors: .4 to .8 us faster (H200).
SMALL = 1 << 23
OF_A_WARP = 1024  # of K: a thread has 32, so that x moves between none but those of a chunk
FMA_FULL, FMA_HALF, FMA_SHORT, FMA_LONG = (Config(1, 4, OF_A_WARP * warps, warps, 1) for warps in (4, 2, 1, 8))
FMA_MANY = replace(FMA_HALF, block_n=8)
FMA = Kernel(
    "int4_fma", _fma_fits, (FMA_FULL, replace(FMA_FULL, block_n=8), FMA_HALF, FMA_MANY, FMA_SHORT, FMA_LONG),
    _fma_keywords, _fma_adapt,
    (
        Default(FMA_LONG, upto=1, k=4097, elements=SMALL),
        Default(FMA_FULL, upto=1, k=4096, elements=SMALL), Default(FMA_HALF, upto=1, k=1025, elements=SMALL),
        Default(FMA_SHORT, upto=1, elements=SMALL),
    ),
)
KERNELS = (FMA, GEMV, GEMV_GROUPS, GEMV_GROUPS_ZERO, GEMV_FLOAT)
