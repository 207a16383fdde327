"""What every test gets: a clean compiler, fixed seeds, `gpu` tests skipped without CUDA, and the `graphs` it compiled."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A hit in Inductor's graph cache skips our lowerings, and then no test could say which kernel ran.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
# Processes side by side share the cores: more threads, and compilers in processes of their own, would only wait for each other.
if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    for variable in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(variable, str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("MLIR_DISABLE_MULTITHREADING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a source tree without an installed package

import pytest
import torch
from hypothesis import HealthCheck, settings
from util import Graph

# No clock of Hypothesis's: another process may have the core for a second in the midst of a draw.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `-n auto`: a process per core, up to four, for each may take 2 GB; none where they would have to share a GPU."""
    return 0 if torch.cuda.is_available() else min(os.cpu_count() or 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Fixed seeds; after the test no compiled code, no warning counted as given, no code seen before."""
    random.seed(0)
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    runtime = sys.modules.get("aoquant_inductor.runtime")
    backend = sys.modules.get("aoquant_inductor.backend")
    if backend is not None and runtime is not None:
        runtime._warned.clear()
        backend._seen.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch's threads afterwards as before: a benchmark sets one."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Every graph that aoquant hands to Inductor from here on."""
    from aoquant_inductor import _inductor

    found: list[Graph] = []
    compile_graph = _inductor.compile_graph

    def record(gm, inputs, patches, packs=(), constant=False, **rest):  # type: ignore[no-untyped-def]
        found.append(Graph(gm.code.strip(), tuple(packs), constant))
        return compile_graph(gm, inputs, patches, packs, constant, **rest)

    monkeypatch.setattr(_inductor, "compile_graph", record)
    return found


@pytest.fixture
def inductor() -> Any:
    """The part of the package that needs Inductor; where that cannot be imported, the test is skipped."""
    return pytest.importorskip("aoquant_inductor._inductor")
