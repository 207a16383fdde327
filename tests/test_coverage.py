"""Whole architectures of transformers and diffusers, one after the other in one process."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models need the extra [demo]")
pytest.importorskip("diffusers", reason="the models need the extra [bench]")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from benchmarks import bench_coverage, coverage_diffusers


def test_two_with_a_tied_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper of transformers gives both one code object: the second looks its packs up."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert bench_coverage.main(["--models", "opt,bloom", "--device", "cpu", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    rows = list(csv.DictReader(path.open()))
    assert [(row["model"], row["quantized"], row["linears"]) for row in rows] == [("opt", "13", "13"), ("bloom", "9", "9")]
    assert all(float(row["sqnr_db"]) > 30 and not row["left"] for row in rows)


def test_every_architecture_can_be_made() -> None:
    for name in (*bench_coverage.MODELS, *coverage_diffusers.MODELS):
        model, inputs = bench_coverage.made(name, "cpu")
        assert any(isinstance(module, torch.nn.Linear) for module in model.modules()) and inputs, name
