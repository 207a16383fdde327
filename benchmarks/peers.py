"""The peers, by the name that their rows begin with: each quantizes a model's plain linears in place, as its users do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks import peer_gemlite, peer_torchao

HAS: Mapping[str, Callable[..., bool]] = {"torchao": peer_torchao.has, "gemlite": peer_gemlite.has}
"""has(scheme, device): whether the peer is installed and has what a scheme of ours means."""
QUANTIZE: Mapping[str, Callable[..., bool]] = {"torchao": peer_torchao.quantize, "gemlite": peer_gemlite.quantize}
"""quantize(model, scheme, device, names=None): the linears of these names, or all; False where the peer has no such scheme."""
