"""Every layout is its own inverse, and says how large it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from util import BF16, CPU, FP16, FP32, sqnr_db

from aoquant_inductor import packing, packing_cpu, packing_cuda, qparams
from aoquant_inductor.layouts import LAYOUTS, by_group
from aoquant_inductor.scheme import SCHEMES, QuantSpec, Scheme

SHAPES = [(1, 1), (7, 31), (65, 33), (16, 128), (130, 257), (3, 576)]
BY_SPEC = list({(s.weight, s.activation and s.activation.symmetric, s.large_m): s for s in SCHEMES.values()}.values())


def shapes(layout: str) -> list[tuple[int, int]]:
    """Those that the layout is chosen for."""
    return [(n, k) for n, k in SHAPES if layout != "wgmma" or k % 64 == 0]


def each_layout(schemes: list[Scheme]) -> pytest.MarkDecorator:
    pairs = [(s, name) for s in schemes for name, layout in LAYOUTS.items() if s.weight.bits in layout.bits]
    return pytest.mark.parametrize(("scheme", "layout"), pairs, ids=lambda value: getattr(value, "name", value))


def packed(shape: tuple[int, int], scheme: Scheme, layout: str, dtype: torch.dtype = BF16, seed: int = 0) -> tuple:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    quantized = qparams.quantize(t, scheme.weight)
    return quantized, packing.pack(quantized, scheme, layout)


@each_layout(BY_SPEC)
def test_unpack_is_the_inverse_and_the_values_are_kept(scheme: Scheme, layout: str) -> None:
    for n, k in shapes(layout):
        quantized, p = packed((n, k), scheme, layout)
        q = packing.unpack(p.w, k, n, p.w_dtype, layout)
        assert torch.equal(q, quantized.w_q), (n, k)
        assert p.shape == (n, k)
        # scale and zero as the op reads them: with the pack's own convention the values are the quantized ones
        zero = None if p.zero is None else by_group(p.zero)[:, :n]
        got = qparams.dequantize(q, by_group(p.scale)[:, :n], zero, p.group_size or None, p.zero_point, torch.float64)
        spec = scheme.weight
        want = qparams.dequantize(
            quantized.w_q, quantized.scale, quantized.zero, spec.group_size, spec.zero_point, torch.float64
        )
        assert sqnr_db(got, want) > 120, (n, k)


@each_layout([s for s in BY_SPEC if s.activation and not s.activation.symmetric])
def test_sums_of_an_asymmetric_activation(scheme: Scheme, layout: str) -> None:
    for n, k in shapes(layout):
        quantized, p = packed((n, k), scheme, layout)
        g = scheme.weight.group_size or k
        scale = quantized.scale.double().repeat_interleave(g, 0)[:k].t()
        one = quantized.scale.shape[0] == 1
        want = (quantized.w_q.double() * (1 if one else scale)).sum(1)
        assert p.sums is not None
        torch.testing.assert_close(p.sums[0, :n].double(), want, rtol=1e-5, atol=0 if one else 1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("scheme", BY_SPEC, ids=lambda s: s.name)
def test_packed_bytes_is_the_plain_size(scheme: Scheme, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        _, p = packed(shape, scheme, "plain", dtype)
        assert packing.packed_bytes(torch.Size(shape), dtype, scheme) == p.nbytes, shape


@each_layout(BY_SPEC)
def test_copy_keeps_the_storage_and_takes_the_values(scheme: Scheme, layout: str) -> None:
    _, old = packed((7, 64), scheme, layout, seed=0)
    _, new = packed((7, 64), scheme, layout, seed=1)
    assert not torch.equal(old.w, new.w)
    where = [t.data_ptr() for t in old.tensors]
    old.copy_(new)
    assert [t.data_ptr() for t in old.tensors] == where
    assert all(torch.equal(a, b) for a, b in zip(old.tensors, new.tensors, strict=True))


@pytest.mark.parametrize(("name", "bits"), [(name, b) for name, layout in LAYOUTS.items() if layout.locate for b in layout.bits])
def test_locate_finds_every_element(name: str, bits: int) -> None:
    layout, size = LAYOUTS[name], (33, 320)
    w_q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), size, dtype=torch.int8)
    nothing = torch.zeros(())
    packed = layout.pack(qparams.Quantized(w_q, torch.ones(1, size[0]), None, QuantSpec(f"int{bits}"), nothing, nothing), False)
    n, k = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    assert layout.locate is not None
    place, shift = layout.locate(bits, n, k, lambda a, b: a // b, lambda a, b: a % b)
    code = packed.w[place].int() >> shift
    if bits == 4:
        code = ((code & 15) ^ (8 if layout.signed else 0)) - 8
    assert torch.equal(code, w_q.int())


def test_int4_of_the_plain_layout_has_the_even_k_low() -> None:
    q = qparams.Quantized(
        torch.tensor([[-8, 7, 1]], dtype=torch.int8), torch.ones(1, 1), None, SCHEMES["int4wo-row"].weight,
        torch.zeros(()), torch.zeros(()),
    )
    assert packing.pack(q, SCHEMES["int4wo-row"], "plain").w.tolist() == [[0 | 15 << 4, 9 | 8 << 4]]


@pytest.mark.parametrize("size", [32, 64])
def test_groups_within_a_chunk_lie_side_by_side(size: int) -> None:
    n, k = 48, 384
    t = torch.arange(k // size * n).view(k // size, n)
    laid = packing_cuda.lay_groups(t, size)
    assert laid.shape == (n // 16, k // 128, 8, 128 // size, 2) and laid.is_contiguous()
    assert torch.equal(by_group(laid), t)
    for group, row in ((0, 0), (k // size - 1, n - 1), (3, 17), (4, 30)):
        place = packing_cuda.locate_group(group, row, size, lambda a, b: a // b, lambda a, b: a % b)
        assert laid[place] == t[group, row]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse4_2 avx avx2 fma f16c", "avx2"),
        ("fpu sse4_2 avx avx2 fma", None),
        ("fpu avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vnni", "avx2"),
        ("fpu avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512vbmi avx512_vnni avx512_bf16", "avx512"),
        (None, None),
    ],
)
def test_weights_are_packed_for_the_best_instruction_set(
    flags: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t: none\n")
    monkeypatch.setattr(packing_cpu, "Path", lambda name: info)
    found = packing_cpu.instruction_set.__wrapped__()
    assert found == expected
    monkeypatch.setattr(packing_cpu, "instruction_set", lambda: found)
    kinds = [packing.choose(SCHEMES[name], CPU, BF16, (64, 64)) for name in ("int8wo", "int8dq")]
    assert kinds == {"avx512": ["cpu_bf16", "cpu_vnni"], "avx2": ["cpu_fma", "cpu_madd"], None: ["plain", "plain"]}[found]
