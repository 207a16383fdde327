"""Calls under modes of the user's: a default device is not what a compile or a pack in the midst of a call goes by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from util import BF16, assert_counts, compiled, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor._inductor import plain_tensors


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("how", [default_device, lambda: torch.device("meta")], ids=["set_default_device", "with"])
def test_a_default_device(how: object) -> None:
    """The second range of M is compiled by the call that needs it, and the weight packed again by the next one."""
    model = nn.Sequential(nn.Linear(64, 64, dtype=BF16), nn.ReLU(), nn.Linear(64, 24, dtype=BF16)).eval()
    few, many = tokens(4, 64), tokens(400, 64)
    function = compiled(model, "int4wo-32-large8", dynamic=True)
    with torch.no_grad():
        want = model(few), model(many)
        with how():  # type: ignore[operator]
            assert all(sqnr_db(function(x), y) > 15 for x, y in zip((few, many), want, strict=True))
            model[0].weight.mul_(-2)
            got = function(few), function(many)
        assert all(sqnr_db(y, model(x)) > 15 for x, y in zip((few, many), got, strict=True))
    assert_counts(aoquant_inductor.report(function), 2)


def test_what_is_packed_lies_where_it_is_told_to() -> None:
    with torch.device("meta"), plain_tensors():
        assert torch.empty(1).device.type == "cpu"


def test_a_second_set_of_weights_under_a_default_device() -> None:
    """Its packs are made in the call."""
    models = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval().requires_grad_(False) for _ in range(3)]
    x = tokens(4, 64, torch.float32)
    with torch.no_grad():
        functions = [compiled(model) for model in models]
        with torch.device("meta"):
            found = [function(x) for function in functions]
        for model, function, y in zip(models, functions, found, strict=True):
            assert sqnr_db(y, model(x)) > 35
            assert_counts(aoquant_inductor.report(function), 2)
