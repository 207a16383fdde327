"""The graph of many equal blocks: whose packs a call takes, asked in C++ from the second call with the same weights on."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from util import assert_counts, compiled

import aoquant_inductor
from aoquant_inductor import native, runtime, watch, weights
from aoquant_inductor.errors import UnsupportedLayers
from aoquant_inductor.weights import STORE


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96, bias=False), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu()) * y


class Tied(nn.Module):
    """A weight that an embedding and two linears read."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.head, self.other = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.head.weight = self.other.weight = self.embedding.weight

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.embedding((x.abs() * 9).long())).relu()
        return self.head(hidden) + self.other(hidden)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often Python was asked for packs."""
    assert watch.settle() == "native"
    found: Counter[str] = Counter()
    call = runtime.LookedUp.call

    def counted(self: runtime.LookedUp, fast: Any, *args: Any) -> Any:
        found["calls"] += 1
        return call(self, fast, *args)

    monkeypatch.setattr(runtime.LookedUp, "call", counted)
    return found


def blocks(count: int, kind: type[nn.Module] = Block, **options: Any) -> tuple[list[nn.Module], list[Any]]:
    torch.compiler.reset()
    first: Any = kind().eval().requires_grad_(False)
    models = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
    for i, model in enumerate(models):
        model.up.weight.data.mul_(1 + i)
    return models, [compiled(model, "int8wo", **options) for model in models]


X = torch.randn(3, 64)


def right(models: list[nn.Module], functions: list[Any]) -> None:
    for model, function in zip(models, functions, strict=True):
        want = model(X, X)
        assert float((function(X, X) - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("check", ["checked", "frozen"])
def test_python_is_asked_once_for_each_set_of_weights(asked: Counter[str], check: str) -> None:
    models, functions = blocks(4, weights=check)
    with torch.no_grad():
        right(models, functions)
        before = asked["calls"]
        assert before >= 3
        right(models, functions)  # the first block's own graph is no longer the first that Dynamo finds
        right(models, functions)  # its packs were new: all others were asked once more
        seen = asked["calls"]
        for _ in range(5):
            right(models, functions)
    assert asked["calls"] == seen <= before + 5
    assert_counts(aoquant_inductor.report(functions[-1]), 2)


def test_a_change_is_seen_by_the_next_call(asked: Counter[str]) -> None:
    models, functions = blocks(3)
    with torch.no_grad():
        for _ in range(3):
            right(models, functions)
        for change in (lambda w: w.mul_(-2), lambda w: setattr(w, "data", torch.randn_like(w)), lambda w: w.copy_(torch.randn_like(w))):
            change(models[1].down.weight)
            before = asked["calls"]
            right(models, functions)
            assert asked["calls"] > before
            right(models, functions)  # the others were asked once more
            settled = asked["calls"]
            right(models, functions)
            assert asked["calls"] == settled
        models[2].up.weight = nn.Parameter(torch.randn(96, 64), requires_grad=False)
        right(models, functions)


def test_packs_go_with_their_weights(asked: Counter[str]) -> None:
    models, functions = blocks(3)
    with torch.no_grad():
        for _ in range(3):
            right(models, functions)
    entry = STORE.find(models[1].up.weight)
    assert entry is not None
    packs = [weakref.ref(t) for packed, _ in entry.packs.values() for t in packed.tensors]
    assert packs
    gone = weakref.ref(models[1].up.weight)
    del entry, models[1], functions[1]
    gc.collect()
    assert gone() is None and all(ref() is None for ref in packs)
    with torch.no_grad():
        right(models, functions)


@pytest.mark.parametrize("policy", ["report", "error"])
def test_a_block_that_finds_no_memory_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    models, functions = blocks(3, on_unsupported=policy)
    with torch.no_grad():
        right(models[:1], functions[:1])
        functions[1](X, X)  # now there is a graph for any weights

        def none(*args: Any) -> Any:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(weights, "pack_weight", none)
        if policy == "error":
            with pytest.raises(UnsupportedLayers, match="could not be packed in the memory that is free"):
                functions[2](X, X)
            return
        with pytest.warns(UserWarning, match="could not be packed in the memory that is free; the whole block stays"):
            y = functions[2](X, X)
        assert torch.allclose(y, models[2](X, X), atol=1e-5)
    assert_counts(aoquant_inductor.report(functions[2]), 0, 2, out_of_memory=2)


def test_models_with_a_tied_weight(asked: Counter[str]) -> None:
    """The weight is looked up for its linears, and passed on to the embedding."""
    models, functions = blocks(3, Tied)
    with torch.no_grad():
        for _ in range(3):
            right(models, functions)
        seen = asked["calls"]
        right(models, functions)
        assert asked["calls"] == seen > 0
        models[1].embedding.weight.mul_(-2)
        right(models, functions)
    assert_counts(aoquant_inductor.report(functions[-1]), 2)  # one row for a weight


def test_arguments_are_checked() -> None:
    assert watch.settle() == "native"
    kind = native.lookup_type()
    assert kind is not None
    for read, kept in (((), (0,)), ((0, 2), (1, 3, 9)), ((-1,), (0,)), ((0, 2), (0, 2))):
        with pytest.raises(ValueError, match="places"):
            kind(read, kept, print, print)
    lookup = kind((0,), (1,), lambda *args: ("fast", args), lambda this, *args: ("slow", args))
    key, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    assert lookup(key, 7) == ("slow", (key, 7))
    for args in ((), (key,), (key, 7, 8)):
        with pytest.raises(TypeError, match="arguments"):
            lookup(*args)
    for wrong in (((), (), None), ((key,), (), None), ((weakref.ref(key),), (), 5)):
        with pytest.raises(TypeError):
            lookup.remember(*wrong)
    both = kind((0, 0), (0, 1), print, lambda this, *args: args)
    assert both(key, 7) == (key, 7)
    lookup.remember((weakref.ref(key),), (1, 2), None)
    assert lookup(key, 7) == ("fast", (1, 2, 7)) and lookup(other, 7)[0] == "slow"
    states = ([0], [0], [0], [torch.float32])
    for bad in (([1, 2, 3, 4],), ([(1, 2, 3)],), ([],), ((1, 2),)):
        with pytest.raises((TypeError, ValueError), match="Watch"):
            native.watch_type()((weakref.ref(key),), *states, *bad)  # type: ignore[misc]
    assert native.watch_type()((weakref.ref(key),), *states, [(1, 2, 3, 4)])()  # type: ignore[misc]
    state = watch.Watch([]).native
    assert state is not None
    lookup.remember((weakref.ref(key),), (3,), state)
    assert lookup(key, 7) == ("fast", (3, 7))
    STORE.turn()
    assert lookup(key, 7)[0] == "slow"
    lookup.forget(id(key))
    assert lookup(key, 7)[0] == "slow"
