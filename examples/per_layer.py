"""A scheme for every kind of layer: look at the plan first, then at the report.

    python examples/per_layer.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import aoquant_inductor

OPTIONS = {
    "schemes": {
        "lm_head": None,  # left as it is
        r"re:model\.layers\.0\..*": "int8wo",  # the first layer is the most sensitive one
        "*.mlp.*": "int4wo-32",
        "*.self_attn.*": {"weight": "int4", "group_size": 64, "symmetric": False},
    },
}


def main() -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128,
    )
    with torch.device("meta"):  # no memory, no data: a plan for a model of any size
        print(aoquant_inductor.plan(LlamaForCausalLM(config), OPTIONS))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16().eval()
    fast = torch.compile(model, backend="aoquant", options=OPTIONS)
    with torch.no_grad():
        fast(torch.arange(8)[None])
    print(aoquant_inductor.report(fast))


if __name__ == "__main__":
    main()
