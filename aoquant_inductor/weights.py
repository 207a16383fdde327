"""The life of a packed weight: packed once per (weight, scheme, layout), shared by every graph, repacked in place.

A Parameter is the key. The store holds it weakly: when it dies its packs go too, with the last graph that holds them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

import torch

from aoquant_inductor import native, packing
from aoquant_inductor._inductor import plain_tensors
from aoquant_inductor.entry import Entry, PackKey, pack_weight, stamp_of
from aoquant_inductor.errors import ReleasedWeights
from aoquant_inductor.layouts import Packed, Strides
from aoquant_inductor.scheme import Scheme

TOGETHER = "together"


class Store:
    """Parameter -> Entry, process-wide."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self.lock = threading.RLock()
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
        """That of a weight; a new one where it got data of another shape, and no graph with the packs of before runs again."""
        with self.lock:
            found = self.find(weight)
            if found is None or not found.fits():
                fresh = self._entries[id(weight)] = Entry(weight, self)
                if found is not None:
                    fresh.trains, fresh.restored = found.trains, found.restored
                    self._close(found)
                return fresh
            return found

    def _close(self, entry: Entry) -> None:
        """With the second packs of others that lie together with its own."""
        for key, (_, _, refs) in entry.wholes.items():
            for ref in refs if key[2] else ():
                weight = ref()
                other = None if weight is None else self.find(weight)
                if other is not None and other is not entry:
                    other.packs.pop(key, None)
                    other.wholes.pop(key, None)
        entry.close()

    def pack(
        self, weight: torch.Tensor, scheme: Scheme, layout: str, loose: bool = False, strides: Strides | None = None
    ) -> tuple[Entry, Packed, float]:
        """The shared pack of a weight, made now if there is none, brought up to date if it is stale. loose: for no graph yet.
        strides: a second one that lies so in memory.

        Raises qparams.NonFinite and torch.OutOfMemoryError, and keeps nothing of the attempt; ReleasedWeights where the
        original is gone and another pack than its own is wanted.
        """
        with self.lock:
            entry = self.entry(weight)
            if entry.packs and entry.stale():
                entry.repack()
            key = (scheme, layout, "" if strides is None else str(strides))
            if key not in entry.packs:
                if entry.release is not None and entry.released:
                    raise ReleasedWeights(entry.release.name)
                stamp = stamp_of(weight)
                packed, sqnr = pack_weight(weight, scheme, layout)
                entry.packs[key] = packed if strides is None else packed.laid(strides), sqnr
                entry.accept(weight, stamp)
                entry.loose.add(key)
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
        with self.lock:
            entries = [self.entry(weight) for weight in weights]
            for entry in entries:
                entry.forget_wholes()
            key, number = (scheme, layout, ""), 1
            while True:
                if (found := _whole(entries, key)) is not None:
                    self.update(entries)
                    return found
                if not any(key in entry.packs and key not in entry.loose for entry in entries):
                    return self._pack_together(entries, weights, key)
                if not always:
                    return None
                key, number = (scheme, layout, f"{TOGETHER} {number}"), number + 1

    def parts(self, weights: Sequence[torch.Tensor], scheme: Scheme, layout: str) -> list[Packed]:
        """What one Packed over these weights, made if there is none, has for each of them."""
        with self.lock:
            whole = self.pack_together(weights, scheme, layout, always=True)
            entries = [self.entry(weight) for weight in weights]
            key = next(key for key in entries[0].wholes if _whole(entries, key) is whole)
            return [entry.packs[key][0] for entry in entries]

    def _pack_together(self, entries: Sequence[Entry], weights: Sequence[torch.Tensor], key: PackKey) -> Packed | None:
        own = (*key[:2], "")
        known = [own if key not in entry.packs and own in entry.packs else key for entry in entries]
        lost = (e.release for e, k in zip(entries, known, strict=True) if k not in e.packs and e.released)
        if gone := next(lost, None):
            raise ReleasedWeights(gone.name)
        self.update([entry for entry in entries if entry.packs])
        stamps = [stamp_of(weight) for weight in weights]
        apart = [e.packs.get(k) or pack_weight(w, *key[:2]) for e, k, w in zip(entries, known, weights, strict=True)]
        with plain_tensors():
            joined = packing.join([packed for packed, _ in apart])
        if joined is None:
            return None
        whole, parts = joined
        self.packed += sum(key not in entry.packs for entry in entries)
        for i, (entry, part) in enumerate(zip(entries, parts, strict=True)):
            entry.loose.discard(key)
            entry.packs[key], entry.wholes[key] = (part, apart[i][1]), (whole, i, tuple(e.ref for e in entries))
            entry.accept(weights[i], stamps[i])
        return whole

    def update(self, entries: Sequence[Entry], everything: bool = False) -> int:
        """Repack what is stale (or all of it) in place; the number of weights repacked."""
        with self.lock:
            due = (lambda e: e.packs and not e.released and e.fits()) if everything else (lambda e: e.stale())
            todo = [entry for entry in entries if due(entry)]
            for entry in todo:
                entry.repack()
            return len(todo)

    def overwritten(self, weights: Sequence[torch.Tensor]) -> int:
        """How many packed weights were written to in a way that PyTorch does not count: stale now. Reads all of each."""
        with self.lock:
            return sum(entry.overwritten() for entry in {self.find(weight) for weight in weights} if entry is not None)

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
