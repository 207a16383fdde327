"""Every script under examples/ runs and says what it did."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "blockwise.py": ["24 linears in 12 blocks, 2 compilations"],
    "llm_generate.py": ["quantized 14 of 15 linears (int8wo: 14; lm_head: user)"],
    "per_layer.py": ["quantized 14 of 15 linears (int8wo: 7; int4wo-64-asym: 4; int4wo-32: 3; lm_head: user)"] * 2,
    "vision.py": ["quantized 12 of 13 linears (int8dq: 12; classifier: user)"],
}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    out = capsys.readouterr().out
    for text in set(SAYS[name]):
        assert out.count(text) == SAYS[name].count(text), out
