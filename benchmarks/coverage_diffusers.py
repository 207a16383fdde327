"""Diffusion models of diffusers, tiny and with random weights: of each class its config and what it is called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from benchmarks.build import BF16

Inputs = dict[str, Any]
CHANNELS, SIDE, TEXT, WIDTH = 4, 8, 8, 32  # of a latent image, and of the tokens that describe it

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
IMAGE = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, **HEADS}
JOINT = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
FLUX = {"patch_size": 1, "in_channels": CHANNELS, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 4, 8), **HEADS}
NORMS = {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_elementwise_affine": False}
UNET = {
    "sample_size": 16, "in_channels": CHANNELS, "out_channels": CHANNELS, "layers_per_block": 1, "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH, "attention_head_dim": 8, "norm_num_groups": 8,
}
VAE = {
    "block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": CHANNELS, "norm_num_groups": 8,
}


def latents(*lead: int, side: int = SIDE) -> torch.Tensor:
    return torch.randn(1, CHANNELS, *lead, side, side, dtype=BF16)


def tokens(count: int, width: int) -> torch.Tensor:
    return torch.randn(1, count, width, dtype=BF16)


def text(**more: Any) -> Inputs:
    return {"encoder_hidden_states": tokens(TEXT, WIDTH), "timestep": torch.tensor([5]), **more}


def image(*lead: int, **more: Any) -> Inputs:
    return text(hidden_states=latents(*lead), **more)


def packed(**more: Any) -> Inputs:
    """Flux's: the latent image as tokens, each with its place."""
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(TEXT, 3)}
    return text(hidden_states=tokens(16, CHANNELS), **places) | {"timestep": torch.tensor([0.5], dtype=BF16)} | more


def pooled() -> torch.Tensor:
    return torch.randn(1, WIDTH, dtype=BF16)


# class -> (its config, its inputs)
MODELS: Mapping[str, tuple[Mapping[str, Any], Callable[[], Inputs]]] = MappingProxyType(
    {
        "FluxTransformer2DModel": (
            {**FLUX, **JOINT, "guidance_embeds": True},
            lambda: packed(pooled_projections=pooled(), guidance=torch.tensor([3.5], dtype=BF16)),
        ),
        "FluxControlNetModel": (
            {**FLUX, **JOINT}, lambda: packed(pooled_projections=pooled(), controlnet_cond=tokens(16, CHANNELS)),
        ),
        "ChromaTransformer2DModel": (
            {
                **FLUX, "joint_attention_dim": WIDTH, "approximator_hidden_dim": WIDTH, "approximator_layers": 1,
                "approximator_num_channels": 16,
            },
            packed,
        ),
        "SD3Transformer2DModel": (
            {**IMAGE, **JOINT, "sample_size": SIDE, "patch_size": 1, "caption_projection_dim": WIDTH},
            lambda: image(pooled_projections=pooled()),
        ),
        "QwenImageTransformer2DModel": (
            {
                "patch_size": 2, "in_channels": 16, "out_channels": CHANNELS, "num_layers": 2, "joint_attention_dim": WIDTH,
                "axes_dims_rope": (8, 4, 4), **HEADS,
            },
            lambda: text(
                hidden_states=tokens(16, 16), encoder_hidden_states_mask=torch.ones(1, TEXT, dtype=torch.long),
                img_shapes=[(1, 4, 4)],
            ) | {"timestep": torch.tensor([0.5], dtype=BF16)},
        ),
        "AuraFlowTransformer2DModel": (
            {
                "sample_size": SIDE, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_mmdit_layers": 1,
                "num_single_dit_layers": 1, "caption_projection_dim": WIDTH, "joint_attention_dim": WIDTH,
                "pos_embed_max_size": 64, **HEADS,
            },
            lambda: image() | {"timestep": torch.tensor([0.5], dtype=BF16)},
        ),
        "PixArtTransformer2DModel": (
            {**IMAGE, **NORMS, "sample_size": SIDE, "patch_size": 2, "caption_channels": WIDTH, "cross_attention_dim": WIDTH},
            lambda: image(added_cond_kwargs={"aspect_ratio": None, "resolution": None}),
        ),
        "SanaTransformer2DModel": (
            {
                **IMAGE, "patch_size": 1, "sample_size": SIDE, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
                "cross_attention_dim": WIDTH, "caption_channels": WIDTH,
            },
            image,
        ),
        "Lumina2Transformer2DModel": (
            {
                "sample_size": SIDE, "patch_size": 2, "in_channels": CHANNELS, "hidden_size": WIDTH, "num_layers": 2,
                "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 2, "scaling_factor": 1.0,
                "axes_dim_rope": (8, 4, 4), "axes_lens": (64, 64, 64), "cap_feat_dim": WIDTH,
            },
            lambda: image(encoder_attention_mask=torch.ones(1, TEXT, dtype=torch.bool)),
        ),
        "DiTTransformer2DModel": (
            {
                **IMAGE, **NORMS, "out_channels": 2 * CHANNELS, "sample_size": SIDE, "patch_size": 2,
                "num_embeds_ada_norm": 100,
            },
            lambda: {"hidden_states": latents(), "timestep": torch.tensor([5]), "class_labels": torch.tensor([1])},
        ),
        "WanTransformer3DModel": (
            {**IMAGE, "patch_size": (1, 2, 2), "text_dim": WIDTH, "freq_dim": WIDTH, "ffn_dim": 64, "rope_max_seq_len": 32},
            lambda: image(2),
        ),
        "LTXVideoTransformer3DModel": (
            {**IMAGE, "cross_attention_dim": WIDTH, "caption_channels": WIDTH},
            lambda: text(
                hidden_states=tokens(8, CHANNELS), encoder_attention_mask=torch.ones(1, TEXT, dtype=torch.bool), num_frames=2,
                height=2, width=2,
            ),
        ),
        "CogVideoXTransformer3DModel": (
            {
                **IMAGE, "time_embed_dim": 16, "text_embed_dim": WIDTH, "max_text_seq_length": TEXT, "sample_width": SIDE,
                "sample_height": SIDE, "sample_frames": 5, "patch_size": 2,
            },
            lambda: text(hidden_states=latents(SIDE).permute(0, 2, 1, 3, 4)[:, :2]),
        ),
        "HunyuanVideoTransformer3DModel": (
            {
                **IMAGE, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1,
                "text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": (4, 4, 8),
            },
            lambda: image(
                1, pooled_projections=pooled(), encoder_attention_mask=torch.ones(1, TEXT),
                guidance=torch.tensor([100.0], dtype=BF16),
            ),
        ),
        "UNet2DConditionModel": (UNET, lambda: text(sample=latents(side=16))),
        "AutoencoderKL": (VAE, lambda: {"sample": torch.randn(1, 3, 32, 32, dtype=BF16)}),
    }
)


def made(name: str, device: str) -> tuple[nn.Module, Inputs]:
    """(the model, what it is called with); parameters that begin as zeros have values, so that all of it counts."""
    import diffusers

    config, inputs = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, name)(**config).to(BF16).to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return model, {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in inputs().items()}
