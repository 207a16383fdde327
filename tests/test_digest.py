"""The sum that a compile knows a weight by, whatever wrote it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from util import BF16

from aoquant_inductor.entry import digest_of


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(("n", "k"), [(4, 32), (3, 7), (1, 1), (5, 2)])
def test_a_digest_is_of_every_value_and_its_row(n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n + 1, k).to(dtype)[1:]  # begins where no wider word may
    digest = digest_of(weight)
    assert torch.equal(digest, digest_of(weight.t().contiguous().t()))
    seen = set()
    for i in range(n):
        for j in range(k):
            changed = weight.clone()
            changed[i, j] += 1
            seen.add(int(digest_of(changed)))
    assert int(digest) not in seen
    for places in range(2):
        assert weight.shape[places] == 1 or int(digest_of(weight.flip(places))) != int(digest)


@pytest.mark.parametrize("change", [lambda w: w * 2, lambda w: w * 4, lambda w: w.t(), lambda w: -w, torch.zeros_like, torch.ones_like])
def test_a_digest_of_many_values(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Sums over powers of two of values that are multiples of powers of two."""
    for weight in (torch.randn(2048, 2048), torch.ones(2048, 2048) * 3, torch.randn(33, 33)):
        other = change(weight).contiguous()
        assert torch.equal(weight, other) or int(digest_of(weight)) != int(digest_of(other))


def test_a_digest_of_odd_memory() -> None:
    row = torch.randn(2, 33)[:1, :32]
    assert int(digest_of(row)) == int(digest_of(row.clone()))
    negative = torch._neg_view(row)
    assert int(digest_of(negative)) == int(digest_of(-row))


def test_a_digest_sees_columns_and_halves_that_change_places() -> None:
    """As the heads of an output projection are put into another order, or those of a rotary embedding into pairs."""
    weight = torch.randn(64, 64).to(BF16)
    moved = [weight.roll(4 * i, 1) for i in range(16)] + [weight.roll(i, 0) for i in range(1, 64)] + [weight.t().contiguous()]
    assert len({int(digest_of(each)) for each in moved}) == len(moved)
