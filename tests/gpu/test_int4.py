"""Every config of the int4 kernels that autotuning may choose, bit-exactly: integers as values, odd sizes, over several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from util import from_pack, linear64, run, sqnr_db

from aoquant_inductor import lowering_triton, packing
from aoquant_inductor.qparams import Quantized, n_groups
from aoquant_inductor.scheme import SCHEMES
from aoquant_inductor.templates import QUANTIZING, Config, Kernel, int4, int4_few, int4_gemv_dynamic
from benchmarks import render

pytestmark = pytest.mark.gpu

SCHEMES_OF = {
    int4_few.FMA: (
        "int4wo-128", "int4wo-32", "int4wo-64", "int4wo-256-asym", "int4wo-row-asym", "int4wo-128-asymfloat", "int4wo-32-asym",
        "int4wo-64-asymfloat",
    ),
    int4_few.GEMV: ("int4wo-128", "int4wo-256-asym", "int4wo-row", "int4wo-row-asym"),
    int4_few.GEMV_FLOAT: ("int4wo-128-asymfloat",),
    int4_few.GEMV_GROUPS: ("int4wo-32", "int4wo-64"),
    int4_few.GEMV_GROUPS_ZERO: ("int4wo-32-asym", "int4wo-64-asym", "int4wo-32-asymfloat"),
    int4.SUMS: ("int4wo-128", "int4wo-128-asym", "int4wo-256"),
    int4.ONE_SUM: ("int4wo-32-asym", "int4wo-64", "int4wo-row-asym", "int4wo-128-asymfloat"),
    int4.DYNAMIC_ROW: ("int8dq-int4w", "int8dq-int4w-asym-asymact"),
    int4.DYNAMIC_GROUPS: ("int8dq-int4w-128", "int8dq-int4w-256-asym", "int8dq-int4w-128-asym-asymact"),
    int4_gemv_dynamic.KERNEL: (
        "int8dq-int4w", "int8dq-int4w-asym", "int8dq-int4w-asym-asymact", "int8dq-int4w-128", "int8dq-int4w-256-asymact",
        "int8dq-int4w-128-asym-asymact",
    ),
}
CASES = [(scheme, kernel, config) for kernel, schemes in SCHEMES_OF.items() for scheme in schemes for config in kernel.configs if not config.tail]


def operands(scheme: str, m: int, n: int, k: int, quantizing: bool) -> tuple[render.Op, render.Tensors]:
    """One linear whose sums are integers below 2 ** 24: every scale is 1, in x too, whose extremes are those of int8."""
    choice = SCHEMES[scheme]
    spec, groups = choice.weight, n_groups(k, choice.weight.group_size)
    w_q = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda")
    scale = torch.ones(groups, n, dtype=torch.float32 if spec.group_size is None else torch.bfloat16, device="cuda")
    zero = None if spec.symmetric else torch.randint(-8, 8, (groups, n), device="cuda").to(torch.int8)
    zero = zero.float() if zero is not None and spec.zero_point == "float" else zero
    nothing = torch.zeros((), device="cuda")
    layout = packing.choose(choice, w_q.device, torch.bfloat16, (n, k))
    packed = packing.pack(Quantized(w_q, scale, zero, spec, nothing, nothing), choice, layout)
    low, high = (-8, 9) if choice.activation is None else (-127, 128) if choice.activation.symmetric else (-64, 192)
    x = torch.randint(low, high, (m, k), device="cuda")
    x[:, 0], x[:, 1] = low, high - 1
    return render.linear(packed, x.bfloat16(), torch.randint(-8, 9, (n,), device="cuda").bfloat16(), choice, quantizing)


def difference(folder: Path, scheme: str, m: int, n: int, k: int, config: tuple[Kernel, Config]) -> int | None:
    """How many values of y are not the reference's, over three seeds; None where this card or size has no such config."""
    wrong: int = 0
    code: Any = None
    for _ in range(3):
        op, tensors = operands(scheme, m, n, k, config[0] in QUANTIZING)
        try:
            code = code or render.render(op, tensors, config)
        except Exception as error:  # Inductor wraps what a lowering raises
            if "CannotRun" in repr(error):
                return None
            raise
        rendered = render.Rendered(op, tensors, code.code, code.names)
        name, source, _, options = render.kernel(rendered.code)
        y = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        args, grid = render.call(rendered, name, y)
        launch = render.load(name, source, folder)[grid]
        for _ in range(2):  # the second finds the counters as the first left them
            launch(*render.described(rendered, args), **options)
            wrong += int((y != rendered.expected).sum())
            y.fill_(float("nan"))
    return wrong


@pytest.mark.parametrize(("scheme", "kernel", "config"), CASES, ids=lambda v: str(v) if isinstance(v, Config) else getattr(v, "template", v))
def test_integers_are_exact(scheme: str, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    sizes = [(max(1, min(config.block_m, 5 if kernel.template == "int4_gemv" else config.block_m) - 1), 203, 4100), (config.block_m, 512, 4096)]
    if kernel.template == "int4_gemv" and config.block_m <= int4_few.FEW:
        sizes = [(m, n, k) for m in (1, 2, 3, 4) for n, k in ((203, 4104), (512, 4096), (96, 14336))]
    if kernel in QUANTIZING:
        sizes = [(m, n, k) for m in (1, 2, 3, 4) for n, k in ((203, 4104), (512, 4096), (48, 200), (96, 14336))]
    sizes += [(2051, 4231, 1040)] if config.programs else []  # tiles enough for programs that each have several
    found = [difference(tmp_path, scheme, m, n, k, (kernel, config)) for m, n, k in sizes]
    if all(wrong is None for wrong in found):
        pytest.skip("not a choice here")
    assert not any(found), found


@pytest.mark.parametrize("scheme", ["int4wo-128", "int4wo-128-asym", "int4wo-32"])
@pytest.mark.parametrize("k", [4096, 5136])
def test_a_copy_in_bf16_has_every_row(scheme: str, k: int) -> None:
    """Too few tiles for the card, so that cuBLAS multiplies; the last chunk of K is a whole one, or not."""
    model = nn.Linear(k, 1024, device="cuda", dtype=torch.bfloat16).eval().requires_grad_(False)
    x = torch.randn(1500, k, device="cuda", dtype=torch.bfloat16)
    with mock.patch.object(lowering_triton, "default", return_value=None):
        y, report = run(model, x, schemes=scheme)[1:]
    assert report.totals["quantized"] == 1 and str(report.layers[0].kernel).startswith("portable"), str(report)
    assert sqnr_db(y, linear64(x, model, SCHEMES[scheme], from_pack(model.weight, SCHEMES[scheme]))) >= 45
