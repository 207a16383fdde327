"""Weights and activations to integers: the error bound, hostile rows, accuracy gates."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from util import BF16, FP16, FP32

from aoquant_inductor import activations, qparams
from aoquant_inductor.qparams import NonFinite
from aoquant_inductor.scheme import SCHEMES, QuantSpec, resolve

SPECS = list(dict.fromkeys(scheme.weight for scheme in SCHEMES.values()))
TINY = torch.finfo(FP32).tiny
ROWS = ("zero", "constant", "negative", "subnormal", "smallest", "normal", "offset", "positive", "outlier", "large")
K_SIZES = (1, 8, 31, 32, 33, 127, 128, 129, 300)


def spec_id(spec: QuantSpec) -> str:
    kind = "sym" if spec.symmetric else f"asym-{spec.zero_point}"
    return f"{spec.dtype}-{spec.group_size or 'row'}-{kind}"


def row(kind: str, k: int, dtype: torch.dtype, rng: torch.Generator) -> torch.Tensor:
    """One hostile row [K], finite in `dtype`."""
    info = torch.finfo(dtype)
    noise = torch.randn(k, generator=rng, dtype=torch.float64)
    values = {
        "zero": lambda: noise * 0,
        "constant": lambda: noise * 0 + noise[0],
        "negative": lambda: -noise.abs() - 1,
        "subnormal": lambda: noise.clamp(-3, 3) * info.tiny / 8,
        "smallest": lambda: noise.sign() * info.smallest_normal,
        "normal": lambda: noise,
        "offset": lambda: noise * 0.1 + 100,
        "positive": lambda: noise.abs() + 0.01,
        "outlier": lambda: noise.index_fill(0, torch.tensor([k // 2]), 3e4),
        "large": lambda: (noise * 0.1 + noise.sign() * 0.5).clamp(-0.9, 0.9) * info.max,
    }[kind]()
    return values.to(dtype)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype) -> torch.Tensor:
    kinds = draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=4))
    k = draw(st.sampled_from(K_SIZES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.stack([row(kind, k, dtype, rng) for kind in kinds])


def values(q: qparams.Quantized) -> torch.Tensor:
    return qparams.dequantize(q.w_q, q.scale, q.zero, q.spec.group_size, q.spec.zero_point, torch.float64)


def per_element(scale: torch.Tensor, k: int, group_size: int | None) -> torch.Tensor:
    return scale.double().repeat_interleave(group_size or max(k, 1), 0)[:k].t()


def check_bound(t: torch.Tensor, spec: QuantSpec) -> None:
    q = qparams.quantize(t, spec)
    k = t.shape[1]
    assert q.w_q.dtype == torch.int8
    assert spec.qmin <= int(q.w_q.min())
    assert int(q.w_q.max()) <= spec.qmax
    back, scale = values(q), per_element(q.scale, k, spec.group_size)
    error = (back - t.double()).abs()
    # beyond half a step: rounding of t / scale and of a float zero point in fp32
    allowed = scale * (0.5 + 1e-4) + t.double().abs() * 1e-6 + TINY
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"t={t.flatten()[worst]}, got {back.flatten()[worst]}, scale {scale.flatten()[worst]}: "
        f"off by {float((error / scale).flatten()[worst]):.2f} steps"
    )
    zero_rows = (t == 0).all(1)
    assert (back[zero_rows] == 0).all(), "a zero row has to stay exactly zero"


KINDS = {kind: [s for s in SPECS if (s.symmetric, s.zero_point) == value] for kind, value in (
    ("sym", (True, "int")), ("asym", (False, "int")), ("asymfloat", (False, "float")),
)}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_error_is_at_most_half_a_step(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check_bound(data.draw(weights(dtype)), data.draw(st.sampled_from(KINDS[kind])))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_finite_values_stay_finite(kind: str, dtype: torch.dtype) -> None:
    top = min(torch.finfo(dtype).max, 1e37)  # beyond that the steps between -top and top overflow fp32
    t = torch.tensor([[top, -top, 0.0, 1.0], [top] * 4, [-top, 1, 2, 3], [top, 1, 2, 3]]).to(dtype)
    for spec in KINDS[kind]:
        q = qparams.quantize(t, spec)
        assert q.scale.isfinite().all()
        assert q.zero is None or q.zero.isfinite().all()
        back = qparams.dequantize(q.w_q, q.scale, q.zero, spec.group_size, spec.zero_point)
        assert back.isfinite().all(), (spec, back)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_sqnr_is_that_of_the_quantized_weight_at_any_magnitude(size: float) -> None:
    t = torch.randn(8, 65) * size
    for spec in (resolve(name).weight for name in ("int8wo", "int4wo-32-asym", "int4wo-32-asymfloat")):
        q = qparams.quantize(t, spec)
        noise = (values(q) - t.double()).square().sum()
        assert q.sqnr_db() == pytest.approx(10 * math.log10(float(t.double().square().sum() / noise)), abs=0.01)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_ragged_last_group_is_quantized_alone(spec: QuantSpec) -> None:
    """Elements beyond K must not widen the tail's range: the tail equals the same values quantized as their own matrix."""
    if spec.group_size is None:
        pytest.skip("one group")
    t = torch.rand(3, spec.group_size + 5) + 2  # far from zero, where padding with zeros would show
    whole, tail = qparams.quantize(t, spec), qparams.quantize(t[:, spec.group_size :].contiguous(), spec)
    assert whole.scale.shape == (2, 3)
    assert torch.equal(whole.scale[1], tail.scale[0])
    assert torch.equal(whole.w_q[:, spec.group_size :], tail.w_q)
    assert whole.zero is None or torch.equal(whole.zero[1], tail.zero[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_non_finite_names_the_first_element(value: float, dtype: torch.dtype) -> None:
    t = torch.zeros(20, 50, dtype=dtype)
    t[17, 40] = t[17, 42] = t[19, 0] = value
    with pytest.raises(NonFinite) as caught:
        qparams.quantize(t, SPECS[0])
    assert caught.value.index == (17, 40)
    assert str(caught.value) == "a non-finite value (first at [17, 40])"


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randn(37, 33)
    spec = resolve("int4wo-32-asym").weight
    whole = qparams.quantize(t, spec)
    monkeypatch.setattr(qparams, "_CHUNKS", {"cpu": 100})
    parts = qparams.quantize(t, spec)
    assert torch.equal(whole.w_q, parts.w_q)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero, parts.zero)
    assert parts.sqnr_db() == pytest.approx(whole.sqnr_db())
    t[30, 7] = math.nan
    with pytest.raises(NonFinite) as caught:
        qparams.quantize(t, spec)
    assert caught.value.index == (30, 7)


@pytest.mark.parametrize(("scheme", "gate"), [("int8wo", 38), ("int4wo-32-asym", 20.5), ("int4wo-128-asym", 17)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_accuracy_gates_for_normal_weights(scheme: str, gate: float, dtype: torch.dtype) -> None:
    t = torch.randn(256, 512).to(dtype)
    assert qparams.quantize(t, resolve(scheme).weight).sqnr_db() >= gate


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_per_token_error_is_at_most_half_a_step(dtype: torch.dtype, asymmetric: bool, data: st.DataObject) -> None:
    x = data.draw(weights(dtype))
    if asymmetric:
        q, scale, zero = activations.quantize_per_token_asym(x)
        assert zero.dtype == torch.int32
    else:
        q, scale = activations.quantize_per_token(x)
        zero = torch.zeros((), dtype=torch.int32)
        assert int(q.min()) >= -127
    assert scale.shape == (x.shape[0], 1)
    assert scale.isfinite().all()
    back = (q.double() - zero.double()) * scale.double()
    error = (back - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-4) + x.double().abs() * 1e-6).all(), (error / scale).max()
    assert (back[(x == 0).all(1)] == 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (2, 3, 4, 8)])
def test_per_token_of_any_rank_is_row_by_row(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    q, scale, zero = activations.quantize_per_token_asym(x)
    assert (q.shape, scale.shape, zero.shape) == (x.shape, (*x.shape[:-1], 1), (*x.shape[:-1], 1))
    rows = [activations.quantize_per_token_asym(r) for r in x.reshape(-1, 8)]
    for i, part in enumerate((q, scale, zero)):
        want = [r[i] for r in rows]
        assert torch.equal(part.flatten(), torch.cat(want) if want else part.flatten())


def test_rounding_by_bits_is_rounding() -> None:
    """What a GPU's kernels are made of, and a CPU's: the same integers, ties and both ends of the range among them."""
    ties = torch.arange(-300, 300) + 0.5
    values = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1), 300 * torch.randn(10000)])
    values = torch.cat([values, torch.tensor([0.0, -0.0, 2.0**22 - 1, 1 - 2.0**22])])
    assert torch.equal(activations.round_by_bits(values), values.round().to(torch.int32))


def test_the_largest_by_bits_is_the_largest() -> None:
    sizes = torch.rand(100, 33) * torch.logspace(-44, 38, 100)[:, None]
    sizes[5] = 0
    sizes[6, 3] = float("inf")
    assert torch.equal(activations.amax_by_bits(sizes), sizes.amax(-1, keepdim=True))
    sizes[6, 4] = float("nan")
    assert activations.amax_by_bits(sizes)[6].isnan()
