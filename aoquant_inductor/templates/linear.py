"""linear.py.jinja: every scheme over the plain layout, at every size and on every card; the fastest for int8 activations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates.kernel import Config, Default, Kernel


def _fits(p: Problem, card: Card) -> bool:
    return p.layout in ("plain", "wgmma")


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


CONFIGS = (
    Config(16, 32, 128, 4, 4),
    Config(64, 64, 128, 4, 4),
    Config(64, 128, 128, 4, 3),
    Config(128, 128, 64, 8, 3),
)
DEFAULTS = (
    Default(CONFIGS[0], upto=16),
    Default(CONFIGS[1], upto=64),
    Default(CONFIGS[2], upto=256),
    Default(CONFIGS[3]),
)
KERNEL = Kernel("linear", _fits, CONFIGS, DEFAULTS, _keywords, _adapt)
