"""Does one line work on a model: architectures of transformers and diffusers, tiny and with random weights, one after another.

A row: how many of its nn.Linears were quantized, which were left and why, and the SQNR in dB of the compiled model's output
against eager bf16. All of them in one process. Needs the extra [demo]; diffusers come with [bench].
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import aoquant_inductor
from benchmarks import cli, coverage_diffusers, measure
from benchmarks.build import BF16
from benchmarks.error import sqnr_db

BENCH = "coverage"
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "max_position_embeddings": 64, "pad_token_id": 0,
}
OLD = {"hidden_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256}
TWO = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 256, "pad_token_id": 0, "decoder_start_token_id": 1,
}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
CONVNEXT = {"image_size": 32, "hidden_sizes": [16, 32, 32, 32], "depths": [1] * 4, "layer_scale_init_value": 1.0}
CONVOLVED = {"conv_dim": [32] * 3, "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3], "num_feat_extract_layers": 3}
WAVE = {**SMALL, **CONVOLVED, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, **MOE,
}
# transformers' model_type -> (with a head for text or without, what it reads, its config)
MODELS: Mapping[str, tuple[bool, str, Mapping[str, Any]]] = MappingProxyType(
    {
        **{name: (True, "text", SMALL) for name in (
            "llama", "mistral", "phi3", "olmo2", "cohere", "granite", "gpt_neox", "falcon", "mamba",
        )},
        **{name: (True, "text", {**SMALL, "head_dim": 16}) for name in ("gemma2", "gemma3_text", "qwen3", "glm4")},
        **{name: (True, "text", OLD) for name in ("gpt2", "bloom")},
        "opt": (True, "text", {**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64}),
        "mixtral": (True, "text", {**SMALL, "num_local_experts": 4}),
        "qwen3_moe": (True, "text", {**SMALL, "head_dim": 16, "num_experts": 4, **MOE}),
        "deepseek_v3": (True, "text", {**SMALL, **DEEPSEEK}),
        **{name: (False, "text", SMALL) for name in ("bert", "roberta", "modernbert", "deberta-v2", "electra")},
        "t5": (False, "two texts", T5),
        "bart": (False, "two texts", {**TWO, "max_position_embeddings": 64}),
        "whisper": (False, "audio", {**TWO, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}),
        "wavlm": (False, "waveform", WAVE),
        **{name: (False, "image", IMAGE) for name in ("vit", "dinov2", "siglip_vision_model", "clip_vision_model")},
        "swin": (False, "image", SWIN),
        "convnext": (False, "image", CONVNEXT),
    }
)


def made(name: str, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """(the model, what it is called with)."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if name in coverage_diffusers.MODELS:
        return coverage_diffusers.made(name, device)
    headed, reads, config = MODELS[name]
    torch.manual_seed(0)
    model = (AutoModelForCausalLM if headed else AutoModel).from_config(AutoConfig.for_model(name, **config), dtype=BF16)
    ids = torch.randint(3, 200, (2, 16), device=device)
    inputs: dict[str, dict[str, Any]] = {
        "text": {"input_ids": ids}, "two texts": {"input_ids": ids, "decoder_input_ids": ids},
        "audio": {"input_features": torch.randn(2, 16, 64, dtype=BF16, device=device), "decoder_input_ids": ids},
        "waveform": {"input_values": torch.randn(2, 1600, dtype=BF16, device=device)},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32, dtype=BF16, device=device)},
    }
    return model.to(device).eval(), inputs[reads] | ({"use_cache": False} if headed else {})


def first(outputs: Mapping[str, Any]) -> torch.Tensor:
    """Of a ControlNet's lists of tensors, too."""
    found = next(iter(outputs.values()))
    tensor: torch.Tensor = found[0] if isinstance(found, (list, tuple)) else found
    return tensor


def cover(name: str, scheme: str, device: str) -> dict[str, Any]:
    """A row. scheme bf16: torch.compile's own, how far what it fuses is from eager."""
    model, inputs = made(name, device)
    torch.compiler.reset()
    how: dict[str, Any] = {} if scheme == "bf16" else {"backend": "aoquant", "options": {"default": scheme}}
    function = torch.compile(model, **how)
    with torch.no_grad():
        want, got = (first(f(**inputs)) for f in (model, function))
    report = aoquant_inductor.report(function) if how else None
    layers = report.layers if report else ()
    return {
        "model": name, "scheme": scheme, "quantized": report.totals["quantized"] if report else 0,
        "linears": sum(isinstance(m, nn.Linear) for m in model.modules()),
        "left": "; ".join(f"{layer.name}: {layer.reason}" for layer in layers if layer.reason),
        "sqnr_db": round(sqnr_db(want, got), 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=1, schemes=("int8wo",))
    p.add_argument("--models", default=",".join((*MODELS, *coverage_diffusers.MODELS)), help="comma-separated (default: all)")
    args = cli.parse(p, argv)
    written: list[dict[str, Any]] = []
    refused = []
    for scheme in args.schemes.split(","):
        for name in args.models.split(","):
            try:
                row = cover(name, scheme, args.device)
            except Exception as error:
                refused.append(f"{name} {scheme}: {type(error).__name__}: {str(error)[:200]}")
                continue
            written += measure.append([row], BENCH, args.device, args.results)
            print(f"{name} {scheme}: {row['quantized']} of {row['linears']}", file=sys.stderr, flush=True)
    head = ("model", "scheme", "quantized", "linears", "sqnr_db", "left")
    return cli.finish(written, cli.table(head, [[str(row[key]) for key in head] for row in written]), refused, args)


if __name__ == "__main__":
    sys.exit(main())
