"""The life of a packed weight: packed once per (weight, scheme, layout), shared by every graph, repacked in place.

A Parameter is the key. The store holds it weakly: when it dies its packs go too, with the last graph that holds them. What
changed is seen by `_version` (in-place writes, optimizer steps, load_state_dict) and by the data pointer
(`.data =`); writes that PyTorch does not count (`p.data.fill_`, numpy views, fused optimizers) are seen by nobody: `refresh`
repairs them.

The original may be let go: the Parameter stays, its memory does not (pointer 0), and whatever reads it raises ReleasedWeights'
text. New data (`.data =`) is packed at the next call and let go again; `bring_back` ends that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aoquant_inductor import native, ops, packing, qparams
from aoquant_inductor._inductor import memory_is_shared, plain_tensors
from aoquant_inductor.errors import ReleasedWeights
from aoquant_inductor.layouts import Packed, Strides
from aoquant_inductor.scheme import Scheme

PackKey = tuple[Scheme, str, str]
"""Scheme, layout, and what a second pack is for: to lie TOGETHER with those of other weights, or as a graph has it."""
TOGETHER = "together"
UNTRACKED = -1  # an inference tensor counts no versions


def _stamp(weight: torch.Tensor) -> tuple[int, int]:
    try:
        pointer = weight.data_ptr()
    except RuntimeError:  # it was let go
        pointer = 0
    return UNTRACKED if weight.is_inference() else weight._version, pointer


def pack_weight(weight: torch.Tensor, scheme: Scheme, layout: str) -> tuple[Packed, float]:
    """weight[N, K] -> its pack and the SQNR in dB of the quantized values. Raises qparams.NonFinite."""
    with plain_tensors():
        quantized = qparams.quantize(weight.detach(), scheme.weight, scheme.qparams)
        return packing.pack(quantized, scheme, layout), quantized.sqnr_db()


@dataclass(frozen=True)
class Release:
    """That an original goes once it is packed: `name` for the error of later uses, `to_cpu` keeps a copy in host memory."""

    name: str
    to_cpu: bool


class Entry:
    """One weight: its packs, and the state of the weight they were made from."""

    def __init__(self, weight: torch.Tensor) -> None:
        key, drop = id(weight), STORE.drop  # bound: at interpreter exit the global is gone before the last weight
        self.ref = weakref.ref(weight, lambda ref: drop(key, ref))
        self.version, self.pointer = _stamp(weight)
        self.packs: dict[PackKey, tuple[Packed, float]] = {}
        self.wholes: dict[PackKey, tuple[Packed, int]] = {}  # what a pack is a part of, and which
        self.loose: set[PackKey] = set()  # packs that no graph reads yet: they may still move
        self.repacks = 0
        self.release: Release | None = None
        self.copy: torch.Tensor | None = None  # of a released weight, if wanted

    @property
    def released(self) -> bool:
        """Whether the packs are all that is left."""
        weight = self.ref()
        return self.release is not None and weight is not None and _stamp(weight)[1] == 0 and weight.numel() > 0

    def stale(self) -> bool:
        weight = self.ref()
        if weight is None or _stamp(weight) == (self.version, self.pointer):
            return False
        if self.released:  # a write that failed counts as a version, too
            self._accept(weight)
            return False
        return True

    def _accept(self, weight: torch.Tensor) -> None:
        """The packs are of the weight as it is now."""
        self.version, self.pointer = _stamp(weight)
        STORE.turn()

    def repack(self) -> None:
        """New values into the same storage. Raises qparams.NonFinite, and then keeps the old values and the old stamp."""
        weight = self.ref()
        if weight is None or self.released:
            return
        stamp = _stamp(weight)
        fresh = {key: pack_weight(weight, *key[:2]) for key in self.packs}
        with plain_tensors():
            for key, (packed, sqnr) in fresh.items():
                self.packs[key][0].copy_(packed)
                self.packs[key] = (self.packs[key][0], sqnr)
        self.version, self.pointer, self.repacks = *stamp, self.repacks + 1
        STORE.turn()
        if self.release is not None:
            self.let_go(self.release)

    def let_go(self, release: Release) -> bool:
        """Frees the memory of the packed weight, if nothing else holds it: whether it is gone.

        Raises RuntimeError where there is no C++ compiler: no other way makes a later use an error instead of a crash.
        """
        weight = self.ref()
        if weight is None or self.released:
            return True
        free = native.module(STORE.turn).let_go
        if memory_is_shared(weight):
            return False
        with plain_tensors():
            self.copy = weight.detach().to("cpu", copy=True) if release.to_cpu else None
        free(weight, str(ReleasedWeights(release.name)))
        self.release = release
        self._accept(weight)
        return True

    def bring_back(self) -> bool:
        """Gives a released weight its data again: True, its own, from the copy; False, what its best pack dequantizes to."""
        weight, exact = self.ref(), self.copy is not None
        if weight is None or not self.released:
            return True
        with plain_tensors():
            if self.copy is not None:
                weight.data = self.copy.to(weight.device)
            else:
                packed, _ = max(self.packs.values(), key=lambda pack: pack[1])
                weight.data = ops.dequantize(packed.w, packed.scale, packed.zero, *packed.key, weight.dtype)
        self.release = self.copy = None
        self._accept(weight)
        return exact


class Store:
    """Parameter -> Entry, process-wide."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._lock = threading.RLock()
        self.packed = 0  # how often a weight was packed from scratch
        self.generation = 0  # how often any stamp changed, or the check got faster

    def turn(self) -> None:
        """Something changed that every Watch has to look at again."""
        self.generation += 1
        native.turn()

    def drop(self, key: int, ref: weakref.ref[torch.Tensor]) -> None:
        found = self._entries.get(key)
        if found is not None and found.ref is ref:  # else the id is in use again
            del self._entries[key]

    def find(self, weight: torch.Tensor) -> Entry | None:
        """The entry of a weight, if it was packed."""
        found = self._entries.get(id(weight))
        return found if found is not None and found.ref() is weight else None

    def entry(self, weight: torch.Tensor) -> Entry:
        with self._lock:
            found = self._entries[id(weight)] = self.find(weight) or Entry(weight)
            return found

    def pack(
        self, weight: torch.Tensor, scheme: Scheme, layout: str, loose: bool = False, strides: Strides | None = None
    ) -> tuple[Entry, Packed, float]:
        """The shared pack of a weight, made now if there is none, brought up to date if it is stale. loose: for no graph yet.
        strides: a second one that lies so in memory.

        Raises qparams.NonFinite and torch.OutOfMemoryError, and keeps nothing of the attempt; ReleasedWeights where the
        original is gone and another pack than its own is wanted.
        """
        with self._lock:
            entry = self.entry(weight)
            if entry.packs and entry.stale():
                entry.repack()
            key = (scheme, layout, "" if strides is None else str(strides))
            if key not in entry.packs:
                if entry.release is not None and entry.released:
                    raise ReleasedWeights(entry.release.name)
                stamp = _stamp(weight)
                packed, sqnr = pack_weight(weight, scheme, layout)
                entry.packs[key] = packed if strides is None else packed.laid(strides), sqnr
                entry.version, entry.pointer = stamp
                entry.loose.add(key)
                self.turn()
                self.packed += 1
            if not loose:
                entry.loose.discard(key)
            return (entry, *entry.packs[key])

    def pack_together(
        self, weights: Sequence[torch.Tensor], scheme: Scheme, layout: str, always: bool = False
    ) -> Packed | None:
        """One Packed over weights that one launch is to serve, their own packs views of it; None where the layout keeps them
        apart, or where graphs read them apart: then `always` makes second packs. Raises as `pack`.
        """
        with self._lock:
            entries = [self.entry(weight) for weight in weights]
            for key in ((scheme, layout, ""), (scheme, layout, TOGETHER)):
                if (found := _whole(entries, key)) is not None:
                    self.update(entries)
                    return found
                if not any(key in entry.packs and key not in entry.loose for entry in entries):
                    return self._pack_together(entries, weights, key)
                if not always:
                    return None
            raise ValueError("weights that lie together in one graph lie together with others in another.")

    def parts(self, weights: Sequence[torch.Tensor], scheme: Scheme, layout: str) -> list[Packed]:
        """What one Packed over these weights, made if there is none, has for each of them."""
        with self._lock:
            whole = self.pack_together(weights, scheme, layout, always=True)
            entries = [self.entry(weight) for weight in weights]
            key = next(key for key in entries[0].wholes if _whole(entries, key) is whole)
            return [entry.packs[key][0] for entry in entries]

    def _pack_together(self, entries: Sequence[Entry], weights: Sequence[torch.Tensor], key: PackKey) -> Packed | None:
        if gone := next((e.release for e in entries if key not in e.packs and e.release is not None and e.released), None):
            raise ReleasedWeights(gone.name)
        self.update([entry for entry in entries if entry.packs])
        stamps = [_stamp(weight) for weight in weights]
        apart = [e.packs.get(key) or pack_weight(weight, *key[:2]) for e, weight in zip(entries, weights, strict=True)]
        with plain_tensors():
            joined = packing.join([packed for packed, _ in apart])
        if joined is None:
            return None
        whole, parts = joined
        self.packed += sum(key not in entry.packs for entry in entries)
        for i, (entry, part) in enumerate(zip(entries, parts, strict=True)):
            entry.loose.discard(key)
            entry.packs[key], entry.wholes[key] = (part, apart[i][1]), (whole, i)
            entry.version, entry.pointer = stamps[i]
        self.turn()
        return whole

    def update(self, entries: Sequence[Entry], everything: bool = False) -> int:
        """Repack what is stale (or all of it) in place; the number of weights repacked."""
        with self._lock:
            todo = [e for e in entries if (everything and not e.released) or e.stale()]
            for entry in todo:
                entry.repack()
            return len(todo)

    def __len__(self) -> int:
        return len(self._entries)


def _whole(entries: Sequence[Entry], key: PackKey) -> Packed | None:
    """What exactly these packs, in this order, are the parts of."""
    wholes = [entry.wholes.get(key) for entry in entries]
    first = wholes[0]
    if first is None or [w and (id(w[0]), w[1]) for w in wholes] != [(id(first[0]), i) for i in range(len(wholes))]:
        return None
    return first[0] if first[0].shape[0] == sum(entry.packs[key][0].shape[0] for entry in entries) else None


STORE = Store()
