"""Benchmark cases: their schemes meet the linears they are meant for, and a step is what it says. Nothing is compiled by Inductor."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the cases need the extra [demo]")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

import aoquant_inductor
from aoquant_inductor.options import parse
from aoquant_inductor.scheme import resolve
from benchmarks import bench_model, build, models
from benchmarks.models import CASES
from benchmarks.peers import PEERS, Peer


def test_every_label_of_every_case_is_a_scheme_or_has_options() -> None:
    for name, case in CASES.items():
        assert case.schemes, name
        assert case.mixed.keys() <= set(case.schemes), name
        for label in case.schemes:
            parse(case.options(label))  # raises UnknownScheme
    assert CASES["toy"].options("int8wo") == {"schemes": "int8wo"}


def test_what_the_issue_asks_to_be_measured_is_there() -> None:
    of = [f"{name}-decode-{batch}" for name in ("qwen", "llama") for batch in (1, 8, 32)]
    of += [f"{name}-prefill-{tokens}" for name in ("qwen", "llama") for tokens in (512, 4096)]
    assert {*of, "qwen-generate", "llama-generate", "smollm2-decode-1", "smollm2-generate", "voxtral"} <= CASES.keys()


def test_voxtral_has_a_scheme_for_each_half() -> None:
    """The shape as published, on the meta device: 32 encoder layers of 6 linears, the projector's 2, 30 of 7, the head."""
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration

    with torch.device("meta"):
        model = VoxtralForConditionalGeneration(VoxtralConfig(audio_token_id=24)).bfloat16().eval()
    case = CASES["voxtral"]
    planned = aoquant_inductor.plan(model, case.options(models.VOXTRAL))
    found = Counter((layer.scheme, "audio_tower" in layer.name or "projector" in layer.name) for layer in planned.layers)
    assert found == {("int8dq", True): 32 * 6 + 2, ("int4wo-32", False): 30 * 7 + 1}


def test_a_step_of_voxtral_reads_audio_and_text() -> None:
    model, bind = CASES["tiny-voxtral-whole"].make("cpu")
    with torch.no_grad():
        logits = bind(model)()
        assert logits.shape == (1, 1, 256) and logits.isfinite().all()
        tower = next(m for name, m in model.named_modules() if name.endswith("audio_tower"))
        tower.layer_norm.bias.add_(1)
        assert not torch.equal(bind(model)(), logits)


def test_generate_is_two_graphs_and_the_same_tokens() -> None:
    case = CASES["tiny-generate"]
    model, bind = case.make("cpu")
    (llm,) = getattr(model, case.blockwise)
    seen = []
    llm.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.shape[1]))
    with torch.no_grad():
        eager = bind(model)()
    assert seen == [1] * 4  # generate asks for the last logits alone
    model, bind = case.make("cpu")
    (llm,) = getattr(model, case.blockwise)
    llm.compile(backend="eager", dynamic=False)
    before = build.graphs()
    with torch.no_grad():
        step = bind(model)
        torch.testing.assert_close(step(), eager)
        assert build.graphs() == before + 2
        step()
        assert build.graphs() == before + 2


def test_smollm2_has_its_own_weights() -> None:
    weights = pytest.importorskip("demo.weights", reason="needs the extra [demo]")
    if not weights.gguf_path().exists():
        pytest.skip("the weights are not cached: `make demo` downloads them")
    model, bind = CASES["smollm2-decode-1"].make("cpu")
    with torch.no_grad():
        assert bind(model)().shape == (1, 1, 49152)
    assert sum(isinstance(m, torch.nn.Linear) for m in model.modules()) == 211


@pytest.mark.parametrize(
    ("case", "label", "peer", "expected"),
    [
        ("tiny-voxtral-whole", models.VOXTRAL, "torchao", {("int8dq", True): 8, ("int4wo-32", False): 8}),
        ("tiny-prefill", "int8dq", "torchao", {("int8dq", False): 14}),  # and the head, of which one row is asked, in bf16
        ("tiny-prefill", "int8dq", "gemlite", {("int8dq", False): 15}),
        ("tiny-prefill", "int4wo-128", "torchao", {("int4wo-128", False): 15}),
    ],
)
def test_peers_get_our_schemes_layer_by_layer(case: str, label: str, peer: str, expected: dict[tuple[str, bool], int]) -> None:
    names = bench_model.layers(CASES[case], CASES[case].make("cpu")[0], label, PEERS[peer])
    seen = Counter((s.name, "audio_tower" in name or "projector" in name) for s, these in names.items() for name in these)
    assert seen == expected


def test_peers_have_rows_for_what_they_have_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    has = Peer(lambda scheme, device: resolve(scheme).weight.bits == 8, lambda *_: False)
    monkeypatch.setattr(bench_model.peers, "PEERS", {"torchao": has})
    assert bench_model.beside(CASES["tiny-prefill"], CASES["tiny-prefill"].schemes, "cuda") == ["torchao int8dq"]
    assert bench_model.beside(CASES["voxtral"], [models.VOXTRAL], "cuda") == []  # one half of it is int4
    model, _ = CASES["tiny-prefill"].make("cpu")
    with pytest.raises(LookupError, match="torchao int8dq"):  # and no row of bf16 by that name
        bench_model.compiled(CASES["tiny-prefill"], model, "torchao int8dq", "default", "cpu")
