"""Descriptors of x that the launcher makes (_inductor_launcher): of every memory that x may lie in, and for every caller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import select_algorithm
from torch._inductor.utils import run_and_get_code
from torch.profiler import profile
from util import BF16, assert_counts, compiled, from_pack, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor.card import Card
from aoquant_inductor.scheme import SCHEMES

SCHEME = "int8dq-int4w-128"  # its kernel by TMA is a choice with every ptxas
M, N, K = 256, 4096, 14336
CARD = Card.of(torch.device("cuda", 0)) if torch.cuda.is_available() else None

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CARD is None or not CARD.has_tma, reason="no tensor memory accelerator")]
weight_only = pytest.mark.skipif(CARD is None or not CARD.may_carry, reason="x comes by TMA to carried sums alone")


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=False, dtype=BF16, device="cuda").eval()


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, K, device="cuda", dtype=BF16)


def unaligned() -> torch.Tensor:
    return torch.randn(M * K + 1, device="cuda", dtype=BF16)[1:].view(M, K)


class Strided(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.as_strided((M, K), (K, 1)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    ("first", "later", "described"),
    [
        (lambda: rows(M), lambda: rows(3 * M)[M : 2 * M], True), (lambda: rows(M), unaligned, True), (unaligned, lambda: rows(M), False),
        (lambda: rows(M).t().contiguous().t(),) * 2 + (False,),
    ],
    ids=["rows of more", "unaligned", "unaligned first", "columns first"],
)
@pytest.mark.parametrize("scheme", [SCHEME, pytest.param("int4wo-128", marks=weight_only)])
def test_x_is_read_where_it_lies(
    linear: nn.Linear, scheme: str, first: Callable[[], torch.Tensor], later: Callable[[], torch.Tensor], described: bool, mode: str
) -> None:
    torch.compiler.reset()
    function = compiled(linear, scheme, mode=mode)
    weight = from_pack(linear.weight, SCHEMES[scheme])
    with torch.no_grad():
        got, codes = run_and_get_code(function, x := first())
        assert sqnr_db(got, linear64(x, linear, SCHEMES[scheme], weight)) >= 45
        # what is quantized first lies as it was made
        assert any("@describing(" in code for code in codes) == (described or scheme == SCHEME)
        for _ in range(3):  # at another address each time
            x = later()
            assert sqnr_db(function(x), linear64(x, linear, SCHEMES[scheme], weight)) >= 45
    assert_counts(aoquant_inductor.report(function), 1)


@weight_only
@pytest.mark.parametrize("scheme", ["int4wo-128", "int8wo"])
def test_parts_of_a_buffer_of_the_graph(linear: nn.Linear, scheme: str) -> None:
    """The first rows begin where their buffer does, the second do not, and their kernel makes its own descriptor."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x.sort(0).values
            return self.linear(x[: len(x) // 2]), self.linear(x[len(x) // 2 :])

    torch.compiler.reset()
    function, x = compiled(Halves(), scheme), rows(2 * M)
    with torch.no_grad():
        got, codes = run_and_get_code(function, x)
        for half, y in zip(x.sort(0).values.chunk(2), got, strict=True):
            assert sqnr_db(y, linear64(half, linear, SCHEMES[scheme], from_pack(linear.weight, SCHEMES[scheme]))) >= 45
    code = "".join(codes)
    assert "@describing(" in code and "tl.make_tensor_descriptor(" in code
    assert_counts(aoquant_inductor.report(function), 1, 1)


@weight_only
def test_rows_that_an_input_has_beyond_its_own_elements(linear: nn.Linear) -> None:
    """What the kernel is given ends before x does."""
    function = compiled(Strided(linear), "int4wo-128")
    x = rows(M)
    with torch.no_grad():
        want = linear64(x, linear, SCHEMES["int4wo-128"], from_pack(linear.weight, SCHEMES["int4wo-128"]))
        assert sqnr_db(function(x[: M // 2]), want) >= 45
    assert_counts(aoquant_inductor.report(function), 1)


def test_any_m_has_the_rows_of_its_call(linear: nn.Linear) -> None:
    function = compiled(linear, SCHEME, dynamic=True)
    weight = from_pack(linear.weight, SCHEMES[SCHEME])
    with torch.no_grad():
        for m in (256, 1000, 130, 2049, 256):
            x = rows(m)
            assert sqnr_db(function(x), linear64(x, linear, SCHEMES[SCHEME], weight)) >= 45, m


def test_a_profiler_that_asks_for_shapes_sees_a_kernel_like_any(linear: nn.Linear) -> None:
    torch.compiler.reset()
    function, x = compiled(linear, SCHEME), rows(M)
    with torch.no_grad():
        y, codes = run_and_get_code(function, x)
        assert any("@describing(" in code for code in codes)
        with profile(record_shapes=True) as profiled:
            assert torch.equal(function(x), y)
    assert any("triton_tem" in event.name for event in profiled.events())


def test_a_search_measures_kernels_with_descriptors(linear: nn.Linear) -> None:
    found: list[dict[Any, float]] = []
    select_algorithm.add_feedback_saver(lambda timings, *rest: found.append(timings))
    try:
        torch.compiler.reset()
        function, x = compiled(linear, SCHEME, max_autotune=True), rows(M)
        with torch.no_grad():
            y = function(x)
    finally:
        select_algorithm.clear_feedback_savers()
    assert sqnr_db(y, linear64(x, linear, SCHEMES[SCHEME], from_pack(linear.weight, SCHEMES[SCHEME]))) >= 45
    paths = {choice.bmreq.module_path: time for timings in found for choice, time in timings.items() if hasattr(choice, "bmreq")}
    described = [time for path, time in paths.items() if "@describing(" in Path(path).read_text()]
    assert described and all(0 < time < 1e6 for time in paths.values()), paths
