"""Every kind of kernel once at sizes that no tile likes, for a tool that watches memory (test_memory_errors.py)."""

from __future__ import annotations

import torch
from torch import nn
from util import BF16, compiled

import aoquant_inductor

SCHEMES = ("int8wo", "int8wo-64", "int8dq-asymact", "int4wo-128-asym", "int4wo-32-asym", "int8dq-int4w", "int8dq-int4w-128-asym")
SHAPES = ((33, 64), (203, 1040), (71, 2112))
MANY = (("int8dq-asymact", "int8dq-int4w"), (4231, 1040), 2051)
"""Tiles enough for programs that each have several."""
COPIED = (("int8wo", "int8wo-64", "int4wo-128-asym"), (203, 4160), 1700)
"""Too few tiles for the card: a copy of the weight in bf16, for cuBLAS."""


def main() -> None:
    kernels = set()
    cases = [(scheme, SHAPES, (1, 3, 17, 130)) for scheme in SCHEMES]
    cases += [(scheme, (shape,), (m,)) for schemes, shape, m in (MANY, COPIED) for scheme in schemes]
    for scheme, shapes, ms in cases:
        model = nn.ModuleList(nn.Linear(k, n, device="cuda", dtype=BF16) for n, k in shapes).eval().requires_grad_(False)
        for m in ms:
            torch.compiler.reset()
            for linear in model:
                function = compiled(linear, scheme, dynamic=False)
                y = function(torch.randn(m, linear.in_features, device="cuda", dtype=BF16))
                assert y.isfinite().all(), (scheme, m, linear)
                kernels |= {str(layer.kernel) for layer in aoquant_inductor.report(function).layers}
    torch.cuda.synchronize()
    print(f"{len(kernels)} kernels", *sorted(kernels), sep="\n")


if __name__ == "__main__":
    main()
