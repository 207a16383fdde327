"""Whole models as benchmark cases: how each is made, and one step of it. Random weights, seeded; shapes as published.

A case's `make(device)` returns (module to compile, bind): bind(compiled) is a call without arguments that does one step and
returns what is compared between schemes. The models are in models_text.py, models_vision.py and models_audio.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from benchmarks import build
from benchmarks.build import BF16, Made, Step
from benchmarks.models_audio import voxtral, voxtral_encoder
from benchmarks.models_text import SMOLLM, decode, generate, prefill
from benchmarks.models_vision import dit, sam_block, sam_encoder
from benchmarks.rows import LADDER

__all__ = ["CASES", "Case", "Made", "Step"]


@dataclass(frozen=True)
class Case:
    """per_step: how many `unit`s a step makes. mode: torch.compile's, for bf16 and ours. blockwise: compile these children.

    schemes: what is measured: a scheme for all linears, or a label that `mixed` has options for. eager: bf16 not compiled, too.
    processes: of which a row is the fastest, where a step is the host's time: every other process is half as slow again.
    one_row: the linears that see one row in a step of many.
    """

    make: Callable[[str], Made]
    per_step: float
    unit: str
    mode: str
    schemes: tuple[str, ...]
    blockwise: str = ""
    mixed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eager: bool = False
    processes: int = 1
    one_row: frozenset[str] = frozenset()

    def options(self, label: str) -> dict[str, Any]:
        """The options of backend="aoquant" for one of `schemes`, or for any scheme."""
        return dict(self.mixed.get(label, {"schemes": label}))


def toy(device: str) -> Made:
    model = build.fresh(build.Toy, device)
    x = torch.randn(1, 512, device=device, dtype=BF16, generator=torch.Generator(device).manual_seed(0))
    return model, lambda compiled: partial(compiled, x)


WEIGHT_ONLY = ("int8wo", "int4wo-128")
PREFILL = ("int8dq", "int8dq-int4w", "int4wo-128", "int4wo-128-large8")
FAST, FAST_GRAPHS, GRAPHS, DEFAULT = "max-autotune-no-cudagraphs", "max-autotune", "reduce-overhead", "default"
NAMES = {"qwen": "qwen2.5-0.5b", "llama": "llama3.1-8b"}
VOXTRAL = "int8dq + int4wo-32"
HALVES = {VOXTRAL: {"schemes": {"*audio_tower.*": "int8dq", "*multi_modal_projector.*": "int8dq"}, "default": "int4wo-32"}}
FUSED = {"schemes": "int8dq", "force_fuse_int_mm_with_mul": True}
RUNGS: Mapping[str, Mapping[str, Any]] = {
    "int8dq": {"schemes": "int8dq"}, "+ force_fuse_int_mm_with_mul": FUSED,
    "+ no epilogue_fusion, coordinate_descent_tuning": FUSED | {"epilogue_fusion": False, "coordinate_descent_tuning": True},
}
"""Of torchao's segment-anything tutorial. force_fuse_int_mm_with_mul has no reader in Inductor since 2.11: our kernel has the
rescale without it, and its rung shows that.
"""
TINY_VOXTRAL = {
    "audio_config": {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4},
    "text_config": {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    },
}


def _decode(
    name: str, batch: int, schemes: tuple[str, ...] = WEIGHT_ONLY, mode: str = GRAPHS, attention: str = "sdpa"
) -> Case:
    return Case(partial(decode, name=name, batch=batch, attention=attention), batch, "token", mode, schemes)


def _prefill(name: str, tokens: int, schemes: tuple[str, ...] = PREFILL) -> Case:
    """With CUDA graphs: of 512 tokens Python is the longer part without, and differs by half from process to process."""
    return Case(partial(prefill, name=name, tokens=tokens), tokens, "token", GRAPHS, schemes, one_row=frozenset({"lm_head"}))


def _ladder(make: Callable[[str], Made], images: int) -> Case:
    return Case(make, images, "image", DEFAULT, tuple(RUNGS), mixed=RUNGS, eager=True)


def _generate(name: str, tokens: int, schemes: tuple[str, ...] = WEIGHT_ONLY) -> Case:
    return Case(partial(generate, name=name, tokens=tokens), tokens, "token", GRAPHS, schemes, blockwise="parts")


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "toy": Case(toy, 1, "call", GRAPHS, (*WEIGHT_ONLY, "int8dq"), processes=9),
        **{f"{short}-decode-{batch}": _decode(name, batch) for short, name in NAMES.items() for batch in (1, 8, 32)},
        **{f"{short}-decode-32-flex": _decode(name, 32, attention="flex_attention") for short, name in NAMES.items()},
        **{f"{short}-prefill-{count}": _prefill(name, count) for short, name in NAMES.items() for count in (512, 4096)},
        **{f"{short}-generate": _generate(name, 32) for short, name in NAMES.items()},
        "smollm2-decode-1": _decode(SMOLLM, 1, ("int8wo", "int8dq", "int4wo-32-asym")),
        "smollm2-generate": _generate(SMOLLM, 32, ("int8wo", "int8dq", "int4wo-32-asym")),
        "sam-block": Case(partial(sam_block, batch=16), 16, "image", FAST, ("int8dq",)),
        "sam-encoder": Case(partial(sam_encoder, batch=8), 8, "image", FAST, ("int8dq",)),
        f"sam-block{LADDER}": _ladder(partial(sam_block, batch=16), 16),
        f"sam-encoder{LADDER}": _ladder(partial(sam_encoder, batch=8), 8),
        "voxtral": Case(partial(voxtral, tokens=512), 30, "second of audio", FAST_GRAPHS, (VOXTRAL,), mixed=HALVES),
        "voxtral-encoder": Case(voxtral_encoder, 30, "second of audio", FAST_GRAPHS, ("int8dq",)),
        "voxtral-prefill": _prefill("voxtral-3b", 512, ("int4wo-32",)),
        "dit": Case(
            partial(dit, depth=8, width=3072, heads=24, tokens=4096), 1, "step", FAST, ("int8dq", "int8wo"), blockwise="blocks"
        ),
        "tiny-sam": Case(partial(sam_encoder, batch=1, layers=1, image=64), 1, "image", DEFAULT, ("int8dq",)),
        f"toy{LADDER}": _ladder(toy, 1),
        "tiny-voxtral": Case(partial(voxtral_encoder, layers=1), 30, "second of audio", DEFAULT, ("int8dq",)),
        "tiny-voxtral-whole": Case(
            partial(voxtral, tokens=384, config=TINY_VOXTRAL), 30, "second of audio", DEFAULT, (VOXTRAL,), mixed=HALVES
        ),
        "tiny-prefill": _prefill("tiny", 32, ("int8dq", "int4wo-128-large8")),
        "tiny-decode": _decode("tiny", 1, ("int8wo",), DEFAULT),
        "tiny-generate": _generate("tiny", 4, ("int8wo",)),
        "tiny-dit": Case(
            partial(dit, depth=3, width=64, heads=4, tokens=16), 1, "step", DEFAULT, ("int8dq",), blockwise="blocks"
        ),
    }
)
