"""Gradients: what trains stays in full precision and says so once; through a frozen packed weight they are its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from util import BF16, FP32, Block, Graph, assert_counts, block, compiled, dequantized, dequantized_twin, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import packing
from aoquant_inductor.scheme import resolve
from aoquant_inductor.weights import STORE

STAY = "linears that train stay in full precision, frozen ones are quantized."
ACTIVATION = f"aoquant: an activation requires grad: {STAY}"
TRAINING = f"aoquant: the model is in training mode with grad enabled: {STAY}"


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
    """A frozen base with an adapter beside it, twice, so that gradients must pass through a packed weight."""

    act: Callable[[torch.Tensor], torch.Tensor] = staticmethod(torch.relu)

    def __init__(self, d: int = 64, dtype: torch.dtype = FP32) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(d, d, dtype=dtype) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(d, 4, False, dtype=dtype) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(4, d, False, dtype=dtype) for _ in range(2))
        for base in self.base:
            base.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for base, down, up in zip(self.base, self.down, self.up, strict=True):
            x = self.act(base(x) + up(down(x)))
        return x


def train(function: Callable[..., torch.Tensor], model: LoRA, x: torch.Tensor, steps: int = 3) -> list[torch.Tensor]:
    """The gradients of the first step, then the trained parameters of the last."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    first: list[torch.Tensor] = []
    for _ in range(steps):
        optimizer.zero_grad()
        function(x).float().square().mean().backward()
        first = first or [p.grad.clone() for p in trained if p.grad is not None]
        optimizer.step()
    return first + [p.detach().clone() for p in trained]


# A dynamic scheme's forward differs from the reference by the rounding of x, and so does what its gradients are taken at.
@pytest.mark.parametrize(("scheme", "db"), [("int8wo", 100), ("int4wo-32-asym", 100), ("int8dq", 25), ("int8dq-int4w-32", 25)])
def test_adapters_train_beside_a_quantized_base(scheme: str, db: float, graphs: list[Graph]) -> None:
    model, x = LoRA().train(), tokens(5, 64, FP32)
    twin = dequantized_twin(model, scheme, "base")
    base = [linear.weight.clone() for linear in model.base]
    function, packed = compiled(model, {"base.*": scheme}), STORE.packed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train(function, model, x)
    assert ours(caught) == [], "nothing was left out that the user asked for"
    want = train(twin, twin, x)
    assert len(got) == len(want) == 2 * 6
    assert min(sqnr_db(a, b) for a, b in zip(got, want, strict=True)) > db
    assert_counts(aoquant_inductor.report(function), 2, 6, no_match=4)
    assert all(torch.equal(linear.weight, before) for linear, before in zip(model.base, base, strict=True))
    assert all(linear.weight.grad is None for linear in model.base)
    assert (STORE.packed, len(graphs)) == (packed + 2, 1)


PLAIN = ["int8wo", "int4wo-32-asym", "int4wo-row", "int4wo-32-asymfloat"]


@pytest.mark.parametrize(("scheme", "layout"), [*((scheme, "plain") for scheme in PLAIN), ("int8wo", "wgmma")])
def test_the_backward_over_the_layouts_of_gpus(scheme: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered into the graph."""
    monkeypatch.setattr(packing, "choose", lambda *_: layout)
    model, x = LoRA().train(), tokens(5, 64, FP32)
    twin = dequantized_twin(model, scheme, "base")
    got, want = train(compiled(model, {"base.*": scheme}), model, x), train(twin, twin, x)
    assert min(sqnr_db(a, b) for a, b in zip(got, want, strict=True)) > 100


def test_a_dynamic_scheme_is_straight_through() -> None:
    """grad_x is grad_y . dequantize(w) exactly, whatever rounding did to x."""
    linear, x = nn.Linear(64, 32).requires_grad_(False).eval(), tokens(3, 64, FP32).requires_grad_()
    compiled(linear, "int8dq")(x).backward(grad := torch.randn(3, 32))
    assert x.grad is not None
    assert sqnr_db(x.grad, grad.double() @ dequantized(linear.weight, resolve("int8dq"))) > 120


def test_the_forward_saves_packs_and_no_dense_weight() -> None:
    model, x = LoRA().train(), tokens(5, 64, FP32)
    y = compiled(model, {"base.*": "int4wo-32"})(x)
    saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert any(t.dtype == torch.uint8 for t in saved)
    assert all(t.numel() < 64 * 64 for t in saved if t.is_floating_point())


class Smooth(LoRA):
    """Of a relu one sum that another rounding puts on its other side leaves a gradient 20 dB; and it needs no input for its own."""

    act = staticmethod(nn.functional.gelu)


def test_bf16_autocast_and_4d(graphs: list[Graph]) -> None:
    model, x = Smooth(dtype=BF16).eval(), tokens(12, 64).view(2, 2, 3, 64).requires_grad_()
    twin, y = dequantized_twin(model, "int8wo", "base"), x.detach().clone().requires_grad_()
    compiled(model, {"base.*": "int8wo"})(x).float().square().sum().backward()
    twin(y).float().square().sum().backward()
    assert sqnr_db(x.grad, y.grad) > 35  # type: ignore[arg-type]
    model, twin, x = model.float(), twin.float(), tokens(5, 64, FP32)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (train(f, m, x, 1) for f, m in ((compiled(model, {"base.*": "int8wo"}), model), (twin, twin)))
    assert min(sqnr_db(a, b) for a, b in zip(got, want, strict=True)) > 30
    assert all("torch.ops.aoquant" in graph.code for graph in graphs)


def test_blocks_that_share_a_graph_train(graphs: list[Graph]) -> None:
    models, x = [LoRA().train() for _ in range(4)], tokens(5, 64, FP32)
    with torch.no_grad():
        models[3].base[1].weight[0, 0] = float("inf")  # its block stays in full precision, and trains all the same
    for i, model in enumerate(models):
        twin = dequantized_twin(model, "int8wo", "base") if i < 3 else copy.deepcopy(model)
        got, want = train(compiled(model, {"base.*": "int8wo"}), model, x, 1), train(twin, twin, x, 1)
        if i < 3:
            assert min(sqnr_db(a, b) for a, b in zip(got, want, strict=True)) > 100, i
        else:
            assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(got, want, strict=True))
    assert len([graph for graph in graphs if graph.packs]) == 2


def test_no_grad_after_training_is_inference_with_the_same_packs() -> None:
    model, x = LoRA().train(), tokens(5, 64, FP32)
    function, packed = compiled(model, {"base.*": "int8wo"}), STORE.packed
    train(function, model, x)
    model.eval()
    with torch.no_grad():
        assert sqnr_db(function(x), dequantized_twin(model, "int8wo", "base")(x)) > 100
    assert STORE.packed == packed + 2


def test_a_base_that_changes_between_forward_and_backward_is_an_error() -> None:
    model, x = LoRA().train(), tokens(5, 64, FP32)
    function = compiled(model, {"base.*": "int8wo"})
    y = function(x)
    with torch.no_grad():
        model.base[1].weight.mul_(2)
    function(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_beside_trainable_linears() -> None:
    model, x = LoRA().eval(), tokens(5, 64, FP32)
    function = compiled(model)
    with pytest.warns(UserWarning, match="some parameters require grad and others are frozen: linears that train stay"):
        function(x).sum().backward()
    assert_counts(aoquant_inductor.report(function), 2, 6, grad=4)
    with torch.no_grad():
        function(x)
    assert_counts(aoquant_inductor.report(function), 6)


def _sees_requires_grad(x: torch.Tensor) -> bool:
    model = LoRA().eval().requires_grad_(False)
    function = torch.compile(model, backend="aot_eager")
    function(x)
    model.up[0].weight.requires_grad_(True)
    return bool(function(x).requires_grad)


def test_unfreezing_after_the_compile() -> None:
    model, x = LoRA().eval().requires_grad_(False), tokens(5, 64, FP32)
    if not _sees_requires_grad(x):
        pytest.skip("this torch does not compile again where a parameter begins to train, whoever the backend is")
    function = compiled(model, {"base.*": "int8wo"})
    function(x)
    assert_counts(aoquant_inductor.report(function), 2, 6, no_match=4)
    model.up[0].weight.requires_grad_(True)
    function(x).sum().backward()
    assert model.up[0].weight.grad is not None
    model.base[0].weight.requires_grad_(True)
    function(x).sum().backward()
    assert model.base[0].weight.grad is not None
    assert model.base[1].weight.grad is None


def test_no_grad_in_training_mode_is_inference() -> None:
    model, x = Block().train(), tokens()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, y, report = run(model, x)
    assert ours(caught) == []
    assert_counts(report, 1)
    assert sqnr_db(y, model.reference(x)) > 45
