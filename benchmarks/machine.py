"""What a number needs to travel: which card or CPU, which versions, which commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def card(device: str) -> tuple[str, str]:
    """(slug for file names, full name) of the GPU or of this CPU with its widest instruction set."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        return slug(name), name
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    known = (("amx_int8", "amx"), ("avx512_bf16", "avx512bf16"), ("avx512f", "avx512"), ("avx2", "avx2"))
    widest = next((word for flag, word in known if flag in flags), "")
    return "-".join(part for part in (slug(name), widest) if part), f"{name} {widest}".strip()


def slug(name: str) -> str:
    """`NVIDIA H200` -> `h200`; `AMD EPYC 7713 64-Core Processor` -> `epyc-7713`."""
    words = re.sub(r"\((R|TM)\)|@.*|\d+-Core", "", name, flags=re.IGNORECASE).split()
    kept = [word for word in words if word.lower() not in {"nvidia", "amd", "intel", "cpu", "processor"}]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(kept).lower()).strip("-")


def _git(*args: str) -> str | None:
    try:
        command = ["git", "--no-optional-locks", "-C", str(Path(__file__).resolve().parent), *args]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


@cache
def commit() -> str:
    """AOQUANT_COMMIT, or HEAD with "+dirty" if anything but results differs from it, or "unknown"."""
    if given := os.environ.get("AOQUANT_COMMIT"):
        return given
    head = _git("rev-parse", "--short", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+dirty" if _git("status", "--porcelain", "--", "..", ":!results") else "")


def environment(device: str) -> dict[str, Any]:
    """What a number needs to travel: card, threads, versions, commit and UTC date."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "card": card(device)[1],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
