"""templates/cpu_linear.h through ctypes against float64, for each instruction set of this CPU, with unreadable pages behind every
buffer; packing_cpu as its own inverse.
"""

import ctypes
import functools
import itertools
import mmap
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aoquant_inductor import packing_cpu

HEADER = Path(packing_cpu.__file__).parent / "templates" / "cpu_linear.h"
FLAGS = "-std=c++17 -O3 -ffast-math -fopenmp -shared -fPIC -w".split()
MACHINE = {"avx512": ["-march=native"], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
LAYOUTS = packing_cpu.LAYOUTS
KINDS = [kind for kinds in LAYOUTS.values() for kind in kinds]

K_SIZES = (1, 2, 31, 32, 33, 127, 129, 576)
N_SIZES = (1, 7, 64, 65, 130)
M_SIZES = (0, 1, 5, 7, 13, 33)
GROUPS = (0, 32, 64, 128, 256)
C_TYPE = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
WEIGHT_ONLY = [  # (x, y, bias) dtypes
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
]
DYNAMIC = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]  # (y, bias)


def missing(isa: str) -> str | None:
    """Why its kernels cannot run here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    lacking = packing_cpu.NEEDS[isa] - flags
    return f"this CPU lacks {sorted(lacking)}" if lacking else None


each_isa = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.skipif(missing(isa) is not None, reason=str(missing(isa)))) for isa in LAYOUTS]
)


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small references: faster without torch's threads beside OpenMP's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name(bits: int, *dtypes: torch.dtype) -> str:
    return "_".join(["linear", str(bits), *(C_TYPE[d] for d in dtypes)])


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    return functools.cache(lambda isa: _build(isa, tmp_path_factory.mktemp(f"cpu_{isa}")))


@pytest.fixture
def lib(build, isa: str) -> ctypes.CDLL:
    return build(isa)


def _build(isa: str, folder: Path) -> ctypes.CDLL:
    lines = [f'#include "{HEADER}"', "using namespace aoquant;"]
    for bits, (x, y, b) in itertools.product((4, 8), WEIGHT_ONLY):
        X, Y, B = C_TYPE[x], C_TYPE[y], C_TYPE[b]
        lines.append(
            f'extern "C" void {name(bits, x, y, b)}(int64_t M, int64_t N, int64_t K, const {X}* x, int64_t ldx, const uint8_t* w, const float* s, const float* o,'
            f" int64_t g, const {B}* b, {Y}* y, int64_t ldy, int t) {{ linear_weight_only<{bits}>(M, N, K, x, ldx, w, s, o, g, b, y, ldy, t); }}"
        )
    for bits, (y, b) in itertools.product((4, 8), DYNAMIC):
        Y, B = C_TYPE[y], C_TYPE[b]
        lines.append(
            f'extern "C" void {name(bits, y, b)}(int64_t M, int64_t N, int64_t K, const int8_t* x, int64_t ldx, const float* xs, const int32_t* zp, const uint8_t* w,'
            f" const float* s, const float* o, int64_t g, const float* ws, const {B}* b, {Y}* y, int64_t ldy, int t)"
            f" {{ linear_dynamic<{bits}>(M, N, K, x, ldx, xs, zp, w, s, o, g, ws, b, y, ldy, t); }}"
        )
    (folder / "kernels.cpp").write_text("\n".join(lines))
    include = f'-DAOQUANT_ISA="cpu_{isa}.h"'
    subprocess.run(["g++", *FLAGS, *MACHINE[isa], include, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Fence:
    """Memory between two unreadable pages; `put` lays a tensor against the end (or the start) of it."""

    def __init__(self, size: int = 1 << 22) -> None:
        page = mmap.PAGESIZE
        self.size = size
        base = LIBC.mmap(None, size + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        self.start = base + page
        assert LIBC.mprotect(base, page, 0) == 0 and LIBC.mprotect(self.start + size, page, 0) == 0

    def put(self, t: torch.Tensor, at_end: bool = True) -> torch.Tensor:
        bytes_ = t.numel() * t.element_size()
        assert bytes_ <= self.size
        if not bytes_:
            return t
        place = self.start + (self.size - bytes_ if at_end else 0)
        view = torch.frombuffer((ctypes.c_char * bytes_).from_address(place), dtype=t.dtype).view(t.shape)
        return view.copy_(t)


FENCES = [Fence() for _ in range(9)]


def fenced(tensors: list[torch.Tensor | None], at_end: bool) -> list[torch.Tensor | None]:
    return [None if t is None else f.put(t, at_end) for f, t in zip(FENCES, tensors, strict=False)]


def strided(t: torch.Tensor, gap: int, fill: float) -> torch.Tensor:
    """t[M, C] inside a flat buffer with `gap` foreign elements between rows and none behind the last."""
    flat = torch.full((max(0, t.shape[0] * (t.shape[1] + gap) - gap),), fill, dtype=t.dtype)
    if t.shape[0]:
        flat.as_strided(t.shape, (t.shape[1] + gap, 1)).copy_(t)
    return flat


def rows_of(flat: torch.Tensor, m: int, n: int, gap: int) -> torch.Tensor:
    return flat.as_strided((m, n), (n + gap, 1)) if m else flat.new_empty((0, n))


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None or not t.numel() else t.data_ptr())


def integer(v: int) -> ctypes.c_int64:
    return ctypes.c_int64(v)


def random_q(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8)


def grouped(k: int, group: int) -> tuple[int, int]:
    """(G, group) as the kernels see them."""
    return (-(-k // group), group) if 0 < group < k else (1, k)


def dequantize(w_q: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group: int) -> torch.Tensor:
    n, k = w_q.shape
    g = torch.arange(k) // group
    w = w_q.double() * scale[g, :n].t().double()
    return w if offset is None else w + offset[g, :n].t().double()


def run(function, shape, x, w_args, bias, y_dtype, gap, at_end, threads, x_args=()):
    """Call a kernel with every buffer fenced and the rows of x and y `gap` elements apart; y[M, N]."""
    m, n, k, group = shape
    poison = float("nan") if x.dtype.is_floating_point else 99
    x_flat, y_flat = strided(x, gap, poison), strided(torch.zeros(m, n, dtype=y_dtype), gap, 77.0)
    y_flat.fill_(77.0)
    x_flat, y_flat, bias, *rest = fenced([x_flat, y_flat, bias, *x_args, *w_args], at_end)
    x_args, (w, scale, offset, *sums) = rest[: len(x_args)], rest[len(x_args) :]
    function(
        *map(integer, (m, n, k)), pointer(x_flat), integer(k + gap), *map(pointer, x_args), pointer(w), pointer(scale), pointer(offset), integer(group),
        *map(pointer, sums), pointer(bias), pointer(y_flat), integer(n + gap), threads,
    )  # fmt: skip
    y = rows_of(y_flat, m, n, gap).clone()
    if m:
        rows_of(y_flat, m, n, gap).fill_(77.0)
        assert bool((y_flat == 77.0).all()), "wrote between the rows of y"
    return y


def cases():
    """Every (K, N, M); the groups below K; sym/asym, bias, gaps, fence side and threads in turn."""
    turn = itertools.product((False, True), (True, False), (0, 3), (True, True, False), (1, 3))
    turns = itertools.cycle(turn)
    for k, n, m in itertools.product(K_SIZES, N_SIZES, M_SIZES):
        for group in GROUPS:
            if group < k or group == 256:
                for _ in range(2):
                    yield k, n, m, group, *next(turns)


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
