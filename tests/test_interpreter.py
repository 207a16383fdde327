"""Every kind of kernel, by Triton's interpreter, against the reference (interpreted.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels themselves", allow_module_level=True)

import interpreted

PARTS = 4  # so that what takes minutes is spread over the processes of a test run


@pytest.mark.parametrize("part", range(PARTS))
def test_the_interpreter_agrees_with_the_reference(part: int) -> None:
    command = [sys.executable, interpreted.__file__, str(part), str(PARTS)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == len(list(interpreted.everything())[part::PARTS]) > 20
