"""Linears that are written out as a product with the weight transposed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
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


def model(spelling: Spelling, n: int = 48) -> Written:
    made = Written(32, n, dtype=BF16).eval().requires_grad_(False)
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


CASTS: dict[str, Spelling] = {
    "w.to(x.dtype)": lambda x, w, b: nn.functional.linear(x, w.to(x.dtype), b.to(x.dtype)),
    "w.type_as(x)": lambda x, w, b: nn.functional.linear(x, weight=w.type_as(x), bias=b),
    "to and contiguous": lambda x, w, b: nn.functional.linear(x, w.to(x.device, x.dtype).contiguous(), b),
    "x @ w.to(x).T": lambda x, w, b: x @ w.to(x).T + b,
    "read twice": lambda x, w, b: nn.functional.linear(x, v := w.bfloat16(), b) + v.sum() * 0,
}


@pytest.mark.parametrize("spelling", CASTS.values(), ids=CASTS)
def test_a_cast_to_what_a_weight_is_goes(spelling: Spelling) -> None:
    one = model(spelling)
    function, y, report = run(one, X, on_unsupported="error")
    assert_counts(report, 1)
    assert sqnr_db(y, linear64(X, one)) >= 40
    with torch.no_grad():
        one.weight.mul_(-2)
        assert sqnr_db(function(X), linear64(X, one)) >= 40


def test_a_cast_to_another_dtype_does_not() -> None:
    one = model(lambda x, w, b: nn.functional.linear(x.float(), w.float(), b.float()).bfloat16())
    _, y, report = run(one, X)
    assert_counts(report, 0, 1, not_parameter=1)
    assert report.layers[0].name == "weight" and report.layers[0].detail is not None and "(float)" in report.layers[0].detail
    assert sqnr_db(y, one(X)) > 100


OTHERS: dict[str, Spelling] = {
    "not transposed": lambda x, w, b: x @ w,
    "transposed twice": lambda x, w, b: x @ w.T.T,
    "permute that does nothing": lambda x, w, b: x @ w.permute(0, 1),
    "the weight on the left": lambda x, w, b: w @ x.transpose(-1, -2),
    "two weights": lambda x, w, b: x + (w @ w.T)[0],
    "a Gram matrix": lambda x, w, b: x.sum() + w @ w.T,
    "addmm with a factor": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.t(), alpha=2),
    "addmm with a matrix": lambda x, w, b: torch.addmm(x.flatten(0, 1), x.flatten(0, 1), w.t()),
    "addmm with one bias for all": lambda x, w, b: torch.addmm(b[:1], x.flatten(0, 1), w.t()),
}


@pytest.mark.parametrize("spelling", OTHERS.values(), ids=OTHERS)
def test_other_products_are_left(spelling: Spelling) -> None:
    one = model(spelling, 32)
    _, y, report = run(one, X, schemes="int8wo")
    assert_counts(report, 0, of=1, other_op=1)
    with torch.no_grad():
        assert sqnr_db(y, one(X).double()) >= 45


def _in_place(w: torch.Tensor) -> None:
    w *= 2


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "mul_": lambda w: w.mul_(2),
    "of its transpose": lambda w: w.T.mul_(2),
    "out": lambda w: torch.mul(w, 2, out=w),
    "*=": _in_place,
    "a part": lambda w: w.view(-1)[:32 * 16].mul_(2),
    "an element": lambda w: w.__setitem__(0, w[0] * 2),
    "copy_": lambda w: w.copy_(w * 2),
    "data": lambda w: w.data.mul_(2),
    "in a list": lambda w: torch._foreach_mul_([w], 2),
}


@pytest.mark.parametrize("product", [lambda x, w: x @ w.T, torch.nn.functional.linear], ids=["written out", "F.linear"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_weight_that_the_graph_writes_to_is_left(
    write: Callable[[torch.Tensor], object], product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    def spelling(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        write(w)
        return product(x, w)

    one = model(spelling, 32)
    same = one.weight.clone()
    function, y, report = run(one, X, schemes="int8wo")
    assert_counts(report, 0, of=1, written=1)
    with torch.no_grad():
        for got in (y, function(X)):
            write(same)
            assert sqnr_db(got, (X @ same.T).double()) >= 45


def test_an_activation_that_is_written_to_is_none_of_it() -> None:
    """Nor are a weight's other readers."""
    one = model(lambda x, w, b: torch.relu_(torch.add(x @ w.T, b)).add_(w.sum()))
    _, y, report = run(one, X, schemes="int8wo")
    assert_counts(report, 1)
    assert sqnr_db(y, one(X).double()) >= 30


def test_a_weight_that_is_an_activation_too_is_not_released() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(32, 32, bias=False, dtype=BF16) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + torch.nn.functional.linear(self.a.weight, self.b.weight).sum()

    product = Product().eval().requires_grad_(False)
    with torch.no_grad():
        want = product(X).double()
    _, y, report = run(product, X, schemes="int8wo", release_weights=True)
    assert_counts(report, 2)
    assert [layer.original for layer in report.layers] == ["kept: the graph reads it elsewhere, too", "released"], str(report)
    assert sqnr_db(y, want) >= 30


def test_in_a_region() -> None:
    one = model(SPELLINGS["x @ w.T + b"])

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = one

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.one, x, use_reentrant=False)  # type: ignore[no-any-return]

    _, y, report = run(Region(), X, schemes="int8wo")
    assert_counts(report, 1)
    assert sqnr_db(y, linear64(X, one)) >= 40


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
