"""Host time per call of quantized models against compiled bf16 in the same run.

cuda: wall time until the call returns, the device not waited for: host only.
cpu: CPU time of one thread. It INCLUDES the kernels, since they run on the host; the 50 x Linear(64, 64) model is
     nearly all overhead, 100 x Linear(1024, 1024) nearly all memory traffic.
Every model and mode is a process of its own; `--jobs` of them compile at once, and are measured one at a time.
The last line is the staleness check alone, over 224 weights, warm caches; it is part of the calls above it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from aoquant_inductor import watch, weights
from benchmarks import build, cli, measure, turns
from benchmarks.measure import Row

BENCH = "host"
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # name -> (how to make it, in_features, linears)
    "toy-512-1024-1024": (build.Toy, 512, 2),
    "residual-100x1024": (partial(build.Stack, 100, 1024, True), 1024, 100),
    "chain-50x64": (partial(build.Stack, 50, 64, False), 64, 50),
    "block-7x64": (partial(build.Block, 64), 64, 7),
}
MODES = {"cpu": ("default",), "cuda": ("default", "reduce-overhead")}
CALLS = {("cpu", "default"): 10, ("cuda", "default"): 3, ("cuda", "reduce-overhead"): 20}
"""Calls per reading of the clock; a hundred launches each fill the driver's queue, one each do not."""
WEIGHTS = 224  # the linears of a Llama-8B


def measure_model(
    name: str, schemes: Sequence[str], mode: str, device: str, reps: int, ready: Callable[[], object] = list
) -> tuple[list[Row], list[str]]:
    """The rows of one model in one mode, bf16 first, and what was refused; `ready` is called before anything is timed."""
    make, width, linears = MODELS[name]
    x = torch.randn(1, width, device=device, dtype=torch.bfloat16)
    block = name.startswith("block")
    first = build.fresh(make, device)
    functions: dict[str, measure.Call] = {"bf16": partial(build.compile_bf16(first, mode), x)}
    if block:  # as ours: under CUDA graphs a second module has a recording of its own, between which every call chooses
        functions["bf16 second"] = partial(build.compile_bf16(copy.deepcopy(first), mode), x)
    kernels, refused = dict.fromkeys(functions, ""), []
    with torch.no_grad(), build.no_caches():
        reference = functions["bf16"]().clone()  # type: ignore[attr-defined]
        for scheme in schemes:
            model = build.fresh(make, device)
            # the graph of a second module with the same code looks its packs up at every call
            for label, one in ((scheme, model), (f"{scheme} looked up", copy.deepcopy(model))):
                if one is not model and not block:
                    continue
                compiled = build.compile_quantized(one, scheme, mode)
                try:
                    kernels[label] = build.kernels(compiled, linears, compiled(x), reference)
                    functions[label] = partial(compiled, x)
                except build.Refused as why:
                    refused.append(f"{name} {mode} {label}: {why}")
        for function in functions.values():
            function()
        before = build.graphs()
        ready()
        clock = measure.host_time if device == "cuda" else _cpu_clock()
        times = clock(functions, CALLS[device, mode], reps)
    if build.graphs() != before:
        return [], [*refused, f"{name} {mode}: {build.graphs() - before} recompilations while timing"]
    what = "host_time" if device == "cuda" else "cpu_time_with_kernels"
    return [
        measure.row(BENCH, name, 1, scheme, mode, what, series, times["bf16"], kernels[scheme])
        for scheme, series in times.items()
    ], refused


def _cpu_clock() -> Callable[..., measure.Times]:
    return measure.cpu_time if torch.get_num_threads() == 1 else measure.wall_time


def staleness(reps: int) -> Row:
    """What a checked graph of WEIGHTS unchanged weights asks at every call."""
    parameters = [nn.Parameter(torch.zeros(8, 8), requires_grad=False) for _ in range(WEIGHTS)]
    check = watch.Watch([weights.STORE.entry(p) for p in parameters])
    if check.stale():
        raise AssertionError("fresh weights are stale")
    clock = _cpu_clock()
    times = clock({"check": check.stale}, 100, reps)
    return measure.row(BENCH, f"{WEIGHTS} weights", 1, "any", "", "stale_check", times["check"])


def child(name: str, mode: str, args: argparse.Namespace) -> list[str]:
    """The command that measures one model in one mode and prints its rows."""
    return [
        sys.executable, "-m", "benchmarks.bench_host", "--child", mode, "--models", name, "--device", args.device,
        "--schemes", args.schemes, "--reps", str(args.reps), "--threads", str(args.threads),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=60, schemes=("int8wo",))
    p.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    turns.arguments(p)
    p.add_argument("--child", help=argparse.SUPPRESS)
    args = cli.parse(p, argv)
    watch.settle()
    if args.child:
        found, refused = measure_model(args.models, args.schemes.split(","), args.child, args.device, args.reps, turns.wait)
        print(json.dumps([[asdict(row) for row in found], refused]))
        return 0
    rows: list[Row] = []
    written: list[dict[str, Any]] = []
    refused = []
    wanted = [(name, mode) for name in args.models.split(",") for mode in MODES[args.device]]
    commands = [child(name, mode, args) for name, mode in wanted]
    for (name, mode), result in zip(wanted, turns.run(commands, args.jobs, args.limit), strict=True):
        if isinstance(result, turns.Failed):
            refused.append(f"{name} {mode}: {result}")
            continue
        more, no = json.loads(result)
        found = [Row(**row) for row in more]
        written += measure.write(found, args.device, args.results)
        rows, refused = rows + found, refused + no
    rows.append(staleness(args.reps))
    written += measure.write(rows[-1:], args.device, args.results)
    cells = [
        (f"{r.shape} {r.mode}".strip(), r.scheme, f"{r.value:.1f}", f"{r.min:.1f}", f"{r.p20:.1f}", f"{r.p80:.1f}",
         "-" if r.ratio is None else f"{r.ratio:.2f}x", r.what, r.kernel or "-")
        for r in rows
    ]
    head = ("model, mode", "scheme", "us", "min", "p20", "p80", "speed vs bf16", "what", "kernel")
    return cli.finish(written, cli.table(head, cells), refused, args)


if __name__ == "__main__":
    sys.exit(main())
