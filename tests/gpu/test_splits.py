"""Tiles that their programs add up together (templates/common.jinja, `summed`), by many at the same time."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from util import BF16, assert_counts, compiled, from_pack, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor.scheme import SCHEMES
from aoquant_inductor.templates import costs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["int8wo", "int8dq", "int4wo-128", "int8dq-int4w", "int8dq-int4w-128"])
def test_two_streams_and_a_busy_card_get_the_same_sums(name: str) -> None:
    """Programs of a tile that do not run at the same time, since others have their place: none waits for ever, none is left out."""
    model = nn.Sequential(nn.Linear(8192, 2048, dtype=BF16)).cuda().eval()
    function = compiled(model, name)
    xs = [torch.randn(m, 8192, device="cuda", dtype=BF16) for m in (256, 203)]
    other = torch.randn(4096, 4096, device="cuda", dtype=BF16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.no_grad():
        alone = [function(x).clone() for x in xs]
        torch.cuda.synchronize()
        got = []
        for _ in range(30):
            with torch.cuda.stream(streams[2]):
                other @ other
            for stream in streams[:2]:
                with torch.cuda.stream(stream):
                    got.append([function(x) for x in xs])
        torch.cuda.synchronize()
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    tiles = re.findall(r"(\d+)x(\d+)x\d+(?: \w+)* split", str(report.layers[0].kernel))
    assert tiles and all(costs.sliced(int(rows) * int(columns)) for rows, columns in tiles), str(report)
    for x, y in zip(xs, alone, strict=True):
        assert sqnr_db(y, linear64(x, model[0], SCHEMES[name], from_pack(model[0].weight, SCHEMES[name]))) >= 45
    assert all(torch.equal(y, want) for ys in got for y, want in zip(ys, alone, strict=True))
