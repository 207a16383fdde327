"""A deep model compiled block by block, as diffusers' `compile_repeated_blocks` does: two compilations for any depth.

    python examples/blockwise.py
"""

from __future__ import annotations

import torch
from torch import nn

import aoquant_inductor


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(*(Block(64) for _ in range(12))).bfloat16().eval().to(device)
    for block in model:
        block.compile(backend="aoquant", options={"schemes": "int8wo"})
    with torch.no_grad():
        model(torch.randn(4, 64, dtype=torch.bfloat16, device=device))
    # each block is a compiled object of its own, with its own weights and its own report
    totals = [aoquant_inductor.report(block).totals for block in model]
    linears, compilations = (sum(total[key] for total in totals) for key in ("quantized", "graphs"))
    print(f"{linears} linears in {len(totals)} blocks, {compilations} compilations")


if __name__ == "__main__":
    main()
