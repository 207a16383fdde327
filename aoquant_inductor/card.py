"""What a kernel is chosen by besides its problem: the card, and the assembler that makes its machine code."""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass

import torch

from aoquant_inductor import _inductor_machine as machine

UNKNOWN = (0, 0)
SAFE_PTXAS = (13, 3)


@dataclass(frozen=True)
class Card:
    """`arch`: 90 for sm_90, 0 where it is not NVIDIA's; `sms`: multiprocessors; `shared`: bytes of shared memory a program may
    have; `ptxas`: the version Triton assembles with, UNKNOWN (older than every other) where it cannot be told.
    """

    arch: int
    sms: int
    shared: int
    ptxas: tuple[int, int]

    @property
    def may_carry(self) -> bool:
        """Whether `carried` configs (templates/kernel.py) may run: by an assembler that may be right about them, whose code is
        checked.
        """
        return self.arch == 0 or (self.ptxas >= SAFE_PTXAS and machine.readable())

    @property
    def has_tma(self) -> bool:
        """Whether it has a tensor memory accelerator."""
        return self.arch >= 90

    @property
    def by_mma_sync(self) -> bool:
        """Whether its tensor cores read their operands from registers."""
        return 80 <= self.arch < 90 or self.arch >= 120

    @property
    def has_tensor_memory(self) -> bool:
        """Whether its tensor cores sum up in a memory of their own."""
        return 100 <= self.arch < 120

    @classmethod
    def of(cls, device: torch.device) -> Card:
        if device.type == "cuda":
            card = torch.cuda.get_device_properties(device)
            shared = getattr(card, "shared_memory_per_block_optin", 0) or 64 << 10
            arch = 0 if torch.version.hip else 10 * card.major + card.minor
            return cls(arch, card.multi_processor_count, shared, ptxas_version(arch) if arch else UNKNOWN)
        if device.type == "xpu":
            return cls(0, getattr(torch.xpu.get_device_properties(device), "gpu_subslice_count", 64), 64 << 10, UNKNOWN)
        raise ValueError(f"no Triton kernels for {device}.")


def ptxas_version(arch: int) -> tuple[int, int]:
    """(13, 5) for the ptxas that Triton uses for sm_<arch>: its own, or what the environment names in its place."""
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return version_of(get_ptxas(arch).path)
    except (ImportError, AttributeError, RuntimeError):
        return UNKNOWN


@functools.cache
def version_of(path: str) -> tuple[int, int]:
    """(13, 5) of the ptxas at `path`, UNKNOWN if it does not tell."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found.group(1)), int(found.group(2))) if found else UNKNOWN
