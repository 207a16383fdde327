"""A model that arrives packed: from the CPU or from safetensors files, tensor by tensor; bad files are refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from util import BF16, assert_counts, compiled, dequantized, linear64, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import CheckpointError, NothingQuantized, UnmatchedPattern, lowering
from aoquant_inductor.scheme import resolve
from aoquant_inductor.weights import STORE


class Net(nn.Module):
    """Embedding tied to the head, two linears, a norm and a buffer that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32, dtype=BF16)
        self.up, self.down = nn.Linear(32, 64, dtype=BF16), nn.Linear(64, 32, dtype=BF16)
        self.norm = nn.LayerNorm(32, dtype=BF16)
        self.head = nn.Linear(32, 64, bias=False, dtype=BF16)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.arange(32, dtype=BF16), persistent=False)

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(self.up(self.embed(i)).relu())) + self.shift)


TOKENS = torch.arange(6)


def net() -> tuple[Net, dict[str, torch.Tensor]]:
    """A model and its checkpoint, the head saved once."""
    model = Net().eval()
    state = {name: t.clone() for name, t in model.state_dict().items() if name != "head.weight"}
    return model, state


def empty() -> Net:
    with torch.device("meta"):
        model = Net().eval()
    model.shift = torch.arange(32, dtype=BF16)
    return model


def check(model: nn.Module, want: torch.Tensor, report: Any, scheme: str = "int8wo") -> None:
    assert {layer.name: (layer.status, layer.original) for layer in report.layers} == {
        "up": ("quantized", "released"), "down": ("quantized", "released"), "head": ("quantized", "kept: it is embed.weight, too"),
    }  # fmt: skip
    packed = STORE.packed
    function = compiled(model, scheme)
    with torch.no_grad():
        y = function(TOKENS)
    totals = aoquant_inductor.report(function).totals
    assert_counts(aoquant_inductor.report(function), 3)
    assert totals["bytes_resident"] == totals["bytes_after"] + 2 * 64 * 32, "but for the tied one the packs are all there is"
    assert STORE.packed == packed, "the graph is made of the packs that arrived"
    assert sqnr_db(y, want) > 30
    assert model.head.weight is model.embed.weight
    with pytest.raises(RuntimeError, match="restore"):
        model.up.weight.clone()


@pytest.mark.parametrize("files", [1, 2])
def test_from_the_meta_device_and_files(tmp_path: Path, files: int) -> None:
    source, state = net()
    names = sorted(state)
    for i in range(files):
        save_file({name: state[name] for name in names[i::files]}, tmp_path / f"{i}.safetensors")
    with torch.no_grad():
        want = source(TOKENS)
    model = empty()
    paths = sorted(tmp_path.iterdir())
    report = aoquant_inductor.load(model, paths if files > 1 else paths[0], device="cpu", options={"schemes": "int8wo"})
    check(model, want, report)
    assert not [name for name, t in model.named_parameters() if t.device.type == "meta"]


def test_from_the_cpu() -> None:
    model, _ = net()
    with torch.no_grad():
        want = model(TOKENS)
    weight = dequantized(model.up.weight)
    check(model, want, aoquant_inductor.load(model, device="cpu", options={"schemes": "int8wo"}))
    with pytest.warns(UserWarning, match="2 of 2 weights came back dequantized"):
        aoquant_inductor.restore(model)
    assert sqnr_db(model.up.weight.detach(), weight) > 50


@pytest.mark.parametrize("scheme", ["int8wo", "int4wo-32-asym"])
def test_what_arrived_apart_lies_together_where_one_launch_serves_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "TOGETHER", frozenset(["cpu"]))

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(96, n, dtype=BF16) for n in (64, 128, 64))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model, x = Heads().eval(), tokens(5, 96)
    wants = [linear64(x, linear, resolve(scheme)) for linear in (model.q, model.k, model.v)]
    aoquant_inductor.load(model, device="cpu", options={"schemes": scheme})
    packed = STORE.packed
    _, ys, report = run(model, x, schemes=scheme)
    assert_counts(report, 3)
    assert report.layers[0].siblings == ("k", "v")
    assert STORE.packed == packed
    assert min(sqnr_db(y, want) for y, want in zip(ys, wants, strict=True)) > 45
    with pytest.warns(UserWarning, match="3 of 3"):
        assert aoquant_inductor.restore(model) == 3
    assert sqnr_db(linear64(x, model.k, resolve(scheme), model.k.weight.detach().double()), wants[1]) > 40


def test_other_options_than_those_it_was_packed_with_are_refused() -> None:
    model, _ = net()
    aoquant_inductor.load(model, device="cpu", options={"schemes": "int8wo"})
    with pytest.raises(aoquant_inductor.ReleasedWeights, match='"up"'), torch.no_grad():
        compiled(model, "int4wo-32")(TOKENS)


def test_options_are_judged_before_anything_moves() -> None:
    model = empty()
    with pytest.raises(UnmatchedPattern):
        aoquant_inductor.load(model, device="cpu", options={"schemes": {"upp": "int8wo"}})
    with pytest.raises(CheckpointError, match="no file: embed.weight is not there, and the model has it on the meta device."):
        aoquant_inductor.load(model, device="cpu")
    with pytest.raises(NothingQuantized):
        aoquant_inductor.load(net()[0], device="cpu", options={"schemes": {"*": None}})


def refused(model: nn.Module, path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        aoquant_inductor.load(model, path, device="cpu")
    assert all(t.device.type == "meta" for t in model.parameters()), "nothing moved"
    return str(caught.value)


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    _, state = net()
    path = tmp_path / "model.safetensors"
    save_file(state | {"up.weight": torch.zeros(3, 3)}, path)
    assert refused(empty(), path) == f"{path}: up.weight is (3, 3), the model's is (64, 32)."
    save_file({name: t for name, t in state.items() if name != "down.bias"}, path)
    assert refused(empty(), path) == (
        f"{path}: down.bias is not there, and the model has it on the meta device. "
        "If it is to be tied to another one, tie them first (transformers: model.tie_weights())."
    )
    pickle = tmp_path / "model.bin"
    torch.save(state, pickle)
    assert refused(empty(), pickle).startswith(f"{pickle}: no whole safetensors file")
    with pytest.raises(FileNotFoundError):
        aoquant_inductor.load(empty(), tmp_path / "nowhere", device="cpu")


def test_mutants_of_a_file_are_refused_or_harmless(tmp_path: Path) -> None:
    """200 damaged headers and cut files: refused as what they are, or another tensor of the right shape; never a crash."""
    _, state = net()
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    json.loads(good[8:header])
    accepted = 0
    for seed in range(200):
        pick = random.Random(seed)
        if seed % 4 == 0:
            bad = good[: pick.randrange(len(good))]
        else:
            at = pick.randrange(header)
            bad = good[:at] + bytes([pick.randrange(256)]) + good[at + 1 :]
        path.write_bytes(bad)
        if bad == good:
            continue
        try:
            aoquant_inductor.load(empty(), path, device="cpu")
            accepted += 1
        except CheckpointError:
            pass
    assert accepted <= 10, "a header byte that says the same, such as a dtype of the same size"


def test_a_buffer_on_the_meta_device_says_how_to_make_the_model(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(32, 32)
            self.register_buffer("angles", torch.ones(4), persistent=False)

    save_file({"up.weight": torch.randn(32, 32), "up.bias": torch.zeros(32)}, tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(CheckpointError, match=r"angles is not there.* as accelerate\.init_empty_weights does\."):
        aoquant_inductor.load(model, tmp_path / "m.safetensors", device="cpu")
    model.angles = torch.ones(4)
    assert aoquant_inductor.load(model, tmp_path / "m.safetensors", device="cpu").totals["quantized"] == 1
