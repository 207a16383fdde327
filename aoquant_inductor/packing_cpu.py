"""w_q[N, K] int8 -> the bytes that templates/cpu_linear.h reads, and back; plain torch.

A packed weight is [n_pad / 64, k_pad / step] rows of 64 columns x `step` values of k: step 2 for "cpu_bf16" (vdpbf16ps), 4 for
"cpu_vnni" (vpdpbusd).
Each table below names the axes of a row in memory order; the byte codes make the kernel's decoding short:

| kind     | bits | byte code                    | axes of a row, slowest first (n within 64, k within the step)             |
|----------|------|------------------------------|---------------------------------------------------------------------------|
| cpu_bf16 | 8    | sign(q) << 7, q >= 0 ? q: ~q | n // 32, n // 4 % 4, n // 16 % 2, n % 4, k                                |
| cpu_bf16 | 4    | nibble q + 8                 | n % 16, k, n // 32 (byte), n // 16 % 2 (nibble, low first)                |
| cpu_vnni | 8    | q + 128                      | n, k                                                                      |
| cpu_vnni | 4    | nibble q + 8                 | n // 32, n % 16, k, n // 16 % 2 (nibble, low first)                       |
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

COLUMNS = 64
STEP = {"cpu_bf16": 2, "cpu_vnni": 4}


NEEDS = frozenset(["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512_vnni", "avx512_bf16"])


@functools.cache
def available() -> bool:
    """Whether this CPU runs templates/cpu_linear.h; asked of Linux, since torch's own queries differ between versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) >= NEEDS


def padded_shape(n: int, k: int, group_size: int, kind: str) -> tuple[int, int]:
    """(n_pad, k_pad) for w_q[n, k]; group_size 0 or >= k: one scale per channel."""
    unit = group_size if 0 < group_size < k else STEP[kind]
    if unit % STEP[kind]:
        raise ValueError(f"group_size {group_size} is not a multiple of {STEP[kind]}, the step of {kind}")
    return -(-n // COLUMNS) * COLUMNS, -(-k // unit) * unit


def pack_vnni(w_q: Tensor, bits: int, k_pad: int, n_pad: int, kind: str) -> Tensor:
    """w_q[N, K] int8, values of `bits` bits -> uint8[n_pad / 64, k_pad / step, 64 * step * bits / 8]; padded with q = 0."""
    step = STEP[kind]
    n, k = w_q.shape
    if (n, k) != (n_pad, k_pad):
        w_q = torch.nn.functional.pad(w_q, (0, k_pad - k, 0, n_pad - n))
    w_q, blocks, steps = w_q.contiguous(), n_pad // COLUMNS, k_pad // step
    # one element of `word` per (n, step): the k of a step move together
    word = {2: torch.int16, 4: torch.int32}[step]
    if bits == 8:
        code = w_q ^ ((w_q >> 7) & 0x7F) if kind == "cpu_bf16" else w_q ^ -128
        words = code.view(word)  # [n_pad, steps]
        if kind == "cpu_bf16":
            rows = words.view(blocks, 2, 2, 4, 4, steps).permute(0, 5, 1, 3, 2, 4)
        else:
            rows = words.view(blocks, COLUMNS, steps).permute(0, 2, 1)
        return rows.contiguous().view(blocks, steps, COLUMNS).view(torch.uint8)
    nibbles = ((w_q + 8) & 15).view(torch.uint8).view(blocks, 2, 2, 16, k_pad)
    pairs = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)  # [blocks, n // 32, n % 16, k_pad]
    if kind == "cpu_bf16":
        rows = pairs.view(blocks, 2, 16, steps, 2).permute(0, 3, 2, 4, 1)
    else:
        rows = pairs.view(torch.int32).permute(0, 3, 1, 2)
    return rows.contiguous().view(blocks, steps, -1).view(torch.uint8)


def unpack_vnni(packed: Tensor, bits: int, n: int, k: int, kind: str) -> Tensor:
    """uint8[n_pad / 64, k_pad / step, 64 * step * bits / 8] -> w_q[n, k] int8; the inverse of `pack_vnni`."""
    step = STEP[kind]
    word = {2: torch.int16, 4: torch.int32}[step]
    blocks, steps = packed.shape[:2]
    n_pad, k_pad = blocks * COLUMNS, steps * step
    if bits == 8:
        words = packed.view(word)
        if kind == "cpu_bf16":
            words = words.view(blocks, steps, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1)
        else:
            words = words.permute(0, 2, 1)
        code = words.flatten().view(torch.int8).view(n_pad, k_pad)
        w_q = code ^ ((code >> 7) & 0x7F) if kind == "cpu_bf16" else code ^ -128
        return w_q[:n, :k].contiguous()
    if kind == "cpu_bf16":
        pairs = packed.view(blocks, steps, 16, 2, 2).permute(0, 4, 2, 1, 3)
    else:
        pairs = packed.view(torch.int32).view(blocks, steps, 2, 16).permute(0, 2, 3, 1).flatten().view(torch.uint8)
    pairs = pairs.reshape(blocks, 2, 1, 16, k_pad)
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
