"""Which kernel and config serve a problem, without a GPU and without rendering any."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from aoquant_inductor import _inductor_choices, lowering_portable, lowering_triton
from aoquant_inductor._inductor_choices import COUNTERS
from aoquant_inductor.card import UNKNOWN, Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.scheme import resolve
from aoquant_inductor.templates import KERNELS, QUANTIZING, Config, Kernel, costs, int4, int4_few, linear
from aoquant_inductor.templates.kernel import MAX_SPLIT

H100 = Card(90, 132, 232448, (12, 8))
CARDS = {"h100": H100, "a100": Card(80, 108, 166912, (12, 8)), "a10": Card(86, 72, 101376, UNKNOWN), "mi300": Card(0, 304, 65536, UNKNOWN)}


@dataclass(frozen=True)
class Node:
    """What a choice asks of an IR node."""

    size: tuple[int, ...]
    dtype: torch.dtype

    def get_size(self) -> tuple[int, ...]:
        return self.size

    def get_dtype(self) -> torch.dtype:
        return self.dtype


def problem(scheme: Any, n: int, k: int, m: int, card: Card = H100, quantizing: bool = False) -> Problem:
    choice, bf16 = resolve(scheme), torch.bfloat16
    group, dynamic, int4 = choice.weight.group_size or 0, choice.activation is not None, choice.weight.bits == 4
    if int4:
        layout, w = "cuda_int8" if dynamic else "cuda_bf16", Node((n // 8, k // 128, 8, 16), torch.int32)
    else:
        layout, w = "wgmma" if not dynamic and card.arch == 90 and k % 64 == 0 else "plain", Node((n, k), torch.int8)
    symmetric = choice.activation.symmetric if choice.activation is not None and quantizing else None
    row, scale = Node((m, 1), torch.float32), Node((k // group if group else 1, n), bf16 if group else torch.float32)
    zero = None if choice.weight.symmetric else Node(scale.size, torch.int8 if choice.weight.zero_point == "int" else bf16)
    x = Node((m, k), torch.int8 if dynamic and not quantizing else bf16)
    return Problem(
        x, row if dynamic and not quantizing else None, None, w, scale, zero, None, None,
        (k, n, choice.weight.dtype, group, choice.weight.zero_point, layout), bf16, (m,), m, torch.device("cuda"), symmetric,
        k * x.dtype.itemsize % 16 == 0,
    )


def default(p: Problem, card: Card = H100) -> tuple[Kernel, Config] | None:
    known = KERNELS if p.symmetric is None else QUANTIZING
    return lowering_triton.default(p, card, [kernel for kernel in known if kernel.fits(p, card)])


BY_PTXAS = {
    (12, 8): [
        ("int8wo", 4096, 4096, 1, "1x4x2048 stepped"), ("int8wo", 6144, 4096, 1, "1x4x4096"), ("int8wo", 4096, 14336, 2, "2x8x2048"),
        ("int8wo", 28672, 4096, 2, "16x64x128 swapped tail split 2"), ("int8wo", 896, 4864, 3, "4x4x2048"), ("int8wo", 4096, 4096, 3, "16x64x128 swapped split 4"), ("int8wo", 151936, 896, 1, "1x4x1024"), ("int4wo-128", 28672, 4096, 1, "1x16x256"), ("int4wo-128", 151936, 896, 1, "1x16x256"),
        ("int4wo-128", 4096, 14336, 1, "1x16x2048"), ("int4wo-32", 28672, 4096, 1, "1x16x1024"), ("int4wo-128", 28672, 4096, 4, "4x16x256"),
        ("int4wo-64", 28672, 4096, 1, "1x16x1024"), ("int4wo-64", 4096, 14336, 1, "1x32x2048"), ("int4wo-32", 4096, 14336, 4, "4x16x2048"),
        ("int4wo-32", 4096, 4096, 1, "1x16x4096"), ("int4wo-32", 6144, 4096, 1, "1x16x2048"), ("int4wo-32", 6144, 4096, 4, "4x16x1024"),
        ("int4wo-128", 4096, 4096, 1, "1x16x2048"), ("int4wo-128", 4096, 4096, 2, "2x16x2048"), ("int4wo-128", 4096, 4096, 3, "4x16x1024"),
        ("int4wo-128", 6144, 4096, 1, "1x16x1024"), ("int4wo-128", 6144, 4100, 1, "8x16x512 split 2"), ("int4wo-32", 1280, 5120, 1, "1x4x8192"), ("int4wo-128", 896, 896, 1, "1x4x1024"),
        ("int8dq", 28672, 4096, 16, "16x64x256 swapped"), ("int8dq", 28672, 4096, 256, "128x128x128"),
        # tests/gpu/test_splits.py adds up parts of these
        ("int8dq", 1280, 5120, 256, "64x64x128 swapped split 3"), ("int8wo", 1280, 5120, 256, "128x64x128 swapped held split 6"), ("int4wo-128", 1280, 5120, 256, "128x64x128 scaled split 6"),
        ("int8dq-int4w", 1280, 5120, 256, "64x64x256 split 3"), ("int8dq-int4w-128", 1280, 5120, 256, "64x64x256 split 3"),
        ("int8wo", 28672, 4096, 4096, None), ("int4wo-128", 28672, 4096, 4096, None),
        ("int4wo-32", 5120, 1280, 128, "64x64x128 scaled tail split 4"),  # what newer ptxas may do alone
    ],
    (13, 5): [
        ("int8wo", 28672, 4096, 256, "256x128x64 swapped carried tma"), ("int8wo", 28672, 4096, 1024, "256x128x64 swapped carried tma"),
        ("int4wo-128", 4096, 14336, 1024, "256x128x128 carried tma scaled"), ("int8wo", 28672, 4096, 64, "64x128x128 swapped carried"),
        ("int8wo", 28672, 4096, 4096, "256x128x64 swapped carried tma tail split 4"),
        ("int4wo-128", 28672, 4096, 4096, "256x128x128 carried tma scaled tail split 4"), ("int4wo-128", 4096, 4096, 512, "128x128x128 carried tma scaled"),
        ("int8wo", 18944, 3584, 256, "256x128x64 swapped carried tma tail split 8"),
        ("int8wo", 5120, 13824, 256, "256x128x64 swapped carried tma split 3"), ("int4wo-128", 5120, 13824, 64, "64x64x128 split 3"),
        # a program for a multiprocessor, or fewer: more stages
        ("int8wo", 1280, 5120, 256, "128x64x128 swapped carried tma alone split 3"), ("int4wo-128", 3840, 1280, 256, "128x64x128 carried tma alone scaled"),
        ("int4wo-32-asym", 3840, 1280, 256, "128x64x128 carried tma alone scaled"), ("int8wo", 6144, 4096, 256, "256x64x64 swapped carried tma alone"),
        # a few tiles more than multiprocessors, in parts beside the others
        ("int4wo-32", 5120, 1280, 256, "128x64x128 carried tma scaled tail split 4"), ("int8wo", 5120, 1280, 256, "128x64x128 swapped carried tma tail split 4"),
        ("int4wo-32-asym", 5120, 1280, 256, "128x64x128 carried tma scaled tail split 4"), ("int4wo-128", 5120, 1280, 256, "128x64x128 carried tma scaled tail split 4"),
        ("int4wo-128", 6144, 4096, 512, "128x128x128 carried tma scaled tail split 2"), ("int4wo-128", 18944, 3584, 128, "128x128x128 carried tma scaled tail split 8"),
        ("int8dq", 1280, 5120, 1024, "128x64x128 swapped tail split 4"),
        ("int8dq-int4w", 1280, 5120, 1024, "64x64x256 tail split 2"), ("int8dq-int4w-128", 1280, 5120, 1024, "64x64x256 tail split 2"),
        ("int8dq-int4w", 5120, 13824, 256, "64x64x256 tail split 2"), ("int8dq-int4w-128", 5120, 1280, 256, "64x64x128"),
        ("int8wo", 18944, 3584, 64, "64x64x128 swapped tail split 4"), ("int4wo-128", 28672, 4096, 16, "16x64x256 tail split 2"),
        ("int4wo-32", 28672, 4096, 16, "16x64x256 scaled tail split 2"), ("int4wo-128", 9728, 896, 16, "16x64x128"),
        ("int8wo", 5120, 1280, 64, "32x64x128 swapped tail split 4"), ("int8wo", 6144, 4096, 64, "32x64x128 swapped split 2"),
        ("int4wo-128", 5120, 1280, 128, "128x64x128 carried tma alone scaled"),
        # up to 32 rows of int8, and x by TMA in parts of K
        ("int8dq", 28672, 4096, 32, "32x64x256 swapped"), ("int8dq-int4w", 28672, 4096, 32, "32x64x256"),
        ("int8dq-int4w-128", 18944, 3584, 32, "32x64x256"), ("int8dq-int4w-128", 4096, 14336, 256, "128x64x128 tma split 2"),
        # no tiles for every multiprocessor, or some for a second time, and a copy that stays in the cache
        ("int4wo-128", 1280, 5120, 1024, None), ("int4wo-32", 1280, 5120, 1024, None), ("int8wo", 1280, 5120, 1024, None),
        ("int8wo", 896, 4864, 1024, None), ("int4wo-32-asym", 896, 4864, 1024, None),
        ("int8wo", 5120, 1280, 1024, None), ("int4wo-128", 5120, 1280, 1024, None), ("int4wo-32", 5120, 1280, 1024, None),
        ("int4wo-128", 3840, 1280, 1024, "128x128x128 carried tma scaled"),
    ],
}
"""What is fastest at (scheme, N, K, M), None where that is the portable lowering; carried sums need the newer ptxas."""


@pytest.mark.parametrize(("ptxas", "case"), [(ptxas, case) for ptxas, cases in BY_PTXAS.items() for case in cases])
def test_the_default_of_some_problems(ptxas: tuple[int, int], case: tuple[str, int, int, int, str | None]) -> None:
    *of, wanted = case
    card = replace(H100, ptxas=ptxas)
    found = default(problem(*of, card), card)
    assert (found and str(found[1])) == wanted


def test_every_config_without_a_default_has_a_price() -> None:
    for kernel in KERNELS:
        assert bool(kernel.defaults) != bool(kernel.label), kernel.template
        missing = [str(config) for config in kernel.configs if kernel.label and (kernel.label, costs.key_of(config)) not in costs.costs()]
        assert not missing, (kernel.label, missing)


def test_a_price_is_of_a_config_that_is_alone_or_of_one_that_is_not() -> None:
    for kernel in KERNELS:
        alone: dict[str, set[bool]] = {}
        for config in kernel.configs:
            alone.setdefault(costs.key_of(config), set()).add(config.alone)
        assert all(len(either) == 1 for either in alone.values()), kernel.template


@pytest.mark.parametrize("m", [1024, 4096])
def test_many_rows_of_int8_are_one_launch_of_as_many_programs_as_fit(m: int) -> None:
    kernel, config = default(problem("int8dq", 28672, 4096, m)) or pytest.fail("no kernel")
    assert (kernel.template, config.programs) == ("persistent", 264)
    kernel, config = default(problem("int8dq", 28672, 4088, m)) or pytest.fail("no kernel")
    assert kernel.template == "linear", "rows that do not start at 16 bytes"


@pytest.mark.parametrize(
    ("n", "k", "m", "wanted"),
    [
        (28672, 4096, 1, "1x4x2048"), (4096, 14336, 2, "2x8x2048"), (4096, 4096, 4, "4x8x2048"), (64, 64, 1, "1x4x512"),
        (28672, 4096, 3, "4x8x2048"), (28672, 8192, 3, None), (4096, 14336, 4, "4x8x2048"), (896, 4864, 3, "4x8x4096"),
        (33, 1040, 3, "4x8x2048"), (64, 64, 5, None), (64, 72, 1, None),
    ],
)
@pytest.mark.parametrize("scheme", ["int8dq", "int8dq-asymact"])
def test_few_rows_are_quantized_in_the_matmul(scheme: str, n: int, k: int, m: int, wanted: str | None) -> None:
    found = default(problem(scheme, n, k, m, quantizing=True))
    assert (found and str(found[1])) == wanted
    assert default(problem(scheme, n, k, m, CARDS["mi300"], quantizing=True), CARDS["mi300"]) is None


@pytest.mark.parametrize(
    ("n", "k", "m", "wanted"),
    [
        (896, 4864, 1, "1x8x4096"), (4096, 14336, 1, "1x8x4096"), (28672, 4096, 1, "1x8x2048"), (48, 200, 1, "1x8x1024"),
        (896, 4864, 2, "2x8x8192"), (4096, 4096, 2, "2x8x4096"), (28672, 4096, 2, None),
        (4096, 4096, 3, "4x8x4096"), (6144, 4096, 4, None), (64, 64, 5, None), (64, 76, 1, None),
    ],
)
@pytest.mark.parametrize("scheme", ["int8dq-int4w", "int8dq-int4w-128", "int8dq-int4w-asymact"])
def test_few_rows_are_quantized_in_the_matmul_of_int4(scheme: str, n: int, k: int, m: int, wanted: str | None) -> None:
    if wanted and m > 2 and scheme.endswith("asymact") and int4_few.spills_sooner():
        wanted = wanted.replace("x8x", "x4x")
    found = default(problem(scheme, n, k, m, quantizing=True))
    assert (found and str(found[1])) == wanted
    assert default(problem(scheme, n, k, m, CARDS["mi300"], quantizing=True), CARDS["mi300"]) is None


SIZES = list(itertools.product((1, 7, 896, 4096, 28672), (1, 8, 65, 576, 4864, 14336), (1, 3, 17, 100, 5000)))


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("scheme", ["int8dq", "int8wo"])
def test_everything_has_a_default_that_fits(scheme: str, card: Card) -> None:
    for n, k, m in SIZES:
        p = problem(scheme, n, k, m, card)
        found = default(p, card)
        if found is None:
            check_that_a_copy_wins(p, card)
            continue
        _check(p, card, *found)


@pytest.mark.parametrize(("n", "k", "m"), [(151936, 896, 16384), (896, 151936, 16384), (151936, 16384, 64)])
@pytest.mark.parametrize("scheme", ["int8dq", "int8wo", "int4wo-128", "int8dq-int4w"])
def test_what_32_bits_do_not_count_is_not_ours(scheme: str, n: int, k: int, m: int) -> None:
    assert lowering_triton.linear(problem(scheme, n, k, m)) is None
    assert not replace(problem("int4wo-128", 152064, 8192, 152064), x=None).beyond_32_bits  # a weight alone has no y
    assert problem(scheme, n, k, m).beyond_32_bits and not problem(scheme, 32768, 32760, 65535).beyond_32_bits


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("scheme", ["int8dq", "int8wo"])
def test_a_search_tries_each_config_once_and_only_what_can_run(scheme: str, card: Card) -> None:
    for n, k, m in ((896, 4864, 1), (4096, 4096, 64), (28672, 576, 300)):
        p = problem(scheme, n, k, m, card)
        found = lowering_triton.search(p, card, [kernel for kernel in KERNELS if kernel.fits(p, card)])
        texts = [(kernel.template, config) for kernel, config in found]
        assert len(texts) == len(set(texts)) >= (3 if card.arch == 90 else 1)
        assert all(m // 8 <= config.block_m <= max(16, 4 * m) for _, config in found)
        for kernel, config in found:
            _check(p, card, kernel, config)


def check_that_a_copy_wins(p: Problem, card: Card) -> None:
    """A weight as bf16 for cuBLAS is dearer than every kernel of ours for few rows, and ours can run all the same."""
    ours = [(us, k, config) for k in KERNELS if k.fits(p, card) for us, config in k.priced(p, card)]
    general = [k for k in KERNELS if k.fits(p, card)] == [linear.GENERAL]  # without prices
    assert not p.dynamic and (p.m > 512 if general else p.m >= 64 and ours), p
    assert general or min(us for us, *_ in ours) > lowering_portable.us(p, card)
    for _, kernel, config in ours:
        _check(p, card, kernel, config)


def _check(p: Problem, card: Card, kernel: Kernel, config: Config) -> None:
    operands = config.block_m * p.x.get_dtype().itemsize + config.block_n * p.bits // 8
    buffers = max(1, config.num_stages - 1) if card.by_mma_sync else config.num_stages
    assert buffers * config.block_k * operands <= card.shared, (kernel.template, config)
    assert 1 <= config.split_k <= MAX_SPLIT and not config.carried
    assert config.split_k == 1 or config.tiles(p.m, p.n) <= COUNTERS


@pytest.mark.parametrize(("n", "m", "split"), [(6144, 1024, 2), (5120, 1024, 4), (4096, 1024, None), (33792, 256, None), (32000, 256, None)])
def test_a_tail_has_as_many_programs_as_run_at_once(n: int, m: int, split: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """192 and 160 tiles leave 60 and 28; 128 and 264 leave none, and of 250 118 are left, too many for two programs each."""
    monkeypatch.setattr(_inductor_choices, "early_launch", lambda *_: False)
    card = replace(H100, ptxas=(13, 5))
    config = linear.INT8_WEIGHT_ONLY.config(problem("int8wo", n, 4096, m, card), card, replace(linear.W_CARRIED, tail=1))
    assert (config and config.split_k) == split
    if config is not None:
        chosen = linear.INT8_WEIGHT_ONLY.choice(problem("int8wo", n, 4096, m, card), config)
        assert chosen.scratch == 4 * config.split_k * config.rest(m, n) * 256 * 128


@pytest.mark.parametrize(("n", "split", "runs"), [(132, 1, True), (133, 1, False), (44, 3, True), (45, 3, False)])
def test_alone_is_for_a_program_per_multiprocessor(n: int, split: int, runs: bool) -> None:
    card = replace(H100, ptxas=(13, 5))
    config = replace(int4.L128_ALONE, split_k=split)
    p = problem("int4wo-128", 64 * n, 4096, 128, card)
    assert (int4.SUMS.config(p, card, config) is not None) == runs
    assert any(found.alone for _, found in int4.SUMS.priced(p, card)) == (n <= 132)


def test_a_carried_accumulator_needs_the_newer_ptxas() -> None:
    p = problem("int8wo", 4096, 4096, 64)
    kernel = next(kernel for kernel in KERNELS if kernel.fits(p, H100) and kernel.template == "linear")
    carried = replace(kernel.configs[0], carried=True, split_k=1)
    versions: dict[Any, bool] = {(12, 8): False, UNKNOWN: False, (13, 3): True, (14, 0): True}
    assert {v: kernel.config(p, replace(H100, ptxas=v), carried) is not None for v in versions} == versions


@pytest.mark.parametrize("card", [CARDS["h100"], CARDS["a100"], CARDS["a10"]], ids=["h100", "a100", "a10"])
@pytest.mark.parametrize("scheme", ["int4wo-128", "int4wo-32", "int4wo-row", "int8dq-int4w", "int8dq-int4w-128"])
def test_int4_has_a_default_that_fits(scheme: str, card: Card) -> None:
    for n, k, m in itertools.product((16, 896, 28672), (128, 14336), (1, 5, 17, 100, 600, 3000)):
        p = problem(scheme, n, k, m, card)
        if (found := default(p, card)) is None:
            check_that_a_copy_wins(p, card)
        else:
            _check(p, card, *found)
