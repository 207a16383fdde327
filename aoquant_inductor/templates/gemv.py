"""gemv.py.jinja: int8 weight-only at the smallest M, by bandwidth."""

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


def _keywords(p: Problem, config: Config) -> dict[str, Any]:
    return {"ROWS": ir.static(p.m), "EVEN_K": p.k % config.block_k == 0, "WGMMA": p.layout == "wgmma"}


# Measured by benchmarks/tune.py on an H100: few rows of W and wide steps, so that many loads of many programs are in flight.
CONFIGS = (Config(1, 2, 2048, 2, 1), Config(1, 4, 2048, 4, 1), Config(1, 4, 1024, 2, 1), Config(1, 2, 1024, 1, 1))
DEFAULTS = (Default(CONFIGS[0], upto=2, k=2048), Default(CONFIGS[3], upto=2))
KERNEL = Kernel("gemv", _fits, CONFIGS, DEFAULTS, _keywords, _adapt)
