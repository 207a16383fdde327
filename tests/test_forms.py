"""One storage that a weight reads in several ways: each has a graph of its own, and the packs are of the last one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import assert_counts, compiled, sqnr_db, tokens

import aoquant_inductor

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
