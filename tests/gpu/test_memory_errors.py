"""No kernel reads or writes outside of its tensors, by compute-sanitizer's memcheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_odd_shapes_under_memcheck() -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("no compute-sanitizer")
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parent, here.parent.parent, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(here / "odd_shapes.py")],
        # an allocation of its own for every tensor: between neighbours of one block nothing would be noticed
        env=os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
    kernels = done.stdout
    for kind in (
        "gemv", "gemv_dynamic", "linear W8A16", "linear W8A8", "persistent W8A8", "int4_gemv", "int4_linear", "int4_dynamic",
        "int4_gemv_dynamic",
    ):
        assert f"Triton {kind}" in kernels, kernels
    assert "portable: dequantize + mm" in kernels, kernels
