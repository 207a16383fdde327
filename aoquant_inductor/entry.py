"""One packed weight: the Parameter, held weakly, its packs, and the state of it that they were made from.

What changed is seen by `_version` (in-place writes, optimizer steps, load_state_dict), by dtype, sizes and strides, and by the
storage (`.data =`), which is held weakly: its memory is free to go, but no other one is taken for it, as by its address;
writes that PyTorch does not count (`p.data +=`, numpy views, fused optimizers) are seen by whoever reads all of the weight: the
next compile does, no call does, so `refresh` repairs them.

The original may be let go: the Parameter stays, its memory does not (pointer 0), and whatever reads it raises ReleasedWeights'
text. New data (`.data =`) is packed at the next call and let go again; `bring_back` ends that.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from aoquant_inductor import native, ops, packing, qparams
from aoquant_inductor._inductor import memory_is_shared, plain_tensors, storage_id
from aoquant_inductor.errors import ReleasedWeights, ShapeChanged
from aoquant_inductor.layouts import Packed
from aoquant_inductor.scheme import Scheme

PackKey = tuple[Scheme, str, str]
"""Scheme, layout, and what a second pack is for: to lie TOGETHER with those of other weights, or as a graph has it."""
UNTRACKED, CLOSED = -1, -2  # versions: an inference tensor counts none, an entry that is closed is of none
DIGEST_WORDS = 2**20  # that digest_of has in memory at once: 8 MB


class Stamp(NamedTuple):
    """What every change that PyTorch knows of changes; `storage` tells storages apart while both are referred to."""

    version: int
    pointer: int
    storage: int
    dtype: torch.dtype
    places: tuple[int, ...]  # its sizes, and then its strides


def form_of(weight: torch.Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """What a Stamp ends with."""
    return storage_id(weight), weight.dtype, (*weight.shape, *weight.stride())


def stamp_of(weight: torch.Tensor) -> Stamp:
    try:
        pointer = weight.data_ptr()
    except RuntimeError:  # it was let go
        pointer = 0
    version = UNTRACKED if weight.is_inference() else weight._version
    return Stamp(version, pointer, *form_of(weight))


def digest_of(weight: torch.Tensor) -> torch.Tensor:
    """An int64 that other values have another of, whatever wrote them; reads the whole weight."""
    with plain_tensors():
        flat = weight.detach().resolve_neg().contiguous().flatten()  # flat: the strides of a single row may be any
        for word in (torch.int64, torch.int32, torch.int16, torch.int8):
            if all(places * flat.itemsize % word.itemsize == 0 for places in (weight.shape[1], flat.storage_offset())):
                words = flat.view(word).view(len(weight), -1)
                break
        # powers of odd factors: what changes its value or its place changes the sum. Some rows at a time: products are int64
        factors = (words.shape[1], 0x5851F42D4C957F2D), (len(words), 0x14057B7EF767814D)
        across, down = (torch.full((size,), odd, device=words.device).cumprod(0) for size, odd in factors)
        sums = [(some * across).sum(1) for some in words.split(max(1, DIGEST_WORDS // words.shape[1]))]
        return (torch.cat(sums) * down).sum()


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


class Keeper(Protocol):
    """What an entry tells: that something changed, that its weight is gone."""

    def turn(self) -> None: ...

    def drop(self, key: int, ref: weakref.ref[torch.Tensor]) -> None: ...


class Entry:
    """One weight: its packs, and the state of the weight they were made from."""

    def __init__(self, weight: torch.Tensor, keeper: Keeper) -> None:
        key, drop = id(weight), keeper.drop
        self.ref = weakref.ref(weight, lambda ref: drop(key, ref))
        self.turn = keeper.turn
        self.stamp, self.storage = stamp_of(weight), StorageWeakRef(weight.untyped_storage())
        self.digest: torch.Tensor | None = None  # of the values that were packed; None: not asked for
        self.packs: dict[PackKey, tuple[Packed, float]] = {}
        # what a pack is a part of, which, and of whose weights the others are
        self.wholes: dict[PackKey, tuple[Packed, int, tuple[weakref.ref[torch.Tensor], ...]]] = {}
        self.loose: set[PackKey] = set()  # packs that no graph reads yet: they may still move
        self.closed: tuple[int, ...] | None = None  # the shape of its packs, once the weight has had another: none may run
        self.repacks = 0
        self.trains = False  # a graph with a backward has read it while it required grad
        self.restored = False  # by the user, after it was let go
        self.release: Release | None = None
        self.copy: torch.Tensor | None = None  # of a released weight, if wanted

    @property
    def released(self) -> bool:
        """Whether the packs are all that is left."""
        weight = self.ref()
        return self.release is not None and weight is not None and stamp_of(weight).pointer == 0 and weight.numel() > 0

    def stale(self) -> bool:
        weight = self.ref()
        if weight is None or self.closed is not None:
            return weight is not None
        if not self.packs or stamp_of(weight) == self.stamp:
            return False
        if self.released:  # a write that failed counts as a version, too
            self.accept(weight, stamp_of(weight))
            return False
        return True

    def fits(self) -> bool:
        """Whether the weight has the shape that its packs have."""
        weight = self.ref()
        return weight is None or all(packed.shape == tuple(weight.shape) for packed, _ in self.packs.values())

    def _shape(self) -> tuple[int, int]:
        return next(iter(self.packs.values()))[0].shape

    def close(self) -> None:
        """The weight has data of another shape now, for which it has another entry: whoever still reads these packs is told."""
        self.closed = self._shape()
        self.packs, self.wholes, self.loose, self.digest, self.release, self.copy = {}, {}, set(), None, None, None
        self.stamp = self.stamp._replace(version=CLOSED)
        self.turn()

    def accept(self, weight: torch.Tensor, stamp: Stamp) -> None:
        """The packs are of the weight as it was when it had this stamp."""
        self.stamp, self.storage = stamp, StorageWeakRef(weight.untyped_storage())
        self.digest = digest_of(weight) if stamp.pointer else None
        self.turn()

    def forget_wholes(self) -> None:
        """Second packs that lie with those of weights that are gone: what read them never runs again."""
        for key, (_, _, refs) in list(self.wholes.items()):
            if key[2] and any(ref() is None for ref in refs):
                del self.wholes[key], self.packs[key]

    def overwritten(self) -> bool:
        """Whether the stamp is that of the packs and the values are not; then it is stale from now on. Reads them all."""
        weight = self.ref()
        if weight is None or self.digest is None or self.stale() or bool(digest_of(weight) == self.digest):
            return False
        self.stamp = self.stamp._replace(pointer=0)
        self.turn()
        return True

    def repack(self) -> None:
        """New values into the same storage. Raises qparams.NonFinite and ShapeChanged, and keeps the old values and stamp."""
        weight = self.ref()
        if weight is None or self.released:
            return
        stamp = stamp_of(weight)
        if self.closed is not None or not self.fits():
            raise ShapeChanged(self.closed or self._shape(), tuple(weight.shape))
        try:
            fresh = {key: pack_weight(weight, *key[:2]) for key in self.packs}
        except qparams.NonFinite as error:
            raise qparams.NonFinite(error.index, tuple(weight.shape)) from None
        with plain_tensors():
            for key, (packed, sqnr) in fresh.items():
                self.packs[key][0].copy_(packed)
                self.packs[key] = (self.packs[key][0], sqnr)
        if weight.device.type != "cpu":
            torch.accelerator.current_stream(weight.device).synchronize()  # the next call may be on another stream
        self.accept(weight, stamp)
        self.repacks += 1
        if self.release is not None:
            self.let_go(self.release)

    def let_go(self, release: Release) -> bool:
        """Frees the memory of the packed weight, if nothing else holds it: whether it is gone.

        Raises RuntimeError where there is no C++ compiler: no other way makes a later use an error instead of a crash.
        """
        weight = self.ref()
        if weight is None or self.released:
            return True
        free = native.module(self.turn).let_go
        if memory_is_shared(weight):
            return False
        with plain_tensors():
            self.copy = weight.detach().to("cpu", copy=True) if release.to_cpu else None
        free(weight, str(ReleasedWeights(release.name)))
        self.release = release
        self.accept(weight, stamp_of(weight))
        return True

    def keep(self) -> None:
        """What it has now stays."""
        self.release, self.copy, self.restored = None, None, True

    def bring_back(self) -> bool:
        """Gives a released weight its data again: True, its own, from the copy; False, what its best pack dequantizes to."""
        weight, exact = self.ref(), self.copy is not None
        if weight is None or not self.released:
            return True
        with plain_tensors(), torch.inference_mode(weight.is_inference()):  # as it was made: with a version, or without
            if self.copy is not None:
                weight.data = self.copy.to(weight.device, copy=True)
            else:
                packed, _ = max(self.packs.values(), key=lambda pack: pack[1])
                weight.data = ops.dequantize(packed.w, packed.scale, packed.zero, *packed.key, weight.dtype)
        self.keep()
        self.accept(weight, stamp_of(weight))
        return exact
