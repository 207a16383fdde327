"""A bar while many layers pack; quiet when there are few, or no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
FEW = 32


def bar(items: Sequence[T]) -> Iterable[T]:
    """The items, with a bar on stderr if it is a terminal and rich is installed."""
    if len(items) < FEW or not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, description="packing", console=Console(stderr=True), transient=True)
