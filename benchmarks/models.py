"""Whole models as benchmark cases: how each is made, and one step of it. Random weights, seeded; shapes as published.

A case's `make(device)` returns (module to compile, bind): bind(compiled) is a call without arguments that does one step and
returns what is compared between schemes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from benchmarks import build

Step = Callable[[], torch.Tensor]
Made = tuple[nn.Module, Callable[[Any], Step]]
CACHE = 512  # positions of a decode's cache
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """per_step: how many `unit`s a step makes. mode: torch.compile's, for bf16 and ours. blockwise: compile these children."""

    make: Callable[[str], Made]
    per_step: float
    unit: str
    mode: str
    schemes: tuple[str, ...]
    blockwise: str = ""


def seeded(make: Callable[[], nn.Module], device: str) -> nn.Module:
    """A bf16 model made on the device, in eval mode; same values every time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)
    try:
        with torch.device(device):
            model = make()
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def toy(device: str) -> Made:
    model = build.fresh(build.Toy, device)
    x = torch.randn(1, 512, device=device, dtype=BF16, generator=torch.Generator(device).manual_seed(0))
    return model, lambda compiled: partial(compiled, x)


LLMS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "qwen2.5-0.5b": {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
        },
        "llama3.1-8b": {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        },
        "voxtral-3b": {
            "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30, "head_dim": 128,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 131072, "tie_word_embeddings": True,
        },
        "tiny": {
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True,
        },
    }
)


def llm(device: str, name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**LLMS[name])
    model: nn.Module = seeded(lambda: AutoModelForCausalLM.from_config(config, dtype=BF16), device)
    return model


def decode(device: str, name: str, batch: int) -> Made:
    """One token per row with a static cache of CACHE positions, all of which attention reads."""
    from transformers import StaticCache

    model: Any = llm(device, name)
    ids = torch.randint(0, 256, (batch, 1), device=device, generator=torch.Generator(device).manual_seed(0))

    def bind(compiled: Any) -> Step:
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = StaticCache(config=config, max_cache_len=CACHE)
        cache.early_initialization(batch, config.num_key_value_heads, head_dim, BF16, ids.device)
        position = torch.full((batch, 1), CACHE // 4, device=device)
        done = 0

        def step() -> torch.Tensor:
            nonlocal done
            done += 1
            if done % (CACHE // 2) == 0:
                cache.reset()
            logits: torch.Tensor = compiled(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True).logits
            return logits

        return step

    return model, bind


def prefill(device: str, name: str, tokens: int) -> Made:
    """The logits of the last token of a prompt; no cache."""
    model = llm(device, name)
    ids = torch.randint(0, 256, (1, tokens), device=device, generator=torch.Generator(device).manual_seed(0))

    def bind(compiled: Any) -> Step:
        return lambda: compiled(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return model, bind


def sam_config(layers: int, image: int) -> Any:
    """SAM's ViT-H image encoder."""
    from transformers import SamVisionConfig

    config = SamVisionConfig(
        hidden_size=1280, num_hidden_layers=layers, num_attention_heads=16, mlp_dim=5120, image_size=image,
        global_attn_indexes=[i for i in (7, 15, 23, 31) if i < layers],
    )
    config._attn_implementation = "eager"
    return config


def first(compiled: Any, x: torch.Tensor) -> Step:
    """A step that returns the first output of a model, whatever it packs it into."""

    def step() -> torch.Tensor:
        y = compiled(x)
        found: torch.Tensor = y if isinstance(y, torch.Tensor) else y[0]
        return found

    return step


def sam_block(device: str, batch: int) -> Made:
    """One windowed layer, 64 x 64 patches."""
    from transformers.models.sam.modeling_sam import SamVisionLayer

    model = seeded(lambda: SamVisionLayer(sam_config(32, 1024), window_size=14), device)
    x = torch.randn(batch, 64, 64, 1280, device=device, dtype=BF16, generator=torch.Generator(device).manual_seed(0))
    return model, partial(first, x=x)


def sam_encoder(device: str, batch: int, layers: int = 32, image: int = 1024) -> Made:
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    model = seeded(lambda: SamVisionEncoder(sam_config(layers, image)), device)
    x = torch.randn(batch, 3, image, image, device=device, dtype=BF16, generator=torch.Generator(device).manual_seed(0))
    return model, partial(first, x=x)


def voxtral_encoder(device: str, layers: int = 32) -> Made:
    """The audio encoder of Voxtral, 30 s of audio."""
    from transformers import VoxtralEncoderConfig
    from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

    model = seeded(lambda: VoxtralEncoder(VoxtralEncoderConfig(num_hidden_layers=layers)), device)
    x = torch.randn(1, 128, 3000, device=device, dtype=BF16, generator=torch.Generator(device).manual_seed(0))
    return model, partial(first, x=x)


class DiTBlock(nn.Module):
    """Self-attention and MLP, each modulated by a conditioning vector: the block of DiT and Flux."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        a1, b1, g1, a2, b2, g2 = self.modulation(nn.functional.silu(c))[:, None].chunk(6, -1)
        h = self.norm1(x) * (1 + a1) + b1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.norm2(x) * (1 + a2) + b2
        return x + g2 * self.down(nn.functional.gelu(self.up(h), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(width, heads) for _ in range(depth))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, c)
        return x


def dit(device: str, depth: int, width: int, heads: int, tokens: int) -> Made:
    model = seeded(partial(DiT, depth, width, heads), device)
    generator = torch.Generator(device).manual_seed(0)
    x, c = (torch.randn(*s, width, device=device, dtype=BF16, generator=generator) for s in ((1, tokens), (1,)))
    return model, lambda compiled: partial(compiled, x, c)


WEIGHT_ONLY = ("int8wo", "int4wo-128")
PREFILL = ("int8dq", "int8dq-int4w", "int4wo-128")
FAST = "max-autotune-no-cudagraphs"
CASES: Mapping[str, Case] = MappingProxyType(
    {
        "toy": Case(toy, 1, "call", "reduce-overhead", (*WEIGHT_ONLY, "int8dq")),
        "qwen-decode-1": Case(partial(decode, name="qwen2.5-0.5b", batch=1), 1, "token", "reduce-overhead", WEIGHT_ONLY),
        "llama-decode-1": Case(partial(decode, name="llama3.1-8b", batch=1), 1, "token", "reduce-overhead", WEIGHT_ONLY),
        "llama-decode-8": Case(partial(decode, name="llama3.1-8b", batch=8), 8, "token", "reduce-overhead", WEIGHT_ONLY),
        "llama-decode-32": Case(partial(decode, name="llama3.1-8b", batch=32), 32, "token", "reduce-overhead", WEIGHT_ONLY),
        "llama-prefill-512": Case(
            partial(prefill, name="llama3.1-8b", tokens=512), 512, "token", "default", PREFILL
        ),
        "llama-prefill-4096": Case(
            partial(prefill, name="llama3.1-8b", tokens=4096), 4096, "token", "default", PREFILL
        ),
        "sam-block": Case(partial(sam_block, batch=16), 16, "image", FAST, ("int8dq",)),
        "sam-encoder": Case(partial(sam_encoder, batch=8), 8, "image", FAST, ("int8dq",)),
        "voxtral-encoder": Case(voxtral_encoder, 30, "second of audio", FAST, ("int8dq",)),
        "voxtral-prefill": Case(partial(prefill, name="voxtral-3b", tokens=512), 512, "token", "default", ("int4wo-32",)),
        "dit": Case(
            partial(dit, depth=8, width=3072, heads=24, tokens=4096), 1, "step", FAST, ("int8dq", "int8wo"), blockwise="blocks"
        ),
        "tiny-sam": Case(partial(sam_encoder, batch=1, layers=1, image=64), 1, "image", "default", ("int8dq",)),
        "tiny-voxtral": Case(partial(voxtral_encoder, layers=1), 30, "second of audio", "default", ("int8dq",)),
        "tiny-decode": Case(partial(decode, name="tiny", batch=1), 1, "token", "default", ("int8wo",)),
        "tiny-dit": Case(
            partial(dit, depth=3, width=64, heads=4, tokens=16), 1, "step", "default", ("int8dq",), blockwise="blocks"
        ),
    }
)
