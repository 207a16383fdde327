"""Weights that change after the compile: the next call uses the new ones, whichever way they came."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import BF16, Block, Graph, assert_counts, block, compiled, dequantized, linear64, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor.weights import STORE


def new(m: Block) -> torch.Tensor:
    return torch.randn(32, 32).to(m.a.weight) * 0.2


def add(m: Block) -> None:
    with torch.no_grad():
        m.a.weight.add_(new(m))


def load(m: Block) -> None:
    m.load_state_dict({"a.weight": new(m), "a.bias": torch.randn(32).to(m.a.bias)})


def assign(m: Block) -> None:
    m.load_state_dict({"a.weight": new(m), "a.bias": torch.randn(32).to(m.a.bias)}, assign=True)


def parameter(m: Block) -> None:
    m.a.weight = nn.Parameter(new(m))


def linear(m: Block) -> None:
    m.a = nn.Linear(32, 32, dtype=BF16, device=m.a.weight.device)


def data(m: Block) -> None:
    m.a.weight.data = new(m)


def step(m: Block) -> None:
    m.a.weight.grad = new(m)
    torch.optim.SGD([m.a.weight], lr=1.0, foreach=False).step()


UPDATES: list[Callable[[Block], None]] = [add, load, assign, parameter, linear, data, step]
MODES = [torch.no_grad, torch.inference_mode]


def make(kind: str, x: torch.Tensor) -> tuple[Block, object]:
    """A compiled block whose graph holds its packs ("constant") or looks them up: a second instance of one class does."""
    for _ in range(2 if kind == "looked up" else 1):
        model = block()
        function, _, _ = run(model, x)
    return model, function


@pytest.mark.parametrize("kind", ["constant", "looked up"])
def test_every_route_and_mode(kind: str, graphs: list[Graph]) -> None:
    x = tokens()
    model, function = make(kind, x)
    assert graphs[-1].constant == (kind == "constant")
    wrong = []
    for _ in range(2):
        for update in UPDATES:
            for mode in MODES:
                before = model.reference(x)
                update(model)
                with mode():
                    y = function(x)
                want = model.reference(x)
                assert sqnr_db(before, want) < 30, "the update has to show"
                if not sqnr_db(y, want) > 45:
                    wrong.append((update.__name__, mode.__name__))
    assert wrong == []
    # nothing of this may have fallen back to bf16: past Dynamo's recompile limit it would, without a word
    with torch.no_grad():
        exact = x.double() + nn.functional.linear(x.double(), model.a.weight.double(), model.a.bias.double()).relu()
        assert sqnr_db(function(x), model.reference(x)) > sqnr_db(function(x), exact)
    assert all("torch.ops.aoquant" in graph.code for graph in graphs)
    assert len(graphs) <= 8


def test_data_that_goes_back_and_forth_between_two_graphs() -> None:
    """Two graphs share one pack: what one of them repacked, the other one must not take for what it saw last."""
    model, x = block(), tokens()
    function, _, _ = run(model, x)
    with torch.inference_mode():
        function(x)
    storages = [new(model), new(model)]
    for _ in range(2):
        for mode, t in zip(MODES, storages, strict=True):
            model.a.weight.data = t
            with mode():
                assert sqnr_db(function(x), model.reference(x)) > 45, mode.__name__


def test_in_place_updates_do_not_recompile(graphs: list[Graph]) -> None:
    x = tokens()
    model, function = make("constant", x)
    where = [t.data_ptr() for t in graphs[0].packs]
    packed = STORE.packed
    for update in (add, load, data, step):
        update(model)
        with torch.no_grad():
            assert sqnr_db(function(x), model.reference(x)) > 45, update
    assert len(graphs) == 1
    assert [t.data_ptr() for t in graphs[0].packs] == where, "the same storage: CUDA graphs hold its address"
    assert STORE.packed == packed


@pytest.mark.parametrize("kind", ["constant", "looked up"])
def test_refresh_repairs_what_nobody_can_see(kind: str, graphs: list[Graph]) -> None:
    x = tokens()
    model, function = make(kind, x)
    count = len(graphs)
    model.a.weight.data.fill_(0.25)
    with torch.no_grad():
        assert sqnr_db(function(x), model.reference(x)) < 30, "seen after all: document it"
        assert aoquant_inductor.refresh(function) == 1
        assert sqnr_db(function(x), model.reference(x)) > 45
    assert len(graphs) == count


class Merging(nn.Module):
    """A base whose adapter can be added to it, by .data as PEFT adds it: the same memory, and no version of it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.delta, self.merged = nn.Linear(32, 32, dtype=BF16), torch.randn(32, 32).to(BF16), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return y if self.merged else y + x @ self.delta.t()

    def merge(self, sign: int) -> None:
        self.base.weight.data += sign * self.delta
        self.merged = sign > 0

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        y = linear64(x, self.base)
        return y if self.merged else y + x.double() @ self.delta.double().t()


def test_a_compile_sees_what_no_call_sees() -> None:
    model, x = Merging().eval(), tokens()
    function, _, _ = run(model, x)
    before = STORE.packed
    model.merge(1)  # Dynamo compiles again for `merged`
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"does not count .*aoquant_inductor.refresh"):
            assert sqnr_db(function(x), model.reference(x)) > 40
        model.merge(-1)  # to the graph of before: nothing compiles
        assert sqnr_db(function(x), model.reference(x)) < 30, "seen after all: document it"
        assert aoquant_inductor.refresh(function) == 1
        assert sqnr_db(function(x), model.reference(x)) > 40
        model.merge(1)
        _, y, report = run(model, x, weights="frozen")  # other options: a graph of its own
        assert_counts(report, 1)
        assert sqnr_db(y, model.reference(x)) > 40
        assert sqnr_db(function(x), model.reference(x)) > 40, "one pack for both"
    assert STORE.packed == before


def test_weights_that_come_to_a_compiled_graph_are_looked_at_once(graphs: list[Graph]) -> None:
    x, model = tokens(), block()
    run(model, x, weights="frozen")
    make("looked up", x)
    count = len(graphs)
    model.a.weight.data += 1
    _, y, report = run(model, x)
    assert_counts(report, 1)
    assert sqnr_db(y, model.reference(x)) > 40
    assert len(graphs) == count == 3


def test_frozen_weights_trust_the_user_and_refresh_still_works() -> None:
    model, x = block(), tokens()
    function, y, _ = run(model, x, weights="frozen")
    add(model)
    with torch.no_grad():
        assert torch.equal(function(x), y)
        assert aoquant_inductor.refresh(function) == 1
        assert sqnr_db(function(x), model.reference(x)) > 45


def test_refresh_before_the_first_call_and_of_something_else() -> None:
    assert aoquant_inductor.refresh(compiled(block())) == 0
    with pytest.raises(TypeError, match=r"refresh\(\) wants what torch.compile returned, not Block"):
        aoquant_inductor.refresh(block())


def test_functional_call_is_honoured() -> None:
    model, x = block(), tokens()
    function, _, _ = run(model, x)
    for zeros in (torch.zeros_like, lambda p: nn.Parameter(torch.zeros_like(p))):
        parameters = {name: zeros(p) for name, p in model.named_parameters()}
        with torch.no_grad():
            y = torch.func.functional_call(function, {f"_orig_mod.{k}": v for k, v in parameters.items()}, (x,))
            assert torch.equal(y, x), "zeros in, zeros out"
            assert sqnr_db(function(x), model.reference(x)) > 45, "and the module's own weights again"


def sqnr_of(weight: torch.Tensor) -> float:
    return sqnr_db(dequantized(weight), weight)


class Adapted(nn.Module):
    """A base linear with two trainable low-rank matrices beside it, as PEFT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64, dtype=BF16)
        self.down, self.up = (nn.Linear(*sizes, bias=False, dtype=BF16) for sizes in ((64, 8), (8, 64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return linear64(x, self.base) + x.double() @ self.down.weight.double().t() @ self.up.weight.double().t()


def test_five_hot_swaps_of_an_adapter_and_a_merge(graphs: list[Graph]) -> None:
    """Row 14: a swap packs nothing, in whatever way the adapter comes; a merge repacks the base once, in place."""
    model, x = Adapted().eval(), tokens(4, 64)
    function, packed = compiled(model, {"base": "int8wo"}), STORE.packed
    stale = 0
    with torch.no_grad():
        function(x)
        entry = STORE.entry(model.base.weight)
        for i in range(5):
            down, up = torch.randn(8, 64).to(BF16), torch.randn(64, 8).to(BF16)
            if i % 2:
                model.down.weight, model.up.weight = nn.Parameter(down), nn.Parameter(up)
            else:
                model.load_state_dict({"down.weight": down, "up.weight": up}, strict=False)
            stale += not sqnr_db(function(x), model.reference(x)) > 40
        assert (stale, entry.repacks, STORE.packed) == (0, 0, packed + 1)
        model.base.weight.add_(model.up.weight @ model.down.weight)
        model.up.weight.zero_()
        assert sqnr_db(function(x), model.reference(x)) > 40
        assert (entry.repacks, STORE.packed) == (1, packed + 1)
    after = aoquant_inductor.report(function)
    assert after.totals["repacks"] == 1
    (base,) = (layer for layer in after.layers if layer.name == "base")
    assert base.sqnr_db == entry.packs[next(iter(entry.packs))][1] == pytest.approx(sqnr_of(model.base.weight), abs=0.1)
    assert all(graph.packs for graph in graphs)


def test_a_weight_that_becomes_nan_is_not_answered_with_the_old_one() -> None:
    """A repack that fails may raise or say NaN; stale finite numbers would hide it."""
    model, x = block(), tokens()
    function, _, _ = run(model, x)
    with torch.no_grad():
        model.a.weight[3, 5] = float("nan")
        with contextlib.suppress(ValueError):
            y = function(x)
            assert y[:, 3].isnan().all()


def test_conversion_to_another_dtype() -> None:
    model, x = block(), tokens()
    function, _, _ = run(model, x)
    model.float()
    with torch.no_grad():
        y = function(x.float())
    assert y.dtype == torch.float32
    assert sqnr_db(y, model.reference(x.float())) > 55
    assert_counts(aoquant_inductor.report(function), 1)
