"""Clocks and result rows that every benchmark shares.

All clocks visit the functions round-robin, each round starting with another one, so that drift (clock, other processes) hits
all alike. A GPU runs each for LOAD seconds first: at its power limit a card is as fast as what it does lets it be. Times are
microseconds per call.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import card, environment

Call = Callable[[], object]
Times = dict[str, list[float]]

RESULTS = Path(__file__).resolve().parent / "results"
LOAD, VISITS = 0.1, 3


# ---- clocks --------------------------------------------------------------------------------------------------------------


def _rounds(names: Sequence[str], reps: int) -> Iterator[str]:
    for rep in range(reps):
        start = rep % len(names)
        yield from (*names[start:], *names[:start])


def _clock(functions: Mapping[str, Call], inner: int, reps: int, now: Callable[[], int], settle: Call) -> Times:
    times: Times = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    for name in _rounds(list(functions), reps):
        function = functions[name]
        settle()
        function()  # this function's data and code back into the caches
        settle()
        start = now()
        for _ in range(inner):
            function()
        times[name].append((now() - start) / 1e3 / inner)
    settle()
    return times


def cpu_time(functions: Mapping[str, Call], inner: int, reps: int) -> Times:
    """CPU time of the calling thread: what torch spends on other threads is not in it, so one thread is required.

    Raises RuntimeError if torch may use more.
    """
    if torch.get_num_threads() != 1:
        raise RuntimeError(f"cpu_time() sees one thread and torch uses {torch.get_num_threads()}: torch.set_num_threads(1).")
    return _clock(functions, inner, reps, time.thread_time_ns, lambda: None)


def wall_time(functions: Mapping[str, Call], inner: int, reps: int) -> Times:
    """Wall-clock time, for several CPU threads; needs a machine of one's own."""
    return _clock(functions, inner, reps, time.perf_counter_ns, lambda: None)


def host_time(functions: Mapping[str, Call], inner: int, reps: int) -> Times:
    """Wall-clock time until the call returns, on CUDA, the queue empty before each block of `inner` calls.

    The driver blocks past ~1000 queued launches: inner * launches per call must stay below.
    """
    return _clock(functions, inner, reps, time.perf_counter_ns, torch.cuda.synchronize)


def gpu_time(functions: Mapping[str, Sequence[Call]], inner: int, reps: int, load: float = LOAD, visits: int = VISITS) -> Times:
    """Device time per call: one CUDA graph calls every copy of a function once, and is replayed `inner` times.

    Each function is read in `visits` rounds, `reps` times in all or a few more, each round after `load` seconds of it. The
    copies must hold more weights than the L2 cache (60 MB on an H200), or the weights come from there.
    """
    graphs = {name: _captured(copies) for name, copies in functions.items()}
    times: Times = {name: [] for name in functions}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for name in _rounds(list(functions), visits):
        until = time.perf_counter() + load
        while time.perf_counter() < until:
            for _ in range(inner):
                graphs[name].replay()
            torch.cuda.synchronize()
        for _ in range(-(-reps // visits)):
            graphs[name].replay()  # so that launching does not count
            start.record()
            for _ in range(inner):
                graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / inner / len(functions[name]))
    return times


def _captured(copies: Sequence[Call]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for function in (*copies, *copies):
            function()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        for function in copies:
            function()
    return graph


# ---- rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One measured number. `ratio` is bf16 time / this time in the same run: above 1 is faster than bf16.

    `value` is the median of `reps` readings, `min`, `p20` and `p80` their least and their quantiles; shape is NxK or a model's
    name; `roofline` is the least time possible on that card, where it is known.
    """

    bench: str
    shape: str
    m: int
    scheme: str
    mode: str
    what: str
    value: float
    unit: str
    ratio: float | None
    min: float
    p20: float
    p80: float
    reps: int
    kernel: str = ""
    roofline: float | None = None


def row(bench: str, shape: str, m: int, scheme: str, mode: str, what: str, times: Sequence[float],
        bf16: Sequence[float] | None = None, kernel: str = "", roofline: float | None = None) -> Row:
    """The Row of one series of times, in microseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    value = statistics.median(ordered)
    return Row(
        bench, shape, m, scheme, mode, what, round(value, 3), "us",
        None if bf16 is None else round(statistics.median(bf16) / value, 3),
        round(ordered[0], 3), round(ordered[round(0.2 * last)], 3), round(ordered[round(0.8 * last)], 3), len(ordered),
        kernel, None if roofline is None else round(roofline, 3),
    )


def extend(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends to a CSV file, which is made where there is none. Raises ValueError on another header."""
    columns = list(rows[0]) if rows else []
    new = not path.exists()
    if not new and rows and (old := path.read_text().partition("\n")[0].strip().split(",")) != columns:
        raise ValueError(f"{path} has the columns {old}, not {columns}: move it away.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def append(rows: Sequence[Mapping[str, Any]], bench: str, device: str, results: Path) -> list[dict[str, Any]]:
    """Appends to `<results>/<card>.<bench>.csv`; the rows with their environment."""
    around = environment(device)
    full = [dict(row) | around for row in rows]
    results.mkdir(parents=True, exist_ok=True)
    extend(results / f"{card(device)[0]}.{bench}.csv", full)
    return full


def write(rows: Sequence[Row], device: str, results: Path) -> list[dict[str, Any]]:
    """Appends every Row to the file of its bench."""
    return [
        done
        for bench in dict.fromkeys(r.bench for r in rows)
        for done in append([asdict(r) for r in rows if r.bench == bench], bench, device, results)
    ]
