"""templates/cpu_linear.h through ctypes against float64, for each instruction set of this CPU, with unreadable pages behind every
buffer; packing_cpu as its own inverse.
"""

import ctypes
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from cpu_kernels import (
    DYNAMIC,
    K_SIZES,
    KINDS,
    LAYOUTS,
    N_SIZES,
    WEIGHT_ONLY,
    cases,
    dequantize,
    each_isa,
    grouped,
    library,
    name,
    random_q,
    run,
)

from aoquant_inductor import packing_cpu


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small references: faster without torch's threads beside OpenMP's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    return functools.cache(lambda isa: library(isa, tmp_path_factory.mktemp(f"cpu_{isa}")))


@pytest.fixture
def lib(build, isa: str) -> ctypes.CDLL:
    return build(isa)


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("x_dtype", "y_dtype", "bias_dtype"), WEIGHT_ONLY)
def test_weight_only_is_float32_accurate(lib, isa, bits, x_dtype, y_dtype, bias_dtype) -> None:
    torch.manual_seed(0)
    function = getattr(lib, name(bits, x_dtype, y_dtype, bias_dtype))
    for k, n, m, group, asym, has_bias, gap, at_end, threads in cases():
        groups, span = grouped(k, group)
        n_pad, k_pad = packing_cpu.padded_shape(n, k, group, LAYOUTS[isa][0], bits)
        w_q, x = random_q(bits, n, k), torch.randn(m, k).to(x_dtype)
        scale = torch.rand(groups, n_pad) + 0.5
        offset = torch.randn(groups, n_pad) if asym else None
        bias = torch.randn(n).to(bias_dtype) if has_bias else None
        packed = packing_cpu.pack(w_q, bits, k_pad, n_pad, LAYOUTS[isa][0])
        y = run(function, (m, n, k, group), x, (packed, scale, offset), bias, y_dtype, gap, at_end, threads)
        w = dequantize(w_q, scale, offset, span)
        expected = x.double() @ w.t() + (bias.double() if has_bias else 0.0)
        # float32 rounding of the terms that are summed, then one rounding to y
        noise = 1e-6 * (x.double().abs() @ (w.abs() + 1.5).t() + 4) + torch.finfo(y_dtype).eps * 0.51 * expected.abs()
        worst = ((y.double() - expected).abs() - noise).max() if m else torch.tensor(0.0)
        assert worst <= 0, (k, n, m, group, asym, has_bias, gap, threads, worst)


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("y_dtype", "bias_dtype"), DYNAMIC)
def test_dynamic_is_exact_on_integers(lib, isa, bits, y_dtype, bias_dtype) -> None:
    """Scales are powers of two and offsets integers, so every float32 step is exact and only the rounding to y remains."""
    torch.manual_seed(0)
    function = getattr(lib, name(bits, y_dtype, bias_dtype))
    down = 2.0**-11 if y_dtype == torch.float16 else 1.0  # keeps float16 finite
    zero_points = itertools.cycle((False, False, True, True, True))
    for k, n, m, group, asym, has_bias, gap, at_end, threads in cases():
        groups, span = grouped(k, group)
        n_pad, k_pad = packing_cpu.padded_shape(n, k, group, LAYOUTS[isa][1], bits)
        w_q, x_q = random_q(bits, n, k), random_q(8, m, k)
        scale = 2.0 ** torch.randint(-1, 2, (groups, n_pad)).float()
        offset = torch.randint(-8, 9, (groups, n_pad)).float() if asym else None
        x_scale = down * 2.0 ** torch.randint(-2, 3, (m,)).float()
        x_zp = torch.randint(-128, 128, (m,), dtype=torch.int32) if next(zero_points) else None
        bias = torch.randint(-4, 5, (n,)).to(bias_dtype) * down if has_bias else None
        packed = packing_cpu.pack(w_q, bits, k_pad, n_pad, LAYOUTS[isa][1])
        w_sum = packing_cpu.weight_sums(w_q, scale, group, n_pad) if x_zp is not None else None
        y = run(function, (m, n, k, group), x_q, (packed, scale, offset, w_sum), bias, y_dtype, gap, at_end, threads, x_args=(x_scale, x_zp))
        x = x_q.double() - (x_zp[:, None].double() if x_zp is not None else 0.0)
        expected = (x @ dequantize(w_q, scale, offset, span).t()) * x_scale[:, None].double() + (bias.double() if has_bias else 0.0)
        assert torch.equal(y, expected.to(y_dtype)), (k, n, m, group, asym, has_bias, gap, threads, x_zp is not None)


@each_isa
@pytest.mark.parametrize("x_value", [-128, 127])
@pytest.mark.parametrize(("bits", "w_value"), [(8, -128), (8, 127), (4, -8), (4, 7)])
@pytest.mark.parametrize("zero_point", [None, -128, 127])
def test_dynamic_does_not_saturate(lib, isa, bits, x_value, w_value, zero_point) -> None:
    m, n, k = 7, 65, 5000  # more than one panel of weights
    n_pad, k_pad = packing_cpu.padded_shape(n, k, 0, LAYOUTS[isa][1], bits)
    x_q, w_q = torch.full((m, k), x_value, dtype=torch.int8), torch.full((n, k), w_value, dtype=torch.int8)
    x_zp = None if zero_point is None else torch.full((m,), zero_point, dtype=torch.int32)
    scale = torch.ones(1, n_pad)
    packed = packing_cpu.pack(w_q, bits, k_pad, n_pad, LAYOUTS[isa][1])
    w_args = (packed, scale, None, packing_cpu.weight_sums(w_q, scale, 0, n_pad))
    y = run(getattr(lib, name(bits, torch.float32, torch.float32)), (m, n, k, 0), x_q, w_args, None, torch.float32, 0, True, 1, x_args=(torch.ones(m), x_zp))
    assert torch.equal(y, torch.full((m, n), float((x_value - (zero_point or 0)) * w_value * k)))


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 128])
def test_panels_and_row_blocks_are_stitched(lib, isa, bits, group) -> None:
    """K beyond one panel of weights, M beyond one block of rows."""
    torch.manual_seed(0)
    m, n, k = 200, 66, 9001
    groups, span = grouped(k, group)
    w_q, x, x_q = random_q(bits, n, k), torch.randn(m, k).bfloat16(), random_q(8, m, k)
    n_pad, k_pad = packing_cpu.padded_shape(n, k, group, LAYOUTS[isa][0], bits)
    packed = packing_cpu.pack(w_q, bits, k_pad, n_pad, LAYOUTS[isa][0])
    n_pad, k_pad = packing_cpu.padded_shape(n, k, group, LAYOUTS[isa][1], bits)
    packed_dynamic = packing_cpu.pack(w_q, bits, k_pad, n_pad, LAYOUTS[isa][1])
    scale = 2.0 ** torch.randint(-1, 2, (groups, n_pad)).float()
    w = dequantize(w_q, scale, None, span)
    weight_only, dynamic = getattr(lib, name(bits, torch.bfloat16, torch.float32, torch.float32)), getattr(lib, name(bits, torch.float32, torch.float32))
    for threads in (1, 4):
        y = run(weight_only, (m, n, k, group), x, (packed, scale, None), None, torch.float32, 0, True, threads)
        assert bool(((y - x.double() @ w.t()).abs() <= 1e-6 * (x.double().abs() @ (w.abs() + 1).t())).all())
        y = run(dynamic, (m, n, k, group), x_q, (packed_dynamic, scale, None, None), None, torch.float32, 0, True, threads, x_args=(None, None))
        assert torch.equal(y.double(), x_q.double() @ w.t())


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("m", [95, 96, 200])
def test_many_rows_read_a_panel(lib, isa, bits, group, m) -> None:
    """Whose weights are scaled where there are groups. With AVX512, from 96 rows on, such a weight is one bf16 number: half a unit
    of its eighth bit away from q * scale + offset.
    """
    torch.manual_seed(m)
    n, k = 70, 2111  # more than one panel, a ragged last group
    groups, span = grouped(k, group)
    w_q, x = random_q(bits, n, k), torch.randn(m, k).bfloat16()
    n_pad, k_pad = packing_cpu.padded_shape(n, k, group, LAYOUTS[isa][0], bits)
    scale, offset = torch.rand(groups, n_pad) + 0.1, torch.randn(groups, n_pad)
    packed = packing_cpu.pack(w_q, bits, k_pad, n_pad, LAYOUTS[isa][0])
    w = dequantize(w_q, scale, offset, span)
    function = getattr(lib, name(bits, torch.bfloat16, torch.float32, torch.float32))
    y = run(function, (m, n, k, group), x, (packed, scale, offset), None, torch.float32, 0, True, 1)
    error, most = (y - x.double() @ w.t()).abs(), x.double().abs() @ (w.abs() + 1).t()
    rounded = isa == "avx512" and group and m >= 96
    assert bool((error <= (2.0**-9 if rounded else 2e-6) * most).all())
    assert not rounded or bool((error > 2e-6 * most).any()), "the panel did not run"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_unpack_is_the_inverse_of_pack(kind, bits, group) -> None:
    torch.manual_seed(0)
    for n, k in itertools.product(N_SIZES, K_SIZES):
        n_pad, k_pad = packing_cpu.padded_shape(n, k, group, kind, bits)
        w_q = random_q(bits, n, k)
        packed = packing_cpu.pack(w_q, bits, k_pad, n_pad, kind)
        assert torch.equal(packed, packing_cpu.pack(w_q.t().contiguous().t(), bits, k_pad, n_pad, kind))
        assert packed.dtype == torch.uint8 and packed.is_contiguous() and packed.numel() == n_pad * k_pad * bits // 8
        assert torch.equal(packing_cpu.unpack(packed, bits, n, k, kind), w_q)
        padded = packing_cpu.unpack(packed, bits, n_pad, k_pad, kind)
        assert not padded[n:].any() and not padded[:, k:].any()


def test_groups_must_fit_the_step() -> None:
    with pytest.raises(ValueError, match="group_size 6"):
        packing_cpu.padded_shape(64, 64, 6, "cpu_vnni", 8)
