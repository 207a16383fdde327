"""Every scheme on the card: right at odd sizes, by our kernel, in every mode, for static and dynamic M."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from util import BF16, FP16, FP32, assert_counts, compiled, from_pack, linear64, sqnr_db

import aoquant_inductor
from aoquant_inductor import SCHEMES

pytestmark = pytest.mark.gpu

LEAST_DB = {BF16: 45.0, FP16: 55.0, FP32: 55.0}
MODES = (None, "reduce-overhead")
NAMES = [name for name, scheme in SCHEMES.items() if scheme.large_m is None]  # the others: test_many_rows.py


SIZES = ((129, 65, True), (576, 1071, False), (1, 7, True), (256, 128, True))
"""K, N, bias: sizes that no tile likes, one of them without bias, one that fits."""


class Odd(nn.Module):
    def __init__(self, dtype: torch.dtype, count: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(k, n, bias=b, dtype=dtype) for k, n, b in SIZES[:count])

    def forward(self, *xs: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear, x in zip(self.linears, xs, strict=True)]


def check(scheme: str, dtype: torch.dtype, mode: str | None, count: int = len(SIZES), ms: tuple[int, ...] = (1, 7, 129)) -> None:
    model = Odd(dtype, count).cuda().eval()
    function = compiled(model, scheme, **({"mode": mode} if mode else {}))
    for m in ms:
        xs = [torch.randn(m, linear.in_features, device="cuda", dtype=dtype) for linear in model.linears]
        for _ in range(3):  # the third is a replay
            with torch.no_grad():
                got = [y.clone() for y in function(*xs)]
        for y, x, linear in zip(got, xs, model.linears, strict=True):
            want = linear64(x, linear, SCHEMES[scheme], from_pack(linear.weight, SCHEMES[scheme]))
            assert sqnr_db(y, want) >= LEAST_DB[dtype], (m, linear)
    report = aoquant_inductor.report(function)
    assert_counts(report, len(model.linears))
    for layer, linear in zip(report.layers, model.linears, strict=True):
        # with one weight a row there is nothing to be faster at: a search may take the reference, and the report says so
        free = (mode or "").startswith("max-autotune") and linear.in_features == 1
        assert "Triton" in str(layer.kernel) or (free and "portable" in str(layer.kernel)), str(report)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", NAMES)
def test_bf16(scheme: str, mode: str | None) -> None:
    check(scheme, BF16, mode)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("scheme", NAMES)
def test_other_dtypes(scheme: str, dtype: torch.dtype) -> None:
    check(scheme, dtype, None, 2, (1, 129))  # one kernel serves nearly all of these


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-128-asym", "int8dq-int4w-128"])
def test_max_autotune(scheme: str) -> None:
    check(scheme, BF16, "max-autotune-no-cudagraphs")


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-row", "int8dq-int4w"])
def test_large_fp16_activations_stay_finite(scheme: str) -> None:
    linear = nn.Linear(4096, 512, device="cuda", dtype=FP16).eval()
    with torch.no_grad():
        y = compiled(linear, scheme)(20 * torch.randn(64, 4096, device="cuda", dtype=FP16))
    assert y.isfinite().all()


@pytest.mark.parametrize("m", [1, 16, 64, 300])
@pytest.mark.parametrize("scheme", ["int8dq", "int8dq-asymact", "int8dq-int4w", "int8dq-int4w-asym-asymact"])
def test_integer_products_are_exact(scheme: str, m: int) -> None:
    """With both scales 1 and integers within a bf16's 8 bits the output is the integer sum itself."""
    k, n = 576, 200
    top = 127 if "int4" not in scheme else 7
    generator = torch.Generator().manual_seed(m)
    weight = torch.randint(-top, top + 1, (n, k), generator=generator).float()
    x = torch.randint(-127, 128, (m, k), generator=generator).float()
    weight[:, 0], x[:, 0], x[:, 1] = top, 127, -128 if "asymact" in scheme else -127
    if "asym" in scheme.replace("asymact", ""):
        weight[:, 1] = -8
    linear = nn.Linear(k, n, bias=False, device="cuda").eval()
    with torch.no_grad():
        linear.weight.copy_(weight)
        y = compiled(linear, scheme)(x.cuda()).cpu()
    assert torch.equal(y.double(), x.double() @ weight.double().t())
