"""What peers are given is what our scheme means; gemlite itself needs a GPU to be imported."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from aoquant_inductor import qparams
from aoquant_inductor.scheme import resolve
from benchmarks import peer_gemlite, peers, rows


class Grid(nn.Module):
    """(w_q - zero) * scale, as gemlite reads what it is given: w_q uint8 [N, K], scale and zero [N, groups]."""

    def __init__(self, w_q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        assert w_q.dtype == torch.uint8 and int(w_q.max()) <= 15
        n, groups = scale.shape
        self.weight = ((w_q.view(n, groups, -1).to(scale.dtype) - zero[..., None]) * scale[..., None]).view(n, -1)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class HQQ:
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        assert device == "cpu" and dtype == torch.float32

    from_weights = staticmethod(Grid)


class Int8:
    def __init__(self, device: str, dtype: torch.dtype) -> None:
        pass

    def from_linear(self, linear: nn.Linear) -> nn.Module:
        return nn.Sequential(nn.Identity()) if type(self) is Int8 else nn.Identity()


class Int8Dynamic(Int8):
    pass


@pytest.fixture
def gemlite(monkeypatch: pytest.MonkeyPatch) -> None:
    package, helper = ModuleType("gemlite"), ModuleType("gemlite.helper")
    helper.A16W4_HQQ_INT, helper.A16W8_INT8, helper.A8W8_INT8_dynamic = HQQ, Int8, Int8Dynamic  # type: ignore[attr-defined]
    package.helper = helper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemlite", package)
    monkeypatch.setitem(sys.modules, "gemlite.helper", helper)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("gemlite")
@pytest.mark.parametrize("scheme", ["int4wo-64", "int4wo-32-asym", "int4wo-row"])
def test_gemlite_gets_the_weights_that_we_have(scheme: str) -> None:
    model = nn.Sequential(nn.Linear(128, 24), nn.Linear(24, 8))
    spec = resolve(scheme).weight
    q = qparams.quantize(model[0].weight.detach(), spec)
    expected = qparams.dequantize(q.w_q, q.scale, q.zero, spec.group_size)
    assert peers.PEERS["gemlite"].quantize(model, scheme, "cuda", {"0"})
    assert isinstance(model[0], Grid) and type(model[1]) is nn.Linear  # only those named
    torch.testing.assert_close(model[0].weight, expected.view(24, 128))


@pytest.mark.usefixtures("gemlite")
@pytest.mark.parametrize(("scheme", "kind"), [("int8wo", nn.Sequential), ("int8dq", nn.Identity)])
def test_int8_is_gemlites_own(scheme: str, kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    assert peers.PEERS["gemlite"].quantize(model, scheme, "cuda") and type(model[0]) is kind


@pytest.mark.usefixtures("gemlite")
def test_which_schemes_gemlite_has() -> None:
    of = ("int8wo", "int8wo-64", "int8dq", "int8dq-asymact", "int4wo-128", "int4wo-32-asym", "int4wo-64-asymfloat",
          "int4wo-128-large8", "int8dq-int4w")
    assert [s for s in of if peers.PEERS["gemlite"].has(s, "cuda")] == ["int8wo", "int8dq", "int4wo-128", "int4wo-32-asym"]
    assert not any(peers.PEERS["gemlite"].has(s, "cpu") for s in of)


def test_what_is_not_installed_is_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = nn.Sequential(nn.Linear(64, 8))
    assert not peer_gemlite.quantize(model, "int4wo-64", "cuda") and type(model[0]) is nn.Linear


def test_whose_a_row_is() -> None:
    assert rows.split("gemlite int4wo-128") == ("gemlite", "int4wo-128")
    assert [rows.split(s)[0] for s in ("int8wo", rows.EAGER, "int8dq + int4wo-32", "torchao int8dq + int4wo-32")] == ["", "", "", "torchao"]
    assert set(rows.PEERS) == peers.PEERS.keys()
