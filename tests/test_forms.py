"""One storage that a weight reads in several ways: each has a graph of its own, and the packs are of the last one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import assert_counts, compiled, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor.qparams import NonFinite

FP32 = torch.float32
CHANGES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "transposed": lambda weight, i: weight.t(),
    "rows and every other row": lambda weight, i: torch.as_strided(weight, (64, 64), (64, 1) if i % 2 else (128, 1), 0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("count", [1, 3])
def test_a_weight_that_reads_its_storage_in_another_way_and_back(change: Callable[..., torch.Tensor], count: int) -> None:
    models = [nn.Linear(64, 64).eval().requires_grad_(False) for _ in range(count)]
    for model in models:
        model.weight.data = torch.randn(128, 64)[:64]
    functions, x = [compiled(model) for model in models], tokens(4, 64, FP32)
    with torch.no_grad():
        for i in range(6):
            for model, function in zip(models, functions, strict=True):
                assert sqnr_db(function(x), model(x)) > 35, i
            models[-1].weight.data = change(models[-1].weight.data, i)
    for function in functions:
        assert_counts(aoquant_inductor.report(function), 1)


def test_a_form_that_cannot_be_packed_is_refused_at_every_call() -> None:
    """Row 1 is in one of the two only."""
    memory, x = torch.randn(128, 64), tokens(4, 64, FP32)
    model = nn.Linear(64, 64, bias=False).eval().requires_grad_(False)
    dense, spread = (torch.as_strided(memory, (64, 64), (step, 1)) for step in (64, 128))
    model.weight.data = dense
    function = compiled(model)
    with torch.no_grad():
        for data in (spread, dense, spread):
            function(x)
            model.weight.data = data
        function(x)
        memory[1].fill_(math.nan)
        model.weight.data = dense
        for _ in range(3):
            with pytest.raises(NonFinite):
                function(x)
        memory[1].fill_(1)
        aoquant_inductor.refresh(function)
        assert sqnr_db(function(x), model(x)) > 35
