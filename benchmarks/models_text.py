"""Language models as benchmark cases: decode, prefill, generate; random weights in published shapes, one with real ones."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from benchmarks.build import BF16, Made, Step, seeded

CACHE = 512  # positions of a decode's cache
SMOLLM = "smollm2-135m"

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


def llm(device: str, name: str, attention: str = "sdpa") -> nn.Module:
    """A model of LLMS with random weights, or SMOLLM with its own. Raises demo.weights.WeightsError without a network.

    attention: transformers' name of how it is computed, for those with random weights.
    """
    if name == SMOLLM:
        from demo import weights

        own: Any = weights.load(weights.fetch(), BF16)[0]
        model: nn.Module = own.to(device).requires_grad_(False)
        return model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**LLMS[name])
    return seeded(lambda: AutoModelForCausalLM.from_config(config, dtype=BF16, attn_implementation=attention), device)


def prompt(device: str, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, tokens), device=device, generator=torch.Generator(device).manual_seed(0))


def static_cache(config: Any, batch: int, positions: int, device: torch.device) -> Any:
    """A cache that has its tensors: a compiled graph that made them would own them."""
    from transformers import StaticCache

    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = StaticCache(config=config, max_cache_len=positions)
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, BF16, device)
    return cache


def decode(device: str, name: str, batch: int, attention: str = "sdpa") -> Made:
    """One token per row with a static cache of CACHE positions, all of which attention reads.

    With a static cache transformers' `sdpa` copies the heads of keys and values that queries share; `flex_attention` does not.
    """
    model: Any = llm(device, name, attention)
    ids = prompt(device, batch, 1)

    def bind(compiled: Any) -> Step:
        cache = static_cache(model.config, batch, CACHE, ids.device)
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
    ids = prompt(device, 1, tokens)

    def bind(compiled: Any) -> Step:
        return lambda: compiled(input_ids=ids, use_cache=False, logits_to_keep=1).logits

    return model, bind


class Generator(nn.Module):
    """A model under one more name: compiled in place as its `parts`, it is what its own generate() calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([model])


def generate(device: str, name: str, tokens: int, start: int = 16) -> Made:
    """model.generate of `tokens` new tokens after `start` given ones, greedy, with a static cache: two graphs.

    transformers would compile the decode steps by itself, and leave the prefill eager; here both are compiled, by whom the
    case says. What is compared is the first token's logits: once two schemes have chosen different tokens, the rest differs.
    """
    model: Any = llm(device, name)
    ids = prompt(device, 1, start)
    settings = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "disable_compile": True,
        "output_logits": True, "return_dict_in_generate": True,
    }

    def bind(compiled: Any) -> Step:
        cache = static_cache(model.config, 1, start + tokens, ids.device)
        mask = torch.ones_like(ids)

        def step() -> torch.Tensor:
            cache.reset()
            found = compiled.parts[0].generate(ids, attention_mask=mask, past_key_values=cache, **settings)
            logits: torch.Tensor = found.logits[0]
            return logits

        return step

    return Generator(model), bind
