"""csrc/module.cpp, built in the background by the machine's own compiler at the first compile, cached beside Inductor's code.

Until it is there, and where there is no compiler or no Python headers, the check in watch.py runs in Python instead: the
same answer, 50 times slower. `state()` is in the report. Letting originals go has no other way: `module()` waits for it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from aoquant_inductor._inductor import cache_folder

log = logging.getLogger("aoquant_inductor")
FOLDER = Path(__file__).parent / "csrc"
SOURCE = FOLDER / "module.cpp"
NAME = "aoquant_watch"

_built: list[Any] = []  # the extension module, once it is there
_failed: list[str] = []


def state() -> str:
    """`native`, `building`, or why the check stays in Python."""
    return "native" if _built else _failed[0] if _failed else "building"


def watch_type() -> Any | None:
    return _built[0].Watch if _built else None


def lookup_type() -> Any | None:
    return _built[0].Lookup if _built else None


def turn() -> None:
    """What any Lookup remembers counts no more."""
    if _built:
        _built[0].turn()


def module(ready: Callable[[], None]) -> Any:
    """The extension module; waits until it is built (seconds, once per machine). Raises RuntimeError where it cannot be."""
    start(ready).join()
    if not _built:
        raise RuntimeError(_failed[0] if _failed else "its build ended with the process that began it (a fork)")
    return _built[0]


def _target() -> Path:
    sources = (file.read_text() for file in sorted(FOLDER.iterdir()))
    facts = (*sources, torch.__version__, sys.version, str(torch._C._GLIBCXX_USE_CXX11_ABI))
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    return cache_folder() / f"{NAME}-{key}.so"


def _command(target: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("no C++ compiler")
    library = Path(torch.__file__).parent / "lib"
    includes = [*include_paths(), sysconfig.get_paths()["include"]]
    scratch = target.with_suffix(f".{os.getpid()}")
    build = [
        compiler, "-O2", "-std=c++20", "-shared", "-fPIC", "-w",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(f"-isystem{path}" for path in includes), str(SOURCE), "-o", str(scratch),
        f"-L{library}", "-ltorch_python", "-ltorch_cpu", "-lc10",
    ]
    # one child that also renames: it finishes what a short script started
    return ["sh", "-c", f"nice {shlex.join(build)} && mv {shlex.quote(str(scratch))} {shlex.quote(str(target))}"]


def _load(target: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(target))
    spec = importlib.util.spec_from_file_location(NAME, str(target), loader=loader)
    if spec is None:
        raise ImportError(str(target))
    built = importlib.util.module_from_spec(spec)
    loader.exec_module(built)
    return built


def _build(ready: Callable[[], None]) -> None:
    try:
        target = _target()
        with FileLock(f"{target}.lock"):  # of 16 processes on a cold cache one builds
            if not target.exists():
                subprocess.run(_command(target), check=True, capture_output=True, text=True, start_new_session=True)
        _built.append(_load(target))
        ready()
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        _failed.append(f"python ({type(error).__name__})")
        log.info("the check for changed weights runs in Python: %s", str(detail).strip()[-2000:])


@functools.cache
def start(ready: Callable[[], None]) -> threading.Thread:
    """Begins the build, once; `ready` is called from its thread when the Watch type is there."""
    thread = threading.Thread(target=_build, args=(ready,), name="aoquant-native", daemon=True)
    thread.start()
    return thread
