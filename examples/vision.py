"""A vision transformer with int8 activations and weights: compute-bound, so both sides are quantized.

    python examples/vision.py
"""

from __future__ import annotations

import torch
from transformers import ViTConfig, ViTForImageClassification

import aoquant_inductor


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ViTConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=64)
    model = ViTForImageClassification(config).bfloat16().eval().to(device)
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16, device=device)
    # the patch embedding is a convolution and stays; the classifier sees one token per image and gains nothing
    options = {"schemes": {"classifier": None}, "default": "int8dq"}
    fast = torch.compile(model, backend="aoquant", options=options)
    with torch.no_grad():
        want, got = model(images).logits, fast(images).logits
    print(f"largest difference {float((want - got).abs().max()):.4f}, largest logit {float(want.abs().max()):.4f}")
    print(aoquant_inductor.report(fast).summary())


if __name__ == "__main__":
    main()
