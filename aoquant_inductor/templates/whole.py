"""*_dense.py.jinja and int4_rows.py.jinja: a whole packed weight written to memory, for a matmul that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from aoquant_inductor import _inductor_choices as inductor
from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates import int4
from aoquant_inductor.templates.kernel import Config, common_keywords, template


@dataclass(frozen=True)
class Whole:
    """template: the stem of its source. config: its tile, of N x K of the weight. keywords: constants by the problem. dtype:
    what it writes, None whatever is asked for.
    """

    template: str
    config: Config
    keywords: Callable[[Problem, Config], dict[str, Any]]
    dtype: torch.dtype | None = None


def _int4(p: Problem, config: Config) -> dict[str, Any]:
    return int4.keywords(p, config) | {"PARTS": 1, "BY_N": True}


DENSE = {
    "cuda_bf16": Whole("int4_dense", Config(128, 32, 128, 4, 1, extra=int4.SCALED), _int4, torch.bfloat16),
    "wgmma": Whole("int8_dense", Config(8, 512, 512, 4, 1), lambda p, config: {}),
}
"""By the layout of the weight: 32 elements a thread. With four times as many, int4's copy and cuBLAS take 1.1 to 1.3 us more of
13 to 27, with twice as many int8's up to 1.1 (H200, 4.4 and 6.6 million elements).
"""
ROWS = Whole("int4_rows", Config(128, 32, 128, 2, 1), _int4, torch.int8)
"""64 elements a thread: 9 to 12 % faster than 128 rows by eight warps (H200, 6.6 to 117 million elements)."""


def dense(p: Problem, dtype: torch.dtype) -> Any | None:
    """The dequantized weight[N, K] in `dtype`, or in what its kernel writes; None on a CPU, for a layout without one, and for
    zeros of int8, which its kernel does not know.
    """
    kernel = None if p.device.type == "cpu" or p.beyond_32_bits else DENSE.get(p.layout)
    return None if kernel is None or (p.bits == 8 and p.zero is not None) else _write(p, kernel, kernel.dtype or dtype)


def rows(p: Problem, row: Any) -> Any:
    """The weight of the layout "cuda_bf16" as int8[N, K] with the scales row[1, N], written to memory."""
    return _write(p, ROWS, torch.int8, row)


def _write(p: Problem, kernel: Whole, dtype: torch.dtype, *more: Any) -> Any:
    keywords = {**common_keywords(p), **kernel.keywords(p, kernel.config), **kernel.config.keywords(), "COUNTED": False}
    keywords |= {"ROWS": p.n, "COLUMNS": p.k}
    inputs = [node for node in (ir.realize(p.w), p.scale, p.zero, *more) if node is not None]
    choice = inductor.TritonChoice("", template(kernel.template), keywords)
    return inductor.select(f"aoquant_{kernel.template}", inputs, (p.n, p.k), dtype, p.device, [choice])[1]
