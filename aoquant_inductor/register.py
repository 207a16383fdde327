"""Makes the name "aoquant" known to torch.compile where no installed package does: a source tree on PYTHONPATH.

An installed aoquant is found by its entry point. Importing torch._dynamo here to register by hand would import parts of
torch._inductor; so the same entry point is offered through importlib.metadata's own extension point instead.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterable
from typing import Any

NAME = "aoquant-inductor"
GROUP = "torch_dynamo_backends"


class _SourceTree(importlib.metadata.Distribution):
    _FILES = {  # noqa: RUF012
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0\n",
        "entry_points.txt": f"[{GROUP}]\naoquant = aoquant_inductor.backend:aoquant\n",
    }

    def read_text(self, filename: str) -> str | None:
        return self._FILES.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        raise FileNotFoundError(path)


class _Finder(importlib.metadata.DistributionFinder):
    def find_spec(self, *args: object, **kwargs: object) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        return [_SourceTree()] if context is None or context.name in (None, NAME) else []


def register() -> None:
    """Once per process; does nothing where an installed distribution already offers the backend."""
    if any(entry.name == "aoquant" for entry in importlib.metadata.entry_points(group=GROUP)):
        return
    if "torch._dynamo.backends.registry" in sys.modules:  # its list of entry points may be cached by now
        from torch._dynamo.backends.registry import register_backend

        from aoquant_inductor.backend import aoquant

        register_backend(aoquant, name="aoquant")  # type: ignore[arg-type]
    else:
        sys.meta_path.append(_Finder())
