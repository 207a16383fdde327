"""torch.ops.aoquant.*: opcheck, and the eager references against float64 computed here from the integers."""

from __future__ import annotations

import pytest
import torch
from util import BF16, FP16, FP32, sqnr_db

from aoquant_inductor import ops, packing, qparams
from aoquant_inductor.layouts import LAYOUTS, Packed
from aoquant_inductor.scheme import SCHEMES, Scheme

WO = ["int8wo", "int8wo-32", "int4wo-row", "int4wo-32", "int4wo-32-asym", "int4wo-32-asymfloat"]
DQ = [
    "int8dq", "int8dq-asymact", "int8dq-int4w", "int8dq-int4w-asym", "int8dq-int4w-asym-asymact", "int8dq-int4w-32",
    "int8dq-int4w-32-asymact", "int8dq-int4w-32-asym", "int8dq-int4w-32-asym-asymact",
]
N, K = 7, 65
LAYOUTS_OF_K = [name for name in LAYOUTS if name != "wgmma"]  # that one is for a K of 64s: test_packing.py
aoquant = torch.ops.aoquant


def with_layouts(names: list[str]) -> pytest.MarkDecorator:
    """Each scheme with the layouts that hold its bits."""
    pairs = [(name, one) for name in names for one in LAYOUTS_OF_K if SCHEMES[name].weight.bits in LAYOUTS[one].bits]
    return pytest.mark.parametrize(("name", "layout"), pairs)


def weight(scheme: Scheme, layout: str) -> tuple[Packed, torch.Tensor]:
    """A pack, and its float64 values element by element from w_q, scale and zero."""
    q = qparams.quantize(torch.randn(N, K), scheme.weight)
    g = scheme.weight.group_size or K
    dense = torch.empty(N, K, dtype=torch.float64)
    for n in range(N):
        for k in range(K):
            s, z = float(q.scale[k // g, n]), 0.0 if q.zero is None else float(q.zero[k // g, n])
            value = int(q.w_q[n, k])
            dense[n, k] = value * s + z if scheme.weight.zero_point == "float" else (value - z) * s
    return packing.pack(q, scheme, layout), dense


def wo_args(name: str, layout: str, dtype: torch.dtype = FP32, shape: tuple[int, ...] = (5, K)) -> tuple:
    p, dense = weight(SCHEMES[name], layout)
    x, bias = torch.randn(shape, dtype=dtype), torch.randn(N, dtype=dtype)
    return (x, p.w, p.scale, p.zero, bias, *p.key), x.double() @ dense.t() + bias.double()


def dq_args(name: str, layout: str, out: torch.dtype = FP32, shape: tuple[int, ...] = (5, K)) -> tuple:
    scheme = SCHEMES[name]
    p, dense = weight(scheme, layout)
    x, bias = torch.randn(shape) + 0.5, torch.randn(N, dtype=out)
    symmetric = scheme.activation is not None and scheme.activation.symmetric
    x_q, scale, *zero = aoquant.quantize_per_token(x) if symmetric else aoquant.quantize_per_token_asym(x)
    z = zero[0] if zero else None
    left = (x_q.double() - (0 if z is None else z.double())) * scale.double()
    args = (x_q, scale, z, p.w, p.scale, p.zero, p.sums, bias, *p.key, out)
    return args, left @ dense.t() + bias.double()


@with_layouts(WO)
def test_linear_wo(name: str, layout: str) -> None:
    for dtype, floor in ((FP32, 110), (FP16, 60), (BF16, 45)):
        for shape in ((5, K), (K,), (2, 1, 3, K), (0, K)):
            args, want = wo_args(name, layout, dtype, shape)
            got = aoquant.linear_wo(*args)
            assert got.dtype == dtype
            assert sqnr_db(got, want) > floor or not got.numel(), (dtype, shape)


@with_layouts(DQ)
def test_linear_dynamic(name: str, layout: str) -> None:
    for out, floor in ((FP32, 110), (FP16, 60), (BF16, 45)):
        for shape in ((5, K), (K,), (2, 1, 3, K), (0, K)):
            args, want = dq_args(name, layout, out, shape)
            got = aoquant.linear_dynamic(*args)
            assert got.dtype == out
            assert sqnr_db(got, want) > floor or not got.numel(), (out, shape)


@with_layouts(WO)
def test_linear_grad(name: str, layout: str) -> None:
    p, dense = weight(SCHEMES[name], layout)
    for dtype, floor in ((FP32, 110), (FP16, 50), (BF16, 40)):
        for shape in ((5, N), (N,), (2, 1, 3, N), (0, N)):
            grad = torch.randn(shape, dtype=dtype)
            got = aoquant.linear_grad(grad, p.w, p.scale, p.zero, *p.key)
            assert got.dtype == dtype
            assert sqnr_db(got, grad.double() @ dense) > floor or not got.numel(), (dtype, shape)


def test_integer_products_are_exact_before_scaling() -> None:
    """Scales of 1 and integers beyond what fp32 sums exactly: the result is the integer itself."""
    k = 4096
    x_q = torch.full((1, k), 127, dtype=torch.int8)
    w = torch.full((1, k), 127, dtype=torch.int8)
    w[0, 0] = 126
    one = torch.ones(1, 1)
    y = aoquant.linear_dynamic(x_q, one, None, w, one, None, None, None, k, 1, "int8", 0, "int", "plain", torch.float64)
    assert int(y) == 127 * 127 * k - 127


def test_an_asymmetric_activation_without_sums_is_refused() -> None:
    args, _ = dq_args("int8dq-asymact", "plain")
    with pytest.raises(ValueError, match="asymmetric activations need w_sums"):
        aoquant.linear_dynamic(*args[:6], None, *args[7:])


def test_the_namespace_holds_these_ops() -> None:
    known = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    names = {name.split(".")[0] for space, name in known if space == ops.NAMESPACE}
    assert names == {"linear_wo", "linear_dynamic", "linear_grad", "quantize_per_token", "quantize_per_token_asym", "requantize"}


@with_layouts(["int8wo", "int4wo-32-asym"])
def test_opcheck_of_weight_only(name: str, layout: str) -> None:
    args = wo_args(name, layout)[0]
    torch.library.opcheck(aoquant.linear_wo.default, args)
    torch.library.opcheck(aoquant.linear_grad.default, (torch.randn(5, N), *args[1:4], *args[5:]))


@with_layouts(["int8dq", "int8dq-int4w-32-asym-asymact"])
def test_opcheck_of_dynamic(name: str, layout: str) -> None:
    args = dq_args(name, layout, BF16)[0]
    torch.library.opcheck(aoquant.linear_dynamic.default, args)
    torch.library.opcheck(aoquant.linear_dynamic.default, args, {"x": torch.randn(5, K, dtype=BF16)})


@with_layouts(["int4wo-32-asym-large8", "int4wo-row-asymfloat-large8"])
def test_opcheck_of_requantize(name: str, layout: str) -> None:
    p, _ = weight(SCHEMES[name], layout)
    torch.library.opcheck(aoquant.requantize.default, (p.w, p.scale, p.zero, p.row, *p.key, p.int8_key[-1]))


def test_opcheck_of_activations() -> None:
    x = torch.randn(2, 3, 8)
    torch.library.opcheck(aoquant.quantize_per_token.default, (x,))
    torch.library.opcheck(aoquant.quantize_per_token_asym.default, (x,))
