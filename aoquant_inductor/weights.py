"""The life of a packed weight: packed once per (weight, scheme, layout), shared by every graph, repacked in place.

A Parameter is the key. The store holds it weakly: when it dies its packs go too, with the last graph that holds them. What
changed is seen by `_version` (in-place writes, optimizer steps, load_state_dict) and by the data pointer
(`.data =`); writes that PyTorch does not count (`p.data.fill_`, numpy views, fused optimizers) are seen by nobody: `refresh`
repairs them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch

from aoquant_inductor import native, packing, qparams
from aoquant_inductor._inductor import plain_tensors
from aoquant_inductor.packing import Packed
from aoquant_inductor.scheme import Scheme

PackKey = tuple[Scheme, str]


UNTRACKED = -1  # an inference tensor counts no versions


def _stamp(weight: torch.Tensor) -> tuple[int, int]:
    return UNTRACKED if weight.is_inference() else weight._version, weight.data_ptr()


def pack_weight(weight: torch.Tensor, scheme: Scheme, layout: str) -> tuple[Packed, float]:
    """weight[N, K] -> its pack and the SQNR in dB of the quantized values. Raises qparams.NonFinite."""
    with plain_tensors():
        quantized = qparams.quantize(weight.detach(), scheme.weight, scheme.qparams)
        return packing.pack(quantized, scheme, layout), quantized.sqnr_db()


class Entry:
    """One weight: its packs, and the state of the weight they were made from."""

    def __init__(self, weight: torch.Tensor) -> None:
        key, drop = id(weight), STORE.drop  # bound: at interpreter exit the global is gone before the last weight
        self.ref = weakref.ref(weight, lambda _: drop(key))
        self.version, self.pointer = _stamp(weight)
        self.packs: dict[PackKey, tuple[Packed, float]] = {}
        self.repacks = 0

    def stale(self) -> bool:
        weight = self.ref()
        return weight is not None and _stamp(weight) != (self.version, self.pointer)

    def repack(self) -> None:
        """New values into the same storage. Raises qparams.NonFinite, and then keeps the old values and the old stamp."""
        weight = self.ref()
        if weight is None:
            return
        stamp = _stamp(weight)
        fresh = {key: pack_weight(weight, *key) for key in self.packs}
        with plain_tensors():
            for key, (packed, sqnr) in fresh.items():
                self.packs[key][0].copy_(packed)
                self.packs[key] = (self.packs[key][0], sqnr)
        self.version, self.pointer = stamp
        self.repacks += 1
        STORE.generation += 1


class Store:
    """Parameter -> Entry, process-wide."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._lock = threading.RLock()
        self.packed = 0  # how often a weight was packed from scratch
        self.generation = 0  # how often any stamp changed

    def drop(self, key: int) -> None:
        self._entries.pop(key, None)

    def entry(self, weight: torch.Tensor) -> Entry:
        with self._lock:
            found = self._entries.get(id(weight))
            if found is None or found.ref() is not weight:  # an id may be reused before the callback ran
                found = self._entries[id(weight)] = Entry(weight)
            return found

    def pack(self, weight: torch.Tensor, scheme: Scheme, layout: str) -> tuple[Entry, Packed, float]:
        """The shared pack of a weight, made now if there is none, brought up to date if it is stale."""
        with self._lock:
            entry = self.entry(weight)
            if entry.packs and entry.stale():
                entry.repack()
            key = (scheme, layout)
            if key not in entry.packs:
                entry.version, entry.pointer = _stamp(weight)
                self.generation += 1
                entry.packs[key] = pack_weight(weight, scheme, layout)
                self.packed += 1
            return (entry, *entry.packs[key])

    def update(self, entries: Sequence[Entry], everything: bool = False) -> int:
        """Repack what is stale (or all of it) in place; the number of weights repacked."""
        with self._lock:
            todo = [e for e in entries if everything or e.stale()]
            for entry in todo:
                entry.repack()
            return len(todo)

    def __len__(self) -> int:
        return len(self._entries)


STORE = Store()


def _new_generation() -> None:
    STORE.generation += 1


def settle() -> str:
    """Waits for the C++ check to be built; returns what the check runs in. For benchmarks: a user's call never waits."""
    native.start(_new_generation).join()
    return native.state()


class Watch:
    """The weights of one graph as they were when its packs were made; asked at every call of a checked graph.

    In C++ once that is built (native.py), until then in list comprehensions.
    """

    __slots__ = ("entries", "generation", "native", "pointers", "refs", "tracked", "versions")

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries = tuple(dict.fromkeys(entries))
        self.refs = tuple(entry.ref for entry in entries)
        native.start(_new_generation)
        self._sync()

    def _sync(self) -> None:
        self.generation = STORE.generation
        tracked = [entry for entry in self.entries if entry.version != UNTRACKED]
        self.tracked = [entry.ref for entry in tracked]
        self.versions = [entry.version for entry in tracked]
        self.pointers = [entry.pointer for entry in self.entries]
        kind = native.watch_type()
        self.native = kind and kind(self.refs, [entry.version for entry in self.entries], self.pointers)

    def stale(self) -> bool:
        """Whether a weight changed since it was packed; never true of a weight that is gone."""
        if self.generation != STORE.generation:
            # Another graph may have repacked: against stamps of one's own, a new storage at an old address looks unchanged.
            self._sync()
        if self.native is not None:
            return self.native() and self._confirmed()
        try:
            return (
                [ref()._version for ref in self.tracked] != self.versions  # type: ignore[union-attr]
                or [ref().data_ptr() for ref in self.refs] != self.pointers  # type: ignore[union-attr]
            )
        except (AttributeError, RuntimeError):  # a weight is gone, or became an inference tensor
            return self._confirmed()

    def _confirmed(self) -> bool:
        return any(entry.stale() for entry in self.entries)

    def update(self) -> None:
        """Repack in place what changed, and remember the weights as they are now."""
        STORE.update(self.entries)
        self._sync()
