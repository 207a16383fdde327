"""Which layout of layouts.py a weight gets, and packs of it: made, joined, undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from aoquant_inductor import packing_cpu, qparams
from aoquant_inductor.card import Card
from aoquant_inductor.layouts import LAYOUTS, Packed
from aoquant_inductor.qparams import Quantized
from aoquant_inductor.scheme import QuantSpec, Scheme

ALIGNMENT = 16  # bytes; what Inductor promises a kernel of its arguments


def choose(scheme: Scheme, device: torch.device, dtype: torch.dtype, shape: Sequence[int]) -> str:
    """The layout of a weight[N, K] of `dtype` on `device`: one that serves every M."""
    if device.type == "cpu" and (isa := packing_cpu.instruction_set()) is not None:
        return packing_cpu.LAYOUTS[isa][scheme.activation is not None]
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return "plain"
    arch, spec, k = Card.of(device).arch, scheme.weight, shape[1]
    if spec.bits == 4 and arch >= 80 and dtype == torch.bfloat16:
        one_group = qparams.n_groups(k, spec.group_size) == 1
        if scheme.activation is not None and (one_group or (spec.group_size or k) >= 128):
            return "cuda_int8"
        if not (one_group and spec.zero_point == "float" and not spec.symmetric):
            return "cuda_bf16"
    if spec.bits == 8 and arch == 90 and scheme.activation is None and k % 64 == 0 and (spec.group_size or k) % 64 == 0:
        return "wgmma"
    return "plain"


def pack(quantized: Quantized, scheme: Scheme, layout: str) -> Packed:
    asymmetric = scheme.activation is not None and not scheme.activation.symmetric
    packed = LAYOUTS[layout].pack(quantized, asymmetric)
    if scheme.large_m is None:
        return packed
    rows, n = LAYOUTS[LAYOUTS[layout].int8_layout].rows, quantized.w_q.shape[0]
    return replace(packed, row=torch.nn.functional.pad(qparams.row_scale(quantized), (0, -n % rows), value=1))


def pack_rows(w_q: torch.Tensor, layout: str) -> torch.Tensor:
    """w_q[N, K] int8 of one scale per row -> w in `layout`."""
    nothing = torch.zeros((), device=w_q.device)
    scale = torch.empty(1, w_q.shape[0], device=w_q.device)
    return LAYOUTS[layout].pack(Quantized(w_q, scale, None, QuantSpec("int8"), nothing, nothing), False).w


def join(packs: Sequence[Packed]) -> tuple[Packed, list[Packed]] | None:
    """(one Packed of all their rows, the packs again as views of it); None where their layout keeps them apart, or a view would
    begin where no kernel loads 16 bytes at once.
    """
    first, rows = packs[0], [p.shape[0] for p in packs]
    if any(n % LAYOUTS[first.layout].rows for n in rows):
        return None

    def cat(tensors: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, Sequence[torch.Tensor | None]]:
        present = [t for t in tensors if t is not None]
        if not present:
            return None, tensors
        axis = 0 if present[0] is first.w or present[0].dim() > 2 else 1  # [G, N], or blocks of rows
        whole = torch.cat(present, axis)
        return whole, whole.split([t.shape[axis] for t in present], axis)

    w, w_parts = cat([p.w for p in packs])
    rest = [cat(tensors) for tensors in zip(*(p.parts[1:] for p in packs), strict=True)]

    def like(p: Packed, n: int, *tensors: torch.Tensor | None) -> Packed:
        w, scale, zero, sums, row = tensors
        assert w is not None and scale is not None
        return replace(p, w=w, scale=scale, zero=zero, sums=sums, row=row, shape=(n, p.shape[1]))

    parts = zip(packs, rows, w_parts, *(views for _, views in rest), strict=True)
    joined = like(first, sum(rows), w, *(whole for whole, _ in rest)), [like(*part) for part in parts]
    aligned = all(t.storage_offset() * t.itemsize % ALIGNMENT == 0 for part in joined[1] for t in part.tensors)
    return joined if aligned else None


def unpack(w: torch.Tensor, k: int, n: int, w_dtype: str, layout: str) -> torch.Tensor:
    """packed w -> w_q[N, K] int8."""
    return LAYOUTS[layout].unpack(w, k, n, w_dtype)


def packed_bytes(shape: torch.Size, dtype: torch.dtype, scheme: Scheme) -> int:
    """The size of a weight[N, K] of `dtype` in the plain layout, without packing it."""
    n, k = shape
    spec = scheme.weight
    groups = qparams.n_groups(k, spec.group_size)
    scale = groups * n * qparams.scale_dtype(dtype, spec).itemsize
    zero = 0 if spec.symmetric else groups * n * qparams.zero_dtype(spec).itemsize
    asymmetric = scheme.activation is not None and not scheme.activation.symmetric
    return n * -(-k * spec.bits // 8) + scale + zero + 4 * n * (asymmetric + (scheme.large_m is not None))
