"""What the report says of weights that are tied, bad, empty, of no linear, never called or run eager."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import fx, nn
from util import BF16, Graph, Two, assert_counts, compiled, dequantized, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import NothingQuantized, eligible, rewrite
from aoquant_inductor.weights import STORE


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 32, dtype=BF16)
        self.head = nn.Linear(32, 16, bias=False, dtype=BF16)
        self.copy = nn.Linear(32, 16, bias=False, dtype=BF16)
        self.head.weight = self.copy.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embed(ids)
        return x, self.head(x), self.copy(x)


def test_a_tied_weight_is_one_pack_and_right_in_every_use(graphs: list[Graph]) -> None:
    model, ids = Tied().eval(), torch.arange(4)
    packed = STORE.packed
    _, (x, head, copy), report = run(model, ids)
    assert_counts(report, 1)
    assert (report.layers[0].name, set(report.layers[0].aliases)) == ("head", {"copy", "embed.weight"})
    assert STORE.packed == packed + 1
    assert graphs[0].code.count("torch.ops.aoquant.linear_wo") == 2
    assert torch.equal(x, model.embed.weight[ids]), "the embedding reads the original"
    want = x.double() @ dequantized(model.embed.weight).t()
    assert sqnr_db(head, want) > 45
    assert torch.equal(head, copy)


def test_a_nan_weight_stays_in_bf16(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Two().eval(), tokens()
    with torch.no_grad():
        model.a.weight[3, 5] = math.nan
        want = torch.compile(model, backend="inductor")(x)[0]
    with caplog.at_level(logging.INFO, "aoquant_inductor"):
        _, (a, b), report = run(model, x)
    assert_counts(report, 1, 2, non_finite=1)
    text = "a holds a non-finite value (first at [3, 5]); it stays in bf16."
    assert text in [r.message for r in caplog.records]
    assert text in str(report).splitlines()
    assert torch.equal(a.view(torch.int16), want.view(torch.int16)), "bit-equal, NaN included"
    assert b.isfinite().all()


class Summed(nn.Module):
    """Linears whose weights go to an op that is no product of theirs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...k,jk,nj->...n", x, self.up.weight, self.down.weight)


def test_linears_that_no_linear_node_reads_are_in_the_report(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(Summed(), nn.Linear(32, 32)).eval()
    with caplog.at_level(logging.WARNING, "aoquant_inductor"):
        _, _, report = run(model, torch.randn(2, 3, 32))
    assert_counts(report, 1, 3, other_op=2)
    left = {one.name: one.detail for one in report.layers if one.reason == "other_op"}
    assert left == dict.fromkeys(("0.up", "0.down"), "is read by einsum, not by a linear.")
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [f"{k} {v}" for k, v in left.items()]
    with pytest.raises(NothingQuantized, match=r"2 linears seen, 2 matched \(other_op: 2\)"):
        run(nn.Sequential(Summed()).eval(), torch.randn(2, 3, 32), on_unsupported="error")


def test_matrices_of_no_linear_are_named_where_they_are_many_bytes() -> None:
    """The experts of a mixture are one parameter: no nn.Linear, so no layer of the report; a functional linear's weight is one."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 32, 32))
            self.down = self.up
            self.router = nn.Parameter(torch.randn(4, 32))
            self.scale = nn.Parameter(torch.ones(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            choice = nn.functional.linear(x, self.router).argmax(-1)
            return (self.up[choice] @ x[..., None])[..., 0] * self.scale

    model = nn.Sequential(nn.Linear(32, 32), Experts(), nn.LayerNorm((1, 32)), nn.Linear(32, 32)).eval()
    _, _, report = run(model, torch.randn(1, 32))
    assert_counts(report, 3)
    assert report.totals["others"] == {"Experts": {"parameters": 1, "bytes": 4 * 32 * 32 * 4}}
    assert report.summary().splitlines()[1:] == ["in no nn.Linear: 1 parameter(s) of Experts, 16.4 kB"]
    planned = aoquant_inductor.plan(model)
    assert planned.totals["others"]["Experts"]["parameters"] == 2  # that F.linear reads the router only a graph says
    _, _, report = run(Two().eval(), tokens())
    assert report.totals["others"] == {} and "\n" not in report.summary()


def test_a_linear_that_is_never_called_is_in_the_report() -> None:
    class Half(Two):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x)

    _, _, report = run(Half().eval(), tokens())
    assert_counts(report, 1, 2, not_called=1)
    assert report.layers[1].name == "b"


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-128", "int8dq-int4w-128-asym"])
def test_a_weight_without_elements_is_left_alone(scheme: str) -> None:
    class Pruned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.cut, self.none = nn.Linear(8, 8), nn.Linear(0, 8), nn.Linear(8, 0)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.kept(x) + self.cut(x[:, :0]), self.none(x)

    model = Pruned().to(BF16).eval()
    function = compiled(model, scheme)
    x = torch.randn(3, 8, dtype=BF16)
    with torch.no_grad():
        y, empty = function(x)
        assert sqnr_db(y, model(x)[0]) > 15
    assert empty.shape == (3, 0)
    assert_counts(aoquant_inductor.report(function), 1, 3, empty=2)


def test_what_dynamo_runs_eager_is_in_the_report() -> None:
    class Eager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        @torch.compiler.disable
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            return y

    _, _, report = run(Eager().eval(), torch.randn(2, 8))
    assert_counts(report, 0, 1, not_called=1)
    assert "no graph of it was compiled" in report.summary()
    assert not aoquant_inductor.report(torch.compile(Eager())).layers, "by another backend"


def test_a_linear_on_a_stream_of_its_own_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.13 notes `with torch.cuda.stream(s)` of the compiled function; without a GPU, noted here in its place."""
    find = rewrite.find

    def noted(gm: fx.GraphModule, *rest: Any) -> list[rewrite.Site]:
        last = gm.graph.find_nodes(op="call_function", target=eligible.LINEAR[0])[-1]
        last.meta["custom"] = {"stream": 1}
        found = find(gm, *rest)
        del last.meta["custom"]  # Inductor has no streams on a CPU
        return found

    monkeypatch.setattr(rewrite, "find", noted)
    _, _, report = run(Two().eval(), tokens())
    assert_counts(report, 1, 2, stream=1)


@pytest.mark.parametrize("shape", [(), (1,), (6, 64), (6, 1)])
def test_a_bias_that_is_broadcast_is_no_bias_of_a_linear(shape: tuple[int, ...]) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.b(x), self.a.weight, bias)

    model, x, bias = Functional().eval(), torch.randn(6, 64), torch.randn(shape)
    _, y, report = run(model, x, bias)
    assert_counts(report, 1, 2, bias=1)
    with torch.no_grad():
        assert sqnr_db(y, model(x, bias)) > 30


def test_a_nested_activation_is_left() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval()
    x = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)], layout=torch.jagged)
    _, y, report = run(model, x)
    assert_counts(report, 0, 1, nested=1)
    with torch.no_grad():
        assert torch.equal(y.values(), model(x).values())


def test_what_has_no_size_yet_is_not_planned() -> None:
    """A lazy part that no call has reached."""
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(32, 16), nn.LazyLinear(8), nn.LazyBatchNorm1d()

        def forward(self, x: torch.Tensor, full: bool = False) -> torch.Tensor:
            return self.norm(self.b(self.a(x))) if full else self.a(x)

    model, x = Lazy().eval(), torch.randn(4, 32)
    assert [layer.name for layer in aoquant_inductor.plan(model).layers] == ["a"]
    function, _, report = run(model, x)
    assert_counts(report, 1)
    with torch.no_grad():
        model(x, True)
        function(x, True)
    assert_counts(aoquant_inductor.report(function), 2)


def test_a_weight_of_one_dimension_is_left() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.v = nn.Linear(32, 64), nn.Parameter(torch.randn(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.a(x), self.v)

    model, x = Vector().eval(), torch.randn(4, 32)
    _, y, report = run(model, x)
    assert_counts(report, 1, 2, not_matrix=1)
    with torch.no_grad():
        assert sqnr_db(y, model(x)) > 30


@pytest.mark.parametrize(("scheme", "most"), [("int8dq", 132104), ("int8dq-asymact", 65793)])
def test_sums_that_may_not_fit_32_bits_are_left(scheme: str, most: int) -> None:
    for k in (most, most + 1):
        model, x = nn.Linear(k, 4, bias=False).eval(), torch.ones(2, k)
        nn.init.ones_(model.weight)
        _, y, report = run(model, x, schemes=scheme)
        assert_counts(report, int(k == most), 1, **({"overflow": 1} if k > most else {}))
        assert torch.allclose(y, torch.full_like(y, k), rtol=1e-5)
