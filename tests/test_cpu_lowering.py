"""How a linear becomes a C++ kernel of ours: which, and how often one is compiled."""

from __future__ import annotations

import re

import pytest
import torch
import util
from test_cpu_kernels import each_isa
from torch import nn

from aoquant_inductor import packing_cpu
from aoquant_inductor.scheme import resolve

KERNELS = {  # int8wo, int4wo, int8dq, W4A8 of bf16
    "avx512": ["C++ AVX512 BF16", "C++ AVX512 BF16", "C++ AVX512 VNNI", "C++ AVX512 VNNI"],
    "avx2": ["C++ AVX2 FMA", "C++ AVX2 FMA", "C++ AVX2 VPMADDWD", "C++ AVX2 VPMADDUBSW"],
}


@each_isa
@pytest.mark.parametrize("m", [3, 40])
def test_the_lowering_takes_the_kernels_of_the_instruction_set(isa: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_cpu, "instruction_set", lambda: isa)
    schemes = ["int8wo", "int4wo-32-asym", "int8dq", "int8dq-int4w-32-asym-asymact"]
    layers = nn.ModuleList(nn.Linear(96, 70, dtype=torch.bfloat16) for _ in schemes)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [layer(x) for layer in self.layers]

    x = torch.randn(m, 96).bfloat16()
    _, got, report = util.run(Model().eval(), x, schemes={f"layers.{i}": name for i, name in enumerate(schemes)})
    util.assert_counts(report, len(schemes))
    assert [layer.kernel for layer in report.layers] == KERNELS[isa]
    for name, layer, y in zip(schemes, layers, got, strict=True):
        assert util.sqnr_db(y, util.linear64(x, layer, resolve(name))) > 45, name


class Two(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(96, 24, dtype=torch.bfloat16), nn.Linear(k, 200, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(y)


@pytest.mark.skipif(packing_cpu.instruction_set() is None, reason="no kernels of ours here")
@pytest.mark.parametrize(("scheme", "k", "count"), [("int4wo-32", 160, 1), ("int8wo", 160, 1), ("int8wo-32", 31, 2)])
def test_one_kernel_serves_every_size(scheme: str, k: int, count: int) -> None:
    """Its text has no sizes, but whether there are several groups; a graph defines it once."""
    from torch._inductor.utils import run_and_get_code

    model, x, y = Two(k).eval(), util.tokens(1, 96), util.tokens(5, k)
    function = util.compiled(model, scheme)
    with torch.no_grad():
        got, (code,) = run_and_get_code(function, x, y)
    assert len([text for text in re.findall(r"'''(.*?)'''", code, re.S) if "namespace aoquant" in text]) == count
    for of, layer, found in zip((x, y), (model.a, model.b), got, strict=True):
        assert util.sqnr_db(found, util.linear64(of, layer, resolve(scheme))) > 45
