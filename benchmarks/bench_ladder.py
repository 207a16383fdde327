"""A model up the ladder of torchao's segment-anything tutorial: eager and compiled bf16, int8dq, Inductor's options.

One model, compiled once per rung, all rungs timed in turn: wall time of one step until the device is done, which is what the
tutorial shows. With --search every compiled rung has max_autotune, as there. `ratio` is against compiled bf16; the first
rung's is below 1. force_fuse_int_mm_with_mul has no reader in Inductor since 2.11: the rescale is in our kernel without it,
and the rung shows that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from benchmarks import build, cli, measure
from benchmarks.measure import Row
from benchmarks.models import CASES

BENCH, WHAT = "ladder", "step_wall_time"
EAGER, COMPILED = "eager bf16", "compile bf16"
FUSED = {"force_fuse_int_mm_with_mul": True}
TUNED = {**FUSED, "epilogue_fusion": False, "coordinate_descent_tuning": True}
RUNGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "int8dq": {},
        "+ force_fuse_int_mm_with_mul": FUSED,
        "+ no epilogue_fusion, coordinate_descent_tuning": TUNED,
    }
)


def climb(model: nn.Module, search: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Rung -> the model as that rung runs it; nothing is compiled before the first call."""
    plain = torch.compile(model, dynamic=False, options=dict(search) or None)
    ours = {
        label: torch.compile(model, backend="aoquant", dynamic=False, options={"schemes": "int8dq", **search, **options})
        for label, options in RUNGS.items()
    }
    return {EAGER: model, COMPILED: plain, **ours}


def waited(step: build.Step, device: str) -> build.Step:
    """The step until the device is done."""

    def whole() -> torch.Tensor:
        y = step()
        if device == "cuda":
            torch.cuda.synchronize()
        return y

    return whole


def measure_case(name: str, device: str, reps: int, search: bool) -> tuple[list[Row], list[str]]:
    """The rows of one case, and what was refused."""
    case = CASES[name]
    model, bind = case.make(device)
    linears = sum(isinstance(m, nn.Linear) for m in model.modules())
    steps: dict[str, build.Step] = {}
    kernels, refused = {EAGER: "", COMPILED: ""}, []
    with torch.no_grad(), build.no_caches():
        for label, function in climb(model, {"max_autotune": True} if search else {}).items():
            steps[label] = waited(bind(function), device)
            y = steps[label]().clone()
            if label == EAGER:
                reference = y
            elif label in RUNGS:
                try:
                    kernels[label] = build.kernels(function, linears, y, reference)
                except build.Refused as why:
                    refused.append(f"{name} {label}: {why}")
                    del steps[label]
        before = build.graphs()
        times = measure.wall_time(steps, 1, reps)
    if build.graphs() != before:
        return [], [*refused, f"{name}: {build.graphs() - before} recompilations while timing"]
    mode = "max_autotune" if search else "default"
    return [
        measure.row(
            BENCH, name, int(case.per_step), label, "" if label == EAGER else mode, WHAT, series, times[COMPILED],
            kernels[label],
        )
        for label, series in times.items()
    ], refused


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=20, schemes=())
    p.add_argument("--cases", default="sam-block,sam-encoder", help="comma-separated (default: %(default)s)")
    p.add_argument("--search", action="store_true", help="max_autotune on every compiled rung")
    args = cli.parse(p, argv)
    rows: list[Row] = []
    written: list[dict[str, Any]] = []
    refused: list[str] = []
    for name in args.cases.split(","):
        more, no = measure_case(name, args.device, args.reps, args.search)
        written += measure.write(more, args.device, args.results)
        rows, refused = rows + more, refused + no
    cells = [(r.shape, r.scheme, f"{r.value / 1e3:.3f}", f"{r.ratio:.2f}x", r.kernel or "-") for r in rows]
    return cli.finish(written, cli.table(("case", "rung", "ms", "speed vs compile bf16", "kernel"), cells), refused, args)


if __name__ == "__main__":
    sys.exit(main())
