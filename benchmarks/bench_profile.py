"""Which kernels one step of a case (models.py) is made of: name, who made it, launches and microseconds per step, share.

Compiled as bench_model does, but without CUDA graphs: a replay has the same kernels and hides who asked for them. On CUDA
the rows are kernels alone; on CPU they are the kernels in Inductor's C++ code and the ATen ops beside them, each without
what it calls, and `host` is the Python around them.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_model, build, cli, measure
from benchmarks.models import CASES

BENCH = "profile"
WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
# in this order: the first that is found in a kernel's name made it
MAKERS = {
    "aoquant": r"aoquant|^triton_tem_.*linear_(wo|dynamic|grad)",
    "inductor": r"^triton_|cpp_fused",
    "attention": r"flash|fmha|sdpa|attention",
    "matmul": r"gemm|gemv|nvjet|cutlass|cublas|splitKreduce|aten::(mm|addmm|bmm|baddbmm|linear|_int_mm)$|mkldnn|onednn",
    "convolution": r"conv|cudnn|winograd",
    "copy": r"^Memcpy|^Memset|aten::copy_",
    "host": r"Dynamo|Compiled|Pregraph|AOTDispatcher|^aten::",
}


def maker(kernel: str) -> str:
    """A key of MAKERS, or `other`."""
    return next((name for name, pattern in MAKERS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


@dataclass(frozen=True)
class Kernel:
    """Per step: `count` launches, `us` microseconds in all of them; `share` of the sum over all kernels."""

    kernel: str
    by: str
    count: float
    us: float
    share: float


def kernels(events: Iterable[tuple[str, float]], steps: int) -> list[Kernel]:
    """(name, microseconds) of every launch in `steps` steps -> what a step is made of, the longest first."""
    count: Counter[str] = Counter()
    time_of: dict[str, float] = {}
    for name, us in events:
        count[name] += 1
        time_of[name] = time_of.get(name, 0.0) + us
    total = sum(time_of.values())
    rows = [
        Kernel(name, maker(name), round(count[name] / steps, 2), round(us / steps, 3), round(us / total, 4))
        for name, us in time_of.items()
    ]
    return sorted(rows, key=lambda row: -row.us)


def record(step: build.Step, device: str, steps: int) -> list[tuple[str, float]]:
    """(name, microseconds) of every kernel of these steps; on CPU of every op, without what it calls."""
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    if cuda:
        return [
            (event.name, float(event.time_range.elapsed_us()))
            for event in profiler.events() or () if event.device_type.name == "CUDA" and not event.is_user_annotation
        ]
    return [(event.name, float(event.self_cpu_time_total)) for event in profiler.events() or ()]


def run(name: str, scheme: str, device: str, steps: int) -> tuple[list[Kernel], float]:
    """(kernels of a step, its median wall time in microseconds without the profiler)"""
    import torch._inductor.config as inductor_config

    case = CASES[name]
    mode = WITHOUT_GRAPHS.get(case.mode, case.mode) if device == "cuda" else "default"
    model, bind = case.make(device)
    with torch.no_grad(), build.no_caches(), inductor_config.patch({"cpp.enable_kernel_profile": device == "cpu"}):
        function = bench_model.compiled(case, model, scheme, mode, device)
        step = bind(function)
        for _ in range(5):
            step()
        if scheme != "bf16" and not bench_model.quantized(case, model, function)[0]:
            raise build.Refused(f"{name} {scheme}: no linear was quantized")
        walls = []
        for _ in range(steps):
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) * 1e6)
        return kernels(record(step, device, steps), steps), statistics.median(walls)


def report(found: Sequence[Kernel], wall: float, most: int) -> str:
    """The longest kernels, then what each maker's take together."""
    cells = [(k.kernel[:90], k.by, f"{k.count:g}", f"{k.us:.1f}", f"{k.share:.1%}") for k in found[:most]]
    rest = f"\n... {len(found) - most} more" if len(found) > most else ""
    sums = {by: [k for k in found if k.by == by] for by in (*MAKERS, "other")}
    totals = [
        (by, f"{sum(k.count for k in of):g}", f"{sum(k.us for k in of):.1f}", f"{sum(k.share for k in of):.1%}")
        for by, of in sums.items() if of
    ]
    return "\n".join([
        cli.table(("kernel", "by", "per step", "us", "share"), cells) + rest, "",
        cli.table(("by", "per step", "us", "share"), totals),
        f"\nin all {sum(k.us for k in found):.1f} us; a step takes {wall:.1f} us without the profiler",
    ])


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=20, schemes=("int8wo",))
    p.add_argument("--case", default="qwen-decode-1", help=f"one of {', '.join(CASES)} (default: %(default)s)")
    p.add_argument("--scheme", dest="schemes", help="the same as --schemes: one after the other")
    p.add_argument("--most", type=int, default=25, help="kernels printed (default: %(default)s); the CSV has all")
    args = cli.parse(p, argv)
    written: list[dict[str, Any]] = []
    parts, refused = [], []
    for scheme in args.schemes.split(","):
        try:
            found, wall = run(args.case, scheme, args.device, args.reps)
        except build.Refused as why:
            refused.append(str(why))
            continue
        rows = [{"bench": BENCH, "case": args.case, "scheme": scheme, "wall_us": round(wall, 1), **vars(k)} for k in found]
        written += measure.append(rows, BENCH, args.device, args.results)
        parts.append(f"{args.case}, {scheme}\n{report(found, wall, args.most)}")
    return cli.finish(written, "\n\n".join(parts), refused, args)


if __name__ == "__main__":
    sys.exit(main())
