"""The part of `_inductor` about the machine code of the kernels that Inductor compiled.

A `carried` config (templates/kernel.py) is right only if ptxas made it so, and what counts is the kernel that runs: with its
epilogue it is another program than the one that was measured, and a compile worker may have used another ptxas.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from aoquant_inductor import machine_code
from aoquant_inductor._inductor import private
from aoquant_inductor.errors import UnsafeMachineCode

CARRIED = "CARRIED : tl.constexpr = True"
_clean: set[bytes] = set()
"""Hashes of the machine code found without a hazard."""
_nothing_carried: contextvars.ContextVar[bool] = contextvars.ContextVar("aoquant_nothing_carried", default=False)


@contextlib.contextmanager
def nothing_carried() -> Iterator[None]:
    """What is compiled inside has no carried kernels."""
    token = _nothing_carried.set(True)
    try:
        yield
    finally:
        _nothing_carried.reset(token)


def readable() -> bool:
    """Whether the kernels of a graph compiled now can be read when it is: else none may be carried."""
    (config,) = private("torch._inductor", "config")
    # a C++ wrapper keeps its kernels to itself, and a cache of one compile is gone before it is over
    hidden = config.cpp_wrapper or config.force_disable_caches
    return not (_nothing_carried.get() or hidden) and machine_code.disassembler() is not None


def assembler(packs: Sequence[torch.Tensor]) -> str:
    """What the choice of kernels for these weights owes to the assembler; nothing where there is none."""
    from aoquant_inductor.card import Card

    devices = {pack.device for pack in packs if pack.is_cuda}
    cards = [Card.of(device) for device in devices]
    return "".join(sorted({f" ptxas {card.ptxas}" for card in cards if card.arch > 0 and card.may_carry}))


def on_hopper(packs: Sequence[torch.Tensor]) -> bool:
    """Whether any of them is on a card with wgmma."""
    cards = {pack.device for pack in packs if pack.is_cuda and not torch.version.hip}
    return any(torch.cuda.get_device_capability(card)[0] == 9 for card in cards)


def guarded(inner: Callable[..., Any], packs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """An inner_compile that also checks the graphs of these weights, compiled now or loaded from a cache."""
    if not on_hopper(packs):
        return inner

    def compile_inner(gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        compiled = inner(gm, example_inputs, **kwargs)
        check(compiled)
        return compiled

    return compile_inner


def check(compiled: Any) -> None:
    """Raises UnsafeMachineCode unless every carried kernel of a CompiledFxGraph has machine code without hazards."""
    source = getattr(compiled, "source_code", None) or ""
    if CARRIED not in source:
        return
    (load,) = private("torch._inductor.runtime.compile_tasks", "_reload_python_module")
    module = sys.modules.get(f"{load.__module__}.{compiled.cache_key}")
    try:
        for name in carried(source) or ["a kernel"]:
            _check_kernel(name, getattr(module, name, None))
    except UnsafeMachineCode:
        _forget(compiled)
        raise


def carried(source: str) -> list[str]:
    """The carried kernels of a module that Inductor wrote, by their names there."""
    _, *parts = re.split(r"^(\w+) = async_compile\.triton\(", source, flags=re.M)
    return [name for name, text in zip(parts[::2], parts[1::2], strict=True) if CARRIED in text]


def _check_kernel(name: str, tuner: Any) -> None:
    """`tuner`: a CachingAutotuner, whose machine code is in its compile_results."""
    for result in getattr(tuner, "compile_results", None) or [None]:
        cubin = _cubin(result)
        if cubin is None:
            raise UnsafeMachineCode(name, [])
        digest = hashlib.sha256(cubin).digest()
        if digest in _clean:
            continue
        sass = machine_code.disassemble(cubin)
        found = None if sass is None else machine_code.hazards(sass)
        if found != []:
            raise UnsafeMachineCode(name, [f"{hazard.address:#x} {hazard.instruction}" for hazard in found or ()])
        _clean.add(digest)


def _cubin(result: Any) -> bytes | None:
    """Of one compile result: of Triton, or of Inductor's own launcher, which drops it from memory once it is on the card."""
    kernel: Any = getattr(result, "kernel", None)
    asm: Any = getattr(kernel, "asm", None) or {}
    found = asm["cubin"] if "cubin" in asm else getattr(kernel, "cubin_raw", None)
    if found is not None:
        return bytes(found)
    try:
        result.reload_cubin_path()
        return Path(kernel.cubin_path).read_bytes()
    except (AttributeError, RuntimeError, OSError):
        return None


def _forget(compiled: Any) -> None:
    """Takes a graph out of Inductor's cache, where it would be found again."""
    (cache,) = private("torch._inductor.codecache", "FxGraphCache")
    if (key := getattr(compiled, "_fx_graph_cache_key", None)) is not None:
        shutil.rmtree(cache._get_tmp_dir_for_key(key), ignore_errors=True)
