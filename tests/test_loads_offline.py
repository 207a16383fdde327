"""How wide the loads of a Triton kernel are, by its PTX, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU is not pretended", allow_module_level=True)

import offline

from aoquant_inductor.templates import Config, Kernel, int4


@pytest.mark.parametrize(("scheme", "kernel", "config", "loads"), [
    ("int4wo-32", int4.FMA, int4.FMA_HALF, {"v4.b32"}), ("int4wo-32-asym", int4.FMA, int4.FMA_HALF, {"v4.b32"}),
    ("int4wo-32", int4.GEMV_GROUPS, int4.GEMV_PAIR, {"v4.b32"}), ("int4wo-64", int4.GEMV_GROUPS, int4.GEMV_PAIR, {"v2.b32"}),
], ids=lambda v: v if isinstance(v, str) else "")
def test_the_scales_of_a_chunk_are_one_load(scheme: str, kernel: Kernel, config: Config, loads: set[str], tmp_path: Path) -> None:
    rendered = offline.render(scheme, 1, 256, 4096, torch.bfloat16, bias=False, config=(kernel, config))
    ptx = str(offline.assemble(rendered.code, tmp_path).asm["ptx"])
    # weights and x have a policy of eviction, scales and zeros have none
    assert set(re.findall(r"ld\.global\.((?:v\d\.)?b\d+)", ptx)) == loads
