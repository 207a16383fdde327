"""Weights to integers: (t[N, K], QuantSpec) -> w_q[N, K], scale[G, N], zero[G, N]; plain torch, any device.

G is the number of groups along K, 1 for a per-channel spec; the last group may be ragged. The convention of a zero is the
spec's: `int` t ~ (q - zero) * scale, `float` t ~ q * scale + zero. Scale and zero are laid [G, N] because every kernel walks
N contiguously within one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from aoquant_inductor.errors import AoquantError
from aoquant_inductor.scheme import QuantSpec

# The smallest normal float: a subnormal scale would be flushed to zero by some kernels. A group without any range has scale 0,
# so that a row of zeros gives exact zeros whatever a kernel's accumulator holds.
SCALE_FLOOR = torch.finfo(torch.float32).tiny
# Elements in fp32 at a time: packing must not need a second fp32 model. A CPU is faster while they stay in L2 (EPYC, 4096 x
# 4096, one thread: 0.07 s in pieces of 1 << 22, 0.045 s here); a GPU wants few launches.
_CHUNKS = {"cpu": 1 << 18}
_CHUNK = 1 << 24


class NonFinite(AoquantError, ValueError):
    """A weight holds NaN or Inf; `index` is the first such element, (n, k); `shape` of one that was packed before it did."""

    def __init__(self, index: tuple[int, int], shape: tuple[int, ...] | None = None) -> None:
        super().__init__(index, shape)
        self.index, self.shape = index, shape

    @property
    def found(self) -> str:
        return f"a non-finite value (first at [{self.index[0]}, {self.index[1]}])"

    def __str__(self) -> str:
        if self.shape is None:
            return self.found
        return f"a weight of shape {self.shape} was changed and holds {self.found}: it runs again once all of it is finite."


@dataclass(frozen=True)
class Quantized:
    """w_q[N, K] int8, scale[G, N] float, zero[G, N] int8 | fp32 | None; signal and noise are sums of squares (0-d fp64)."""

    w_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    spec: QuantSpec
    signal: torch.Tensor
    noise: torch.Tensor

    def sqnr_db(self) -> float:
        """10 log10(|t|^2 / |t - dequantize(q)|^2); inf when exact."""
        signal, noise = float(self.signal), float(self.noise)
        return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def n_groups(k: int, group_size: int | None) -> int:
    return 1 if group_size is None else -(-k // group_size)


def scale_dtype(t: torch.dtype, spec: QuantSpec) -> torch.dtype:
    """bf16 for groups of a half-precision weight (fp16 scales underflow), else fp32."""
    return torch.float32 if spec.group_size is None or t == torch.float32 else torch.bfloat16


def zero_dtype(spec: QuantSpec) -> torch.dtype:
    """fp32 for a float zero: it may be far from 0 where the step is small."""
    return torch.int8 if spec.zero_point == "int" else torch.float32


def _round_up(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To `dtype`, never below: a scale that shrank would clip the extremes by more than half a step."""
    low = scale.to(dtype)
    if dtype == torch.float32:
        return low
    return torch.where(low.float() < scale, (low.view(torch.int16) + 1).view(dtype), low)


def _scale(step: torch.Tensor, flat: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> torch.Tensor:
    """Step sizes of groups: 0 where the group is flat, else a normal number."""
    return _round_up(step.clamp_min(SCALE_FLOOR).masked_fill(flat, 0), scale_dtype(dtype, spec))


def _divide(t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return t / scale.float().clamp_min(SCALE_FLOOR)


def _minmax(t: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """t[N, G, g] fp32 -> scale[N, G], zero[N, G]; the range is the data's."""
    if spec.symmetric:
        top = t.abs().amax(-1)
        return _scale(top / spec.qmax, top == 0, spec, dtype), None
    low, high = t.amin(-1), t.amax(-1)
    if spec.zero_point == "int":  # zero must be on the grid
        low, high = low.clamp_max(0), high.clamp_min(0)
    steps = spec.qmax - spec.qmin
    scale = _scale(high / steps - low / steps, high == low, spec, dtype)  # high - low may overflow
    if spec.zero_point == "int":
        zero = spec.qmin - _divide(low, scale).round()
        return scale, zero.clamp(spec.qmin, spec.qmax).to(torch.int8)
    return scale, low - spec.qmin * scale.float()


ALGORITHMS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor | None]]] = {"minmax": _minmax}


def _to_grid(t: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    s = scale.unsqueeze(-1)
    if zero is None:
        q = _divide(t, s).round()
    elif spec.zero_point == "int":
        q = _divide(t, s).round() + zero.float().unsqueeze(-1)
    else:
        q = _divide(t - zero.unsqueeze(-1), s).round()
    return q.clamp(spec.qmin, spec.qmax)


def from_grid(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec_zero: str) -> torch.Tensor:
    """q[..., g] and scale, zero broadcast against it -> values; the one statement of the two zero conventions."""
    if zero is None:
        return q * scale
    return (q - zero) * scale if spec_zero == "int" else q * scale + zero


def _parts(t: torch.Tensor) -> Iterator[slice]:
    """The rows of t[N, K], a few at a time; at least 8 times for a large one, so that its fp32 pieces stay small beside it."""
    n, k = t.shape
    size = min(_CHUNKS.get(t.device.type, _CHUNK), max(t.numel() // 8, 1 << 16))
    rows = max(1, size // max(k, 1))
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def _first_non_finite(t: torch.Tensor) -> tuple[int, int]:
    for part in _parts(t):
        bad = (~torch.isfinite(t[part])).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            return part.start + row, column
    raise AssertionError("every element is finite")


def _rows(
    source: torch.Tensor, spec: QuantSpec, kind: torch.dtype, algorithm: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]]:
    """source[n, K] fp32 -> q[n, K] int8, scale[n, G], zero[n, G], (signal, noise); what else it needs is free at its end."""
    k = source.shape[1]
    g = spec.group_size or max(k, 1)
    groups = n_groups(k, spec.group_size)
    # replicate: the ragged tail repeats an element of its own group and so never widens its range
    padded = torch.nn.functional.pad(source, (0, groups * g - k), mode="replicate") if groups * g != k else source
    padded = padded.reshape(-1, groups, g)
    s, z = ALGORITHMS[algorithm](padded, spec, kind)
    q = _to_grid(padded, s, z, spec)
    w_q = q.reshape(-1, groups * g)[:, :k].to(torch.int8)
    error = from_grid(q, s.float().unsqueeze(-1), None if z is None else z.float().unsqueeze(-1), spec.zero_point)
    error = error.reshape(-1, groups * g)[:, :k].sub_(source)
    energies = [torch.linalg.vector_norm(part, dtype=torch.float64) ** 2 for part in (source, error)]
    return w_q, s, z, (energies[0], energies[1])


def quantize(t: torch.Tensor, spec: QuantSpec, algorithm: str = "minmax") -> Quantized:
    """(t[N, K] floating, QuantSpec) -> Quantized. |dequantize(q) - t| <= scale / 2 for min-max.

    Raises NonFinite with the first bad element.
    """
    n, k = t.shape
    groups = n_groups(k, spec.group_size)
    device, kind = t.device, t.dtype
    w_q = torch.empty(n, k, dtype=torch.int8, device=device)
    scale = torch.empty(groups, n, dtype=scale_dtype(kind, spec), device=device)
    zero: torch.Tensor | None = None
    if not spec.symmetric:
        zero = torch.empty(groups, n, dtype=zero_dtype(spec), device=device)
    signal, noise = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    for part in _parts(t):
        q, s, z, energies = _rows(t[part].float(), spec, kind, algorithm)
        w_q[part], scale[:, part] = q, s.t()
        if zero is not None and z is not None:
            zero[:, part] = z.t()
        signal += energies[0]
        noise += energies[1]
    if not math.isfinite(signal):  # a sum of finite fp32 squares fits fp64; asked once, since a GPU has to stop for the answer
        raise NonFinite(_first_non_finite(t))
    return Quantized(w_q, scale, zero, spec, signal, noise)


def dequantize(
    w_q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group_size: int | None, spec_zero: str = "int",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(w_q[N, K], scale[G, N], zero[G, N]) -> w[N, K] in `dtype`; the arithmetic is done in `dtype`."""
    k = w_q.shape[1]
    if scale.shape[0] == 1:
        s, z = scale.t(), None if zero is None else zero.t()
        return from_grid(w_q.to(dtype), s.to(dtype), None if z is None else z.to(dtype), spec_zero)
    g = group_size or k
    index = torch.arange(k, device=w_q.device) // g
    s = scale.to(dtype)[index].t()
    z = None if zero is None else zero.to(dtype)[index].t()
    return from_grid(w_q.to(dtype), s, z, spec_zero)


def row_scale(quantized: Quantized) -> torch.Tensor:
    """-> row[1, N] fp32: the scale of each row with which its dequantized values, of all its groups, fit int8; where the row is
    one group of integers, that group's own.
    """
    spec, scale, zero, n = quantized.spec, quantized.scale, quantized.zero, quantized.w_q.shape[0]
    if scale.shape[0] == 1 and (zero is None or spec.zero_point == "int"):
        return scale.float().clamp_min(SCALE_FLOOR)
    row = torch.empty(1, n, dtype=torch.float32, device=scale.device)
    for part in _parts(quantized.w_q):
        z = None if zero is None else zero[:, part]
        dense = dequantize(quantized.w_q[part], scale[:, part], z, spec.group_size, spec.zero_point)
        row[0, part] = (dense.abs_().amax(1) / 127).clamp_min(SCALE_FLOOR)
    return row


def to_rows(
    w_q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, row: torch.Tensor, group_size: int | None, spec_zero: str
) -> torch.Tensor:
    """(w_q[N, K], scale[G, N], zero[G, N], row[1, N]) -> int8[N, K] with the scales `row`: values in their units, rounded."""
    one = 1 / row
    z = zero if zero is None or spec_zero == "int" else zero.float() * one
    return dequantize(w_q, scale.float() * one, z, group_size, spec_zero).round_().to(torch.int8)
