"""int4 w_q[N, K] int8 -> the words that templates/int4_*.py.jinja read, and back; plain torch, on the weight's own device.

A packed weight is [n_pad / 8, k_pad / 128, 8 rows, 64 bytes]: a warp reads 8 rows x 128 of K as 512 consecutive bytes. What a
thread reads is what the tensor core wants of it in registers:

| kind      | nibble       | bytes of a row, slowest first (k within 128)           | in a byte, low nibble first | element |
|-----------|--------------|--------------------------------------------------------|-----------------------------|---------|
| cuda_bf16 | q + 8        | k // 2 % 4 (lane), k // 32 (word), k % 2, k // 16 % 2  | k // 8 % 2                  | int32   |
| cuda_int8 | q, two's c.  | k % 64                                                 | k // 64                     | uint8   |

cuda_bf16: lane i of four holds columns 2i, 2i + 1, 2i + 8, 2i + 9 of every 16, as mma.sync and wgmma ask; the two of a pair lie
16 bits apart, where one lop3 makes two bf16 of them. Rows: of every 16, the even ones come first, then the odd ones. A thread
holds rows i and i + 8 of what it is given: so these are neighbours in the weight, and their scales one word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROWS = 16
CHUNK = 128


def padded_shape(n: int, k: int) -> tuple[int, int]:
    """(n_pad, k_pad) for w_q[n, k]."""
    return -(-n // ROWS) * ROWS, -(-k // CHUNK) * CHUNK


def padded_groups(k_pad: int, group_size: int, groups: int) -> int:
    """Rows of scale and zero: as many as k_pad holds, 1 for one group per row."""
    return groups if groups == 1 else max(groups, -(-k_pad // group_size))


def pack(w_q: Tensor, kind: str) -> Tensor:
    """w_q[N, K] int8 in -8..7 -> int32[n_pad / 8, k_pad / 128, 8, 16] or uint8[..., 64]; padded with q = 0."""
    n, k = w_q.shape
    n_pad, k_pad = padded_shape(n, k)
    if (n, k) != (n_pad, k_pad):
        w_q = torch.nn.functional.pad(w_q, (0, k_pad - k, 0, n_pad - n))
    blocks, chunks = n_pad // 16, k_pad // CHUNK
    if kind == "cuda_int8":
        nibbles = (w_q & 15).view(torch.uint8).view(blocks, 8, 2, chunks, 2, 64)
        rows = nibbles[:, :, :, :, 0] | (nibbles[:, :, :, :, 1] << 4)  # block, row // 2, row % 2, chunk, k % 64
        return rows.permute(0, 2, 3, 1, 4).reshape(2 * blocks, chunks, 8, 64).contiguous()
    nibbles = (w_q + 8).view(torch.uint8).view(blocks, 8, 2, chunks, 4, 2, 2, 4, 2)
    rows = nibbles[..., 0, :, :] | (nibbles[..., 1, :, :] << 4)  # block, row // 2, row % 2, chunk, k // 32, 16, 2, 1
    return rows.permute(0, 2, 3, 1, 6, 4, 7, 5).reshape(2 * blocks, chunks, 8, 64).contiguous().view(torch.int32)


def lay_groups(t: Tensor, group_size: int) -> Tensor:
    """scale or zero t[G, n_pad] of groups of 32 or 64 -> [n_pad / 16, k_pad / 128, 8, 128 / group_size, 2]: side by side what
    a thread wants of a chunk, two rows with all their groups.
    """
    some = CHUNK // group_size
    return t.view(-1, some, t.shape[1] // ROWS, ROWS // 2, 2).permute(2, 0, 3, 1, 4).contiguous()


def by_group(t: Tensor) -> Tensor:
    """The inverse of `lay_groups`: t[G, n_pad]."""
    return t.permute(1, 3, 0, 2, 4).reshape(-1, t.shape[0] * ROWS)


def unpack(packed: Tensor, n: int, k: int, kind: str) -> Tensor:
    """The inverse of `pack`: w_q[n, k] int8."""
    blocks, chunks = packed.shape[0] // 2, packed.shape[1]
    w = packed.view(torch.uint8)
    if kind == "cuda_int8":
        nibbles = torch.stack((w & 15, w >> 4), 3) ^ 8
        rows = nibbles.view(blocks, 2, chunks, 8, 2, 64).permute(0, 3, 1, 2, 4, 5)
    else:
        nibbles = torch.stack((w & 15, w >> 4), 4)  # the last two: byte, nibble
        rows = nibbles.view(blocks, 2, chunks, 8, 4, 4, 2, 2, 2).permute(0, 3, 1, 2, 5, 7, 8, 4, 6)
    w_q = rows.reshape(blocks * 16, chunks * CHUNK).view(torch.int8) - 8
    return w_q[:n, :k].contiguous()


def wgmma_order(w: Tensor, back: bool = False) -> Tensor:
    """w[N, K] with k = 16a + 8b + 2c + d of every 64 at 16c + 4a + 2b + d: the 16 bytes that one thread of a warpgroup holds of
    its register operand are neighbours. Hopper's, of the 16-bit types. `back` undoes it.
    """
    n, k = w.shape
    sizes, order = ((4, 4, 2, 2), (0, 1, 3, 4, 2, 5)) if back else ((4, 2, 4, 2), (0, 1, 4, 2, 3, 5))
    return w.reshape(n, k // 64, *sizes).permute(order).reshape(n, k)


def locate(kind: str, n: Any, k: Any, div: Callable[..., Any], mod: Callable[..., Any]) -> tuple[tuple[Any, ...], Any]:
    """(index of the element that holds w_q[n, k], how many bits it lies above the lowest); n and k may be symbols."""
    bit = lambda value, step, size: mod(div(value, step), size)  # noqa: E731
    if kind == "wgmma":
        return (n, div(k, 64) * 64 + 16 * bit(k, 2, 4) + 4 * bit(k, 16, 4) + 2 * bit(k, 8, 2) + mod(k, 2)), 0
    block = div(n, 16) * 2 + mod(n, 2)
    row, chunk = bit(n, 2, 8), div(k, CHUNK)
    if kind == "cuda_int8":
        return (block, chunk, row, mod(k, 64)), 4 * bit(k, 64, 2)
    return (block, chunk, row, bit(k, 2, 4) * 4 + bit(k, 32, 4)), 4 * bit(k, 8, 2) + 8 * bit(k, 16, 2) + 16 * mod(k, 2)


def locate_group(group: Any, n: Any, group_size: int, div: Callable[..., Any], mod: Callable[..., Any]) -> tuple[Any, ...]:
    """The index of row n's scale of a group in `lay_groups`; both may be symbols."""
    some = CHUNK // group_size
    return div(n, ROWS), div(group, some), div(mod(n, ROWS), 2), mod(group, some), mod(n, 2)
