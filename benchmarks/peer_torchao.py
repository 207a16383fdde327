"""torchao as a peer: the config that means the same as a scheme of ours, on a plain nn.Linear, compiled as its users do."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from aoquant_inductor.scheme import Scheme, resolve


def config(scheme: str | Scheme, device: str) -> Any | None:
    """torchao's config for this scheme, or None where it has none (or is not installed)."""
    try:
        from torchao import quantization as ao
    except ImportError:
        return None
    s = resolve(scheme)
    group = s.weight.group_size
    if s.name == "int8wo":
        return ao.Int8WeightOnlyConfig()
    if s.name == "int8dq":
        return ao.Int8DynamicActivationInt8WeightConfig()
    if s.name.startswith("int4wo") and device == "cuda" and s.weight.zero_point == "float" and group is not None:
        return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    if s.name in ("int4wo-128", "int4wo-64", "int4wo-32") and device == "cuda":  # its own zero point is a float one
        return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
    if s.name in ("int8dq-int4w", "int8dq-int4w-32", "int8dq-int4w-64", "int8dq-int4w-128", "int8dq-int4w-256"):
        granularity = ao.PerAxis(0) if group is None else ao.PerGroup(group)
        return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=granularity)
    return None


def has(scheme: str | Scheme, device: str) -> bool:
    return config(scheme, device) is not None


def takes_one_row(scheme: Scheme) -> bool:
    """torch._int_mm, which serves int8dq, wants more than 16."""
    return scheme.activation is None or scheme.weight.bits == 4


def quantize(model: nn.Module, scheme: str | Scheme, device: str, names: Container[str] | None = None) -> bool:
    """Quantizes in place the linears of these names, or all; False where torchao has nothing for the scheme."""
    found = config(scheme, device)
    if found is None:
        return False
    from torchao.quantization import quantize_

    quantize_(model, found, lambda module, name: isinstance(module, nn.Linear) and (names is None or name in names))
    return True
