"""Whole models (models.py): bf16 under torch.compile, each scheme through aoquant, peers (--peers) where they are installed.

Every row is a process of its own, so that memory, compile time and Dynamo's caches are its own; or the fastest of
Case.processes. `--jobs` of them compile at once (their compile time is then left empty); measured is one at a time, in VISITS
turns of each. step: device time of one step, the queue kept full where the host is fast enough for it. host: until the call
returns, the device idle before, the median of the visit where it is least: what others do on the machine only adds. resident
and peak: torch.cuda's allocator after the first call, and at most until then; of the whole process on CPU they are left empty.
error: SQNR in dB of the step's result against compiled bf16's.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aoquant_inductor.options import parse
from aoquant_inductor.scheme import Scheme
from benchmarks import cli, measure, peers, turns
from benchmarks.error import sqnr_db
from benchmarks.models import CASES, Case, Step
from benchmarks.rows import EAGER, split

BENCH = "model"
VISITS = 3


def compiled(case: Case, model: nn.Module, scheme: str, mode: str, device: str) -> Any:
    """The model as its users compile it to serve it: whole, or block by block; ours without the original weights.

    Raises LookupError where a peer has no such scheme.
    """
    options: dict[str, Any] = {} if mode == "default" else {"mode": mode}
    if scheme == EAGER:
        return model
    whose, label = split(scheme)
    if scheme == "bf16" or whose:
        for s, names in layers(case, model, label, peers.PEERS[whose]).items() if whose else ():
            if not peers.PEERS[whose].quantize(model, s, device, names):
                raise LookupError(scheme)
        how: dict[str, Any] = options
    else:
        how = {"backend": "aoquant", "options": {**case.options(scheme), **options, "release_weights": True}}
    if case.blockwise:
        for block in getattr(model, case.blockwise):
            block.compile(**how, dynamic=False)
        return model
    return torch.compile(model, dynamic=False, **how)


def layers(case: Case, model: nn.Module, label: str, peer: peers.Peer) -> dict[Scheme, set[str]]:
    """The names of the linears of each scheme; none that sees one row where the peer's kernel wants more."""
    options = parse(case.options(label))
    names: dict[Scheme, set[str]] = {}
    for name, module in model.named_modules():
        scheme = options.choose([name]).scheme if isinstance(module, nn.Linear) else None
        if scheme is not None and (name not in case.one_row or peer.takes_one_row(scheme)):
            names.setdefault(scheme, set()).add(name)
    return names


def beside(case: Case, schemes: Sequence[str], device: str) -> list[str]:
    """The rows of peers: of each, the schemes that it has."""
    found = []
    for whose, peer in peers.PEERS.items():
        for label in schemes:
            options = parse(case.options(label))
            if all(peer.has(s, device) for s in {options.default, *(s for _, s in options.schemes)} - {None}):
                found.append(f"{whose} {label}")
    return found


def quantized(case: Case, model: nn.Module, function: Any) -> tuple[int, int]:
    """(linears quantized, linears) by the reports of what was compiled."""
    import aoquant_inductor

    parts = list(getattr(model, case.blockwise)) if case.blockwise else [function]
    totals = [aoquant_inductor.report(part).totals for part in parts]
    return sum(t["quantized"] for t in totals), sum(t["linears"] for t in totals)


def device_ms(step: Step, device: str, seconds: float) -> list[float]:
    """Milliseconds per step of blocks of steps, the queue empty only between blocks."""
    once = max(1e-5, min(_seconds(step, 1, device) for _ in range(3)))
    inner = max(1, min(50, int(0.1 / once)))
    return [1e3 * _seconds(step, inner, device) / inner for _ in range(max(5, min(40, int(seconds / (inner * once)))))]


def _seconds(step: Step, count: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(
    name: str, scheme: str, device: str, mode: str, reference: Path, seconds: float, ready: Callable[[], None]
) -> dict[str, Any]:
    """One row, in this process; `ready` is called when all is compiled, and before each visit. mode: torch.compile's."""
    import aoquant_inductor  # noqa: F401  (registers the backend in a source tree)

    case = CASES[name]
    model, bind = case.make(device)
    linear_bytes = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        started = time.perf_counter()
        function = compiled(case, model, scheme, mode, device)
        step = bind(function)
        result = step().clone()
        if device == "cuda":
            torch.cuda.synchronize()
        compile_seconds = time.perf_counter() - started
        gc.collect()
        peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else ""
        for _ in range(5):
            step()
        resident = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else ""
        step_peak: float | str = ""
        times: list[float] = []
        host: list[float] = []
        for _ in range(VISITS):
            ready()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            times += device_ms(step, device, seconds / VISITS)
            if device == "cuda":
                step_peak = torch.cuda.max_memory_allocated() / 1e6
                calls = max(5, min(70, int(1e3 * seconds / VISITS / statistics.median(times))))
                host.append(statistics.median(measure.host_time({"": step}, 1, calls)[""]))
    if scheme == "bf16":
        torch.save(result.cpu(), reference)
        error = ""
    else:
        decibels = sqnr_db(torch.load(reference, weights_only=True), result.cpu())
        if math.isnan(decibels):
            raise RuntimeError("the result is not finite")
        error = f"{decibels:.2f}"
    ours = scheme not in ("bf16", EAGER) and not split(scheme)[0]
    done, linears = quantized(case, model, function) if ours else (0, 0)
    if ours and not done:
        raise RuntimeError("no linear was quantized")
    value = statistics.median(times)
    return {
        "bench": BENCH, "case": name, "scheme": scheme, "mode": mode, "ms": round(value, 4), "min_ms": round(min(times), 4),
        "rate": round(1e3 * case.per_step / value, 2), "unit": f"{case.unit}/s",
        "host_ms": round(min(host) / 1e3, 4) if host else "", "compile_s": round(compile_seconds, 2),
        "resident_mb": resident and round(resident, 1), "first_call_peak_mb": peak and round(peak, 1),
        "step_peak_mb": step_peak and round(float(step_peak), 1), "linear_mb": round(linear_bytes / 1e6, 1), "error_db": error,
        "quantized": f"{done}/{linears}" if ours else "",
    }


def child(name: str, scheme: str, args: Any, reference: Path) -> list[str]:
    """The command that measures one row and prints it."""
    return [
        sys.executable, "-m", "benchmarks.bench_model", "--child", name, scheme, "--device", args.device,
        "--mode", args.mode or (CASES[name].mode if args.device == "cuda" else "default"), "--seconds", str(args.seconds),
        "--reference", str(reference), "--threads", str(args.threads),
    ]


COLUMNS = {
    "host_ms": "host ms", "resident_mb": "resident MB", "first_call_peak_mb": "peak MB", "step_peak_mb": "step MB",
    "compile_s": "compile s", "error_db": "dB", "quantized": "linears",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    base: dict[str, dict[str, Any]] = {row["case"]: row for row in rows if row["scheme"] == "bf16"}
    lines = [
        [
            row["case"], row["scheme"], f"{row['ms']:.3f}", f"{row['rate']:.1f} {row['unit']}",
            f"{base[row['case']]['ms'] / row['ms']:.2f}x" if row["case"] in base else "-",
            *(str(row[key]) or "-" for key in COLUMNS),
        ]
        for row in rows
    ]
    return cli.table(("case", "scheme", "ms", "rate", "speed", *COLUMNS.values()), lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=0, schemes=())
    p.add_argument("--cases", default="toy,qwen-decode-1,sam-block,dit", help=f"of {', '.join(CASES)} (default: %(default)s)")
    p.add_argument("--peers", action="store_true", help="torchao and gemlite too, where they have the scheme")
    p.add_argument("--mode", default="", help="of torch.compile, for all (default: the case's; on a CPU `default`)")
    p.add_argument("--seconds", type=float, default=2.0, help="of timed steps per row (default: %(default)s)")
    p.add_argument("--processes", type=int, default=0, help="per row: the fastest (default: the case's; on a CPU 1)")
    turns.arguments(p)
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    p.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    args = cli.parse(p, argv)
    if args.child:
        print(json.dumps(run(*args.child, args.device, args.mode, args.reference, args.seconds, turns.wait)))
        return 0
    rows: list[dict[str, Any]] = []
    refused = []
    with tempfile.TemporaryDirectory() as folder:
        wanted: list[tuple[str, str]] = []
        for name in args.cases.split(","):
            schemes = args.schemes.split(",") if args.schemes else list(CASES[name].schemes)
            others = beside(CASES[name], schemes, args.device) if args.peers and not CASES[name].eager else []
            eager = [EAGER] * (CASES[name].eager and not args.schemes)
            once = [(name, scheme) for scheme in ("bf16", *eager, *schemes, *others)]
            # each batch of processes has all of them: a slow spell of the machine meets all alike
            wanted += once * (args.processes or (CASES[name].processes if args.device == "cuda" else 1))
        commands = [child(name, scheme, args, Path(folder) / f"{name}.pt") for name, scheme in wanted]

        def ready(which: int, seconds: float) -> None:
            print(f"{' '.join(wanted[which])}: prepared after {seconds:.0f} s", file=sys.stderr, flush=True)

        found: dict[tuple[str, str], list[str | turns.Failed]] = {which: [] for which in wanted}
        for which, printed in zip(wanted, turns.run(commands, args.jobs, args.limit, ready), strict=True):
            found[which].append(printed)
            if len(found[which]) < wanted.count(which):
                continue
            name, scheme = which
            if failed := dict.fromkeys(str(each) for each in found[which] if isinstance(each, turns.Failed)):
                refused += [f"{name} {scheme}: {message}" for message in failed]
                continue
            done = sorted((json.loads(str(each)) for each in found[which]), key=lambda row: row["ms"])
            row: dict[str, Any] = done[0]
            if args.jobs > 1:
                row["compile_s"] = ""
            rows += measure.append([row], BENCH, args.device, args.results)
            print(f"{name} {scheme}: {' '.join(str(each['ms']) for each in done)} ms", file=sys.stderr, flush=True)
    return cli.finish(rows, table(rows) if rows else "", refused, args)


if __name__ == "__main__":
    sys.exit(main())
