"""The benchmarks run, refuse what is no measurement, and write rows that can travel. Tiny shapes; no number is judged."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from benchmarks import bench_host, bench_linear, build, machine, measure, shapes

COLUMNS = [
    *("bench", "shape", "m", "scheme", "mode", "what", "value", "unit", "ratio", "min", "p20", "p80", "reps"),
    *("kernel", "roofline"),
    *("card", "threads", "torch", "triton", "python", "commit", "date"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(folder: Path, bench: str) -> list[dict[str, str]]:
    path = folder / f"{machine.card('cpu')[0]}.{bench}.csv"
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == COLUMNS
    return rows


def check(row: dict[str, str]) -> None:
    assert all(row[c] for c in COLUMNS if c not in {"ratio", "kernel", "roofline", "mode", "triton"}), row
    assert 0 < float(row["min"]) <= float(row["p20"]) <= float(row["value"]) <= float(row["p80"])
    assert row["unit"] == "us"


def test_bench_linear_writes_a_row_per_scheme_and_m(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--shapes", "64x128", "--m", "1,3", "--schemes", "int8wo", "--reps", "2"]
    assert bench_linear.main([*argv, "--results", str(tmp_path)]) == 0
    rows = [r for r in rows_of(tmp_path, "linear") if r["kernel"] != "torchao"]
    assert [(r["scheme"], r["m"]) for r in rows] == [("bf16", "1"), ("int8wo", "1"), ("bf16", "3"), ("int8wo", "3")]
    for row in rows:
        check(row)
        bf16 = next(r for r in rows if r["m"] == row["m"])
        assert float(row["ratio"]) == pytest.approx(float(bf16["value"]) / float(row["value"]), abs=1e-3, rel=1e-2)
    assert all(r["kernel"] for r in rows if r["scheme"] == "int8wo")
    out = capsys.readouterr().out
    losing = [r for r in rows if float(r["ratio"]) < 1]
    assert f"losing rows (below 1.00x bf16): {len(losing)}" in out


def test_copies_have_inputs_of_their_own_in_one_memory() -> None:
    """Or a graph would do once what each layer of a model does, and x of many copies would not be in the cache."""
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(len({node.args[0] for node in graph.graph.nodes if node.target is torch.nn.functional.linear}))
        return graph

    xs = bench_linear.inputs(4, torch.randn(2, 16))
    torch.compile(bench_linear.Copies(4, 8, 16), backend=backend, fullgraph=True)(xs)
    assert seen == [4]
    assert len({x.data_ptr() for x in xs}) == 1


def test_copies_of_a_layer_are_one_graph_and_each_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CUDA clock needs; build.kernels() inside compares two copies, of different weights, with bf16's."""
    monkeypatch.setattr(bench_linear.Problem, "copies", lambda self, bits: 4)
    before = build.graphs()
    rows, refused = bench_linear.measure_problem(bench_linear.Problem((64, 128), 2, "cpu", 2), ["int8dq"])
    assert refused == []
    assert [r.scheme for r in rows if r.kernel != "torchao"] == ["bf16", "int8dq"]
    assert build.graphs() == before + 2


def test_bench_host_writes_rows_and_appends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--models", "toy-512-1024-1024", "--reps", "2", "--json", "--results", str(tmp_path)]
    assert bench_host.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["refused"] == []
    rows = rows_of(tmp_path, "host")
    assert [(r["scheme"], r["what"]) for r in rows] == [
        ("bf16", "cpu_time_with_kernels"), ("int8wo", "cpu_time_with_kernels"), ("any", "stale_check"),
    ]
    for row in rows:
        check(row)
    measure.write([measure.row("host", "x", 1, "bf16", "", "y", [1.0])], "cpu", tmp_path)
    assert len(rows_of(tmp_path, "host")) == 4


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / f"{machine.card('cpu')[0]}.host.csv"
    path.write_text("bench,value\n")
    with pytest.raises(ValueError, match="move it away"):
        measure.write([measure.row("host", "x", 1, "bf16", "", "y", [1.0])], "cpu", tmp_path)
    assert path.read_text() == "bench,value\n"


def test_what_is_not_quantized_or_wrong_is_refused() -> None:
    model = build.fresh(lambda: build.Linear(64, 64), "cpu")
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad(), build.no_caches():
        compiled = build.compile_quantized(model, "int8wo")
        y = compiled(x)
        assert build.kernels(compiled, 1, y, model(x))
        with pytest.raises(build.Refused, match="1 of 2 linears"):
            build.kernels(compiled, 2, y, model(x))
        with pytest.raises(build.Refused, match="the output is wrong"):
            build.kernels(compiled, 1, y, -model(x))


def test_the_clock_interleaves_and_counts_only_its_thread() -> None:
    torch.set_num_threads(1)
    seen: list[str] = []
    times = measure.cpu_time({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, inner=2, reps=2)
    assert "".join(seen) == "aaabbb" + "aaabbb" + "bbbaaa"
    assert [len(series) for series in times.values()] == [2, 2]
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="one thread"):
        measure.cpu_time({"a": lambda: None}, 1, 1)


def test_shapes_are_parsed_by_size_and_by_name() -> None:
    assert shapes.parse("896x4864,llama8b-o") == [(896, 4864), (4096, 4096)]
    with pytest.raises(ValueError, match="'4096' is no shape"):
        shapes.parse("4096")


def test_slugs() -> None:
    assert machine.slug("NVIDIA H200") == "h200"
    assert machine.slug("AMD EPYC 7713 64-Core Processor") == "epyc-7713"
    assert machine.slug("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz") == "xeon-platinum-8480c"


def test_roofline_is_bytes_for_one_row_and_flops_for_many() -> None:
    few, many = (bench_linear.Problem((28672, 4096), m, "cuda", 1) for m in (1, 8192))
    assert few.roofline("bf16") == pytest.approx(2 * 28672 * 4096 / 4.37e12 * 1e6, rel=0.01)
    assert few.roofline("int4wo-row") == pytest.approx(few.roofline("bf16") / 4, rel=0.01)
    assert many.roofline("int8dq") == pytest.approx(many.roofline("int8wo") / 2)


def test_bench_accuracy_scores_prefills_longer_than_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from types import SimpleNamespace

    from benchmarks import bench_accuracy

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99, "initializer_range": 0.3}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().eval()
    tokenizer = lambda text: SimpleNamespace(input_ids=[ord(c) % 99 for c in text])  # noqa: E731
    monkeypatch.setattr(bench_accuracy, "fetch", lambda: None)
    monkeypatch.setattr(bench_accuracy, "load", lambda path: (model, tokenizer))
    monkeypatch.setattr(bench_accuracy, "LENGTH", 300)
    argv = ["--device", "cpu", "--tokens", "300", "--schemes", "int4wo-32,int4wo-32-large8", "--results", str(tmp_path)]
    assert bench_accuracy.main(argv) == 0
    with (tmp_path / f"{machine.card('cpu')[0]}.accuracy.csv").open(newline="") as file:
        base, plain, large = csv.DictReader(file)
    assert [row["scheme"] for row in (base, plain, large)] == ["bf16", "int4wo-32", "int4wo-32-large8"]
    assert (base["kl"], base["ppl_ratio"], plain["layers"], large["layers"]) == ("0", "1.0", "14", "14")
    assert "to int8" in large["kernel"] and "to int8" not in plain["kernel"]
    assert 0 < float(plain["kl"]) != float(large["kl"]) > 0


def test_bench_memory_packs_every_linear_from_everywhere(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from benchmarks import bench_memory

    argv = ["--device", "cpu", "--model", "tiny", "--ways", "pack,cpu,file", "--schemes", "int8wo", "--results", str(tmp_path)]
    assert bench_memory.main(argv) == 0
    rows = rows_of(tmp_path, "memory")
    assert [(r["mode"], r["what"]) for r in rows] == [(way, "seconds") for way in ("pack", "cpu", "file")]
    linear = torch.nn.Linear(8, 8)
    alias = linear.weight.detach()
    with pytest.raises(build.Refused, match="stays in memory"):
        bench_memory.pack(torch.nn.Sequential(linear), "int8wo", "cpu")
    assert torch.equal(alias, linear.weight)


def test_problems_in_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    argv = ["--device", "cpu", "--shapes", "64x128", "--m", "1,3", "--schemes", "int8wo", "--reps", "2", "--jobs", "2"]
    assert bench_linear.main([*argv, "--results", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "linear")
    assert [(r["scheme"], r["m"]) for r in rows] == [("bf16", "1"), ("int8wo", "1"), ("bf16", "3"), ("int8wo", "3")]
