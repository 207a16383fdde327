"""One linear y[M, N] = x[M, K] @ w[N, K].T per scheme and M against compiled bf16 in the same run.

cpu: CPU time of one thread, weights and x in whatever cache they fit (they are used again at once); bf16 is torch.compile's
     default mode, so is ours.
cuda: device time inside a CUDA graph over copies of the layer that hold more than the L2 cache; both sides are compiled with
     max-autotune-no-cudagraphs.
Every M is a static compile of its own. torchao is measured beside it where it is installed and has the scheme.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from aoquant_inductor.scheme import resolve
from benchmarks import build, cli, measure, peer_torchao, shapes
from benchmarks.measure import Row
from benchmarks.shapes import Shape

BENCH = "linear"
Compiled = Callable[..., Any]
MODES = {"cpu": "default", "cuda": "max-autotune-no-cudagraphs"}
COLD_BYTES, MOST_COPIES = 320e6, 160  # weights in one CUDA graph; the L2 of an H200 holds 60e6
READ, BF16, INT8 = 4.37e12, 779e12, 1558e12  # H200: bytes/s measured, FLOP/s measured, OP/s twice bf16
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
        """Microseconds on an H200: every byte once at READ, or the multiplications, whichever is more."""
        n, k = self.shape
        bits = 16.0
        compute = BF16
        if scheme != "bf16":
            s = resolve(scheme)
            bits = s.weight.bits + (16 / s.weight.group_size if s.weight.group_size else 0)
            compute = INT8 if s.activation else BF16
        size = n * k * bits / 8 + 2 * self.m * (n + k)
        return max(size / READ, 2 * self.m * n * k / compute) * 1e6

    def copies(self, bits: float) -> int:
        if self.device == "cpu":
            return 1
        n, k = self.shape
        return max(2, min(MOST_COPIES, -(-int(COLD_BYTES) // int(n * k * bits / 8))))


def measure_problem(problem: Problem, schemes: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The rows of one shape and M, bf16 first, and what was refused."""
    x = torch.randn(problem.m, problem.shape[1], device=problem.device, dtype=torch.bfloat16)
    calls: dict[str, list[measure.Call]] = {}
    kernels: dict[str, str] = {}
    refused: list[str] = []
    with torch.no_grad(), build.no_caches():
        bf16 = _compile(problem, 16, partial(build.compile_bf16, mode=MODES[problem.device]))
        reference = [compiled(x) for compiled in bf16[:2]]
        calls["bf16"], kernels["bf16"] = [partial(c, x) for c in bf16], ""
        for scheme in schemes:
            quantized = partial(build.compile_quantized, scheme=scheme, mode=MODES[problem.device])
            compiled = _compile(problem, resolve(scheme).weight.bits, quantized)
            try:
                found = {build.kernels(c, 1, c(x), y) for c, y in zip(compiled, reference, strict=False)}
            except build.Refused as why:
                refused.append(f"{problem.name} M={problem.m} {scheme}: {why}")
                continue
            calls[scheme], kernels[scheme] = [partial(c, x) for c in compiled], ", ".join(sorted(found))
            if (peer := _peer(problem, scheme)) is not None:
                calls[f"torchao {scheme}"] = [partial(c, x) for c in peer]
        for series in calls.values():
            for call in series:
                call()
        before = build.graphs()
        times = _time(problem, calls)
    if build.graphs() != before:
        return [], [*refused, f"{problem.name} M={problem.m}: {build.graphs() - before} recompilations while timing"]
    mode, what = MODES[problem.device], "gpu_time" if problem.device == "cuda" else "cpu_time"
    return [
        measure.row(
            BENCH, problem.name, problem.m, name, mode, what, series, times["bf16"], kernels.get(name, "torchao"),
            problem.roofline(name.removeprefix("torchao ")) if problem.device == "cuda" else None,
        )
        for name, series in times.items()
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


def _peer(problem: Problem, scheme: str) -> list[Compiled] | None:
    models = list(_models(problem, resolve(scheme).weight.bits))
    if not all(peer_torchao.quantize(model, scheme, problem.device) for model in models):
        return None
    return [build.compile_bf16(model, MODES[problem.device]) for model in models]


def _time(problem: Problem, calls: dict[str, list[measure.Call]]) -> measure.Times:
    if problem.device == "cuda":
        return measure.gpu_time(calls, 3, problem.reps)
    alone = {name: series[0] for name, series in calls.items()}
    clock = measure.cpu_time if torch.get_num_threads() == 1 else measure.wall_time
    once = min(clock(alone, 1, 2)["bf16"])
    return clock(alone, max(1, int(CPU_BLOCK_US / once)), problem.reps)


def report(rows: Sequence[Row]) -> str:
    """Per shape: bf16 in microseconds, the others as speed relative to it; then the losing rows, plainly."""
    parts = []
    for name in dict.fromkeys(r.shape for r in rows):
        here = {(r.scheme, r.m): r for r in rows if r.shape == name}
        ms = list(dict.fromkeys(m for _, m in here))
        lines = []
        for scheme in dict.fromkeys(s for s, _ in here):
            cells = [here.get((scheme, m)) for m in ms]
            unit, form = (" us", "{0.value:.1f}") if scheme == "bf16" else ("", "{0.ratio:.2f}")
            lines.append([scheme + unit, *("-" if c is None else form.format(c) for c in cells)])
            floors = ["-" if c is None or c.roofline is None else f"{c.roofline / c.value:.0%}" for c in cells]
            if set(floors) != {"-"}:
                lines.append(["  of roofline", *floors])
        parts.append(cli.table([f"{name}, M =", *map(str, ms)], lines))
    losing = [r for r in rows if r.ratio is not None and r.ratio < 1 and r.kernel != "torchao"]
    parts.append(f"losing rows (below 1.00x bf16): {len(losing)}")
    parts += [f"  {r.shape} M={r.m} {r.scheme}: {r.ratio:.3f}x, {r.value:.1f} us, {r.kernel}" for r in losing]
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=30, schemes=shapes.SCHEMES)
    p.add_argument("--shapes", help="comma-separated NxK or names (default: per device)")
    p.add_argument("--m", help="comma-separated (default: per device)")
    args = cli.parse(p, argv)
    wanted = shapes.parse(args.shapes or ",".join(shapes.DEFAULT_SHAPES[args.device]))
    ms = [int(m) for m in args.m.split(",")] if args.m else shapes.DEFAULT_M[args.device]
    rows: list[Row] = []
    written: list[dict[str, Any]] = []
    refused: list[str] = []
    for shape in wanted:
        for m in ms:
            more, no = measure_problem(Problem(shape, m, args.device, args.reps), args.schemes.split(","))
            written += measure.write(more, args.device, args.results)  # at once: a run may be cut short
            rows, refused = rows + more, refused + no
            print(f"{'x'.join(map(str, shape))} M={m}: {len(more)} rows", file=sys.stderr, flush=True)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return cli.finish(written, report(rows), refused, args)


if __name__ == "__main__":
    sys.exit(main())
