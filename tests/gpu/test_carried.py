"""Carried sums on the card: exact, alone and fused, and their machine code is read whichever way a kernel came."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from util import BF16, dequantized, run, sqnr_db

import aoquant_inductor
from aoquant_inductor import _inductor_machine, card, ptxas
from aoquant_inductor.scheme import resolve

pytestmark = pytest.mark.gpu
M, N, K = 1024, 4096, 2048


@pytest.fixture(autouse=True)
def able() -> None:
    here = card.Card.of(torch.device("cuda", 0))
    if here.arch != 90 or not here.may_carry:
        pytest.skip("needs a Hopper card, and a ptxas from 13.3 on")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[bytes]:
    """The hashes of what was read and found right from here on."""
    found: set[bytes] = set()
    monkeypatch.setattr(_inductor_machine, "_clean", found)
    return found


class Layer(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, device="cuda", dtype=BF16)
        self.fused = fused

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return nn.functional.silu(y) + residual if self.fused else y


def tokens(m: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x of small integers and a residual."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randint(-7, 8, (m, K), device="cuda", generator=generator).to(BF16)
    return x, torch.randn(m, N, device="cuda", generator=generator).to(BF16)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", ["int8wo", "int4wo-128", "int4wo-32-asym"])
def test_right_in_every_call_and_read_once(scheme: str, fused: bool, mode: str | None, read: set[bytes]) -> None:
    layer = Layer(fused).eval().requires_grad_(False)
    if scheme == "int8wo":  # its own codes, so that sums are exact
        layer.linear.weight.random_(-127, 128)[:, 0] = 127
        layer.linear.bias.random_(-64, 64)
    weight = dequantized(layer.linear.weight, resolve(scheme))
    function, _, report = run(layer, *tokens(M, 0), schemes=scheme, **({"mode": mode} if mode else {}))
    assert "carried" in str(report.layers[0].kernel), str(report)
    assert len(read) == 1
    for seed in range(20):
        x, residual = tokens(M, seed)
        want = x.double() @ weight.t() + layer.linear.bias.double()
        with torch.no_grad():
            y = function(x, residual).clone()
        if scheme == "int8wo" and not fused:
            assert torch.equal(y, want.to(BF16)), seed
        assert sqnr_db(y, nn.functional.silu(want) + residual.double() if fused else want) > 40, seed


def test_fp16_is_not_carried(read: set[bytes]) -> None:
    layer = Layer(False).half().eval().requires_grad_(False)
    _, _, report = run(layer, *(t.half() for t in tokens(M, 0)))
    assert "carried" not in str(report.layers[0].kernel), str(report)
    assert not read


PROCESS = """
import os, sys, torch
sys.path[:0] = [{tests!r}]
from torch._dynamo.utils import counters
if {late!r}:
    from torch._inductor.async_compile import AsyncCompile
    AsyncCompile.wait_pool_ready()
    os.environ.update({late!r})
import aoquant_inductor
from aoquant_inductor import _inductor_machine
layer = torch.nn.Linear(2048, 4096, device="cuda", dtype=torch.bfloat16).eval().requires_grad_(False)
function = torch.compile(layer, backend="aoquant")
x = torch.randn(1024, 2048, device="cuda", dtype=torch.bfloat16)
y = function(x).float()
assert (y - layer(x).float()).norm() < 0.02 * y.norm()
report = aoquant_inductor.report(function)
refused = [hint for hint in report.totals["hints"] if "touches registers" in hint]
assert not refused or "carried" not in str(report.layers[0].kernel), str(report)
print(counters["inductor"]["fxgraph_cache_hit"], len(_inductor_machine._clean), len(refused))
"""


def process(folder: Path, late: dict[str, str], **env: str) -> list[str]:
    """What a fresh process says of one linear: hits in Inductor's cache, machine codes found right, kernels refused. `late`: the
    environment after its compile workers have started.
    """
    code = PROCESS.format(tests=str(Path(__file__).parent.parent), late=late)
    kept = {key: value for key, value in os.environ.items() if key not in (ptxas.VARIABLES if late else ())}
    paths = os.pathsep.join([str(Path(aoquant_inductor.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "PYTHONPATH": paths, **env}
    done = subprocess.run([sys.executable, "-c", code], env=kept | env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("static", ["1", "0"])
def test_a_graph_from_the_cache_is_read_too(static: str, tmp_path: Path) -> None:
    assert process(tmp_path, {}, TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER=static) == ["0 1 0"]
    assert process(tmp_path, {}, TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER=static) == ["1 1 0"]


def test_workers_with_an_old_ptxas_are_found_out(tmp_path: Path) -> None:
    """The graph is compiled again without carried sums; the one they made is not in the cache afterwards."""
    new = ptxas.installed()
    if new is None:
        pytest.skip('no ptxas of pip install "aoquant-inductor[cuda]"')
    with pytest.MonkeyPatch.context() as patch:
        for variable in ptxas.VARIABLES:
            patch.delenv(variable, raising=False)
        if card.ptxas_version(90) >= card.SAFE_PTXAS:
            pytest.skip("Triton's own ptxas is new enough")
    late = dict.fromkeys(ptxas.VARIABLES, str(new))
    assert process(tmp_path, late, TORCHINDUCTOR_COMPILE_THREADS="2") == ["0 0 1"]
    assert process(tmp_path, {}, **late) == ["0 1 0"]
