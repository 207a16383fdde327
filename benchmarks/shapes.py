"""Named weight shapes N x K (out_features x in_features) and the row counts M they are measured at."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Shape = tuple[int, int]

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "cpu": (2048, 2048),  # the CPU table of shared/torch-compile.md
        "llama8b-o": (4096, 4096),
        "llama8b-qkv": (6144, 4096),
        "llama8b-gate-up": (28672, 4096),
        "llama8b-down": (4096, 14336),
        "sam-h-qkv": (3840, 1280),
        "sam-h-mlp-in": (5120, 1280),
        "sam-h-mlp-out": (1280, 5120),
        "qwen0.5b-down": (896, 4864),
    }
)

DEFAULT_SHAPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cpu": ("cpu",), "cuda": tuple(name for name in SHAPES if name != "cpu")}
)
DEFAULT_M: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"cpu": (1, 2, 4, 8, 16, 32, 64, 128, 512), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
)
SCHEMES = ("int8wo", "int8dq", "int4wo-128", "int4wo-32-asym", "int8dq-int4w", "int8dq-int4w-128")


def parse(text: str) -> list[Shape]:
    """`2048x2048,llama8b-o` -> [(N, K), ...]. Raises ValueError for a word that is neither NxK nor a name."""
    found = []
    for word in text.split(","):
        n, x, k = word.partition("x")
        if word in SHAPES:
            found.append(SHAPES[word])
        elif x and n.isdigit() and k.isdigit():
            found.append((int(n), int(k)))
        else:
            raise ValueError(f"{word!r} is no shape: write NxK, or one of {', '.join(SHAPES)}.")
    return found
