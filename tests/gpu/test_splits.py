"""Tiles that their programs add up together (templates/common.jinja, `summed`), by many at the same time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_int4 import difference
from torch import nn
from util import BF16, assert_counts, compiled, from_pack, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor import card
from aoquant_inductor.scheme import SCHEMES
from aoquant_inductor.templates import Config, Kernel, costs, int4, linear

pytestmark = pytest.mark.gpu


def exact(folder: Path, scheme: str, m: int, n: int, k: int, kernel: Kernel, config: Config) -> None:
    """Every config here is a choice wherever carried sums are: one that did not run is no success."""
    if config.carried and not card.Card.of(torch.device("cuda", 0)).may_carry:
        pytest.skip("needs a ptxas from 13.3 on")
    assert difference(folder, scheme, m, n, k, (kernel, config)) == 0


@pytest.mark.parametrize("name", ["int8wo", "int8dq", "int4wo-128", "int8dq-int4w", "int8dq-int4w-128"])
def test_two_streams_and_a_busy_card_get_the_same_sums(name: str) -> None:
    """Programs of a tile that do not run at the same time, since others have their place: none waits for ever, none is left out.

    Of three or six parts each (costs.csv).
    """
    model = nn.Sequential(nn.Linear(5120, 1280, dtype=BF16)).cuda().eval()
    function = compiled(model, name)
    xs = [torch.randn(m, 5120, device="cuda", dtype=BF16) for m in (256, 203)]
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


@pytest.mark.parametrize(("scheme", "kernel", "config"), [
    ("int8wo", linear.INT8_WEIGHT_ONLY, linear.W_CARRIED), ("int8wo", linear.GENERAL, Config(64, 64, 128, 4, 3)),
    ("int4wo-128", int4.SUMS, int4.L_CARRIED), ("int4wo-32-asym", int4.ONE_SUM, int4.L_CARRIED), ("int4wo-128", int4.SUMS, int4.L64),
    ("int8wo", linear.INT8_WEIGHT_ONLY, linear.W128_CARRIED), ("int4wo-128", int4.SUMS, int4.L128_CARRIED), ("int4wo-128", int4.SUMS, int4.L128_WIDE_CARRIED),
    ("int4wo-32", int4.ONE_SUM, int4.L128_CARRIED), ("int4wo-32-asym", int4.ONE_SUM, int4.L128_CARRIED), ("int8dq", linear.INT8_DYNAMIC, linear.D512_HIGH),
    ("int8dq-int4w", int4.DYNAMIC_ROW, int4.D64_TAIL), ("int8dq-int4w-128", int4.DYNAMIC_GROUPS, int4.D64_TAIL),
    *(("int8wo", linear.INT8_WEIGHT_ONLY, config) for config in (linear.W16, linear.W32, linear.W64)),
    *(("int4wo-128", int4.SUMS, config) for config in (int4.L16_LONG, int4.L32, int4.L32_LONG, int4.L64_WIDE)),
    *((scheme, int4.ONE_SUM, config) for scheme in ("int4wo-32", "int4wo-32-asym") for config in (int4.S16, int4.S32, int4.S64, int4.S64_WIDE)),
])
def test_a_tail_is_exact(scheme: str, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    """Twelve tiles more than the card has multiprocessors, of which each then has many programs."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    n = config.block_n * (sms + 12)
    exact(tmp_path, scheme, config.block_m, n, 4096, kernel, replace(config, split_k=1, tail=1))


@pytest.mark.parametrize("split", [3, 6, 12])
@pytest.mark.parametrize(("scheme", "m", "kernel", "config"), [
    ("int8wo", 200, linear.INT8_WEIGHT_ONLY, linear.W_CARRIED), ("int8wo", 16, linear.INT8_WEIGHT_ONLY, linear.W16), ("int8dq", 200, linear.INT8_DYNAMIC, linear.D512),
    ("int8dq", 50, linear.INT8_DYNAMIC, linear.D64), ("int4wo-128", 200, int4.SUMS, int4.L_CARRIED), ("int4wo-128", 50, int4.SUMS, int4.L64),
    ("int8dq-int4w", 200, int4.DYNAMIC_ROW, int4.D256), ("int8dq-int4w-128", 50, int4.DYNAMIC_GROUPS, int4.D_SMALL),
    ("int8dq", 32, linear.INT8_DYNAMIC, linear.D32), ("int8dq-int4w", 32, int4.DYNAMIC_ROW, int4.D32), ("int8dq-int4w-128", 32, int4.DYNAMIC_GROUPS, int4.G32),
    ("int8dq-int4w-128", 200, int4.DYNAMIC_GROUPS, int4.T_GROUPS),
])
def test_splits_that_are_no_power_of_two_are_exact(scheme: str, m: int, kernel: Kernel, config: Config, split: int, tmp_path: Path) -> None:
    exact(tmp_path, scheme, m, 1280, 5120, kernel, replace(config, split_k=split))
