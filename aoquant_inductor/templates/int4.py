"""int4_*.py.jinja: int4 weights on CUDA at every M, over the two layouts of packing_cuda.py.

A wide weight has tiles for every multiprocessor; a narrower one splits K until the card is full.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor import packing_cuda
from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.kernel import FILL, FILL_TWICE, Config, Kernel

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


def small_groups(p: Problem) -> bool:
    """Several in a chunk of K, whose scales lie as packing_cuda.lay_groups."""
    return p.groups > 1 and p.group_size < packing_cuda.CHUNK


def float_zeros(p: Problem) -> bool:
    """A zero off the grid for each of several groups."""
    return p.groups > 1 and p.zero is not None and p.zero_point == "float"


def _one_sum(p: Problem) -> bool:
    """Whether all groups are summed up in one accumulator: there is one, or their scales cannot wait for the sum over a group,
    which is smaller than a dot, or has a zero off the grid.
    """
    return p.groups == 1 or small_groups(p) or float_zeros(p)


def _one_sum_adapt(p: Problem, card: Card, config: Config) -> Config | None:
    return replace(config, extra=()) if p.groups == 1 else config


def _scaled(config: Config) -> Config:
    return replace(config, extra=SCALED)


def _tail(config: Config) -> Config:
    return replace(config, split_k=1, tail=1)


L16 = Config(16, 64, 128, 4, 4, split_k=3 * FILL)
L16_LONG = Config(16, 64, 256, 4, 3, split_k=FILL_TWICE)
L32 = Config(32, 64, 128, 4, 4, split_k=FILL_TWICE)
L32_LONG = Config(32, 64, 256, 4, 3, split_k=FILL_TWICE)
L64 = Config(64, 64, 128, 4, 4, split_k=FILL_TWICE)
L64_WIDE = Config(64, 128, 128, 8, 3)
L128 = Config(128, 64, 128, 4, 3, split_k=FILL_TWICE)
L128_CARRIED = replace(_scaled(L128), carried=True, tma=True)
L128_TAIL = _tail(L128_CARRIED)  # 2 to 24 % faster (H200)
L128_ALONE = replace(L128_CARRIED, num_stages=4, alone=True, split_k=FILL)  # 2 to 22 % faster than three as alone (H200)
L128_WIDE = _scaled(Config(128, 128, 128, 8, 3))
L256 = _scaled(Config(256, 128, 128, 8, 3))
L_CARRIED = replace(L256, carried=True, tma=True)
L128_WIDE_CARRIED = replace(L_CARRIED, block_m=128, num_warps=4)  # 2 to 10 % faster than by 8, but for small groups (H200)

LARGE = (
    L128_WIDE, L256, replace(L256, split_k=FILL_TWICE), L_CARRIED, replace(L_CARRIED, split_k=FILL), replace(L_CARRIED, tail=1),
    replace(L_CARRIED, block_m=128, split_k=FILL),
)
SUMS = Kernel(
    "int4_linear", lambda p, card: p.layout == "cuda_bf16" and not _one_sum(p),
    (
        L16, L16_LONG, replace(L16_LONG, split_k=4 * FILL), L32, Config(32, 128, 128, 8, 4, split_k=FILL), L64, L64_WIDE,
        Config(64, 64, 256, 4, 3, split_k=FILL_TWICE), _scaled(L64_WIDE), L128, _scaled(L128),
        L128_CARRIED, L128_TAIL, L128_ALONE, replace(L128_WIDE_CARRIED, split_k=FILL), replace(L128_WIDE_CARRIED, tail=1),
        *map(_tail, (L16_LONG, L32, L32_LONG, L64, L64_WIDE)), *LARGE,  # 1 to 24 % faster at 10240 columns and more (H200)
    ),
    keywords, label="W4A16",
)
S16, S32, S64_WIDE, S64, S128 = (_scaled(config) for config in (L16_LONG, L32_LONG, L64_WIDE, L64, L128))
ONE_SUM = Kernel(
    "int4_linear", lambda p, card: p.layout == "cuda_bf16" and _one_sum(p),
    (
        S16, replace(S16, split_k=4 * FILL), S32, S64_WIDE, S64, S128, L128_CARRIED, L128_TAIL, L128_ALONE,
        *map(_tail, (S16, S32, S64, S64_WIDE)), *LARGE,
    ),
    keywords, _one_sum_adapt, label="W4A16 one sum",
)

D16 = Config(16, 64, 256, 4, 4, split_k=FILL_TWICE)
D32 = replace(D16, block_m=32)
D64 = Config(64, 64, 256, 4, 4, split_k=FILL_TWICE)
D256_WIDE = Config(128, 128, 128, 4, 4)
D256 = Config(128, 64, 128, 4, 4, split_k=FILL_TWICE)
D_LARGE = Config(128, 128, 128, 8, 3)
D_SMALL = Config(64, 64, 128, 4, 4, split_k=FILL_TWICE)
D64_THREE = replace(D64, num_stages=3)
# some tiles more than multiprocessors: up to 16 % faster than as many whole ones (H200)
D64_TAIL = _tail(D64_THREE)


def _crowded(p: Problem) -> bool:
    """Zeros of both sides and of every group take a thread's last registers."""
    return p.groups > 1 and p.zero is not None and p.x_zero is not None


# x by the tensor memory accelerator, where a group is a dot: fewer registers, 3 to 12 % faster at many rows on an H200, and in
# parts of K where no tile is for a second time. Programs that stay need 25 registers, which at 64 columns cost one of three.
T_ROW = Config(128, 128, 128, 8, 3, tma=True, programs=2)
T_GROUPS = Config(128, 64, 128, 4, 3, tma=True, split_k=FILL)


def _dynamic_adapt(p: Problem, card: Card, config: Config) -> Config | None:
    return replace(config, num_warps=8) if _crowded(p) and config.block_m * config.block_n >= 64 * 128 else config


def _dynamic_keywords(p: Problem, config: Config) -> dict[str, Any]:
    return keywords(p, config) | ({"FEW": False} if _crowded(p) else {})


def _dynamic(groups: bool, configs: tuple[Config, ...], label: str) -> Kernel:
    fits = lambda p, card: p.layout == "cuda_int8" and (p.groups > 1) == groups  # noqa: E731
    return Kernel("int4_dynamic", fits, configs, _dynamic_keywords, _dynamic_adapt, label=label)


DYNAMIC_ROW = _dynamic(
    False,
    (
        D16, D32, D64, D256_WIDE, D256, D_LARGE, replace(D_LARGE, split_k=FILL), D_SMALL, Config(64, 128, 256, 4, 3),
        Config(128, 128, 128, 4, 3), T_ROW, replace(T_ROW, group_m=16), D64_THREE, D64_TAIL,
    ),
    "W4A8",
)
G16 = Config(16, 64, 256, 4, 3, split_k=FILL_TWICE)
G32 = replace(G16, block_m=32)
DYNAMIC_GROUPS = _dynamic(
    True,
    (
        G16, G32, D_SMALL, D256, Config(64, 128, 128, 8, 4), Config(64, 128, 256, 4, 3),
        D64_THREE, D64_TAIL, T_GROUPS, replace(T_GROUPS, group_m=16, split_k=1),
    ),
    "W4A8 groups",
)
KERNELS = (SUMS, ONE_SUM, DYNAMIC_ROW, DYNAMIC_GROUPS)
