"""Activations to int8 codes with one scale per token, a row of x: plain torch, which Inductor fuses into what makes x."""

from __future__ import annotations

import torch

from aoquant_inductor.qparams import SCALE_FLOOR

_ROUNDED = 0x4B400000
"""The bits of the fp32 1.5 * 2**23: added to it, a value of less than 2**22 becomes the nearest integer, to even on a tie, in
the lowest bits."""


def round_by_bits(values: torch.Tensor) -> torch.Tensor:
    """values.round() as int32, of fp32 within +-2**22: one sum, where a GPU rounds and converts at a quarter of its rate."""
    return (values + 1.5 * 2**23).view(torch.int32) - _ROUNDED


def amax_by_bits(sizes: torch.Tensor) -> torch.Tensor:
    """sizes[..., K].amax(-1, keepdim=True), of fp32 that is not negative: ordered as its bits are, NaN above all, for
    which a maximum of fp32 asks at every step.
    """
    return sizes.view(torch.int32).amax(-1, keepdim=True).view(torch.float32)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """values.round(), of fp32 within +-2**22, as integers or fp32: by what is fastest there, vectors of fp32 on a CPU."""
    return values.round() if values.device.type == "cpu" else round_by_bits(values)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x[..., K] -> x_q[..., K] int8 in -127..127, x_scale[..., 1] fp32; x ~ x_q * x_scale."""
    values = x.float()
    sizes = values.abs()
    peak = sizes.amax(-1, keepdim=True) if x.device.type == "cpu" else amax_by_bits(sizes)
    # a product, which is what eager CUDA and Inductor make of a division by a constant: the same codes everywhere
    scale = (peak * (1 / 127)).clamp_min(SCALE_FLOOR)
    # one division for a row: an element's own would cost a kernel more than its bytes do
    return _rounded(values * (1 / scale)).to(torch.int8), scale


def quantize_per_token_asym(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x[..., K] -> x_q[..., K] int8, x_scale[..., 1] fp32, x_zero[..., 1] int32; x ~ (x_q - x_zero) * x_scale."""
    values = x.float()
    low = values.amin(-1, keepdim=True).clamp_max(0)
    high = values.amax(-1, keepdim=True).clamp_min(0)
    scale = (high * (1 / 255) - low * (1 / 255)).clamp_min(SCALE_FLOOR)
    inverse = 1 / scale
    zero = (-128 - _rounded(low * inverse)).clamp(-128, 127)
    return (_rounded(values * inverse) + zero).clamp(-128, 127).to(torch.int8), scale, zero.to(torch.int32)
