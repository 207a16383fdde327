"""One linear y[M, N] = x[M, K] @ w[N, K].T per scheme and M against compiled bf16 in the same run.

cpu: CPU time of one thread, weights and x in whatever cache they fit (they are used again at once); bf16 is torch.compile's
     default mode, so is ours.
cuda: device time inside a CUDA graph over copies of the layer, all in one compiled graph, that hold more than the L2 cache;
     x is in that cache, as the kernel before leaves it.
     bf16 is compiled in default mode and with max-autotune-no-cudagraphs, and the faster one is what the ratios are against;
     ours in default mode, without a search, or with --search too. Each is timed after a tenth of a second of itself, as in a
     model made of it: one that is at the card's power limit is slower then, one behind it faster.
Every M is a static compile of its own, and every problem a process of its own, `--jobs` of which compile at once; measured
is one at a time. Peers (--peers: torchao, gemlite) are compiled with max-autotune-no-cudagraphs, where they have the scheme.
"""

from __future__ import annotations

import argparse
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
from benchmarks import build, cli, measure, peers, shapes, turns
from benchmarks.measure import Row
from benchmarks.problem import Problem
from benchmarks.rows import split

BENCH = "linear"
Compiled = Callable[..., Any]
DEFAULT, SEARCH = "default", "max-autotune-no-cudagraphs"
CPU_BLOCK_US = 3000.0  # calls per clock reading: enough to fill this


@dataclass
class Series:
    """One compiled form of so many copies of the linear: a call of all of them, and which kernels serve them."""

    scheme: str
    mode: str
    call: measure.Call
    copies: int
    kernels: str


class Copies(nn.Module):
    """As a model holds its layers, each with an input of its own: nothing is shared but what a graph does once."""

    def __init__(self, count: int, n: int, k: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build.Linear(n, k) for _ in range(count))

    def forward(self, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


def inputs(count: int, x: torch.Tensor) -> list[torch.Tensor]:
    """As many inputs of one graph, in one memory: the more copies a scheme has, the more of theirs would leave the cache."""
    return [x.view_as(x) for _ in range(count)]


def prepare(problem: Problem, schemes: Sequence[str], search: bool, beside: bool) -> tuple[list[Series], list[str]]:
    """Everything to be measured, compiled and called once, bf16 first, and what was refused."""
    most = max(problem.copies(16 if scheme == "bf16" else resolve(scheme).weight.bits) for scheme in ("bf16", *schemes))
    xs = inputs(most, torch.randn(problem.m, problem.shape[1], dtype=torch.bfloat16, device=problem.device))
    found: list[Series] = []
    refused: list[str] = []

    def add(scheme: str, mode: str, bits: float, compiler: Callable[[nn.Module], Compiled | None]) -> list[torch.Tensor] | None:
        """The outputs; None where the compiler has nothing for it."""
        count = problem.copies(bits)
        compiled = compiler(build.fresh(partial(Copies, count, *problem.shape), problem.device))
        if compiled is None:
            return None
        call = partial(compiled, xs[:count])
        found.append(Series(scheme, mode, call, count, ""))
        return call()  # packed, and its originals let go, before the next scheme's copies come

    with torch.no_grad(), build.no_caches():
        for mode in (DEFAULT, SEARCH) if problem.device == "cuda" else (DEFAULT,):
            reference = add("bf16", mode, 16, partial(build.compile_bf16, mode=mode))
        assert reference is not None
        for scheme in schemes:
            bits = resolve(scheme).weight.bits
            for mode in (DEFAULT, SEARCH) if search else (DEFAULT,):
                ys = add(scheme, mode, bits, partial(build.compile_quantized, scheme=scheme, mode=mode, release=True))
                last = found[-1]
                try:
                    pair = (torch.stack(outputs[:2]) for outputs in (ys or [], reference))
                    last.kernels = build.kernels(last.call.func, last.copies, *pair)  # type: ignore[attr-defined]
                except build.Refused as why:
                    refused.append(f"{problem.name} M={problem.m} {scheme} {mode}: {why}")
                    found.pop()
            mode = SEARCH if problem.device == "cuda" else DEFAULT
            for peer in peers.PEERS if beside else ():
                built = len(found)
                try:
                    ys = add(f"{peer} {scheme}", mode, bits, partial(_peer, problem, peer, scheme, mode))
                    if ys is not None:
                        found[-1].kernels = peer
                        build.check(torch.stack(ys[:2]), torch.stack(reference[:2]))
                except Exception as why:  # whatever a peer's kernels raise
                    refused.append(f"{problem.name} M={problem.m} {peer} {scheme}: {type(why).__name__}: {why}"[:300])
                    del found[built:]
    return found, refused


def measure_problem(
    problem: Problem, schemes: Sequence[str], search: bool = False, beside: bool = False, ready: Callable[[], object] = list
) -> tuple[list[Row], list[str]]:
    """The rows of one shape and M, bf16 first, and what was refused; `ready` is called before anything is timed."""
    found, refused = prepare(problem, schemes, search, beside)
    before = build.graphs()
    ready()
    with torch.no_grad():
        times = _time(problem, {f"{i}": series for i, series in enumerate(found)})
    if build.graphs() != before:
        return [], [*refused, f"{problem.name} M={problem.m}: {build.graphs() - before} recompilations while timing"]
    base = min((times[f"{i}"] for i, series in enumerate(found) if series.scheme == "bf16"), key=statistics.median)
    what = "gpu_time" if problem.device == "cuda" else "cpu_time"
    return [
        measure.row(
            BENCH, problem.name, problem.m, series.scheme, series.mode, what, times[f"{i}"], base, series.kernels,
            problem.roofline(split(series.scheme)[1]) if problem.device == "cuda" else None,
        )
        for i, series in enumerate(found)
    ], refused


def _peer(problem: Problem, peer: str, scheme: str, mode: str, model: nn.Module) -> Compiled | None:
    return build.compile_bf16(model, mode) if peers.PEERS[peer].quantize(model, scheme, problem.device) else None


def _time(problem: Problem, series: dict[str, Series]) -> measure.Times:
    """Microseconds of one copy."""
    calls = {name: one.call for name, one in series.items()}
    if problem.device == "cuda":
        times = measure.gpu_time({name: [call] for name, call in calls.items()}, 3, problem.reps)
    else:
        clock = measure.cpu_time if torch.get_num_threads() == 1 else measure.wall_time
        once = min(clock(calls, 1, 2)["0"])
        times = clock(calls, max(1, int(CPU_BLOCK_US / once)), problem.reps)
    return {name: [us / series[name].copies for us in found] for name, found in times.items()}


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
    losing = [r for r in rows if r.ratio is not None and r.ratio < 1 and r.kernel not in ("", *peers.PEERS)]
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
    p.add_argument("--peers", action="store_true", help="torchao and gemlite too, where installed and with the scheme")
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
