"""gemlite as a peer: its linears in the place of a model's, by the scheme that means the same; Triton kernels, CUDA only."""

from __future__ import annotations

import importlib.util
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from aoquant_inductor import qparams
from aoquant_inductor.scheme import Scheme, resolve


def has(scheme: str | Scheme, device: str) -> bool:
    """Whether it is installed and has such a scheme: per-channel int8, int4 in groups with or without zero points."""
    s = resolve(scheme)
    if device != "cuda" or importlib.util.find_spec("gemlite") is None:
        return False
    if s.weight.bits == 8:
        return s.weight.group_size is None and s.weight.symmetric and (s.activation is None or s.activation.symmetric)
    return s.activation is None and s.weight.zero_point != "float" and s.large_m is None


def layer(linear: nn.Linear, scheme: Scheme) -> nn.Module:
    """A linear of gemlite's with this one's weight, quantized by us where gemlite leaves that to others (int4)."""
    from gemlite import helper

    kind: dict[str, Any] = {"device": str(linear.weight.device), "dtype": linear.weight.dtype}
    made: nn.Module
    if scheme.weight.bits == 8:
        made = (helper.A16W8_INT8 if scheme.activation is None else helper.A8W8_INT8_dynamic)(**kind).from_linear(linear)
        return made
    q = qparams.quantize(linear.weight.detach(), scheme.weight)
    scale = q.scale.t().contiguous()
    # unsigned nibbles: (w - zero) * scale, with 8 on both sides
    zero = torch.full_like(scale, 8) if q.zero is None else q.zero.t().to(scale.dtype) + 8
    made = helper.A16W4_HQQ_INT(**kind).from_weights((q.w_q + 8).to(torch.uint8), scale, zero, linear.bias)
    return made


def quantize(model: nn.Module, scheme: str | Scheme, device: str, names: Container[str] | None = None) -> bool:
    """Replaces in place the linears of these names, or all; False where gemlite has nothing for the scheme."""
    if not has(scheme, device):
        return False
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and (names is None or name in names)]
    for name, linear in linears:
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, layer(linear, resolve(scheme)))
    return True
