"""linear.py.jinja: every scheme over the plain layout, at every size and on every card; the fastest for int8 activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.kernel import FILL, Config, Default, Kernel


def _adapt(p: Problem, config: Config) -> Config | None:
    # fp32 operands are four times an int8's bytes in shared memory; tl.dot wants at least 32 of K for int8
    block_k = min(config.block_k, 32 if p.x.get_dtype() == torch.float32 else config.block_k, 1 << (p.k - 1).bit_length())
    least = 64 if p.layout == "wgmma" else 32
    block_k = max(least, block_k if p.groups == 1 else min(block_k, p.group_size))
    if p.zero is not None and p.groups == 1 and config.split_k != 1:
        return replace(config, block_k=block_k, split_k=1)  # the sums of x are not shared by the programs of a tile
    return replace(config, block_k=block_k)


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    return {"EVEN_K": p.k % config.block_k == 0, "WGMMA": p.layout == "wgmma"}


GENERAL_CONFIGS = (
    Config(16, 32, 128, 4, 4),
    Config(64, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 3),
    Config(128, 128, 64, 8, 3),
)
GENERAL = Kernel(
    "linear", lambda p, card: p.layout in ("plain", "wgmma"), GENERAL_CONFIGS,
    (
        Default(GENERAL_CONFIGS[0], upto=16), Default(GENERAL_CONFIGS[1], upto=64), Default(GENERAL_CONFIGS[2], upto=256),
        Default(GENERAL_CONFIGS[3]),
    ),
    _keywords, _adapt,
)

# int8 x int8: exact sums, whatever ptxas. Two programs per multiprocessor at large M: Triton waits for every int32 dot, which
# only a second program hides.
D16 = Config(16, 64, 256, 4, 4, swap=True, split_k=FILL)
D64 = Config(64, 64, 256, 4, 3, swap=True, split_k=FILL)
D256 = Config(64, 128, 128, 4, 4, swap=True, split_k=FILL)
DBIG = Config(128, 128, 128, 4, 3, group_m=16)
INT8_DYNAMIC = Kernel(
    "linear", lambda p, card: p.dynamic and p.bits == 8 and card.arch >= 90, (D16, D64, D256, DBIG),
    (Default(D16, 16), Default(D64, 64), Default(D256, 256), Default(DBIG)), _keywords, _adapt,
)

W16 = Config(16, 64, 128, 4, 4, swap=True, split_k=FILL)
W64 = Config(64, 128, 128, 8, 4, swap=True, split_k=FILL)
W256 = Config(128, 64, 128, 4, 3, swap=True)
INT8_WEIGHT_ONLY = Kernel(
    "linear", lambda p, card: p.layout == "wgmma", (W16, W64, W256),
    (Default(W16, 16), Default(W64, 64), Default(W256, 256)), _keywords, _adapt,
)
