"""One linear y[M, N] = x[M, K] @ w[N, K].T per scheme and M against compiled bf16 in the same run.

cpu: CPU time of one thread, weights and x in whatever cache they fit (they are used again at once); bf16 is torch.compile's
     default mode, so is ours.
cuda: device time inside a CUDA graph over copies of the layer that hold more than the L2 cache. bf16 is compiled in default
     mode and with max-autotune-no-cudagraphs, and the faster one is what the ratios are against; ours in default mode, without
     a search, or with --search too.
Every M is a static compile of its own, and every problem a process of its own, `--jobs` of which compile at once; measured
is one at a time. torchao (--peers) is compiled with max-autotune-no-cudagraphs, where it has the scheme.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from aoquant_inductor.scheme import resolve
from benchmarks import build, cli, measure, peer_torchao, shapes, turns
from benchmarks.measure import Row
from benchmarks.shapes import Shape

BENCH = "linear"
Compiled = Callable[..., Any]
DEFAULT, SEARCH = "default", "max-autotune-no-cudagraphs"
COLD_BYTES, MOST_COPIES = 240e6, 160  # weights in one CUDA graph; the L2 of an H200 holds 60e6
READ = {"H200": 4.37e12, "H100": 3.35e12}  # bytes/s: measured; by the data sheet
BF16, INT8 = 779e12, 1558e12  # of both: FLOP/s measured, OP/s twice that
CPU_BLOCK_US = 3000.0  # calls per clock reading: enough to fill this


@dataclass
class Problem:
    """One shape at one M on one device."""

    shape: Shape
    m: int
    device: str
    reps: int

    @property
    def name(self) -> str:
        return "x".join(map(str, self.shape))

    def roofline(self, scheme: str) -> float:
        """Microseconds on this card, or an H200: every byte once, or the multiplications, whichever is more."""
        n, k = self.shape
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        read = next((rate for card, rate in READ.items() if card in name), READ["H200"])
        bits = 16.0
        compute = BF16
        if scheme != "bf16":
            s = resolve(scheme)
            bits = s.weight.bits + (16 / s.weight.group_size if s.weight.group_size else 0)
            compute = INT8 if s.activation else BF16
        size = n * k * bits / 8 + 2 * self.m * (n + k)
        return max(size / read, 2 * self.m * n * k / compute) * 1e6

    def copies(self, bits: float) -> int:
        if self.device == "cpu":
            return 1
        n, k = self.shape
        return max(2, min(MOST_COPIES, -(-int(COLD_BYTES) // int(n * k * bits / 8))))


@dataclass
class Series:
    """One compiled form of the linear: its copies, and which kernels serve them."""

    scheme: str
    mode: str
    calls: list[measure.Call]
    kernels: str


def prepare(problem: Problem, schemes: Sequence[str], search: bool, peers: bool) -> tuple[list[Series], list[str]]:
    """Everything to be measured, compiled and called once, bf16 first, and what was refused."""
    x = torch.randn(problem.m, problem.shape[1], device=problem.device, dtype=torch.bfloat16)
    found: list[Series] = []
    refused: list[str] = []

    def add(scheme: str, mode: str, compiled: Sequence[Compiled], kernels: str) -> None:
        found.append(Series(scheme, mode, [partial(c, x) for c in compiled], kernels))
        for call in found[-1].calls:  # packed, and its original let go, before the next scheme's copies come
            call()

    with torch.no_grad(), build.no_caches():
        for mode in (DEFAULT, SEARCH) if problem.device == "cuda" else (DEFAULT,):
            add("bf16", mode, _compile(problem, 16, partial(build.compile_bf16, mode=mode)), "")
        reference = [call() for call in found[0].calls[:2]]
        for scheme in schemes:
            for mode in (DEFAULT, SEARCH) if search else (DEFAULT,):
                quantized = partial(build.compile_quantized, scheme=scheme, mode=mode, release=True)
                compiled = _compile(problem, resolve(scheme).weight.bits, quantized)
                try:
                    names = {build.kernels(c, 1, c(x), y) for c, y in zip(compiled, reference, strict=False)}
                except build.Refused as why:
                    refused.append(f"{problem.name} M={problem.m} {scheme} {mode}: {why}")
                else:
                    add(scheme, mode, compiled, ", ".join(sorted(names)))
            mode = SEARCH if problem.device == "cuda" else DEFAULT
            if peers and (peer := _peer(problem, scheme, mode)) is not None:
                add(f"torchao {scheme}", mode, peer, "torchao")
    return found, refused


def measure_problem(
    problem: Problem, schemes: Sequence[str], search: bool = False, peers: bool = False, ready: Callable[[], object] = list
) -> tuple[list[Row], list[str]]:
    """The rows of one shape and M, bf16 first, and what was refused; `ready` is called before anything is timed."""
    found, refused = prepare(problem, schemes, search, peers)
    before = build.graphs()
    ready()
    with torch.no_grad():
        times = _time(problem, {f"{i}": series.calls for i, series in enumerate(found)})
    if build.graphs() != before:
        return [], [*refused, f"{problem.name} M={problem.m}: {build.graphs() - before} recompilations while timing"]
    base = min((times[f"{i}"] for i, series in enumerate(found) if series.scheme == "bf16"), key=statistics.median)
    what = "gpu_time" if problem.device == "cuda" else "cpu_time"
    return [
        measure.row(
            BENCH, problem.name, problem.m, series.scheme, series.mode, what, times[f"{i}"], base, series.kernels,
            problem.roofline(series.scheme.removeprefix("torchao ")) if problem.device == "cuda" else None,
        )
        for i, series in enumerate(found)
    ], refused


def _models(problem: Problem, bits: float) -> Iterator[nn.Module]:
    """Copies of a layer, all of one class: any number of them is two graphs. Copy i has the same values in every call."""
    first = build.fresh(partial(build.Linear, *problem.shape), problem.device)
    for i in range(problem.copies(bits)):
        model = copy.deepcopy(first)
        if i:
            build.fill(model, i)
        yield model


def _compile(problem: Problem, bits: float, compiler: Callable[[nn.Module], Compiled]) -> list[Compiled]:
    return [compiler(model) for model in _models(problem, bits)]


def _peer(problem: Problem, scheme: str, mode: str) -> list[Compiled] | None:
    models = list(_models(problem, resolve(scheme).weight.bits))
    if not all(peer_torchao.quantize(model, scheme, problem.device) for model in models):
        return None
    return [build.compile_bf16(model, mode) for model in models]


def _time(problem: Problem, calls: dict[str, list[measure.Call]]) -> measure.Times:
    if problem.device == "cuda":
        return measure.gpu_time(calls, 3, problem.reps)
    alone = {name: series[0] for name, series in calls.items()}
    clock = measure.cpu_time if torch.get_num_threads() == 1 else measure.wall_time
    once = min(clock(alone, 1, 2)["0"])
    return clock(alone, max(1, int(CPU_BLOCK_US / once)), problem.reps)


def report(rows: Sequence[Row]) -> str:
    """Per shape: bf16 in microseconds, the others as speed relative to it; then the losing rows, plainly."""
    parts = []
    for name in dict.fromkeys(r.shape for r in rows):
        here = {(r.scheme, r.mode, r.m): r for r in rows if r.shape == name}
        ms = sorted({m for *_, m in here})
        lines = []
        for scheme, mode in dict.fromkeys((s, mode) for s, mode, _ in here):
            cells = [here.get((scheme, mode, m)) for m in ms]
            unit, form = (" us", "{0.value:.1f}") if scheme == "bf16" else ("", "{0.ratio:.2f}")
            label = f"{scheme}{unit}{'' if mode == DEFAULT else ' max-autotune'}"
            lines.append([label, *("-" if c is None else form.format(c) for c in cells)])
            floors = ["-" if c is None or c.roofline is None else f"{c.roofline / c.value:.0%}" for c in cells]
            if set(floors) != {"-"}:
                lines.append(["  of roofline", *floors])
        parts.append(cli.table([f"{name}, M =", *map(str, ms)], lines))
    losing = [r for r in rows if r.ratio is not None and r.ratio < 1 and r.kernel not in ("", "torchao")]
    parts.append(f"losing rows (below 1.00x bf16): {len(losing)}")
    parts += [f"  {r.shape} M={r.m} {r.scheme}: {r.ratio:.3f}x, {r.value:.1f} us, {r.kernel}" for r in losing]
    return "\n".join(parts)


def child(problem: Problem, args: argparse.Namespace) -> list[str]:
    """The command that measures one problem and prints its rows."""
    flags = [flag for flag in ("search", "peers") if getattr(args, flag)]
    return [
        sys.executable, "-m", "benchmarks.bench_linear", "--child", "--device", args.device, "--reps", str(args.reps),
        "--shapes", problem.name, "--m", str(problem.m), "--schemes", args.schemes, *(f"--{flag}" for flag in flags),
    ]


def results(problems: Sequence[Problem], args: argparse.Namespace) -> Iterator[tuple[list[Row], list[str]]]:
    """(rows, refusals) of every problem, in this process or each in one of its own."""
    if args.jobs == 1 or args.child:
        for problem in problems:
            ready = turns.wait if args.child else list
            yield measure_problem(problem, args.schemes.split(","), args.search, args.peers, ready)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
        return
    for problem, found in zip(problems, turns.run([child(p, args) for p in problems], args.jobs, args.limit), strict=True):
        if isinstance(found, turns.Failed):
            yield [], [f"{problem.name} M={problem.m}: {found}"]
        else:
            rows, refused = json.loads(found)
            yield [Row(**row) for row in rows], refused


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=30, schemes=shapes.SCHEMES)
    p.add_argument("--shapes", help="comma-separated NxK or names (default: per device)")
    p.add_argument("--m", help="comma-separated (default: per device)")
    p.add_argument("--search", action="store_true", help="ours with max-autotune too")
    p.add_argument("--peers", action="store_true", help="torchao too, where it is installed and has the scheme")
    turns.arguments(p)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = cli.parse(p, argv)
    wanted = shapes.parse(args.shapes or ",".join(shapes.DEFAULT_SHAPES[args.device]))
    ms = [int(m) for m in args.m.split(",")] if args.m else shapes.DEFAULT_M[args.device]
    rows: list[Row] = []
    written: list[dict[str, Any]] = []
    refused: list[str] = []
    problems = [Problem(shape, m, args.device, args.reps) for shape in wanted for m in ms]
    for problem, (more, no) in zip(problems, results(problems, args), strict=True):
        if args.child:
            print(json.dumps([[asdict(row) for row in more], no]))
            return 0
        written += measure.write(more, args.device, args.results)  # at once: a run may be cut short
        rows, refused = rows + more, refused + no
        print(f"{problem.name} M={problem.m}: {len(more)} rows", file=sys.stderr, flush=True)
    return cli.finish(written, report(rows), refused, args)


if __name__ == "__main__":
    sys.exit(main())
