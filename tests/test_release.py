"""Originals let go: the memory is really gone, compiled graphs go on, and every other use says what to do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from util import BF16, FP32, Block, Graph, assert_counts, block, compiled, dequantized, peak_bytes, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import ReleasedWeights, native, packing, qparams
from aoquant_inductor.entry import Release
from aoquant_inductor.scheme import resolve
from aoquant_inductor.weights import STORE


class Tied(nn.Module):
    """An embedding tied to its head, a weight that something else reads, and two linears that only linears read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32, dtype=BF16)
        self.up, self.down = nn.Linear(32, 64, dtype=BF16), nn.Linear(64, 32, dtype=BF16)
        self.read = nn.Linear(32, 32, dtype=BF16)
        self.head = nn.Linear(32, 64, bias=False, dtype=BF16)
        self.head.weight = self.embed.weight

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        x = self.down(self.up(self.embed(i)).relu())
        return self.head(self.read(x) + self.read.weight[0])


def released(model: nn.Module, x: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor, Any]:
    return run(model, x, **{"release_weights": True, **options})


def test_what_goes_and_what_stays_with_its_reason() -> None:
    model, i = Tied().eval(), torch.arange(6)
    with torch.no_grad():
        want = model(i)
    function, y, report = released(model, i)
    assert_counts(report, 4)
    assert {layer.name: layer.original for layer in report.layers} == {
        "up": "released", "down": "released", "read": "kept: the graph reads it elsewhere, too",
        "head": "kept: the graph reads it elsewhere, too",
    }
    assert "read kept: the graph reads it elsewhere, too" in str(report)
    kept = 2 * (32 * 32 + 64 * 32)
    assert report.totals["bytes_resident"] == report.totals["bytes_after"] + kept
    assert sqnr_db(y, want) > 30
    with torch.no_grad():
        assert torch.equal(function(i), y)


def test_a_tie_outside_of_the_graph_and_an_alias_keep_the_original() -> None:
    model, x = Block().eval(), tokens()
    model.table = nn.Embedding(32, 32, dtype=BF16)
    model.table.weight = model.a.weight  # type: ignore[assignment]
    _, _, report = released(model, x)
    assert report.layers[0].original == "kept: it is table.weight, too"
    model = block()
    alias = model.a.weight.detach()
    _, _, report = released(model, x)
    assert report.layers[0].original == "kept: another tensor shares its memory"
    assert torch.equal(alias, model.a.weight)


def test_new_shapes_modes_and_callables_go_on_from_the_packs(graphs: list[Graph]) -> None:
    model = block()
    want = dequantized(model.a.weight)
    function, _, _ = released(model, tokens())
    packed = STORE.packed
    second = compiled(model)
    for mode in (torch.no_grad, torch.inference_mode):
        for m in (4, 5, 9):
            x = tokens(m)
            with mode():
                y = x.double() + (x.double() @ want.t() + model.a.bias.double()).relu()
                assert sqnr_db(function(x), y) > 45, (mode, m)
                assert sqnr_db(second(x), y) > 45, (mode, m)
    assert STORE.packed == packed
    assert all("torch.ops.aoquant" in graph.code for graph in graphs)


def fails(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def test_every_eager_use_names_the_way_out() -> None:
    model, x = block(), tokens()
    function, y, _ = released(model, x)
    text = str(ReleasedWeights("a"))
    assert "aoquant_inductor.restore(model)" in text
    w = model.a.weight
    uses: list[Callable[[], object]] = [
        lambda: model(x), lambda: w + 1, w.clone, lambda: w[0, 0].item(), lambda: repr(w), model.float, lambda: w.detach().view(torch.int16).numpy(),
        lambda: copy.deepcopy(model), model.state_dict, lambda: torch.save(model, io.BytesIO()), lambda: w.detach().fill_(0),
        lambda: model.load_state_dict({"a.weight": torch.zeros(32, 32)}, strict=False),
        lambda: compiled(model, "int4wo-32")(x), lambda: torch.compile(model)(x),
    ]  # fmt: skip
    with torch.no_grad():
        for i, use in enumerate(uses):
            assert text in fails(use), i
        model.a.bias.data = model.a.bias.data.bfloat16()  # model.float() had come this far
        assert torch.equal(function(x), y), "and the compiled graph goes on"
        with pytest.raises(ReleasedWeights):
            compiled(model, "int4wo-32")(x)


def test_training_on_released_weights_is_refused() -> None:
    model, x = block(), tokens()
    released(model, x)
    with pytest.raises(ReleasedWeights):
        compiled(model.train())(x)


def test_an_evaluation_leaves_what_trains() -> None:
    """An adapter belongs to its optimizer; the base beside it goes."""
    model = nn.Sequential(nn.Linear(32, 32).requires_grad_(False), nn.Linear(32, 32))
    function, x = compiled(model, release_weights=True), torch.randn(4, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        function(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            function(x)
    originals = {layer.name: layer.original for layer in aoquant_inductor.report(function).layers}
    assert originals == {"0": "released", "1": "kept: it trains"}


@pytest.mark.parametrize("kind", [True, "cpu"])
def test_weights_made_in_inference_mode_come_back(kind: bool | str) -> None:
    with torch.inference_mode():
        model, x = block(), tokens()
        function, y, _ = released(model, x, release_weights=kind)
        assert aoquant_inductor.restore(model) == 1
        assert torch.equal(function(x), y)
        assert sqnr_db(model(x), y) > 40


def test_state_dict_is_the_copy_where_the_user_asked_for_one() -> None:
    model, x = block(), tokens()
    before = model.a.weight.detach().clone()
    function, y, report = released(model, x, release_weights="cpu")
    assert report.layers[0].original == "released"
    assert torch.equal(model.state_dict()["a.weight"], before)
    assert aoquant_inductor.restore(model) == 1
    assert torch.equal(model.a.weight, before)
    after = aoquant_inductor.report(function)
    assert after.layers[0].original == "kept: it was restored"
    assert after.totals["bytes_resident"] == report.totals["bytes_resident"] + model.a.weight.nbytes
    assert model.a.weight.requires_grad
    repacks = STORE.entry(model.a.weight).repacks
    with torch.no_grad():
        assert torch.equal(function(x), y)
    assert STORE.entry(model.a.weight).repacks == repacks
    assert not model.a._state_dict_hooks


def test_restore_says_that_it_dequantizes() -> None:
    model, x = block(), tokens()
    want = dequantized(model.a.weight).to(BF16)
    function, y, _ = released(model, x)
    with pytest.warns(UserWarning, match="1 of 1 weights came back dequantized"):
        assert aoquant_inductor.restore(function) == 1
    assert sqnr_db(model.a.weight, want) > 50
    with torch.no_grad():
        assert torch.equal(function(x), y), "the packs are still those of the original"
        model.a.weight.mul_(2)
        assert sqnr_db(function(x), model.reference(x)) > 45
    assert aoquant_inductor.restore(model) == 0


def test_new_data_is_packed_and_let_go_again() -> None:
    model, x = block(), tokens()
    function, _, _ = released(model, x)
    new = torch.randn(32, 32).to(BF16)
    want = x.double() + (x.double() @ dequantized(new).t() + model.a.bias.double()).relu()
    model.a.weight.data = new.clone()
    with torch.no_grad():
        assert sqnr_db(function(x), want) > 45
    assert str(ReleasedWeights("a")) in fails(model.a.weight.clone)
    model.load_state_dict({"a.weight": new, "a.bias": model.a.bias.detach()}, assign=True)
    with torch.no_grad():
        assert sqnr_db(function(x), want) > 45


def test_a_refused_compile_released_nothing() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32, dtype=BF16), nn.Linear(32, 32, dtype=BF16)).eval(), tokens()
    with torch.no_grad():
        model[1].weight[3, 5] = float("nan")
        with pytest.raises(Exception, match="non-finite"):
            compiled(model, release_weights=True, on_unsupported="error")(x)
        model(x)


def test_blocks_that_share_a_graph_let_go_too() -> None:
    stack, x = nn.ModuleList(block() for _ in range(4)), tokens()
    for one in stack:
        one.compile(backend="aoquant", options={"schemes": "int8wo", "release_weights": True})
        wants = dequantized(one.a.weight)
        with torch.no_grad():
            y = one(x)
        assert sqnr_db(y, x.double() + (x.double() @ wants.t() + one.a.bias.double()).relu()) > 45
        fails(one.a.weight.clone)
        assert aoquant_inductor.report(one).layers[0].original == "released"


@pytest.mark.parametrize(("scheme", "ratio"), [("int8wo", 0.55), ("int4wo-128", 0.32)])
def test_resident_and_peak(scheme: str, ratio: float) -> None:
    """Row 17 and row 22: what is left, and the most there ever was while packing."""
    native.module(STORE.turn)
    one, held = 2 * 1024 * 1024, []

    def pack() -> None:
        layers = [nn.Linear(1024, 1024, bias=False, dtype=BF16) for _ in range(6)]
        for i, layer in enumerate(layers):
            layout = packing.choose(resolve(scheme), torch.device("cpu"), BF16, layer.weight.shape)
            entry, _, _ = STORE.pack(layer.weight, resolve(scheme), layout)
            assert entry.let_go(Release(str(i), False))
        held.extend(layers)

    peak, left = peak_bytes(pack)
    assert 0.25 * 6 * one <= left <= ratio * 6 * one
    assert 6 * one <= peak <= 6 * one + 2 * one


def test_out_of_memory_rolls_one_layer_back() -> None:
    model, x = nn.Sequential(*(nn.Linear(32, 32, dtype=BF16) for _ in range(3))).eval(), tokens()
    quantize = qparams.quantize
    calls = iter(range(3))

    def failing(*args: Any) -> qparams.Quantized:
        if next(calls) == 1:
            raise torch.OutOfMemoryError
        return quantize(*args)

    with mock.patch.object(qparams, "quantize", failing):
        _, _, report = released(model, x)
    assert_counts(report, 2, 3, out_of_memory=1)
    assert [layer.original for layer in report.layers] == ["released", "kept", "released"]
    assert "1 could not be packed in the memory that is free; it stays in bf16." in str(report)
    assert STORE.entry(model[1].weight).packs == {}
    model[1].weight.clone()


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> Any:
        raise RuntimeError("python (FileNotFoundError)")

    monkeypatch.setattr(native, "module", none)
    model, x = block(), tokens()
    with pytest.raises(aoquant_inductor.OptionError, match='"release_weights" needs a C\\+\\+ compiler'):
        compiled(model, release_weights=True)(x)
    model(x)


def test_fp32_int4_too() -> None:
    model, x = Block(64, FP32).eval(), tokens(4, 64, FP32)
    want = model.reference(x, resolve("int4wo-32-asym"))
    _, y, report = released(model, x, schemes="int4wo-32-asym")
    assert sqnr_db(y, want) > 55
    assert report.totals["bytes_resident"] < 0.32 * 64 * 64 * 4


def test_a_report_says_what_another_compile_released() -> None:
    model, x = block(), tokens()
    function, _, report = run(model, x)
    assert report.layers[0].original == "kept"
    released(model, x)
    assert aoquant_inductor.report(function).layers[0].original == "released"


def test_what_was_restored_stays_when_another_graph_packs_it() -> None:
    model, x = block(), tokens()
    function, _, _ = released(model, x)
    with pytest.warns(UserWarning, match="came back dequantized"):
        aoquant_inductor.restore(model)
    new = torch.randn_like(model.a.weight)
    model.load_state_dict({"a.weight": new}, strict=False)
    with torch.no_grad():
        function(x)
        function(tokens(9))  # another graph
    assert torch.equal(model.a.weight, new)
    assert aoquant_inductor.report(function).layers[0].original == "kept: it was restored"
