"""How far a result is from another, for every benchmark that says so."""

from __future__ import annotations

import math

import torch


def sqnr_db(want: torch.Tensor, got: torch.Tensor) -> float:
    """10 log10(|want|^2 / |want - got|^2), in float64; inf of the same result, nan of one that is not finite."""
    want, got = want.double(), got.double()
    noise = float((got - want).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(float(want.square().sum()) / noise) if math.isfinite(noise) else math.nan
