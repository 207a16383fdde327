"""Quantized graphs are for inference: what needs a gradient runs in full precision, and says so once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from util import Block, Graph, assert_counts, block, compiled, run, sqnr_db, tokens

import aoquant_inductor

ACTIVATION = "aoquant: an activation requires grad: compiling in full precision. Quantized graphs are for inference."
TRAINING = (
    "aoquant: the model is in training mode with grad enabled: compiling in full precision. "
    "Quantized graphs are for inference."
)


def ours(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("aoquant")]


def grads(function: object, model: Block, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, then the gradients of x (if it asks) and of the parameters."""
    model.zero_grad()
    x.grad = None
    y = function(x)
    y.float().square().sum().backward()
    return [t.clone() for t in (y.detach(), x.grad, model.a.weight.grad, model.a.bias.grad) if t is not None]


def test_grad_enabled_and_nothing_needs_it() -> None:
    models, x = [block(), block()], tokens()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in models:
            function = compiled(model)
            for _ in range(2):
                assert sqnr_db(function(x), model.reference(x)) > 45
            assert_counts(aoquant_inductor.report(function), 1)
    assert ours(caught) == [
        "aoquant: grad is enabled, but nothing asks for it: compiling for inference. Use torch.no_grad() to say so."
    ]


@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_plain_inductors(training: bool, graphs: list[Graph]) -> None:
    model, x = Block().train(training), tokens()
    x.requires_grad_(not training)
    function = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = grads(function, model, x)
        again = grads(function, model, x)
    assert ours(caught) == [TRAINING if training else ACTIVATION]
    want = grads(torch.compile(model, backend="inductor"), model, x)
    assert len(got) == len(want) == (3 if training else 4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    assert_counts(aoquant_inductor.report(function), 0, 1, grad=1)
    assert "aoquant" not in graphs[0].code


def test_from_eval_to_train_and_back_recompiles(graphs: list[Graph]) -> None:
    model, x = block(), tokens()
    function = compiled(model)
    y = function(x)
    assert sqnr_db(y, model.reference(x)) > 45
    model.train()
    got = grads(function, model, x)
    want = grads(model, model, x)
    assert all(sqnr_db(a, b) > 40 for a, b in zip(got, want, strict=True))
    assert not torch.equal(got[0], y)
    model.eval()
    with torch.no_grad():
        assert torch.equal(function(x), y)
    assert [bool(graph.packs) for graph in graphs][:2] == [True, False]
    assert_counts(aoquant_inductor.report(function), 1)


def test_a_training_step_compiled_as_a_function() -> None:
    """The module is no argument of torch.compile here; its training flag counts all the same."""
    model, x = Block().train(), tokens()

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).float().square().sum()

    function = torch.compile(loss, backend="aoquant", options={"schemes": "int8wo"})
    function(x).backward()
    got = model.a.weight.grad.clone()
    model.zero_grad()
    loss(x).backward()
    assert sqnr_db(got, model.a.weight.grad) > 40


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = block()
        self.down, self.up = nn.Linear(32, 4, False, dtype=torch.bfloat16), nn.Linear(4, 32, False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def test_frozen_beside_trainable_falls_back_and_all_frozen_does_not() -> None:
    model, x = LoRA().eval(), tokens()
    model.base.requires_grad_(False)
    function = compiled(model, {"base.*": "int8wo"})
    with pytest.warns(UserWarning, match="some parameters require grad and others are frozen"):
        y = function(x)
    y.float().sum().backward()
    assert model.up.weight.grad is not None
    assert model.base.a.weight.grad is None
    assert_counts(aoquant_inductor.report(function), 0, 3, grad=1, no_match=2)
    with torch.no_grad():
        function(x)
    assert_counts(aoquant_inductor.report(function), 1, 3, no_match=2)


def test_unfreezing_after_the_compile() -> None:
    model, x = LoRA().eval().requires_grad_(False), tokens()
    function = compiled(model, {"base.*": "int8wo"})
    function(x)
    assert_counts(aoquant_inductor.report(function), 1, 3, no_match=2)
    model.up.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="some parameters require grad"):
        y = function(x)
    y.float().sum().backward()
    assert model.up.weight.grad is not None


def test_no_grad_in_training_mode_is_inference() -> None:
    model, x = Block().train(), tokens()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, y, report = run(model, x)
    assert ours(caught) == []
    assert_counts(report, 1)
    assert sqnr_db(y, model.reference(x)) > 45
