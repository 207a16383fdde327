"""Linears that are written out as a product with the weight transposed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import BF16, assert_counts, compiled, linear64, run, sqnr_db

import aoquant_inductor
from aoquant_inductor.scheme import SCHEMES

Spelling = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
SPELLINGS: dict[str, Spelling] = {
    "x @ w.T + b": lambda x, w, b: x @ w.T + b,
    "x @ w.mT": lambda x, w, b: x @ w.mT + b,
    "matmul t()": lambda x, w, b: torch.matmul(x, w.t()) + b,
    "x.matmul(transpose)": lambda x, w, b: x.matmul(w.transpose(0, 1)) + b,
    "transpose(-1, -2)": lambda x, w, b: torch.matmul(x, torch.transpose(w, -1, -2)) + b,
    "permute": lambda x, w, b: x @ w.permute(1, 0) + b,
    "permute list": lambda x, w, b: x @ torch.permute(w, [1, 0]) + b,
    "mm": lambda x, w, b: torch.mm(x.flatten(0, 1), w.t()).view(*x.shape[:-1], -1) + b,
    "x.mm": lambda x, w, b: x.flatten(0, 1).mm(torch.t(w)).view(*x.shape[:-1], -1) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t()).view(*x.shape[:-1], -1),
}


X = torch.randn(2, 3, 32, dtype=BF16)


class Written(nn.Linear):
    spelling: Spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.spelling(x, self.weight, self.bias)


def model(spelling: Spelling) -> Written:
    made = Written(32, 48, dtype=BF16).eval().requires_grad_(False)
    made.spelling = spelling
    return made


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("scheme", ["int8wo", "int8dq"])
def test_a_product_is_a_linear(spelling: Spelling, scheme: str) -> None:
    one = model(spelling)
    _, y, report = run(one, X, schemes=scheme)
    assert_counts(report, 1)
    assert y.shape == (2, 3, 48) and y.dtype == BF16
    assert sqnr_db(y, linear64(X, one, SCHEMES[scheme])) >= 40


OTHERS: dict[str, Spelling] = {
    "not transposed": lambda x, w, b: x @ w[:32],
    "transposed twice": lambda x, w, b: x @ w.T.T[:32],
    "permute that does nothing": lambda x, w, b: x @ w.permute(0, 1)[:32],
    "the weight on the left": lambda x, w, b: w @ x.transpose(-1, -2),
    "addmm with a factor": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=2),
    "addmm with a matrix": lambda x, w, b: torch.addmm(x.flatten(0, 1) @ w[:32, :1].expand(32, 48).contiguous(), x.flatten(0, 1), w.t()),
}


@pytest.mark.parametrize("spelling", OTHERS.values(), ids=OTHERS)
def test_other_products_are_left(spelling: Spelling) -> None:
    one = model(spelling)
    _, y, report = run(one, X, schemes="int8wo")
    assert_counts(report, 0, of=1, other_op=1)
    with torch.no_grad():
        assert sqnr_db(y, one(X).double()) >= 45


def test_a_weight_that_is_also_read_as_it_is_and_of_no_linear() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(48, 32, dtype=BF16))
            self.one = nn.Linear(32, 48, bias=False, dtype=BF16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flipped = self.one.weight.T
            return x @ flipped + x @ self.own.T + flipped.sum()

    both = Both().eval().requires_grad_(False)
    _, y, report = run(both, X, schemes="int8wo")
    assert_counts(report, 1)
    with torch.no_grad():
        assert sqnr_db(y, both(X).double()) >= 35


def test_many_equal_blocks_and_a_change() -> None:
    torch.compiler.reset()
    models = [model(SPELLINGS["x @ w.T + b"]) for _ in range(3)]
    functions = [compiled(one, "int8wo") for one in models]
    with torch.no_grad():
        for _ in range(2):
            for one, function in zip(models, functions, strict=True):
                assert sqnr_db(function(X), one(X).double()) >= 35
                one.weight.mul_(-2)
    assert_counts(aoquant_inductor.report(functions[-1]), 1)
