"""The check at every call of a graph: did a weight change since it was packed?"""

from __future__ import annotations

from collections.abc import Sequence

from aoquant_inductor import native
from aoquant_inductor.entry import UNTRACKED, Entry, form_of
from aoquant_inductor.weights import STORE


def settle() -> str:
    """Waits for the C++ check to be built; returns what the check runs in. For benchmarks: a user's call never waits."""
    native.start(STORE.turn).join()
    return native.state()


class Watch:
    """The weights of one graph as they were when its packs were made; asked at every call of a checked graph.

    In C++ once that is built (native.py), until then in list comprehensions.
    """

    __slots__ = ("entries", "generation", "native", "places", "refs", "tracked", "versions")

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries = tuple(dict.fromkeys(entries))
        self.refs = tuple(entry.ref for entry in entries)
        native.start(STORE.turn)
        self._sync()

    def _sync(self) -> None:
        self.generation = STORE.generation
        stamps = [entry.stamp for entry in self.entries]
        tracked = [entry for entry in self.entries if entry.stamp.version != UNTRACKED]
        self.tracked = [entry.ref for entry in tracked]
        self.versions = [entry.stamp.version for entry in tracked]
        self.places = [stamp[1:] for stamp in stamps]
        kind = native.watch_type()
        self.native = kind and kind(self.refs, *([stamp[i] for stamp in stamps] for i in range(5)))

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
                or [(w.data_ptr(), *form_of(w)) for w in [ref() for ref in self.refs]] != self.places  # type: ignore[union-attr, arg-type]
            )
        except (AttributeError, RuntimeError):  # a weight is gone, or became an inference tensor
            return self._confirmed()

    def _confirmed(self) -> bool:
        return any(entry.stale() for entry in self.entries)

    def update(self) -> None:
        """Repack in place what changed, and remember the weights as they are now."""
        STORE.update(self.entries)
        self._sync()
