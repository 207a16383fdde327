"""The Triton template without a GPU: compiled for two architectures, and run by Triton's interpreter against the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the template itself", allow_module_level=True)

import offline

INT8 = {80: "m16n8k32.*s32.s8.s8", 90: "(wgmma.*|m16n8k32.*)s32.s8.s8"}
BF16 = {80: "m16n8k16.*f32.bf16.bf16", 90: "(wgmma.*|m16n8k16.*)f32.bf16.bf16"}
WANTED = {
    "int8wo": BF16, "int8dq": INT8, "int4wo-32-asym": BF16, "int4wo-128": BF16, "int8dq-int4w-128-asym-asymact": INT8,
}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("scheme", WANTED)
def test_compiles_to_the_instruction_meant(scheme: str, arch: int, tmp_path: Path) -> None:
    for m in (8, 256):
        rendered = offline.render(scheme, m, 256, 576, torch.bfloat16, arch=arch)
        ptx = offline.assemble(rendered.code, tmp_path, arch).asm["ptx"]
        assert re.search(WANTED[scheme][arch], ptx), (m, sorted(set(re.findall(r"(?:wgmma|mma)\.\S+", ptx))))
        assert ".local" not in ptx, "registers spill"
        assert arch == 80 or m == 8 or "wgmma.mma_async" in ptx


# bf16 is broken in Triton's interpreter: fp16 and fp32 there, bf16 on the card.
SPLIT, SWAPPED = "Config(16, 32, 128, 4, 3, split_k=4)", "Config(32, 64, 128, 4, 3, swap=True, split_k=2)"
FORCED = [("int8dq", "float16", 5, 70, 1025, SPLIT), ("int8dq-asymact", "float16", 5, 70, 1025, SWAPPED),
          ("int8wo", "float16", 33, 70, 1024, SWAPPED), ("int4wo-32-asym", "float16", 5, 33, 129, SWAPPED)]
CASES = [
    ("int8wo", "float16", 5, 33, 65), ("int8wo-32", "float32", 3, 40, 33), ("int8dq", "float16", 5, 70, 129),
    ("int8dq-asymact", "float32", 3, 33, 31), ("int4wo-32-asym", "float16", 5, 33, 129), ("int4wo-32-asymfloat", "float32", 2, 20, 70),
    ("int4wo-row-asym", "float16", 2, 33, 65), ("int8dq-int4w-32-asym-asymact", "float32", 5, 33, 129),
    ("int8dq-int4w-asym-asymact", "float16", 3, 33, 65),
]
FEW_ROWS = [("int8wo", "float16", 1, 70, 1024), ("int8wo", "float16", 2, 35, 704), ("int8wo-128", "float16", 2, 33, 512), ("int8wo", "float16", 3, 33, 528)]
CASES = [(*case, "None") for case in CASES + FEW_ROWS] + FORCED
RUN = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import pathlib, torch, offline
torch.manual_seed(0)
from aoquant_inductor.templates import Config, linear
for scheme, dtype, m, n, k, config in {cases!r}:
    config = eval(config)
    r = offline.render(scheme, m, n, k, getattr(torch, dtype), config=config and (linear.GENERAL, config))
    name, source, signature, _ = offline.kernel(r.code)
    y = torch.full((m, n), float("nan"), dtype=getattr(torch, dtype))
    args, grid = offline.call(r, name, y)
    offline.load(name, source, pathlib.Path({tmp!r}))[grid](*args)
    want = r.expected.double()
    noise = float((y.double() - want).square().sum()); signal = float(want.square().sum())
    assert noise <= signal * 10 ** -5.5, (scheme, dtype, noise / signal)
    print("right", scheme)
"""


def test_the_interpreter_agrees_with_the_reference(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = RUN.format(tests=str(here), root=str(here.parent), cases=CASES, tmp=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == len(CASES)
