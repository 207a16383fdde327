"""q, k, v in one launch on the card, biases and CUDA graphs included, over an update of one of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from util import BF16, assert_counts, compiled, from_pack, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor.scheme import resolve

pytestmark = pytest.mark.gpu


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, n, bias=i != 1, dtype=BF16) for i, n in enumerate((256, 64, 64)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-128", "int4wo-32-asym", "int8dq-int4w-64", "int8dq-int4w", "int8dq-int4w-128"])
def test_one_launch_serves_three(scheme: str, mode: str) -> None:
    model, s = Heads().cuda().eval(), resolve(scheme)
    function = compiled(model, scheme, mode=mode)
    for m in (1, 20, 300):
        for _ in range(3):
            x = torch.randn(m, 256, device="cuda", dtype=BF16)
            with torch.no_grad():
                model.k.weight.mul_(-1)
                got = [y.clone() for y in function(x)]
            for y, one in zip(got, (model.q, model.k, model.v), strict=True):
                assert sqnr_db(y, linear64(x, one, s, from_pack(one.weight, s))) > 45, (m, one)
    report = aoquant_inductor.report(function)
    assert_counts(report, 3)
    assert all("Triton" in str(layer.kernel) for layer in report.layers), str(report)
    assert [set(layer.siblings) for layer in report.layers] == [{"k", "v"}, {"q", "v"}, {"q", "k"}]
