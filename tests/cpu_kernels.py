"""templates/cpu_linear.h through ctypes: each kernel by its name in a library, with unreadable pages behind every buffer."""

import ctypes
import itertools
import mmap
import shutil
import subprocess
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


def name(bits: int, *dtypes: torch.dtype) -> str:
    return "_".join(["linear", str(bits), *(C_TYPE[d] for d in dtypes)])


def library(isa: str, folder: Path) -> ctypes.CDLL:
    """The kernels of an instruction set, compiled in `folder`."""
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
