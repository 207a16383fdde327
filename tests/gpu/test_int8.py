"""The int8 kernels on the card: exact sums through split-K and replays, the kernel meant, one of it per linear."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from util import BF16, compiled, run, sqnr_db

import aoquant_inductor
from aoquant_inductor import activations
from aoquant_inductor._inductor_choices import EARLY
from aoquant_inductor.card import Card

pytestmark = pytest.mark.gpu


def integers(n: int, k: int, seed: int = 0) -> nn.Linear:
    """Weights that are their own int8 codes, with a scale of 1."""
    linear = nn.Linear(k, n, bias=False, device="cuda", dtype=BF16).eval().requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(seed)
    linear.weight.copy_(torch.randint(-127, 128, (n, k), device="cuda", generator=generator))
    linear.weight[:, 0] = 127
    return linear


def tokens(m: int, k: int, seed: int, top: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randint(-top, top + 1, (m, k), device="cuda", generator=generator).to(BF16)
    x[:, 0] = top
    return x


def expected(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    return (x.double() @ linear.weight.double().t()).to(BF16)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("scheme", "m", "top"), [("int8dq", 16, 127), ("int8dq", 64, 127), ("int8wo", 16, 7), ("int8wo", 64, 7)])
def test_split_k_is_exact_in_every_replay(scheme: str, m: int, top: int, mode: str | None) -> None:
    linear = integers(512, 9216)
    function, _, report = run(linear, tokens(m, 9216, 0, top), schemes=scheme, **({"mode": mode} if mode else {}))
    assert "split" in str(report.layers[0].kernel), str(report)
    for seed in range(20):
        x = tokens(m, 9216, seed, top)
        with torch.no_grad():
            assert torch.equal(function(x).clone(), expected(x, linear)), seed


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 33, 100, 300])
@pytest.mark.parametrize(("n", "k"), [(33, 64), (512, 704), (1071, 2112), (200, 576), (64, 14336)])
def test_weight_only_sums_are_exact(m: int, n: int, k: int) -> None:
    linear = integers(n, k)
    x = tokens(m, k, m, 7)
    _, y, _ = run(linear, x, schemes="int8wo")
    assert torch.equal(y, expected(x, linear))


@pytest.mark.parametrize(("n", "k", "tile"), [(3840, 1280, "128x64x128"), (6144, 4096, "256x64x64"), (1280, 5120, "128x64x128")])
def test_programs_with_a_multiprocessor_each_are_exact(n: int, k: int, tile: str) -> None:
    here = Card.of(torch.device("cuda", 0))
    if here.arch != 90 or here.sms != 132 or not here.may_carry:
        pytest.skip("needs a Hopper card of 132 multiprocessors, and a ptxas from 13.3 on")
    linear = integers(n, k)
    function, _, report = run(linear, tokens(256, k, 0, 7), schemes="int8wo")
    assert re.search(rf"{tile} .*\balone\b", str(report.layers[0].kernel)), str(report)
    for seed in range(5):
        x = tokens(256, k, seed, 7)
        with torch.no_grad():
            assert torch.equal(function(x), expected(x, linear)), seed


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("scheme", "n", "k"), [("int8dq", 4099, 1040), ("int8dq-asymact", 4224, 704), ("int8dq", 4096, 272)])
def test_programs_with_many_tiles_are_exact(scheme: str, n: int, k: int, mode: str | None) -> None:
    linear = integers(n, k)
    function = compiled(linear, scheme, dynamic=True, **({"mode": mode} if mode else {}))
    for seed, m in enumerate((5000, 5000, 4500, 7777)):
        x = tokens(m, k, seed, 127)
        if scheme == "int8dq-asymact":  # a range of 255 from zero has a scale of 1
            x = x.abs()
            x[:, 0] = 255
        with torch.no_grad():
            assert torch.equal(function(x).clone(), expected(x, linear)), m
    report = aoquant_inductor.report(function)
    assert report.totals["quantized"] == 1 and "persistent W8A8" in str(report.layers[0].kernel), str(report)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("scheme", ["int8dq", "int8dq-asymact"])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_few_rows_quantize_in_the_matmul_exactly(m: int, scheme: str, mode: str | None) -> None:
    asymmetric = scheme == "int8dq-asymact"
    for n, k in ((33, 64), (512, 704), (1071, 2112), (64, 14336)):
        linear = integers(n, k)
        function = compiled(linear, scheme, dynamic=False, **({"mode": mode} if mode else {}))
        for seed in range(5):
            x = tokens(m, k, seed, 127)
            if asymmetric:  # a range of 255 from zero has a scale of 1
                x = x.abs()
                x[:, 0] = 255
            with torch.no_grad():
                assert torch.equal(function(x).clone(), expected(x, linear)), (n, k, seed)
        report = aoquant_inductor.report(function)
        assert report.totals["quantized"] == 1
        assert re.fullmatch(r"Triton gemv_dynamic W8A8 \S+", str(report.layers[0].kernel)), str(report)


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("int8dq", torch.bfloat16), ("int8dq", torch.float16), ("int8dq-asymact", torch.float16)]
)
def test_quantized_in_the_matmul_are_the_codes_of_the_definition(scheme: str, dtype: torch.dtype) -> None:
    """A weight of ones on its diagonal: y holds the codes of x times its scale, near enough to tell them, ties among them."""
    k = 1040
    linear = nn.Linear(k, k, bias=False, device="cuda", dtype=dtype).eval().requires_grad_(False)
    linear.weight.copy_(torch.eye(k))
    x = torch.randn(4, k, device="cuda", dtype=dtype)
    x[2] *= 30
    x[3, 1:] = 0
    _, y, report = run(linear, x, schemes=scheme)
    assert "gemv_dynamic" in str(report.layers[0].kernel), str(report)
    quantize = activations.quantize_per_token if scheme == "int8dq" else activations.quantize_per_token_asym
    codes, scale, zero = (*quantize(x), 0)[:3]
    assert torch.equal((y.float() / scale).round(), codes.float() - zero)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("m", [1, 4])
def test_a_chain_of_few_rows_is_one_kernel_per_linear(m: int, mode: str | None) -> None:
    model = nn.Sequential(*(part for _ in range(5) for part in (nn.Linear(256, 256), nn.ReLU()))).to("cuda", BF16).eval()
    x = torch.randn(m, 256, device="cuda", dtype=BF16)
    with torch.no_grad():
        y, (code, *_) = run_and_get_code(compiled(model, "int8dq", **({"mode": mode} if mode else {})), x)
        want = model(x)
    assert re.findall(r"(triton_[a-z]+)_\w+\.run\(", code) == ["triton_tem"] * 5, code
    assert "extern_kernels." not in re.sub(r"extern_kernels = .*|from .*", "", code)
    assert sqnr_db(y, want) > 25


@pytest.mark.parametrize("scheme", ["int8dq", "int8wo"])
def test_one_kernel_per_linear_and_no_int32_in_memory(scheme: str) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(1024), nn.Linear(1024, 4096)

        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.linear(self.norm(x))) + residual

    model = Residual().to("cuda", BF16).eval()
    x, residual = (torch.randn(512, n, device="cuda", dtype=BF16) for n in (1024, 4096))
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(compiled(model, scheme), x, residual)
    calls = re.findall(r"(triton_[a-z]+)_\w+\.run\(", code)
    assert sorted(calls) == ["triton_per", "triton_tem"], calls
    assert not re.search(r"empty_strided_cuda\(\(512, 4096\).*torch.int32", code)
    assert "extern_kernels" not in re.sub(r"extern_kernels = .*|from .*", "", code)


@pytest.mark.parametrize("scheme", ["int8dq", "int8wo", "int8dq-asymact"])
@pytest.mark.parametrize("m", [2, 64])
def test_a_search_names_the_winner(scheme: str, m: int) -> None:
    linear = integers(512, 2048)
    x = tokens(m, 2048, 1, 7)
    function, y, report = run(linear, x, schemes=scheme, mode="max-autotune")
    kernel = str(report.layers[0].kernel)
    assert re.fullmatch(r"Triton \w+ W8A(8|16) \d+x\d+x\d+.*|portable: .*", kernel), kernel
    with torch.no_grad():
        for _ in range(5):
            y = function(x).clone()
    # a search may take the dequantized bf16 matmul, or one that quantizes x with a scale of its own
    assert float((y.double() - expected(x, linear).double()).norm() / y.double().norm()) < 0.02
    assert aoquant_inductor.report(function).totals["quantized"] == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-128", "int8dq-int4w-128"])
@pytest.mark.parametrize("m", [1, 16, 64])
def test_kernels_that_overlap_are_right_across_updates(m: int, scheme: str, mode: str | None) -> None:
    model = nn.Sequential(*(part for _ in range(10) for part in (nn.Linear(1024, 1024), nn.ReLU()))).to("cuda", BF16).eval()
    options = {"mode": mode} if mode else {}
    apart = compiled(copy.deepcopy(model), scheme)
    early = compiled(model, scheme, **options, **{"triton.enable_pdl": True})
    few = m <= EARLY
    x = torch.randn(m, 1024, device="cuda", dtype=BF16)
    codes: list[str] = []
    with torch.no_grad():
        for step in range(20):
            if step % 4 == 3:
                for linear, other in zip(model[::2], apart._orig_mod[::2], strict=True):
                    linear.weight.mul_(1.01)
                    other.weight.mul_(1.01)
            y, codes = run_and_get_code(early, x) if step == 0 else (early(x), codes)
            assert torch.equal(y.clone(), apart(x).clone()), step
    kernels = [text for text in codes[0].split("async_compile.triton(")[1:] if text.startswith("'triton_tem")]
    assert kernels and all(("gdc_wait()" in text and "'launch_pdl': True" in text) == few for text in kernels), codes[0]
    report = aoquant_inductor.report(early)
    assert report.totals["quantized"] == 10
    assert all("Triton" in str(layer.kernel) for layer in report.layers), str(report)
