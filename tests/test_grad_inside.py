"""Functions that take gradients themselves: what is compiled is differentiated, whoever calls it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import FP32, assert_counts, compiled, tokens

import aoquant_inductor

NOT_211 = pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="there it fails, or runs eager, by any backend")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def force(net: Net, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.func.grad(lambda v: net(v).sum())(x)
    return found


def vjp(net: Net, x: torch.Tensor) -> torch.Tensor:
    y, back = torch.func.vjp(net, x)
    return torch.as_tensor(back(y)[0])


def jvp(net: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(torch.func.jvp(net, (x,), (x,))[1])


def each(net: Net, x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(torch.func.vmap(torch.func.grad(lambda v: net(v).sum()))(x))


def enabled(net: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        return torch.autograd.grad(net(v).sum(), v)[0]


@NOT_211
def test_asking_for_gradients_without_grad_is_nothing() -> None:
    """As transformers' gradient_checkpointing_enable has it: a hook on the embedding that stays in evaluation."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).eval(), tokens(3, 8, FP32)
    model[0].register_forward_hook(lambda module, args, y: y.requires_grad_(True))
    function = compiled(model)
    with torch.no_grad():
        y = function(x)
        assert torch.allclose(y, model(x), atol=0.05) and not torch.equal(y, model(x))
    assert_counts(aoquant_inductor.report(function), 2)


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_of_an_activation_that_asks_for_them(grad: bool) -> None:
    """In the graph: under grad, or where inference mode, and with it no_grad, is left within."""

    def f(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if grad else torch.inference_mode(False):
            v = x.clone().requires_grad_()
            net(v).sum().backward()
            assert v.grad is not None
            return v.grad

    net, x = Net().eval().requires_grad_(False), tokens(5, 8, FP32)
    with torch.set_grad_enabled(grad):
        function = torch.compile(lambda x: f(net, x), backend="aoquant")
        got, want = function(x), f(net, x)
    assert float((got - want).norm() / want.norm()) < 0.03
    assert_counts(aoquant_inductor.report(function), 2 * grad, 2, **({} if grad else {"grad": 2}))


class Taking(nn.Module):
    def __init__(self, net: Net, take: Callable[[Net, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.take = net, take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.take(self.net, x)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("take", [force, vjp, jvp, each, enabled])
def test_gradients_taken_inside_are_there(take: Callable[[Net, torch.Tensor], torch.Tensor], trains: bool) -> None:
    net, x = Net().eval().requires_grad_(trains), tokens(5, 8, FP32)
    want = take(net, x)

    function = compiled(Taking(net, take).eval())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = function(x)
    assert want.abs().max() > 0.01 and torch.allclose(got, want, atol=1e-5)
    assert_counts(aoquant_inductor.report(function), 0, 2, grad=2)
    assert torch.allclose(take(net, x), want), "what Dynamo left behind"


def test_tangents_that_come_from_outside_are_not_lost() -> None:
    """By torch's own words, that Inductor's products have none, or by the tangent itself."""
    import torch.autograd.forward_ad as forward_ad

    model, x = nn.Linear(32, 32).eval().requires_grad_(False), torch.randn(4, 32)
    function = torch.compile(model, backend="aoquant")
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn(4, 32))
        with contextlib.suppress(NotImplementedError):
            assert forward_ad.unpack_dual(function(dual)).tangent is not None
    assert_counts(aoquant_inductor.report(function), 0, 1, grad=1)


def test_a_transform_that_takes_none_is_quantized() -> None:
    net, x = Net().eval(), tokens(5, 8, FP32)
    function = compiled(Taking(net, lambda net, x: torch.as_tensor(torch.func.vmap(lambda v: net(v))(x))).eval())
    with torch.no_grad():
        assert torch.allclose(function(x), net(x), atol=0.05)
    assert_counts(aoquant_inductor.report(function), 2)


def test_the_gradient_of_a_bias_of_one_vector() -> None:
    linear, x = nn.Linear(8, 6).train(), tokens(1, 8, FP32)[0]
    linear.weight.requires_grad_(False)
    function = compiled(linear)
    (2 * function(x)).sum().backward()
    assert linear.bias.grad is not None and torch.equal(linear.bias.grad, torch.full((6,), 2.0))
    assert_counts(aoquant_inductor.report(function), 1)


class Adapter(nn.Module):
    """A trainable linear before a frozen one, and something done with the results."""

    def __init__(self, then: Callable[[Adapter, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self, self.first(x))


def relu(m: Adapter, h: torch.Tensor) -> torch.Tensor:
    return nn.functional.relu(m.frozen(h), inplace=True)


def residual(m: Adapter, h: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = m.frozen(h)
    y += h
    return y


def of_each(m: Adapter, h: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(torch.vmap(lambda v: m.frozen(v))(h))


def inference(m: Adapter, h: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        factor = m.frozen(h).mean()
    return h * factor.clone()


@pytest.mark.parametrize(("then", "quantized"), [(relu, 1), (residual, 1), (of_each, 0), pytest.param(inference, 0, marks=NOT_211)])
def test_what_is_done_with_a_frozen_result_while_others_train(
    then: Callable[[Adapter, torch.Tensor], torch.Tensor], quantized: int
) -> None:
    model, x = Adapter(then).train(), tokens(5, 8, FP32)
    function = compiled(model, {"frozen": "int8wo"})
    got, want = [], []
    for into, call in ((got, function), (want, model)):
        model.zero_grad()
        call(x).square().sum().backward()
        assert model.first.weight.grad is not None
        into.append(model.first.weight.grad.clone())
    assert (got[0] - want[0]).norm() < 0.05 * want[0].norm()
    assert aoquant_inductor.report(function).totals["quantized"] == quantized
