"""report() and plan(): what they say, over recompiles, tied weights, bad weights; the log line; the errors."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from util import Graph, Two, assert_counts, block, compiled, run, tokens

import aoquant_inductor
from aoquant_inductor import NothingQuantized, UnsupportedLayers
from aoquant_inductor.report import Layer, Report


def test_content_json_and_recompiles(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Two().eval(), tokens()
    function = compiled(model, {"a": "int4wo-32", "b": None})
    before = aoquant_inductor.report(function)
    assert [(layer.name, layer.reason) for layer in before.layers] == [("a", "not_called"), ("b", "user")]
    assert "no graph of it was compiled" in before.summary() and before.totals["graphs"] == 0
    with caplog.at_level(logging.INFO, "aoquant_inductor"), torch.no_grad():
        function(x)
    first = aoquant_inductor.report(function)
    a, b = first.layers
    assert (a.name, a.aliases, a.shape, a.scheme, a.matched_by) == ("a", (), (16, 32), "int4wo-32", "a")
    assert (a.status, a.reason, a.bytes_before) == ("quantized", None, 16 * 32 * 2)
    assert 15 < a.sqnr_db < 30
    assert (b.name, b.scheme, b.status, b.reason, b.kernel, b.sqnr_db) == ("b", None, "skipped", "user", None, None)
    assert b.bytes_before == b.bytes_after == 16 * 32 * 2
    after = a.bytes_after + b.bytes_after
    assert (first.totals["bytes_before"], first.totals["bytes_after"]) == (2048, after)
    lines = [r.message for r in caplog.records if r.name == "aoquant_inductor" and r.levelno == logging.INFO]
    assert lines == [first.summary()]
    assert first.summary() == f"quantized 1 of 2 linears (int4wo-32: 1; b: user), 2.0 kB -> {after / 1000:.1f} kB"
    assert str(first).splitlines()[-1] == first.summary()
    data = json.loads(first.to_json())
    assert data["version"] == 1
    assert data["totals"] == first.totals
    tuples = ("aliases", "shape", "siblings")
    again = [Layer(**one | {key: tuple(one[key]) for key in tuples}) for one in data["layers"]]
    assert again == [a, b]
    assert data["layers"][0]["sqnr_db"] == asdict(a)["sqnr_db"]
    with torch.inference_mode():
        function(x)
    second = aoquant_inductor.report(function)
    assert_counts(second, 1, 2, user=1)
    assert (second.totals["graphs"], second.totals["recompiles"]) == (2, 1)
    assert second.layers == first.layers


def layer(name: str, scheme: str | None, reason: str | None = None, size: int = 2_000_000) -> Layer:
    status = "quantized" if reason is None else "skipped"
    after = size // 2 if reason is None else size
    return Layer(name, (), (1000, 1000), scheme, "default", status, reason, None, size, after, math.inf)


def test_summary_and_table_text() -> None:
    report = Report((layer("a", "int8wo"), layer("b", "int8wo"), layer("c", "int4wo-32"), layer("lm_head", None, "user")))
    assert report.summary() == "quantized 3 of 4 linears (int8wo: 2; int4wo-32: 1; lm_head: user), 8.0 MB -> 5.0 MB"
    many = Report((layer("a", "int8wo", size=3), *(layer(f"x{i}", None, "no_match") for i in range(4))))
    assert many.summary() == "quantized 1 of 5 linears (int8wo: 1; no_match: 4), 8.0 MB -> 8.0 MB"
    rows = str(report).splitlines()
    assert rows[0].split() == ["name", "shape", "scheme", "matched", "by", "status", "bytes", "dB", "kernel"]
    assert " ".join(rows[4].split()) == "lm_head 1000x1000 - default skipped: user 2.0 MB -> 2.0 MB inf -"
    assert json.loads(report.to_json())["layers"][0]["sqnr_db"] is None, "infinity is no JSON"


def test_plan_on_the_meta_device_says_what_the_compile_does() -> None:
    options = {"schemes": {"a": "int4wo-32", "b": None}}
    with torch.device("meta"):
        planned = aoquant_inductor.plan(Two(), options)
    _, _, done = run(Two().eval(), tokens(), schemes=options["schemes"])
    keys = ("name", "aliases", "shape", "scheme", "matched_by", "status", "reason", "bytes_before")
    assert [[getattr(x, k) for k in keys] for x in planned.layers] == [[getattr(x, k) for k in keys] for x in done.layers]
    # plain layout: half a byte per value and a bf16 scale per group
    assert planned.layers[0].bytes_after == 16 * 32 // 2 + 16 * 2
    with pytest.raises(NothingQuantized, match=r"nothing was quantized: 2 linears seen, 0 matched\."):
        aoquant_inductor.plan(Two(), {"schemes": {"a": None}})


def test_nothing_quantized_through_torch_compile() -> None:
    with pytest.raises(Exception, match="nothing was quantized: 2 linears seen, 0 matched") as caught:
        run(Two().eval(), tokens(), schemes={"a": None})
    errors = [caught.value, caught.value.__cause__, getattr(caught.value, "inner_exception", None)]
    assert any(isinstance(error, NothingQuantized) for error in errors)


def test_on_unsupported_error_names_the_layer() -> None:
    model = Two().eval()
    with torch.no_grad():
        model.a.weight[0, 0] = math.inf
    text = r'^a holds a non-finite value \(first at \[0, 0\]\); it stays in bf16\. Set on_unsupported="report" to go on\.$'
    with pytest.raises(UnsupportedLayers, match=text):
        run(model, tokens(), on_unsupported="error")


def test_report_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"report\(\) wants what torch.compile returned, not object"):
        aoquant_inductor.report(object())


def test_report_of_module_compile_and_of_a_bound_forward() -> None:
    one, two, x = block(), block(), tokens()
    one.compile(backend="aoquant")
    two.forward = torch.compile(two.forward, backend="aoquant")
    with torch.no_grad():
        one(x), two(x)
    for report in (aoquant_inductor.report(one), aoquant_inductor.report(two.forward)):
        assert_counts(report, 1)
        assert report.layers[0].name == "a"


def test_unmatched_keys_and_versions_are_in_the_report() -> None:
    with pytest.warns(UserWarning, match='"c" names none of the 2 linears'):
        _, _, report = run(Two().eval(), tokens(), schemes={"a": "int8wo", "c": "int8wo"}, on_unmatched="warn")
    assert_counts(report, 1, 2, no_match=1)
    assert report.totals["unmatched"] == ["c"]
    assert report.totals["torch"] == torch.__version__


def test_the_report_lies_in_the_debug_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aoquant_inductor import _inductor

    monkeypatch.setattr(_inductor, "debug_folder", lambda: tmp_path)
    _, _, report = run(Two().eval(), tokens())
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text())
    assert (data["totals"]["quantized"], file.name) == (2, "graph1.json")
    assert [one["name"] for one in data["layers"]] == [layer.name for layer in report.layers]
    run(Two().eval(), tokens(), schemes="int8dq")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["graph1.json", "graph2.json"], "of another compiled object"


def test_the_debug_folder_is_torchs() -> None:
    """TORCH_COMPILE_DEBUG is read when torch is imported: another process."""
    code = "from aoquant_inductor import _inductor; print(_inductor.debug_folder())"
    for value, want in (("0", "None"), ("1", "aoquant")):
        env = {**os.environ, "TORCH_COMPILE_DEBUG": value, "TORCH_COMPILE_DEBUG_DIR": ""}
        with tempfile.TemporaryDirectory() as folder:
            env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
            done = subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, capture_output=True, text=True, check=True)
        assert done.stdout.strip().endswith(want)


@pytest.mark.parametrize("instances", [1, 2])
def test_a_second_equal_compile_has_the_graphs_of_the_first(instances: int, graphs: list[Graph]) -> None:
    """As a cell of a notebook that runs again: Dynamo compiles nothing for it, and the first may be gone."""
    x = tokens()
    for _ in range(instances):  # a second instance looks its packs up
        model = Two().eval()
        first, _, report = run(model, x)
    assert_counts(report, 2)
    count = len(graphs)
    for _ in range(2):
        with torch.no_grad():
            first = compiled(model)
            first(x)
        assert_counts(aoquant_inductor.report(first), 2)
        assert len(graphs) == count
    model.a.weight.data.fill_(0.25)
    assert aoquant_inductor.refresh(first) == 2
    other = compiled(model, "int8dq")
    for function in (other, compiled(Two().eval())):  # other options, another model: nothing ran by them
        assert_counts(aoquant_inductor.report(function), 0, 2, not_called=2)


@pytest.mark.parametrize("name", ["plan", "restore", "load"])
def test_what_wants_a_module_says_so(name: str) -> None:
    more = {"device": "cpu"} if name == "load" else {}
    for wrong in (None, 3, torch.relu):
        with pytest.raises(TypeError, match=rf"{name}\(\) wants a module, not {type(wrong).__name__}"):
            getattr(aoquant_inductor, name)(wrong, **more)


def test_linears_that_the_module_has_no_more_are_gone() -> None:
    """An adapter wrapped around one, as LoRA's; one taken out."""

    class Wrapper(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.down, self.up = base, nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)).eval(), torch.randn(4, 32)
    function = compiled(model)
    with torch.no_grad():
        function(x)
        assert_counts(aoquant_inductor.report(function), 3)
        model[0], model[2] = Wrapper(model[0]), nn.Identity()
        assert aoquant_inductor.report(function).totals["reasons"] == {"not_called": 3}
        function(x)
    report = aoquant_inductor.report(function)
    assert_counts(report, 4)
    assert {layer.name for layer in report.layers} == {"0.base_layer", "0.down", "0.up", "1"}
