"""What a linear is called, wherever its weight comes from: keys of `schemes` and the report go by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from util import Graph, assert_counts, dequantized_twin, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import OptionError
from aoquant_inductor.errors import UnmatchedPattern, UnsupportedLayers
from aoquant_inductor.names import Names

FP32 = torch.float32


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()


class Mixture(nn.Module):
    """The router of a mixture in transformers: a parameter that F.linear reads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_parameter_that_is_read_as_a_linear_goes_by_its_module(graphs: list[Graph]) -> None:
    model = nn.ModuleDict({"up": nn.Linear(32, 32), "gate": Mixture()}).eval()
    table = nn.Parameter(torch.randn(2, 3, 4))
    model["gate"].register_parameter("experts", table)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.mlp["up"](x)
            torch._dynamo.graph_break()
            return self.mlp["gate"](y)

    schemes = {"*.gate": None, "*": "int8wo"}
    whole = Whole().eval()
    _, _, report = run(whole, tokens(dtype=FP32), schemes=schemes)  # the first of two graphs has no router
    assert_counts(report, 1, 2, user=1)
    assert {layer.name: layer.matched_by for layer in report.layers} == {"mlp.up": "*", "mlp.gate": "*.gate"}
    assert [bool(graph.packs) for graph in graphs] == [True, False]
    assert aoquant_inductor.plan(whole, {"schemes": schemes}).totals["quantized"] == 1
    with pytest.raises(UnmatchedPattern, match=r'"\*.experts" names none of the 1 linears'):
        aoquant_inductor.plan(whole, {"schemes": {"*.experts": "int8wo", "*": "int8wo"}})


def test_a_function_over_several_modules_names_each_by_its_variable() -> None:
    first, second, x = pair(), pair(), tokens(dtype=FP32)

    def both(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = second(first(x))
        return y

    function, y, report = run(both, x, schemes={"second.0": None, "*": "int8wo"})  # type: ignore[arg-type]
    assert_counts(report, 3, 4, user=1)
    assert [layer.name for layer in report.layers] == ["first.0", "first.2", "second.0", "second.2"]
    twins = dequantized_twin(first, "int8wo"), dequantized_twin(second, "int8wo", "2")
    with torch.no_grad():
        assert sqnr_db(y, twins[1](twins[0](x))) > 100


def test_names_from_sources() -> None:
    names, weights = Names(None), [torch.empty(0) for _ in range(2)]
    sources = [f"L['models'][{i}]._modules['up']._parameters['weight']" for i in range(2)]
    names.hear(sources)
    assert [names.of(*pair) for pair in zip(weights, sources, strict=True)] == [["0.up"], ["1.up"]]
    sources = [f"L['{name}']._modules['up']._parameters['weight']" for name in ("encoder", "decoder")]
    names.hear([*sources, "L['w']"])
    assert [names.of(*pair) for pair in zip(weights, sources, strict=True)] == [["encoder.up"], ["decoder.up"]]
    names.hear(sources[:1])
    assert names.of(weights[0], sources[0]) == ["up"]
    assert names.of(weights[0], "L['w']") == ["L['w']"]


def normed(linear: nn.Linear) -> None:
    parametrizations.weight_norm(linear)


def pruned(linear: nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", 0.5)


@pytest.mark.parametrize("how", [normed, pruned])
def test_a_weight_that_is_computed_is_named_and_stays(how: object, graphs: list[Graph]) -> None:
    model, x, schemes = pair(), tokens(dtype=FP32), {"0": "int8wo", "2": "int8wo"}
    how(model[0])  # type: ignore[operator]
    model.eval()
    function, y, report = run(model, x, schemes=schemes)
    assert_counts(report, 1, 2, not_parameter=1)
    (left,) = (layer for layer in report.layers if layer.reason)
    assert (left.name, left.shape, left.scheme) == ("0", (32, 32), "int8wo")
    assert left.detail == "has a weight that is computed at every call (a parametrization?), which stays as it is."
    with torch.no_grad():
        assert sqnr_db(y, model(x)) > 30
    planned = aoquant_inductor.plan(model, {"schemes": schemes})
    assert [(layer.name, layer.reason, layer.shape) for layer in planned.layers if layer.reason] == [
        ("0", "not_parameter", (32, 32))
    ]
    with pytest.raises(UnsupportedLayers, match="^0 has a weight that is computed"):
        run(model, x, schemes=schemes, on_unsupported="error")
    assert len(graphs) == 1


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 0.5, self.bias)


class Router(nn.Module):
    """As that of DeepSeek-V2: a matrix of its own, read in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.double(), self.weight.double()).float()


class Merged(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, 32)
        self.down, self.up = nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(32, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight + self.up @ self.down, self.bias)


class MergedByLinear(Merged):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight + nn.functional.linear(self.up, self.down.T), self.bias)


def test_a_weight_merged_by_a_linear_of_parameters() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), MergedByLinear()), tokens(dtype=FP32)
    _, y, report = run(model, x)
    assert_counts(report, 1, 3, not_parameter=2)
    assert [(layer.name, (layer.detail or "")[:31]) for layer in report.layers if layer.reason] == [
        ("1.down", "is computed by the graph (getat"), ("1", "is computed by the graph (add);")
    ]
    assert sqnr_db(y, model(x)) > 30


@pytest.mark.parametrize(("kind", "op"), [(lambda: Scaled(32, 32), "mul"), (Router, "double"), (Merged, "add")])
def test_a_weight_that_the_graph_makes_of_parameters_has_their_name(kind: Callable[[], nn.Module], op: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), kind()), tokens(dtype=FP32)
    function, y, report = run(model, x)
    assert_counts(report, 1, 2, not_parameter=1)
    (left,) = (layer for layer in report.layers if layer.reason)
    assert (left.name, left.shape, left.scheme) == ("1", (8 if kind is Router else 32, 32), "int8wo")
    assert left.detail == f"is computed by the graph ({op}); only a whole parameter is packed."
    assert sqnr_db(y, model(x)) > 30
    with pytest.raises(UnsupportedLayers, match="^1 is computed by"):
        run(model, x, on_unsupported="error")


class Hyper(nn.Module):
    """A weight that a linear of a parameter makes."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.latent = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.h(self.latent))


class Both(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(x, self.weight * 0.5)


class Cut(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([nn.functional.linear(x, w) for w in self.weight.chunk(2)], -1)


def test_a_use_of_a_weight_as_it_is_and_one_that_is_not() -> None:
    x = tokens(dtype=FP32)
    both = Both(32, 32)
    _, y, report = run(both, x, on_unsupported="error")
    assert_counts(report, 1)
    assert report.layers[0].detail == "is read as it is, too, to compute a weight (mul)."
    assert report.totals["bytes_before"] == 4096 and 30 < sqnr_db(y, both(x)) < 80
    _, y, report = run(model := Hyper(), x, on_unsupported="error")
    assert_counts(report, 1, 2, not_parameter=1)
    assert report.layers[0].name == "h" and report.layers[1].detail == "has a weight that the graph computes."
    assert sqnr_db(y, model(x)) > 30


def test_a_skipped_linear_has_the_size_of_its_parameter() -> None:
    model = Cut(32, 64)
    function, _, report = run(nn.Sequential(model, nn.Linear(64, 8)), tokens(dtype=FP32))
    assert_counts(report, 1, 2, not_parameter=1)
    cut = report.layers[0]
    assert (cut.name, cut.shape, cut.bytes_before, cut.bytes_after) == ("0", (64, 32), 8192, 8192)
    assert cut.detail == "is cut into parts by the graph; only a whole parameter is packed."
    function.bfloat16()
    cut, other = aoquant_inductor.report(function).layers
    assert (cut.bytes_before, cut.bytes_after, other.bytes_before) == (4096, 4096, 1024)


def test_linears_that_come_to_share_a_weight_are_one_row() -> None:
    model, x = pair(), tokens(dtype=FP32)
    function, _, report = run(model, x)
    assert_counts(report, 2)
    model[2].weight = model[0].weight
    with torch.no_grad():
        assert sqnr_db(function(x), model(x)) > 30
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    assert (report.layers[0].name, report.layers[0].aliases, report.totals["bytes_before"]) == ("0", ("2",), 4096)


def test_what_activations_are_multiplied_with_is_no_layer_of_theirs() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.q(x), self.k(x))

    model, x = Scores(), tokens(dtype=FP32)
    _, y, report = run(model, x, on_unsupported="error")
    assert_counts(report, 2, 3, not_parameter=1)
    assert [layer.detail for layer in report.layers if layer.reason] == ["has a weight that the graph computes."]
    assert sqnr_db(y, model(x)) > 30


def test_a_matrix_of_no_linear_has_one_name_in_every_model_of_its_class() -> None:
    """The second model runs the first one's graph."""
    for _ in range(3):
        _, _, report = run(nn.Sequential(nn.Linear(32, 32), Mixture()), tokens(dtype=FP32))
        assert_counts(report, 2)
        assert [layer.name for layer in report.layers] == ["0", "1"]


def test_what_torch_export_made_is_quantized() -> None:
    """Its linears are aten ops over parameters that no nn.Linear owns."""
    model, x = pair(), tokens(dtype=FP32)
    exported = torch.export.export(model, (x,)).module()
    _, y, report = run(exported, x, schemes={"0": "int8wo", "2": "int4wo-32"})
    assert_counts(report, 2)
    assert {layer.name: layer.scheme for layer in report.layers} == {"0": "int8wo", "2": "int4wo-32"}
    assert 15 < sqnr_db(y, model(x)) < 40


def test_a_model_without_data_says_so() -> None:
    with torch.device("meta"):
        model, x = pair(), torch.empty(4, 32)
    _, y, report = run(model, x)
    assert y.is_meta
    assert_counts(report, 0, 2, meta=2)
    assert report.layers[0].detail == "has no data: it is on the meta device."


@pytest.mark.parametrize("options", ["int8wo", ["int8wo"]])
def test_options_that_are_no_dict(options: object) -> None:
    function = torch.compile(pair(), backend="aoquant", options=options)  # type: ignore[call-overload]
    with pytest.raises(OptionError, match=r'give a dict, as {"schemes": "int8wo"}'):
        function(tokens(dtype=FP32))


def test_vmap_is_one_call_of_more_rows(caplog: pytest.LogCaptureFixture) -> None:
    model, x = pair(), torch.randn(3, 5, 32)
    torch._logging.set_logs(aot_graphs=True)
    try:
        _, y, report = run(lambda x: torch.vmap(model, in_dims=1)(x), x)  # type: ignore[arg-type]
    finally:
        torch._logging.set_logs()
    assert_counts(report, 2)
    assert caplog.text.count("torch.ops.aoquant.linear_wo.default(") == 2
    with torch.no_grad():
        assert sqnr_db(y, dequantized_twin(model, "int8wo")(x.movedim(1, 0))) > 100


def test_only_what_torch_compile_puts_into_a_name_is_left_out() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.compile(nn.Linear(8, 8))
            self.my_orig_mod = nn.Sequential(nn.Linear(8, 8))

    assert [layer.name for layer in aoquant_inductor.plan(Inner(), {"schemes": {"one": "int8wo"}}).layers] == ["one", "my_orig_mod.0"]
