"""What was compiled for inference, with grad enabled, serves no training step: in whatever frame Dynamo traced it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import Block, assert_counts, compiled, sqnr_db, tokens

import aoquant_inductor


class Own(Block):
    """`self` goes by another name."""

    def forward(s, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return Block.forward(s, x)


class Decorated(Block):
    forward = torch.autocast("cpu", enabled=False)(Block.forward)


class Behind(nn.Module):
    """Its linears are in a frame of their own, of a module that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Broken()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)

    def train(self, mode: bool = True) -> nn.Module:
        self.training = mode
        return self


class Broken(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return Block.forward(self, x)


def hooked() -> nn.Module:
    """As accelerate hooks a module."""
    model = Block()
    model.forward = functools.partial(lambda module, x: Block.forward(module, x), model)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU()), Own, Decorated, hooked, Behind])
def test_an_inference_graph_serves_no_training_step(make: Callable[[], nn.Module]) -> None:
    """Compiled with grad enabled in eval mode; whatever frame Dynamo traced it in."""
    model, head, x = make().eval(), nn.Linear(32, 4), tokens().float()
    model, function = model.float(), compiled(model)
    function(x)
    assert_counts(aoquant_inductor.report(function), 1)
    model.train()
    head(function(x)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_is_frozen_in_another_graph_counts() -> None:
    """A projector that trains before a frozen body, in eval mode, a graph break between them."""
    class Connector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projector, self.body = nn.Linear(32, 32), nn.Linear(32, 32).requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.projector(x)
            torch._dynamo.graph_break()
            return self.body(h)

    model = Connector().eval()
    function = compiled(model)
    function(torch.randn(5, 32)).sum().backward()
    assert model.projector.weight.grad is not None
    assert_counts(aoquant_inductor.report(function), 1, 2, grad=1)


def test_a_learned_input_gets_its_gradient() -> None:
    """A latent, a prompt: a Parameter, and none of the model's."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    function, target = compiled(model), torch.randn(4, 64)
    latent = nn.Parameter(0.1 * torch.randn(4, 64))
    grads = []
    for one in (function, model):
        ((one(latent) - target).square().mean() + 0.01 * latent.square().mean()).backward()
        grads.append(latent.grad)
        latent.grad = None
    assert sqnr_db(*grads) > 60
    assert_counts(aoquant_inductor.report(function), 0, 2, grad=2)
    frozen = copy.deepcopy(model).requires_grad_(False)
    function = compiled(frozen)
    (function(latent) - target).square().mean().backward()
    assert latent.grad is not None and float(latent.grad.abs().max()) > 0
    assert_counts(aoquant_inductor.report(function), 2)
