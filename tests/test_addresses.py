"""What a weight may become between two calls that is hard to see, or no weight to pack."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from util import FP32, INT8, assert_counts, compiled, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import AoquantError, ShapeChanged, native, watch
from aoquant_inductor.weights import STORE


@pytest.mark.parametrize("how", ["native", "python"])
@pytest.mark.parametrize("kind", ["constant", "looked up"])
def test_data_at_the_address_of_what_was_there_before(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an allocator hands it out: neither the version nor the data pointer tells."""
    if how == "python":
        monkeypatch.setattr(native, "watch_type", lambda: None)
        monkeypatch.setattr(native, "lookup_type", lambda: None)
    elif watch.settle() != "native":
        pytest.skip(watch.settle())

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.linear(x)
            return y

    x, place = tokens(3, 32, FP32), np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    for _ in range(3 if kind == "looked up" else 1):
        model = Layer().eval()
        function = compiled(model)
        model.linear.weight.data = torch.from_numpy(place)
        with torch.no_grad():
            function(x)
    version, pointer = model.linear.weight._version, model.linear.weight.data_ptr()
    for seed in range(3):
        model.linear.weight.data = torch.empty(0)
        place[:] = np.random.default_rng(seed + 1).normal(size=(32, 32))
        model.linear.weight.data = torch.from_numpy(place)
        assert (model.linear.weight._version, model.linear.weight.data_ptr()) == (version, pointer)
        with torch.no_grad():
            assert sqnr_db(function(x), model(x)) > 30, seed


def test_a_weight_that_stops_being_finite_is_an_error_of_ours_until_it_is_again() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)).eval(), tokens(3, 32, FP32)
    function = compiled(model)
    with torch.no_grad():
        function(x)
        model[0].weight[2, 3] = float("inf")
        for _ in range(2):
            with pytest.raises(AoquantError, match=r"shape \(32, 32\) was changed and holds a non-finite value \(first at \[2, 3\]\)"):
                function(x)
        model[0].weight[2, 3] = 0.5
        assert sqnr_db(function(x), model(x)) > 30


@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="its graphs do not see it, Inductor's own neither (ShapeChanged)")
def test_data_of_another_shape_is_packed_by_the_graph_of_that_shape() -> None:
    """As transformers' resize_token_embeddings gives it to an embedding, and so to a tied head."""
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    function = compiled(model)
    with torch.no_grad():
        for n, k in ((32, 32), (16, 32), (32, 16), (48, 32)):
            model[0].weight.data, model[0].bias.data = torch.randn(n, k), torch.randn(n)
            x = tokens(3, k, FP32)
            for _ in range(2):
                assert sqnr_db(function(x), model(x)) > 30
            model[0].weight.data.mul_(-2)
            assert aoquant_inductor.refresh(function) == 1
            assert sqnr_db(function(x), model(x)) > 30
            report = aoquant_inductor.report(function)
            assert_counts(report, 1)
            assert (report.layers[0].shape, report.layers[0].bytes_before) == ((n, k), 4 * n * k)
        model[0].weight.data, model[0].bias.data = torch.randn(16, 32), torch.randn(16)
        for _ in range(2):  # the graph of that shape has packs that nobody brings up to date any more
            with pytest.raises(ShapeChanged, match=r"\(16, 32\) has had another shape since"):
                function(tokens(3, 32, FP32))
        model[0].weight = nn.Parameter(torch.randn(16, 32))
        x = tokens(3, 32, FP32)
        assert sqnr_db(function(x), model(x)) > 30


@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="see above")
@pytest.mark.parametrize("kind", [True, "cpu"])
def test_a_released_weight_that_gets_another_shape(kind: bool | str) -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False)).eval()
    function, x = compiled(model, release_weights=kind), tokens(3, 32, FP32)
    with torch.no_grad():
        function(x)
        wider = torch.randn(48, 32)
        model[0].weight.data = wider.clone()
        want = model(x)
        assert sqnr_db(function(x), want) > 30
        assert aoquant_inductor.report(function).layers[0].original == "released"
        if kind == "cpu":
            assert torch.equal(model.state_dict()["0.weight"], wider)
        assert aoquant_inductor.restore(model) == 1
        assert model[0].weight.shape == (48, 32) and sqnr_db(model[0].weight, wider) > 30
        model[0].weight.data = torch.randn(16, 32)
        function(x)
        assert model[0].weight.data_ptr() != 0, "what was restored stays"


@pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="see above")
def test_a_looked_up_weight_goes_to_another_shape_and_back() -> None:
    models = [nn.Linear(32, 32).eval().requires_grad_(False) for _ in range(3)]
    functions, x = [compiled(model) for model in models], tokens(3, 32, FP32)
    with torch.no_grad():
        for n in (32, 16, 32, 48, 32):
            models[2].weight.data, models[2].bias.data = torch.randn(n, 32), torch.randn(n)
            for _ in range(3):
                for model, function in zip(models, functions, strict=True):
                    assert sqnr_db(function(x), model(x)) > 30, n
            models[2].weight.mul_(-2)
            assert sqnr_db(functions[2](x), models[2](x)) > 30, n
    assert_counts(aoquant_inductor.report(functions[2]), 1)


def test_new_data_before_the_next_call_is_kept_by_restore() -> None:
    model, x, new = nn.Sequential(nn.Linear(32, 32)).eval(), tokens(3, 32, FP32), torch.randn(32, 32)
    function = compiled(model, release_weights="cpu")
    with torch.no_grad():
        function(x)
        assert aoquant_inductor.report(function).layers[0].original == "released"
        model[0].weight.data = new.clone()
        assert aoquant_inductor.restore(model) == 0
        assert sqnr_db(function(x), model(x)) > 30
    assert torch.equal(model.state_dict()["0.weight"], new) and torch.equal(model[0].weight, new)


def test_a_refused_call_holds_nothing() -> None:
    model = nn.Linear(32, 32, bias=False)
    watching = watch.Watch([STORE.pack(model.weight, INT8, "plain")[0]])
    model.weight.data = torch.randn(16, 32)
    STORE.pack(model.weight, INT8, "plain")

    class Argument:
        pass

    def call(argument: Argument) -> None:
        watching.update()

    gone = []
    for _ in range(3):
        argument = Argument()
        gone.append(weakref.ref(argument))
        with pytest.raises(ShapeChanged):
            call(argument)
        del argument
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_a_graph_that_is_called_with_a_weight_of_another_shape_refuses() -> None:
    """As guards of Dynamo's let it with torch 2.11."""
    model = nn.Linear(32, 32)
    entry = STORE.pack(model.weight, INT8, "plain")[0]
    watching = watch.Watch([entry])
    model.weight.data = model.weight.data[:16]  # the same address and strides
    assert watching.stale()
    with pytest.raises(ShapeChanged, match=r"\(32, 32\) has the shape \(16, 32\)"):
        watching.update()


def test_the_report_says_what_became_of_a_weight() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32)).eval(), tokens(3, 32, FP32)
    function = compiled(model)
    with torch.no_grad():
        function(x)
        assert_counts(aoquant_inductor.report(function), 1)
        model.double()
        assert torch.equal(function(x.double()), model(x.double()))
        assert_counts(aoquant_inductor.report(function), 0, 1, dtype=1)
        model.float()
        function(x)
    assert_counts(aoquant_inductor.report(function), 1)
