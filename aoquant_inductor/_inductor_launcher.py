"""Part of `_inductor`: what a generated kernel with descriptors is launched by. Imported by such a kernel alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch._inductor.runtime.hints import HeuristicType
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, DebugAutotuner
from triton.tools.tensor_descriptor import TensorDescriptor

Place = tuple[int, int, tuple[int, int]]
"""Which argument, its columns, the block of a descriptor."""


def _described(base: Any, name: str) -> Any:
    """An autotuner of Inductor's whose kernel has a descriptor for each of `places` behind its `own` arguments."""

    class Described(base):  # type: ignore[misc]
        own: int
        places: Sequence[Place]
        launchers: Sequence[Callable[..., Any]]
        heuristic_type: HeuristicType

        def _precompile_config(self, cfg: Any) -> Any:
            """For Triton's launcher: Inductor's static one knows no descriptors, and leaves to it what is a user's kernel."""
            kind, self.heuristic_type = self.heuristic_type, HeuristicType.USER_AUTOTUNE
            try:
                return super()._precompile_config(cfg)
            finally:
                self.heuristic_type = kind

        def _make_launchers(self) -> None:
            super()._make_launchers()
            self.launchers = [self._launcher(launcher) for launcher in self.launchers]

        def _launcher(self, launcher: Callable[..., Any]) -> Callable[..., Any]:
            """`launcher`, called without the descriptors, of which a profiler then knows nothing."""
            if hasattr(launcher, "__wrapped__"):
                return launcher

            @functools.wraps(launcher)  # and its attributes
            def described(*args: Any, **kwargs: Any) -> Any:
                if any(args[at].numel() == 0 for at, *_ in self.places):
                    return None  # a descriptor has rows, and Triton launches no kernel without programs
                return launcher(*self._with_descriptors(args), **kwargs)

            return described

        def _with_descriptors(self, args: Sequence[Any]) -> tuple[Any, ...]:
            made = (descriptor(args[at], columns, block) for at, columns, block in self.places)
            return (*args[: self.own], *made, *args[self.own :])

        def _interpret_args_grid(self, args: Sequence[Any], cfg: Any) -> Any:
            """For what prints a launch's parameters, by the names of all of them."""
            return super()._interpret_args_grid(self._with_descriptors(args), cfg)

    Described.__name__ = Described.__qualname__ = name  # by which a compile worker sends it back
    return Described


Describing = _described(CachingAutotuner, "Describing")
DescribingDebug = _described(DebugAutotuner, "DescribingDebug")
"""With Inductor's `profile_bandwidth`."""


def descriptor(tensor: Any, columns: int, block: tuple[int, int]) -> Any:
    """A Triton descriptor of all of a dense tensor as rows of so many columns. Rows beyond x's own are read, not used."""
    return TensorDescriptor(tensor, [tensor.numel() // columns, columns], [columns, 1], list(block))


def describing(own: int, places: Sequence[Place]) -> Callable[[Any], Any]:
    """A decorator of a kernel's launcher: behind its `own` arguments come a descriptor for each of `places`."""

    def decorated(launcher: Any) -> Any:
        launcher.__class__ = DescribingDebug if isinstance(launcher, DebugAutotuner) else Describing
        launcher.own, launcher.places = own, places
        return launcher

    return decorated
