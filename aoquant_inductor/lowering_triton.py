"""The GPU's choices: one Triton template over the plain layout (templates/linear.py.jinja), right for every scheme and size.

Configs are data: the first that fits M is taken; under max_autotune all of them compete.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor.problem import Problem

SOURCE = Path(__file__).parent / "templates" / "linear.py.jinja"


@dataclass(frozen=True)
class Config:
    """A tile and how it runs; `upto`: the largest M it is the default for."""

    upto: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


CONFIGS = (
    Config(16, 16, 32, 128, 4, 4),
    Config(64, 64, 64, 128, 4, 4),
    Config(256, 64, 128, 128, 4, 3),
    Config(1 << 62, 128, 128, 64, 8, 3),
)


@functools.cache
def _template() -> Any:
    return ir.triton_template("aoquant_linear", SOURCE.read_text())


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    # fp32 operands are four times an int8's bytes in shared memory; tl.dot wants at least 32 of K for int8
    block_k = min(config.block_k, 32 if p.x.get_dtype() == torch.float32 else config.block_k, 1 << (p.k - 1).bit_length())
    block_k = max(32, block_k if p.groups == 1 else min(block_k, p.group_size))
    return {
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": block_k, "GROUP_M": config.group_m,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        "BITS": p.bits, "GROUPS": p.groups, "GROUP": p.group_size, "DYNAMIC": p.dynamic, "HAS_XZ": p.x_zero is not None,
        "HAS_WZ": p.zero is not None, "HAS_BIAS": p.bias is not None, "ZERO_POINT_INT": p.zero_point == "int",
    }


def linear(p: Problem) -> tuple[str, Any] | None:
    """(kernel name, y[M, N]) for the plain layout."""
    if p.layout != "plain" or ir.static(p.m) == 0 or p.k == 0 or p.n == 0:
        return None
    order = (p.x, p.w, p.scale, p.x_scale, p.x_zero, p.sums if p.x_zero is not None else None, p.zero, p.bias)
    inputs = [node for node in order if node is not None]
    hint = ir.rows_hint(p.m)
    configs = CONFIGS if ir.searching() else [next(c for c in CONFIGS if hint <= c.upto)]
    choices = [_keywords(p, config) for config in configs]
    node = ir.triton_choices(_template(), "aoquant_linear", inputs, (p.m, p.n), p.out_dtype, p.device, choices)
    return f"Triton linear ({'W%dA8' if p.dynamic else 'W%dA16'})" % p.bits, node
