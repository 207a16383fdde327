"""Image models as benchmark cases: SAM's encoder and a diffusion transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.build import BF16, Made, first, seeded


def sam_config(layers: int, image: int) -> Any:
    """SAM's ViT-H image encoder."""
    from transformers import SamVisionConfig

    config = SamVisionConfig(
        hidden_size=1280, num_hidden_layers=layers, num_attention_heads=16, mlp_dim=5120, image_size=image,
        global_attn_indexes=[i for i in (7, 15, 23, 31) if i < layers],
        initializer_range=0.02,  # its default, 1e-10, makes an encoder whose layers do nothing
    )
    config._attn_implementation = "eager"
    return config


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
        y: torch.Tensor = x + g2 * self.down(nn.functional.gelu(self.up(h), approximate="tanh"))
        return y


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
