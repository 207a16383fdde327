"""w_q[N, K] int8 -> the bytes that templates/cpu_linear.h reads, and back; plain torch.

A packed weight is [n_pad / columns, k_pad / step] rows of 4 * lanes columns x `step` values of k, for vectors of so many lanes
of 32 bits: 16 with AVX512 ("cpu_bf16" for vdpbf16ps, "cpu_vnni" for vpdpbusd), 8 with AVX2 ("cpu_fma" for vfmadd, "cpu_madd"
for vpmaddwd and, of int4, vpmaddubsw).
Each table below names the axes of a row in memory order; the byte codes make the kernel's decoding short:

| kind     | bits | step | byte code                    | axes of a row, slowest first (n within columns, k within step)    |
|----------|------|------|------------------------------|-------------------------------------------------------------------|
| cpu_bf16 | 8    | 2    | sign(q) << 7, q >= 0 ? q: ~q | n // 32, n // 4 % 4, n // 16 % 2, n % 4, k                        |
| cpu_bf16 | 4    | 2    | nibble q + 8                 | n % 16, k, n // 32 (byte), n // 16 % 2 (nibble, low first)        |
| cpu_vnni | 8    | 4    | q + 128                      | n, k                                                              |
| cpu_vnni | 4    | 4    | nibble q + 8                 | n // 32, n % 16, k, n // 16 % 2 (nibble, low first)               |
| cpu_fma  | 8    | 2    | q                            | k, n                                                              |
| cpu_fma  | 4    | 2    | nibble q + 8                 | n % 8, k, n // 16 (byte), n // 8 % 2 (nibble, low first)          |
| cpu_madd | 8    | 2    | q                            | n, k                                                              |
| cpu_madd | 4    | 4    | nibble q + 8                 | n // 16, n % 8, k, n // 8 % 2 (nibble, low first)                 |
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

LANES = {"cpu_bf16": 16, "cpu_vnni": 16, "cpu_fma": 8, "cpu_madd": 8}
LAYOUTS = {"avx512": ("cpu_bf16", "cpu_vnni"), "avx2": ("cpu_fma", "cpu_madd")}
"""instruction set -> its layouts, weight-only and dynamic."""

NEEDS = {
    "avx512": frozenset(["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bf16"]),
    "avx2": frozenset(["avx2", "fma", "f16c"]),
}
"""instruction set -> what Linux calls what its templates/cpu_<instruction set>.h needs; the best first."""


@functools.cache
def instruction_set() -> str | None:
    """The best of NEEDS that this CPU has, which its weights are packed for; None where there are no kernels of ours. Asked of
    Linux, since torch's own queries differ between versions.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return next((name for name, needs in NEEDS.items() if flags >= needs), None)


def columns(kind: str) -> int:
    return 4 * LANES[kind]


def step(kind: str, bits: int) -> int:
    return 4 if kind == "cpu_vnni" or (kind, bits) == ("cpu_madd", 4) else 2


def padded_shape(n: int, k: int, group_size: int, kind: str, bits: int) -> tuple[int, int]:
    """(n_pad, k_pad) for w_q[n, k]; group_size 0 or >= k: one scale per channel."""
    unit = group_size if 0 < group_size < k else step(kind, bits)
    if unit % step(kind, bits):
        raise ValueError(f"group_size {group_size} is not a multiple of {step(kind, bits)}, the step of {kind}")
    return -(-n // columns(kind)) * columns(kind), -(-k // unit) * unit


def _code8(t: Tensor, kind: str) -> Tensor:
    """The bytes of int8, and back."""
    if kind == "cpu_bf16":
        return t ^ ((t >> 7) & 0x7F)
    return t ^ -128 if kind == "cpu_vnni" else t


def pack(w_q: Tensor, bits: int, k_pad: int, n_pad: int, kind: str) -> Tensor:
    """w_q[N, K] int8, values of `bits` bits -> uint8[n_pad / columns, k_pad / step, bytes of a row]; padded with q = 0."""
    each, width, lanes = step(kind, bits), columns(kind), LANES[kind]
    n, k = w_q.shape
    if (n, k) != (n_pad, k_pad):
        w_q = torch.nn.functional.pad(w_q, (0, k_pad - k, 0, n_pad - n))
    w_q, blocks, steps = w_q.contiguous(), n_pad // width, k_pad // each
    # one element of `word` per (n, step): the k of a step move together
    word = {2: torch.int16, 4: torch.int32}[each]
    if bits == 8:
        code = _code8(w_q, kind)
        if kind == "cpu_fma":
            return code.view(blocks, width, steps, 2).permute(0, 2, 3, 1).contiguous().view(blocks, steps, -1).view(torch.uint8)
        words = code.view(word)  # [n_pad, steps]
        if kind == "cpu_bf16":
            rows = words.view(blocks, 2, 2, 4, 4, steps).permute(0, 5, 1, 3, 2, 4)
        else:
            rows = words.view(blocks, width, steps).permute(0, 2, 1)
        return rows.contiguous().view(blocks, steps, width).view(torch.uint8)
    nibbles = ((w_q + 8) & 15).view(torch.uint8).view(blocks, 2, 2, lanes, k_pad)
    pairs = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)  # [blocks, n // (2 * lanes), n % lanes, k_pad]
    if each == 2:
        rows = pairs.view(blocks, 2, lanes, steps, 2).permute(0, 3, 2, 4, 1)
    else:
        rows = pairs.view(torch.int32).permute(0, 3, 1, 2)
    return rows.contiguous().view(blocks, steps, -1).view(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int, k: int, kind: str) -> Tensor:
    """uint8[n_pad / columns, k_pad / step, bytes of a row] -> w_q[n, k] int8; the inverse of `pack`."""
    each, width, lanes = step(kind, bits), columns(kind), LANES[kind]
    word = {2: torch.int16, 4: torch.int32}[each]
    blocks, steps = packed.shape[:2]
    n_pad, k_pad = blocks * width, steps * each
    if bits == 8:
        if kind == "cpu_fma":
            words = packed.view(blocks, steps, 2, width).permute(0, 3, 1, 2)
        elif kind == "cpu_bf16":
            words = packed.view(word).view(blocks, steps, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1)
        else:
            words = packed.view(word).permute(0, 2, 1)
        w_q = _code8(words.flatten().view(torch.int8).view(n_pad, k_pad), kind)
        return w_q[:n, :k].contiguous()
    if each == 2:
        pairs = packed.view(blocks, steps, lanes, 2, 2).permute(0, 4, 2, 1, 3)
    else:
        pairs = packed.view(torch.int32).view(blocks, steps, 2, lanes).permute(0, 2, 3, 1).flatten().view(torch.uint8)
    pairs = pairs.reshape(blocks, 2, 1, lanes, k_pad)
    w_q = torch.cat((pairs & 15, pairs >> 4), 2).view(torch.int8) - 8
    return w_q.reshape(n_pad, k_pad)[:n, :k].contiguous()


def weight_sums(w_q: Tensor, scale: Tensor, group_size: int, n_pad: int) -> Tensor:
    """(w_q[N, K] int8, scale[G, n_pad]) -> float32[n_pad], what a zero point of x multiplies.

    sum_k w_q when G = 1 (exact integers, which leave the integer accumulator), else sum_k w_q * scale.
    """
    n, k = w_q.shape
    group = group_size if 0 < group_size < k else k
    groups = -(-k // group)
    padded = torch.nn.functional.pad(w_q, (0, groups * group - k, 0, n_pad - n))
    sums = padded.view(n_pad, groups, group).sum(-1, dtype=torch.int32).t()
    return sums[0].float() if groups == 1 else (sums.double() * scale).sum(0).float()
