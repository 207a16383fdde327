"""Plots and tables from result files: the committed ones are up to date, and what they show is what the rows say."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from benchmarks import plots, rows, tables
from benchmarks.measure import RESULTS
from benchmarks.plots import PLOTS, Bar, Line

ENVIRONMENT = {"card": "a card", "threads": 1, "torch": "2.13.0", "commit": "abc"}
# shape, M, scheme, mode, value, ratio, roofline: bf16 in two modes, the searched one faster; int8wo measured twice, and searched
LINEAR = [
    ("8x16", 1, "bf16", "default", 12.0, 0.833, 8.0),
    ("8x16", 1, "bf16", "searched", 10.0, 1.0, 8.0),
    ("8x16", 1, "int8wo", "default", 9.0, 1.1, 4.0),
    ("8x16", 1, "int8wo", "default", 5.0, 2.0, 4.0),
    ("8x16", 1, "int8wo", "searched", 4.0, 2.5, 4.0),
    ("8x16", 1, "torchao int8wo", "searched", 20.0, 0.5, 4.0),
    ("8x16", 64, "bf16", "default", 20.0, 1.0, 16.0),
    ("8x16", 64, "int8wo", "default", 25.0, 0.8, 16.0),
]
MODEL = [
    ("toy", "bf16", "graphs", 3.0), ("toy", "int8wo", "graphs", 2.0), ("toy", "torchao int8wo", "graphs", 4.0),
    ("toy", "int8dq", "other mode", 0.1), ("lost", "int8wo", "graphs", 1.0),
    ("sam-ladder", "bf16", "default", 4.0), ("sam-ladder", "eager bf16", "default", 8.0), ("sam-ladder", "+ more", "default", 2.0),
]


def write(folder: Path, bench: str, found: Sequence[Mapping[str, Any]]) -> None:
    with (folder / f"card.{bench}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *ENVIRONMENT], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **ENVIRONMENT} for row in found)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of result files: linear and model of one card."""
    write(tmp_path, "linear", [
        dict(zip(("shape", "m", "scheme", "mode", "value", "ratio", "roofline"), row, strict=True)) for row in LINEAR
    ])
    write(tmp_path, "model", [
        {"case": case, "scheme": scheme, "mode": mode, "ms": ms, "rate": 1e3 / ms, "unit": "call/s", "host_ms": "", "resident_mb": 3000 / ms,
         "error_db": "" if scheme == "bf16" else "40.00", "quantized": ""}
        for case, scheme, mode, ms in MODEL
    ])
    return tmp_path


def test_committed_plots_show_the_committed_rows() -> None:
    """Written by `python -m benchmarks.plots`."""
    wanted = plots.plots(RESULTS)
    assert len(wanted) >= 2
    assert plots.stale(wanted, PLOTS) == []


def test_committed_plots_are_what_this_matplotlib_draws() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="drawing needs the extra [bench]")
    from benchmarks import draw

    texts = {plot.name: (plot, (PLOTS / f"{plot.name}.svg").read_text()) for plot in plots.plots(RESULTS)}
    same = {name: (plot, text) for name, (plot, text) in texts.items() if plots.version(text) == matplotlib.__version__}
    if not same:
        pytest.skip(f"drawn by another matplotlib than {matplotlib.__version__}")
    for name, (plot, text) in same.items():
        assert draw.svg(plot) == text, name


def test_lines_are_the_newest_rows_in_default_mode_and_their_bounds(results: Path) -> None:
    (plot,) = plots.linear(results)
    (panel,) = plot.panels
    assert panel.title == "8x16"
    assert panel.lines == (
        Line("int8wo", ((1, 2.0), (64, 0.8))),
        Line("int8wo", ((1, 2.5), (64, 1.25)), bound=True),  # 10 us over 4, 20 us over 16
        Line("torchao int8wo", ((1, 0.5),)),
    )
    assert (plot.name, plot.source) == ("card.linear", "a card, 1 CPU thread(s), torch 2.13.0, commit abc")


def test_of_two_modes_bf16_counts_where_it_is_faster(results: Path) -> None:
    found = {(row["m"], row["scheme"]): row["value"] for row in rows.linears(results / "card.linear.csv")}
    assert found["1", "bf16"] == "10.0"
    assert found["1", "int8wo"] == "5.0"


def test_bars_of_models_need_a_baseline(results: Path) -> None:
    (plot,) = plots.models(results)
    (panel,) = plot.panels  # "lost" has no bf16
    assert panel.title == "toy"
    assert panel.bars[1] == Bar("int8wo", "int8wo", 1.5, "1.50x, 500 call/s")
    assert [bar.value for bar in panel.bars] == [1.0, 1.5, 0.75]


def test_a_row_is_set_against_bf16_of_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [("torchao int8wo", 5), ("bf16", 4), ("int8wo", 2), ("torchao int8dq", 8), ("bf16", 6), ("int8wo", 2)]
    same = {"unit": "call/s", "mode": "default", "host_ms": "", "resident_mb": "", "error_db": "", "quantized": ""}
    found = [{"case": "toy", "scheme": scheme, "ms": float(ms), "rate": 1e3 / ms, **same} for scheme, ms in runs]
    write(tmp_path, "model", found)
    speed = {row["scheme"]: speed for row, speed in rows.speeds(rows.of_models(tmp_path / "card.model.csv"), "toy")}
    assert speed == {"bf16": 1, "int8wo": 3, "torchao int8dq": 0.5, "torchao int8wo": 1.2}
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.model("card").splitlines()
    assert [line.split(" | ")[4] for line in lines if line.startswith("| toy")] == [
        "6.000 ms", "5.000 ms (bf16 not in its run)", "2.000 ms", "8.000 ms (bf16 4.000)"
    ]


def test_the_ladder_falls_from_its_first_rung(results: Path) -> None:
    (plot,) = plots.ladder(results)
    assert [panel.title for panel in plot.panels] == ["sam, default mode"]
    assert [bar.label for bar in plot.panels[0].bars] == ["eager bf16", "compiled bf16", "+ more"]
    assert [bar.text for bar in plot.panels[0].bars] == ["8.00 ms, 1.00x", "4.00 ms, 2.00x", "2.00 ms, 4.00x"]
    assert [bar.scheme for bar in plot.panels[0].bars] == ["bf16", "bf16", "int8dq"]


def test_one_command_draws_says_what_it_cannot_and_keeps_up(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs the extra [bench]")
    folder = results / "plots"
    argv = ["--results", str(results), "--plots", str(folder)]
    assert plots.main([*argv, "--check"]) == 1  # nothing is there yet
    assert not folder.exists()
    assert plots.main(argv) == 0
    assert f"kernels: no rows in {results}" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"card.linear.svg", "card.model.svg", "card.ladder.svg"}
    assert all(b"<dc:date>" not in text and b"8x16" in before["card.linear.svg"] for text in before.values())
    assert plots.main([*argv, "--check"]) == 0
    assert plots.main(argv) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    path = results / "card.model.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line.replace(",2.0,", ",1.0,") for line in lines if not line.startswith(("toy", "lost"))))
    assert plots.stale(plots.plots(results), folder) == ["card.ladder.svg", "card.model.svg"]
    assert plots.main([*argv, "--check"]) == 1
    assert plots.main(argv) == 0
    assert {path.name for path in folder.iterdir()} == {"card.linear.svg", "card.ladder.svg"}
    assert plots.main([*argv, "--check"]) == 0


def test_tables_of_models_and_of_what_loses(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(tables, "FIRST", ("toy",))
    assert "| toy | int8wo | 1.50x | 500.0 call/s | 2.000 ms | - | 1.50 GB | 40.00 dB | - |" in tables.model("card")
    assert "| toy | torchao int8wo | **0.75x** |" in tables.model("card")
    assert "| toy, card | int8wo | 1.50x | 1.50 GB, 1.50x | SQNR 40.00 dB |" in tables.first()
    assert "torchao" not in tables.first() and "int8dq" not in tables.model("card") + tables.first()
    lost = tables.losing("card", "no such card")
    assert "0.80x" in tables.losing("card.linear") and "None." in tables.losing("card.model")  # eager bf16 is not ours
    assert "| 8x16, card.linear | int8wo | M = 64 **0.80x** |" in lost
    assert "torchao" not in lost
    assert lost.count("**") == 2
    assert tables.plots("*.model", "*.ladder").count("![") == 2
    (results / "card.model.csv").unlink()
    assert "card.model" not in tables.plots("*")


def test_a_profile_counts_the_last_run_alone(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", results)
    assert "bench_profile" in tables.profiles()
    run = [("a", "aoquant", 2, 9.0, 0.9, "1"), ("b", "matmul", 1, 1.0, 0.1, "1"), ("c", "inductor", 3, 2.0, 0.25, "2"),
           ("a", "aoquant", 4, 6.0, 0.75, "2")]
    names = ("kernel", "by", "count", "us", "share", "date")
    write(results, "profile", [{"case": "toy", "scheme": "int8wo", **dict(zip(names, row, strict=True))} for row in run])
    assert "| toy, card | int8wo | 8 us | 4, 75.0% | 3, 25.0% |" in tables.profiles()
    assert "matmul" not in tables.profiles()
