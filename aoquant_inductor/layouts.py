"""w_q -> the bytes that a kernel of this device wants, and back.

| layout     | w                                                         | scale, zero                                  |
|------------|-----------------------------------------------------------|----------------------------------------------|
| `plain`    | int8 [N, K]; int4: uint8 [N, ceil(K / 2)], q + 8, even k low | [G, N], as quantized                      |
| `wgmma`    | int8 [N, K], K in packing_cuda.wgmma_order                | [G, N], as quantized                         |
| `cuda_int8` | packing_cuda.py, int4 for int8 activations                | [G, N] up to the padded shape; int zeros bf16 |
| `cuda_bf16` | packing_cuda.py, int4 for bf16 activations                | the same; of groups below 128 as lay_groups  |
| `cpu_bf16` | packing_cpu.py, AVX512 and floating activations           | fp32 [G, N up to 64], q * scale + zero        |
| `cpu_vnni` | packing_cpu.py, AVX512 and int8 activations               | the same                                     |
| `cpu_fma`  | packing_cpu.py, AVX2 and floating activations             | fp32 [G, N up to 32], q * scale + zero        |
| `cpu_madd` | packing_cpu.py, AVX2 and int8 activations                 | the same                                     |

A layout is a value in LAYOUTS: the op names it, the lowering picks a kernel by it, `unpack` serves the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from aoquant_inductor import packing_cpu, packing_cuda
from aoquant_inductor.qparams import Quantized
from aoquant_inductor.scheme import DTYPES

WeightKey = tuple[int, int, str, int, str, str]
"""in_features, out_features, w_dtype, group_size, zero_point, layout: what an op is told about its weight."""


def rows_key(k: int, n: int, layout: str) -> WeightKey:
    """Of an int8 weight with one scale per row."""
    return (k, n, "int8", 0, "int", layout)


Place = Callable[..., tuple[tuple[Any, ...], Any]]
Strides = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Packed:
    """A weight as its kernel reads it, and what the op must be told; `zero_point` is the convention of `zero`.

    row[1, N], of a scheme with large_m: the scale of each row when the weight becomes int8 in the layout `int8_layout`.
    """

    w: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    sums: torch.Tensor | None
    shape: tuple[int, int]
    w_dtype: str
    group_size: int
    zero_point: str
    layout: str
    row: torch.Tensor | None = None

    @property
    def parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.w, self.scale, self.zero, self.sums, self.row

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in self.parts if t is not None)

    @property
    def key(self) -> WeightKey:
        return (self.shape[1], self.shape[0], self.w_dtype, self.group_size, self.zero_point, self.layout)

    @property
    def int8_key(self) -> WeightKey:
        """Of what requantize makes of it."""
        return rows_key(self.shape[1], self.shape[0], LAYOUTS[self.layout].int8_layout)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def strides(self) -> Strides:
        """How `tensors` lie in memory: not one after the other where this is a part of what lies side by side."""
        return tuple(t.stride() for t in self.tensors)

    def lies(self, strides: Strides) -> bool:
        """Whether they lie so, as far as there is more than one element to go."""
        return all(
            have == want or size == 1
            for t, wanted in zip(self.tensors, strides, strict=True)
            for size, have, want in zip(t.shape, t.stride(), wanted, strict=True)
        )

    def laid(self, strides: Strides) -> Packed:
        """A copy in these strides."""
        coming = iter(strides)
        w, scale, zero, sums, row = (
            None if t is None else torch.empty_strided(t.shape, next(coming), dtype=t.dtype, device=t.device).copy_(t)
            for t in self.parts
        )
        assert w is not None and scale is not None
        return replace(self, w=w, scale=scale, zero=zero, sums=sums, row=row)

    def copy_(self, other: Packed) -> None:
        """Other values into the same storage: compiled graphs and CUDA graphs hold these addresses."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)


@dataclass(frozen=True)
class Layout:
    """rows: weights whose N are multiples of it lie side by side in one pack, w along its first axis. int8_layout: that of int8
    weights for int8 activations, on the devices that have this one. locate: (bits, n, k, floor division, remainder) -> where
    w_q[n, k] is, as packing_cuda.locate; None where our own kernels do everything. signed: int4 in two's complement, not q + 8.
    """

    pack: Callable[[Quantized, bool], Packed]
    unpack: Callable[[torch.Tensor, int, int, str], torch.Tensor]
    rows: int
    bits: tuple[int, ...] = (4, 8)
    int8_layout: str = "plain"
    locate: Place | None = None
    signed: bool = False


def by_group(t: torch.Tensor) -> torch.Tensor:
    """A pack's scale or zero as [G, N up to the padded shape], whatever its layout."""
    return t if t.dim() == 2 else packing_cuda.by_group(t)


def _plain_pack(quantized: Quantized, sums: bool) -> Packed:
    spec, w = quantized.spec, quantized.w_q
    n, k = w.shape
    if spec.bits == 4:
        codes = (torch.nn.functional.pad(w, (0, k % 2)) + 8).view(torch.uint8)
        w = codes[:, 0::2] | (codes[:, 1::2] << 4)
    total = packing_cpu.weight_sums(quantized.w_q, quantized.scale, spec.group_size or 0, n)[None] if sums else None
    return Packed(
        w.contiguous(), quantized.scale, quantized.zero, total, (n, k), spec.dtype, spec.group_size or 0,
        spec.zero_point, "plain",
    )


def _plain_unpack(w: torch.Tensor, k: int, n: int, w_dtype: str) -> torch.Tensor:
    if DTYPES[w_dtype][0] == 8:
        return w
    return torch.stack((w & 15, w >> 4), -1).reshape(n, -1)[:, :k].view(torch.int8) - 8


def _place(kind: str) -> Place:
    if kind == "plain":
        return lambda bits, n, k, div, mod: ((n, k), 0) if bits == 8 else ((n, div(k, 2)), mod(k, 2) * 4)
    return lambda bits, *where: packing_cuda.locate(kind, *where)


def _wgmma() -> Layout:
    def pack(quantized: Quantized, sums: bool) -> Packed:
        plain = _plain_pack(quantized, sums)
        return replace(plain, w=packing_cuda.wgmma_order(plain.w).contiguous(), layout="wgmma")

    unpack = lambda w, k, n, w_dtype: packing_cuda.wgmma_order(w, back=True)  # noqa: E731
    return Layout(pack, unpack, 1, (8,), locate=_place("wgmma"))


def _cpu(kind: str, int8_layout: str) -> Layout:
    def pack(quantized: Quantized, sums: bool) -> Packed:
        spec, (n, k) = quantized.spec, quantized.w_q.shape
        group = spec.group_size or 0
        n_pad, k_pad = packing_cpu.padded_shape(n, k, group, kind, spec.bits)
        pad = (0, n_pad - n)
        scale = torch.nn.functional.pad(quantized.scale.float(), pad)
        zero = None
        if quantized.zero is not None:
            z = quantized.zero.float()
            zero = torch.nn.functional.pad(-z * quantized.scale.float() if spec.zero_point == "int" else z, pad)
        total = packing_cpu.weight_sums(quantized.w_q, scale, group, n_pad)[None] if sums else None
        w = packing_cpu.pack(quantized.w_q, spec.bits, k_pad, n_pad, kind)
        return Packed(w, scale, zero, total, (n, k), spec.dtype, group, "float", kind)

    def unpack(w: torch.Tensor, k: int, n: int, w_dtype: str) -> torch.Tensor:
        return packing_cpu.unpack(w, DTYPES[w_dtype][0], n, k, kind)

    return Layout(pack, unpack, packing_cpu.columns(kind), int8_layout=int8_layout)


def _cuda(kind: str) -> Layout:
    def pack(quantized: Quantized, sums: bool) -> Packed:
        spec, (n, k), groups = quantized.spec, quantized.w_q.shape, quantized.scale.shape[0]
        group = spec.group_size or 0
        n_pad, k_pad = packing_cuda.padded_shape(n, k)
        pad = (0, n_pad - n, 0, packing_cuda.padded_groups(k_pad, group, groups) - groups)
        scale = torch.nn.functional.pad(quantized.scale, pad)
        zero = None
        if quantized.zero is not None:
            zero_dtype = torch.bfloat16 if spec.zero_point == "int" else torch.float32  # -8..7 is exact in bf16
            zero = torch.nn.functional.pad(quantized.zero.to(zero_dtype), pad)
        total = packing_cpu.weight_sums(quantized.w_q, scale[:groups], group, n_pad)[None] if sums else None
        if kind == "cuda_bf16" and groups > 1 and group < packing_cuda.CHUNK:
            scale, zero = packing_cuda.lay_groups(scale, group), None if zero is None else packing_cuda.lay_groups(zero, group)
        w = packing_cuda.pack(quantized.w_q, kind)
        return Packed(w, scale, zero, total, (n, k), spec.dtype, group, spec.zero_point, kind)

    unpack = lambda w, k, n, w_dtype: packing_cuda.unpack(w, n, k, kind)  # noqa: E731
    return Layout(pack, unpack, packing_cuda.ROWS, (4,), locate=_place(kind), signed=kind == "cuda_int8")


LAYOUTS = {
    "plain": Layout(_plain_pack, _plain_unpack, 1, locate=_place("plain")), "wgmma": _wgmma(),
    **{kind: _cpu(kind, kinds[1]) for kinds in packing_cpu.LAYOUTS.values() for kind in kinds},
    "cuda_bf16": _cuda("cuda_bf16"), "cuda_int8": _cuda("cuda_int8"),
}
