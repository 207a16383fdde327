"""Regions of a graph that Dynamo leaves as graphs of their own: what they call is quantized like the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_grad import Smooth, train
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from util import FP32, Graph, assert_counts, compiled, dequantized, dequantized_twin, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor.scheme import resolve


class Checkpointed(Smooth):
    def __init__(self, context_fn: Callable[..., object] | None = None) -> None:
        super().__init__()
        self.how = {} if context_fn is None else {"context_fn": context_fn}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def layer(i: int, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.base[i](x) + self.up[i](self.down[i](x)))

        for i in range(2):
            x = checkpoint(layer, i, x, use_reentrant=False, **self.how)
        return x


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq"])
def test_a_checkpointed_base_is_quantized_and_computed_again(scheme: str, graphs: list[Graph]) -> None:
    model, x, kept = Checkpointed().train(), tokens(500, 64, FP32), []
    plain = Smooth().train()
    plain.load_state_dict(model.state_dict())
    results = []
    for one in (model, plain):
        function = compiled(one, {"base.*": scheme})
        y = function(x)  # held: torch 2.11 lets go of what is saved with it
        kept.append(sum(t.numel() for t in y.grad_fn.saved_tensors if t.is_floating_point()))
        results.append(train(function, one, x))
        assert_counts(aoquant_inductor.report(function), 2, 6, no_match=4)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[0] < 0.6 * kept[1], kept
    model.eval()
    with torch.no_grad():
        function = compiled(model, {"base.*": scheme})
        assert sqnr_db(function(x), plain(x)) > 25
    assert_counts(aoquant_inductor.report(function), 2, 6, no_match=4)


def test_a_checkpoint_draws_the_same_numbers_again() -> None:
    linear = nn.Linear(64, 32, dtype=FP32).requires_grad_(False)

    def dropped(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(linear(x), 0.5)

    x = tokens(9, 64, FP32).requires_grad_()
    function = compiled(lambda x: checkpoint(dropped, x, use_reentrant=False))
    y = function(x)
    y.sum().backward()
    assert_counts(aoquant_inductor.report(function), 1)
    assert x.grad is not None and 0.3 < float((y != 0).float().mean()) < 0.7
    assert sqnr_db(x.grad, 2 * (y != 0).double() @ dequantized(linear.weight, resolve("int8wo"))) > 100


def test_a_checkpoint_with_a_policy_is_left_and_says_so() -> None:
    def save_nothing(*_: object, **__: object) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_RECOMPUTE

    model, x = Checkpointed(partial(create_selective_checkpoint_contexts, save_nothing)).train(), tokens(5, 64, FP32)
    function = compiled(model, {"base.*": "int8wo"})
    twin = copy.deepcopy(model)
    got, want = train(function, model, x), train(twin, twin, x)
    assert len(got) == 12 and min(sqnr_db(a, b) for a, b in zip(got, want, strict=True)) > 100
    assert [layer.reason for layer in aoquant_inductor.report(function).layers if layer.name.startswith("base")] == ["other_op"] * 2


class Region(nn.Module):
    """One body for all of its equals."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq"])
def test_every_call_of_a_nested_region_has_its_own_weight(scheme: str, graphs: list[Graph]) -> None:
    model, x = nn.Sequential(*(Region() for _ in range(4)), nn.Linear(64, 8)).eval(), tokens(5, 64, FP32)
    twin = dequantized_twin(model, scheme)
    with torch.no_grad():
        function = compiled(model, scheme)
        assert sqnr_db(function(x), twin(x)) > (100 if scheme == "int8wo" else 25)
        model[0].linear.weight.neg_()
        twin[0].linear.weight.neg_()
        assert sqnr_db(function(x), twin(x)) > (100 if scheme == "int8wo" else 25), "an update is seen"
    assert_counts(aoquant_inductor.report(function), 5)
    assert len(graphs) == 1


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.regions, self.head = nn.ModuleList(Region() for _ in range(3)), nn.Linear(64, 8)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def inner(y: torch.Tensor) -> torch.Tensor:
            offset = torch.tensor(0.5)
            return self.regions[2](checkpoint(self.regions[1], y, use_reentrant=False) - offset)

        return self.head(checkpoint(inner, self.regions[0](x), use_reentrant=False))


def test_regions_within_regions() -> None:
    model, x = Nested(), tokens(5, 64, FP32).requires_grad_()
    twin = dequantized_twin(model, "int8wo")
    function = compiled(model)
    got, want = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (function, twin))
    assert sqnr_db(got, want) > 100
    assert_counts(aoquant_inductor.report(function), 4)
