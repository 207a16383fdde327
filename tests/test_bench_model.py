"""bench_model and the processes that it measures in: tiny models; no number is judged."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from benchmarks import bench_model, build, models, turns
from benchmarks.error import sqnr_db

pytestmark = pytest.mark.usefixtures("one_thread")


def test_models_share_no_code_object() -> None:
    one, other = (build.fresh(lambda: build.Linear(64, 64), "cpu") for _ in range(2))
    assert type(one).forward.__code__ is not type(other).forward.__code__
    assert torch.equal(one.linear.weight, other.linear.weight)
    before = build.graphs()
    compiled = [torch.compile(m, backend="eager", dynamic=False) for m in (one, other)]
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    for _ in range(3):
        for c in compiled:
            c(x)
    assert build.graphs() == before + 2


@pytest.fixture
def childless(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench_model's children one after the other in this process: ten seconds of a core each to begin, and another test has them."""

    def run(commands: Sequence[Sequence[str]], *_: object) -> Iterator[str]:
        for command in commands:
            assert command[:3] == [sys.executable, "-m", "benchmarks.bench_model"]
            torch.compiler.reset()
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert bench_model.main(command[3:]) == 0
            yield printed.getvalue().splitlines()[-1]

    monkeypatch.setattr(turns, "run", run)
    monkeypatch.setattr(turns, "wait", lambda: None)


def test_models_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--cases", "toy", "--schemes", "int8dq", "--device", "cpu", "--seconds", "0.05", "--json"]
    assert bench_model.main([*argv, "--results", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["case"], row["scheme"], row["quantized"]) for row in rows] == [("toy", "bf16", ""), ("toy", "int8dq", "2/2")]
    assert float(rows[1]["error_db"]) > 20


def test_a_result_that_is_not_finite_has_no_row(tmp_path: Path) -> None:
    of = ("cpu", "default", tmp_path / "toy.pt", 0.01, lambda: None)
    assert bench_model.run("toy", "bf16", *of)["error_db"] == ""
    torch.save(torch.load(tmp_path / "toy.pt") * math.nan, tmp_path / "toy.pt")
    with pytest.raises(RuntimeError, match="not finite"):
        bench_model.run("toy", "int8wo", *of)


@pytest.mark.usefixtures("childless")
def test_models_whole_and_by_their_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--cases", "toy,tiny-dit", "--schemes", "int8dq", "--device", "cpu", "--seconds", "0.05", "--json"]
    assert bench_model.main([*argv, "--results", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["case"], row["scheme"], row["quantized"]) for row in rows] == [
        ("toy", "bf16", ""), ("toy", "int8dq", "2/2"), ("tiny-dit", "bf16", ""), ("tiny-dit", "int8dq", "15/15"),
    ]
    assert all(float(row["error_db"]) > 20 for row in rows if row["quantized"]), rows
    (file,) = tmp_path.glob("*.model.csv")
    assert len(file.read_text().splitlines()) == 5


def test_a_row_is_the_fastest_of_its_processes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(commands: Sequence[Sequence[str]], *_: object) -> Iterator[str | turns.Failed]:
        assert [command[4:6] for command in commands] == [["toy", "bf16"], ["toy", "int8wo"], ["toy", "int8dq"]] * 3
        row = dict.fromkeys(bench_model.COLUMNS, "") | {"case": "toy", "rate": 1.0, "unit": "call/s"}
        for bf16, int8wo in ((2, 5), (9, 4), (1, 3)):
            yield from (json.dumps(row | {"scheme": scheme, "ms": ms}) for scheme, ms in (("bf16", bf16), ("int8wo", int8wo)))
            yield turns.Failed("out of memory") if bf16 == 9 else "{}"

    monkeypatch.setattr(turns, "run", run)
    argv = ["--cases", "toy", "--schemes", "int8wo,int8dq", "--device", "cpu", "--processes", "3", "--json"]
    assert bench_model.main([*argv, "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert [(row["scheme"], row["ms"]) for row in json.loads(printed.out)["rows"]] == [("bf16", 1), ("int8wo", 3)]
    assert "toy int8dq: out of memory" in printed.out + printed.err


@pytest.mark.usefixtures("childless")
def test_a_ladder_is_eager_compiled_and_every_rung(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--cases", "toy-ladder", "--device", "cpu", "--seconds", "0.05", "--results", str(tmp_path), "--json"]
    assert bench_model.main(argv) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    rungs = list(models.RUNGS)
    assert [(row["scheme"], row["quantized"]) for row in rows] == [("bf16", ""), ("eager bf16", ""), *((rung, "2/2") for rung in rungs)]
    assert len({tuple(sorted(options.items())) for options in models.RUNGS.values()}) == len(rungs) == 3
    assert float(rows[1]["error_db"]) > 40


def test_children_wait_for_their_turn_and_say_why_they_failed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = f"""
import sys, time
from benchmarks import turns
log = open({str(log)!r}, "a", buffering=1)
log.write("prepared\\n")
for _ in range(int(sys.argv[2])):
    turns.wait()
    for _ in range(20):
        log.write(sys.argv[1] + "\\n"); time.sleep(0.005)
print("noise"); print("result " + sys.argv[1])
"""
    measured = [[sys.executable, "-c", body, *name] for name in ("a1", "b3", "c2")]
    wrong = [[sys.executable, "-c", "raise ValueError('no such thing')"], [sys.executable, "-c", "import time; time.sleep(60)"]]
    stuck = [sys.executable, "-c", "import time\nfrom benchmarks import turns\nturns.wait()\ntime.sleep(60)"]
    *found, failed, late, hanging = turns.run([*measured, *wrong, stuck], 3, 5)
    assert found == ["result a", "result b", "result c"]
    assert str(failed) == "ValueError: no such thing"
    assert str(late) == str(hanging) == "took more than 5 s"
    visits = [name for visit in ("abc", "bc", "b") for name in visit for _ in range(20)]
    assert log.read_text().split() == ["prepared"] * 3 + visits


def test_an_error_that_is_not_finite_is_nan_and_not_none() -> None:
    want = torch.tensor([3.0, 4.0])
    assert sqnr_db(want, want + torch.tensor([0.3, -0.4])) == pytest.approx(20)
    assert sqnr_db(want, want) == math.inf
    assert all(math.isnan(sqnr_db(want, torch.tensor([bad, 4.0]))) for bad in (math.nan, math.inf))
