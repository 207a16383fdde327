"""Dynamic M on the card: every range of M by a kernel of its own, under CUDA graphs too, from one graph of Dynamo's."""

from __future__ import annotations

import pytest
import torch
from util import Block, assert_counts, compiled, sqnr_db

import aoquant_inductor
from aoquant_inductor.scheme import resolve

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32"])
def test_one_dynamo_graph_serves_every_m(scheme: str, mode: str) -> None:
    model = Block(256).cuda().eval()
    function = compiled(model, scheme, dynamic=True, mode=mode)
    for _ in range(2):
        for m in (7, 300, 40, 2, 64, 65, 1000):
            x = torch.randn(m, 256, device="cuda", dtype=torch.bfloat16)
            with torch.no_grad():
                assert sqnr_db(function(x), model.reference(x, resolve(scheme))) > 44, m
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    assert report.totals["graphs"] == 1
    kernels = str(report.layers[0].kernel)
    assert len(kernels.split(", ")) > 1 and "plain PyTorch" not in kernels, kernels
