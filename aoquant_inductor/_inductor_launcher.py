"""Part of `_inductor`: what a generated kernel with descriptors is launched by. Imported by such a kernel alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

Place = tuple[int, int, tuple[int, int]]
"""Which argument, its columns, the block of a descriptor."""


class Describing(CachingAutotuner):  # type: ignore[misc]
    own: int
    places: Sequence[Place]

    def _precompile_config(self, cfg: Any) -> Any:
        """For Triton's launcher: Inductor's static one knows no descriptors, and leaves to it what is a user's kernel."""
        kind, self.heuristic_type = self.heuristic_type, HeuristicType.USER_AUTOTUNE
        try:
            return super()._precompile_config(cfg)
        finally:
            self.heuristic_type = kind

    def _make_launchers(self) -> None:
        super()._make_launchers()
        self.launchers = [self._described(launcher) for launcher in self.launchers]

    def _described(self, launcher: Callable[..., Any]) -> Callable[..., Any]:
        """`launcher`, called without the descriptors; a profiler and whoever prints arguments then know none."""
        if hasattr(launcher, "__wrapped__"):
            return launcher
        own, places = self.own, self.places

        @functools.wraps(launcher)  # and its attributes
        def described(*args: Any, **kwargs: Any) -> Any:
            made = [descriptor(args[at], columns, block) for at, columns, block in places]
            return launcher(*args[:own], *made, *args[own:], **kwargs)

        return described


def descriptor(tensor: Any, columns: int, block: tuple[int, int]) -> Any:
    """A Triton descriptor of all of a dense tensor as rows of so many columns. Rows beyond x's own are read, not used."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, [tensor.numel() // columns, columns], [columns, 1], list(block))


def describing(own: int, places: Sequence[Place]) -> Callable[[Any], Any]:
    """A decorator of a kernel's launcher: behind its `own` arguments come a descriptor for each of `places`."""

    def decorated(launcher: Any) -> Any:
        launcher.__class__ = Describing
        launcher.own, launcher.places = own, places
        return launcher

    return decorated
