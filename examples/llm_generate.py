"""A transformers LLM: `model.generate` through a quantized graph.

    python examples/llm_generate.py [MODEL]    MODEL: a name or folder for from_pretrained; without it a tiny random Llama

generate() compiles by itself where the cache is static: its decode steps run the quantized graph, its prefill the plain model.
Wrapping `model.forward` instead compiles both.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig, LlamaConfig, LlamaForCausalLM

import aoquant_inductor

OPTIONS = {"schemes": {"lm_head": None}, "default": "int8wo"}


def load() -> tuple[LlamaForCausalLM, torch.Tensor]:
    """A model and the ids of a prompt."""
    if len(sys.argv) > 1:
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
        ids = AutoTokenizer.from_pretrained(sys.argv[1])("The capital of France is", return_tensors="pt").input_ids
    else:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128,
        )
        model, ids = LlamaForCausalLM(config).bfloat16(), torch.arange(1, 9)[None]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), ids.to(device)


def main() -> None:
    model, ids = load()
    # mode=None: generate's own default is "reduce-overhead", and torch.compile refuses mode and options together
    compile_config = CompileConfig(backend="aoquant", mode=None, options=OPTIONS, fullgraph=False)
    compile_config._compile_all_devices = True  # transformers compiles on the CPU only when told
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    with torch.no_grad():
        ids = model.generate(ids, compile_config=compile_config, **settings)
    print(ids.tolist())
    print(aoquant_inductor.report(model._compiled_call).summary())


if __name__ == "__main__":
    main()
