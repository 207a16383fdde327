"""One linear as a benchmark's problem: how many copies of its weight leave the cache, and the least time it must take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aoquant_inductor.scheme import resolve
from benchmarks.shapes import Shape

COLD_BYTES, MOST_COPIES = 240e6, 160  # weights in one CUDA graph; the L2 of an H200 holds 60e6
READ = {"H200": 4.37e12, "H100": 3.35e12}  # bytes/s: measured; by the data sheet
BF16, INT8 = 779e12, 1558e12  # of both: FLOP/s measured, OP/s twice that


@dataclass
class Problem:
    """One shape at one M on one device."""

    shape: Shape
    m: int
    device: str
    reps: int

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    def roofline(self, scheme: str) -> float:
        """Microseconds on this card, or an H200: every byte once, or the multiplications, whichever is more."""
        n, k = self.shape
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        read = next((rate for card, rate in READ.items() if card in name), READ["H200"])
        bits = 16.0
        compute = BF16
        if scheme != "bf16":
            s = resolve(scheme)
            bits = s.weight.bits + (16 / s.weight.group_size if s.weight.group_size else 0)
            compute = INT8 if s.activation else BF16
        size = n * k * bits / 8 + 2 * self.m * (n + k)
        return max(size / read, 2 * self.m * n * k / compute) * 1e6

    def copies(self, bits: float) -> int:
        if self.device == "cpu":
            return 1
        n, k = self.shape
        return max(2, min(MOST_COPIES, -(-int(COLD_BYTES) // int(n * k * bits / 8))))
