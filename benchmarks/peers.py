"""The peers, by the name that their rows begin with: each quantizes a model's plain linears in place, as its users do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aoquant_inductor.scheme import Scheme
from benchmarks import peer_gemlite, peer_torchao


@dataclass(frozen=True)
class Peer:
    """has(scheme, device): it is installed, and has what a scheme of ours means.

    quantize(model, scheme, device, names=None): the linears of these names, or all; False where it has no such scheme.
    takes_one_row(scheme): its kernel runs where x has a single row.
    """

    has: Callable[[str | Scheme, str], bool]
    quantize: Callable[..., bool]
    takes_one_row: Callable[[Scheme], bool] = lambda scheme: True


PEERS: Mapping[str, Peer] = {
    "torchao": Peer(peer_torchao.has, peer_torchao.quantize, peer_torchao.takes_one_row),
    "gemlite": Peer(peer_gemlite.has, peer_gemlite.quantize),
}
