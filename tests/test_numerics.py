"""Every scheme through torch.compile against float64 computed from its own pack, at odd shapes, by our kernel."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from util import BF16, FP16, FP32, activation, assert_counts, compiled, from_pack, linear64, our_kernel, run, sqnr_db

import aoquant_inductor
from aoquant_inductor import packing_cpu
from aoquant_inductor.scheme import SCHEMES, Scheme, resolve

GATE = {BF16: 45, FP16: 55, FP32: 55}
SHAPES = [(1, 7), (31, 16), (33, 1), (127, 65), (129, 16), (576, 65), (129, 1071), (33, 7)]  # K, N
SOME = ["int8wo", "int4wo-32-asym", "int8dq-asymact", "int8dq-int4w-32-asym-asymact"]


class Zoo(nn.Module):
    """One linear per scheme: y[name] = linear(x[K])."""

    def __init__(self, schemes: list[str], dtype: torch.dtype, shapes: list[tuple[int, int]] = SHAPES, offset: int = 0) -> None:
        super().__init__()
        self.linears = nn.ModuleDict()
        for i, name in enumerate(schemes):
            # both zero point conventions are one kernel: the same shape saves a compilation
            same = name.removesuffix("float") if "wo" in name else name
            j = schemes.index(same) if same in schemes else i
            k, n = shapes[(j + offset) % len(shapes)]
            self.linears[name] = nn.Linear(k, n, bias=j % 2 == 0, dtype=dtype)

    @property
    def schemes(self) -> dict[str, str]:
        return {f"linears.{name}": name for name in self.linears}

    def inputs(self, m: int, dtype: torch.dtype) -> dict[int, torch.Tensor]:
        return {linear.in_features: torch.randn(m, linear.in_features, dtype=dtype) for linear in self.linears.values()}

    def forward(self, x: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: linear(x[linear.in_features]) for name, linear in self.linears.items()}

    def misses(self, x: dict[int, torch.Tensor], got: dict[str, torch.Tensor], gate: float) -> dict[str, float]:
        """Scheme -> SQNR, of those below the gate."""
        found = {}
        for name, linear in self.linears.items():
            scheme = resolve(name)
            want = linear64(x[linear.in_features], linear, scheme, from_pack(linear.weight, scheme))
            assert got[name].dtype == x[linear.in_features].dtype
            found[name] = sqnr_db(got[name], want) if want.numel() else 999.0
        return {name: round(db, 1) for name, db in found.items() if db < gate}


@pytest.mark.parametrize(("dtype", "offset"), [(BF16, 0), (FP16, 3), (FP32, 5)], ids=["bf16", "fp16", "fp32"])
def test_every_scheme(dtype: torch.dtype, offset: int) -> None:
    # a cold compilation of all in all three dtypes takes minutes: fp16 and fp32 take a third of the list unless asked
    names = [name for name, scheme in SCHEMES.items() if scheme.large_m is None]  # else the same at this M
    if dtype != BF16 and not os.environ.get("AOQUANT_TEST_ALL"):
        names = names[offset % 3 :: 3]
    zoo = Zoo(names, dtype, offset=offset).eval()
    x = zoo.inputs(7, dtype)
    _, got, report = run(zoo, x, schemes=zoo.schemes)
    assert_counts(report, len(names))
    assert {layer.name: layer.scheme for layer in report.layers} == zoo.schemes
    assert not [layer for layer in report.layers if not our_kernel(layer.kernel)]
    assert zoo.misses(x, got, GATE[dtype]) == {}


@pytest.mark.parametrize("m", [0, 1])
def test_none_or_one_token(m: int) -> None:
    zoo = Zoo(SOME, BF16, [(33, 7), (129, 65)]).eval()
    x = zoo.inputs(m, BF16)
    _, got, report = run(zoo, x, schemes=zoo.schemes)
    assert_counts(report, len(SOME))
    assert zoo.misses(x, got, 45) == {}
    assert all(y.shape == (m, zoo.linears[name].out_features) for name, y in got.items())


def test_dynamic_m() -> None:
    zoo = Zoo(SOME, BF16, [(33, 7), (129, 65)]).eval()
    function = compiled(zoo, zoo.schemes, dynamic=True)
    for m in (7, 129, 2):
        x = zoo.inputs(m, BF16)
        with torch.no_grad():
            assert zoo.misses(x, function(x), 45) == {}, m
    report = aoquant_inductor.report(function)
    assert_counts(report, len(SOME))
    assert report.totals["graphs"] == 1
    assert not [layer for layer in report.layers if not our_kernel(layer.kernel)]


@pytest.mark.parametrize("m", [1, 7])
def test_portable_lowering(monkeypatch: pytest.MonkeyPatch, m: int) -> None:
    """What runs where there is no kernel of ours."""
    monkeypatch.setattr(packing_cpu, "instruction_set", lambda: None)
    names = [*SOME, "int8dq", "int8dq-int4w-asym", "int4wo-32-asymfloat"]
    zoo = Zoo(names, FP32, [(33, 7), (129, 65), (1, 16)]).eval()
    x = zoo.inputs(m, FP32)
    _, got, report = run(zoo, x, schemes=zoo.schemes)
    assert_counts(report, len(names))
    assert all(layer.kernel.startswith("portable") for layer in report.layers)
    assert zoo.misses(x, got, 55) == {}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_portable_lowering_of_a_last_group_that_is_not_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Inductor's C++ loop over such a K lost its end. And the backward, which is portable beside our kernels, too."""
    monkeypatch.setattr(packing_cpu, "instruction_set", lambda: None)
    names = ["int8wo-32", "int8wo-64", "int8wo-128", "int4wo-128", "int4wo-32-asymfloat"]
    zoo = Zoo(names, dtype, [(129, 16), (200, 7), (160, 33), (145, 16), (513, 5)]).eval().requires_grad_(False)
    x = zoo.inputs(7, dtype)
    _, got, report = run(zoo, x, schemes=zoo.schemes)
    assert_counts(report, len(names))
    assert zoo.misses(x, got, GATE[dtype]) == {}
    function = compiled(zoo, zoo.schemes)
    leaves = {k: t.requires_grad_() for k, t in zoo.inputs(7, dtype).items()}
    sum(y.float().sum() for y in function(leaves).values()).backward()
    for name, linear in zoo.linears.items():
        weight = from_pack(linear.weight, resolve(name))
        assert sqnr_db(leaves[linear.in_features].grad, weight.sum(0).expand(7, -1)) > 40, name


class Ranks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wo, self.dq = (nn.Linear(33, 7, dtype=BF16) for _ in range(2))

    def forward(self, xs: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(self.wo(x), self.dq(x)) for x in xs]


def test_inputs_of_any_rank_and_stride() -> None:
    big = torch.randn(12, 2, 80, dtype=BF16)
    xs = {  # 12 tokens wherever there are several: one kernel serves them all
        "1-D": big[0, 0, :33].clone(),
        "3-D": big[:6, :, :33].contiguous(),
        "4-D": big[:6, :, :33].reshape(2, 3, 2, 33).contiguous(),
        "strided": big[:, 0, 0:66:2],
        "transposed": torch.randn(33, 12, dtype=BF16).t(),
        "offset": big[:6, :, 5:38],
        "broadcast": torch.randn(1, 33, dtype=BF16).expand(12, 33),
    }
    model = Ranks().eval()
    _, got, report = run(model, list(xs.values()), schemes={"wo": "int8wo", "dq": "int8dq"})
    assert_counts(report, 2)
    for (name, x), (wo, dq) in zip(xs.items(), got, strict=True):
        assert sqnr_db(wo, linear64(x, model.wo)) > 45, name
        assert sqnr_db(dq, linear64(x, model.dq, resolve("int8dq"))) > 45, name


class Wide(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4096, 256, dtype=FP16) for _ in names)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x) for linear in self.linears]


@pytest.mark.parametrize("portable", [False, True])
def test_fp16_with_large_activations_does_not_overflow(monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    if portable:
        monkeypatch.setattr(packing_cpu, "instruction_set", lambda: None)
    names = ["int8wo", "int8dq", "int4wo-128", "int8dq-int4w-32"]
    model = Wide(names).eval()
    x = (torch.randn(4, 4096) * 20).to(FP16)
    _, got, report = run(model, x, schemes={f"linears.{i}": name for i, name in enumerate(names)})
    assert_counts(report, len(names))
    for name, linear, y in zip(names, model.linears, got, strict=True):
        scheme: Scheme = resolve(name)
        assert sqnr_db(y, linear64(x, linear, scheme)) > 50, name


class Inside(nn.Module):
    """Linears of views that start inside of a buffer: of an input, of another linear's result, the last row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, dtype=BF16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.a(x[1:]), self.b((x * 2)[2:-1]), self.c(self.a(x)[-1:])


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_that_start_inside_of_a_buffer(dynamic: bool) -> None:
    model, x = Inside().eval(), torch.randn(7, 32, dtype=BF16)
    function = compiled(model, {"a": "int8wo", "b": "int4wo-32", "c": "int8dq"}, dynamic=dynamic)
    for part in (x, x[1:]):
        with torch.no_grad():
            for y, want, least in zip(function(part), model(part), (40, 18, 33), strict=True):
                assert sqnr_db(y, want) > least


def test_vmap() -> None:
    linear, x = nn.Linear(32, 32, dtype=BF16).eval(), torch.randn(3, 4, 32, dtype=BF16)
    with torch.no_grad():
        y = torch.compile(torch.vmap(linear), backend="aoquant", options={"schemes": "int8wo"})(x)
    assert sqnr_db(y, linear64(x, linear)) > 45


class Hostile(Ranks):
    def __init__(self) -> None:
        super().__init__()
        self.int4, self.dq4 = (nn.Linear(33, 7, dtype=BF16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.wo(x), self.dq(x), self.int4(x), self.dq4(x)]


def test_zero_rows_are_exact_and_outliers_finite() -> None:
    model = Hostile().eval()
    names = ["int8wo", "int8dq-asymact", "int4wo-32-asym", "int8dq-int4w-32-asym-asymact"]
    linears = [model.wo, model.dq, model.int4, model.dq4]
    x = torch.randn(5, 33, dtype=BF16)
    x[0] = 0
    x[1, 3] = 1e4
    x[3, 3] = 1e30
    x[2] = 1e-40
    with torch.no_grad():
        for linear in linears:
            linear.weight[0] = 0
            linear.weight[1] = 1e-39
            linear.weight[2, 5] = 1e4
            linear.bias[0] = 0
    keys = ("wo", "dq", "int4", "dq4")
    _, got, report = run(model, x, schemes=dict(zip(keys, names, strict=True)))
    assert_counts(report, 4)
    for name, linear, y in zip(names, linears, got, strict=True):
        finite = linear64(x, linear, resolve(name)).abs() < 1e38
        assert y[finite].isfinite().all(), name
        assert (y[:, 0] == 0).all(), f"{name}: a zero row of the weight gives exact 0"
        assert torch.equal(y[0], linear.bias), f"{name}: a zero token gives the bias"


def test_activation_quantization_matches_the_reference() -> None:
    """The reference used above, against its own definition."""
    x = torch.randn(3, 65)
    for name, steps in (("int8dq", 127), ("int8dq-asymact", 255)):
        back = activation(x, resolve(name))
        span = x.abs().amax(1) if steps == 127 else x.amax(1) - x.amin(1)
        assert ((back - x).abs().amax(1) <= span / steps * 0.5001).all()
