"""The life of a packed weight on the card: updates in every mode, CUDA graphs across them, memory that really goes, training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_grad import LoRA, train
from test_instances import Seven
from test_siblings import Heads
from test_updates import MODES, UPDATES
from torch import nn
from util import (
    BF16,
    FP32,
    Block,
    Graph,
    assert_counts,
    block,
    compiled,
    dequantized_twin,
    from_pack,
    linear64,
    sqnr_db,
    tokens,
)

import aoquant_inductor
from aoquant_inductor import ReleasedWeights, packing
from aoquant_inductor.entry import Release
from aoquant_inductor.scheme import resolve
from aoquant_inductor.weights import STORE

pytestmark = pytest.mark.gpu

GPU_MODES = (None, "reduce-overhead")


def on_gpu(model: nn.Module, scheme: object = "int8wo", mode: str | None = None, **options: object) -> tuple[nn.Module, Callable]:
    model = model.cuda()
    return model, compiled(model, scheme, **({"mode": mode} if mode else {}), **options)


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("grad", MODES)
def test_every_route(grad: Callable, mode: str | None, graphs: list[Graph]) -> None:
    model, function = on_gpu(block(), mode=mode)
    x, wrong = tokens().cuda(), []
    with grad():
        for _ in range(3):
            function(x)
    for update in UPDATES:
        before = model.reference(x)
        update(model)
        want = model.reference(x)
        assert sqnr_db(before, want) < 30, "the update has to show"
        for replay in range(3):
            with grad():
                y = function(x).clone()
            if not sqnr_db(y, want) > 45:
                wrong.append((update.__name__, replay))
    assert wrong == []
    assert all(graph.packs for graph in graphs)


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-32"])
def test_a_hundred_replays_across_updates(scheme: str, graphs: list[Graph]) -> None:
    """Row 21: the same storage, new values, the graph recorded before still replayed."""
    model, function = on_gpu(block(), scheme, "reduce-overhead")
    x, stale = tokens().cuda(), 0
    with torch.no_grad():
        for i in range(100):
            if i % 10 == 9:
                model.a.weight.neg_() if i % 20 == 9 else model.a.weight.data.neg_()
                if i % 20 != 9:
                    assert aoquant_inductor.refresh(function) == 1
            stale += not sqnr_db(function(x).clone(), model.reference(x, resolve(scheme))) > 35
    assert (stale, len(graphs)) == (0, 1)


def test_blocks_that_share_a_graph_under_cuda_graphs(graphs: list[Graph]) -> None:
    blocks, x = [Seven().cuda().eval() for _ in range(6)], tokens().cuda()
    for one in blocks:
        one.compile(backend="aoquant", options={"schemes": "int8wo", "mode": "reduce-overhead"})
    with torch.no_grad():
        for _ in range(4):
            for one in blocks:
                torch.compiler.cudagraph_mark_step_begin()
                assert sqnr_db(one(x).clone(), Seven.forward(one, x)) > 30
    assert len(graphs) == 2


@pytest.mark.parametrize("mode", GPU_MODES)
@pytest.mark.parametrize("scheme", ["int8wo-64", "int4wo-128", "int4wo-32-asym", "int8dq-int4w-128"])
def test_further_blocks_of_many_rows_serve_the_graph_of_the_second(scheme: str, mode: str | None, graphs: list[Graph]) -> None:
    """q, k and v lie in one pack and have launches of their own, so that the scales of their groups lie apart."""
    x, s = tokens(300, 256).cuda(), resolve(scheme)
    with torch.no_grad():
        for _ in range(4):
            model, function = on_gpu(Heads((256, 128, 128), 256).eval(), scheme, mode, dynamic=False)
            got = [y.clone() for y in function(x)]
            for y, one in zip(got, (model.q, model.k, model.v), strict=False):
                assert sqnr_db(y, linear64(x, one, s, from_pack(one.weight, s))) > 44
            assert_counts(aoquant_inductor.report(function), 4)
    assert len(graphs) == 2, "one of constants, one for all others"


@pytest.mark.parametrize(("scheme", "ratio"), [("int8wo", 0.55), ("int4wo-128", 0.32)])
def test_resident_and_peak(scheme: str, ratio: float) -> None:
    layers = [nn.Linear(4096, n, bias=False, dtype=BF16, device="cuda") for n in (4096, 1024, 14336, 4096)]
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    model, before = sum(m.weight.nbytes for m in layers), torch.cuda.memory_allocated()
    largest = max(m.weight.nbytes for m in layers)
    for i, layer in enumerate(layers):
        layout = packing.choose(resolve(scheme), layer.weight.device, BF16, layer.weight.shape)
        entry, _, _ = STORE.pack(layer.weight, resolve(scheme), layout)
        assert entry.let_go(Release(str(i), False))
    assert torch.cuda.memory_allocated() - (before - model) <= ratio * model
    assert torch.cuda.max_memory_allocated() - before <= 2 * largest


def test_eager_use_of_a_released_weight_is_an_error_and_the_card_lives_on() -> None:
    model, function = on_gpu(block(), release_weights=True)
    x = tokens().cuda()
    with torch.no_grad():
        y = function(x)
        w = model.a.weight
        for use in (lambda: model(x), w.clone, lambda: w + 1, lambda: w.add_(1), lambda: w.cpu(), model.state_dict):
            with pytest.raises(RuntimeError, match="restore"):
                use()
        torch.cuda.synchronize()
        assert torch.equal(function(x), y)
        with pytest.warns(UserWarning, match="dequantized"):
            aoquant_inductor.restore(model)
        assert sqnr_db(model(x), y) > 35
        assert torch.equal(function(x), y)
    with pytest.raises(ReleasedWeights):
        raise ReleasedWeights("a")


def test_from_a_file_onto_the_card(tmp_path: Path) -> None:
    source, x = Block(1024).eval(), tokens(4, 1024).cuda()
    save_file(source.state_dict(), tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Block(1024).eval()
    aoquant_inductor.load(model, tmp_path / "m.safetensors", device="cuda", options={"schemes": "int4wo-128"})
    with torch.no_grad():
        y = compiled(model, "int4wo-128")(x)
    assert sqnr_db(y, source.cuda().reference(x, resolve("int4wo-128"))) > 40


@pytest.mark.parametrize(("scheme", "db"), [("int8wo", 60), ("int4wo-32-asym", 60), ("int8dq", 25)])
def test_adapters_train(scheme: str, db: float) -> None:
    model, x = LoRA().train().cuda(), tokens(5, 64, FP32).cuda()
    twin = dequantized_twin(model, scheme, "base")
    function = compiled(model, {"base.*": scheme})
    got, want = train(function, model, x), train(twin, twin, x)
    assert min(sqnr_db(a, b) for a, b in zip(got, want, strict=True)) > db
    assert_counts(aoquant_inductor.report(function), 2, 6, no_match=4)
