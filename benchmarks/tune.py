"""Kernel configs against each other on this GPU, without a graph around them: what the defaults of templates/ are chosen by.

Every config of every kernel that fits is rendered by Inductor and compiled in parallel processes, checked for equality with
the reference on integer-valued operands, and timed inside a CUDA graph over copies of the weight, of its scales and of the
result that hold more than the L2 cache, after a while under that load: some kernels meet the card's power limit only then.
`--space FILE` is Python that defines SPACE(problem), kernel name -> configs, to try instead of the kernels' own, and may define
PROBLEMS, (scheme, N, K, M) of each, instead of all schemes at all shapes and M.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import runpy
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from aoquant_inductor import packing
from aoquant_inductor.card import Card
from aoquant_inductor.qparams import Quantized, n_groups
from aoquant_inductor.scheme import resolve
from aoquant_inductor.templates import KERNELS, QUANTIZING, Config
from benchmarks import machine, measure, render, shapes
from benchmarks.rows import REFERENCES

COLD_BYTES = 320e6
SCALES = (1e-3, 2e-3)
SPREAD = {8: 35.0, 4: 2.6}
"""A normal weight's standard deviation in steps, where its largest, of 4096 and of 128, is at the range's end: at its power
limit a card is slower on integers that fill the range alike.
"""
Space = Mapping[str, Sequence[Config]]


@dataclass(frozen=True)
class Problem:
    scheme: str
    n: int
    k: int
    m: int
    quantizing: bool = False

    def operands(self, device: str) -> tuple[render.Op, render.Tensors]:
        """Integers as values: every sum below 2**24 is exact in fp32, and the equality of two results means something."""
        scheme = resolve(self.scheme)
        spec = scheme.weight
        groups = n_groups(self.k, spec.group_size)
        w = SPREAD[spec.bits] * torch.randn(self.n, self.k, device=device)
        w_q = w.round().clamp(spec.qmin, spec.qmax).to(torch.int8)
        kind = torch.float32 if spec.group_size is None else torch.bfloat16
        scale = torch.ones(groups, self.n, dtype=kind, device=device)
        zero = None if spec.symmetric else torch.full((groups, self.n), 1, dtype=torch.int8, device=device)
        empty = torch.zeros((), device=device)
        layout = packing.choose(scheme, torch.device("cuda", 0), torch.bfloat16, (self.n, self.k))
        p = packing.pack(Quantized(w_q, scale, zero, spec, empty, empty), scheme, layout)
        x = torch.randint(-7, 8, (self.m, self.k), device=device).to(torch.bfloat16)
        x[:, 0] = 127  # a scale of 1 where it is quantized
        op, tensors = render.linear(p, x, None, scheme, self.quantizing)
        if scheme.activation is not None and not self.quantizing:
            tensors["x"].random_(-128, 128)
            tensors["x_scale"].fill_(1)
        return op, tensors


@dataclass(frozen=True)
class Built:
    code: str
    names: tuple[str, ...]
    name: str
    path: Path
    options: Mapping[str, int]
    config: Config


def build(problem: Problem, kernel: str, config: Config, folder: Path) -> Built | str:
    """Rendered and compiled into Triton's cache, in a process of its own; or why not: not every exception can be pickled."""
    try:
        return _build(problem, kernel, config, folder)
    except Exception as error:
        return str(error)[:160].replace("\n", " ")


def _build(problem: Problem, kernel: str, config: Config, folder: Path) -> Built:
    op, tensors = problem.operands("meta")
    rendered = _render(op, tensors, kernel, config)
    name, source, _, options = render.kernel(rendered.code)
    function = render.load(name, source, folder)
    y = torch.empty(problem.m, problem.n, dtype=torch.bfloat16, device="meta")
    args, grid = render.call(rendered, name, y)
    kinds = [getattr(a, "dtype", a) for a in render.described(rendered, args)]
    function.warmup(*kinds, grid=grid, **options)
    path = Path(function.fn.__code__.co_filename)
    return Built(rendered.code, rendered.names, name, path, options, rendered.config or config)


def _render(op: render.Op, tensors: render.Tensors, kernel: str, config: Config) -> render.Rendered:
    """By the first kernel of this template that fits the problem."""
    errors = []
    for candidate in (k for k in reversed((*KERNELS, *QUANTIZING)) if k.template == kernel):
        try:
            return render.render(op, tensors, (candidate, config))
        except Exception as error:  # Inductor wraps what a lowering raises
            errors.append(error)
    raise errors[0]


def _text(config: Config) -> str:
    further = dict(config.extra) | ({"PROGRAMS": config.programs} if config.programs else {})
    return f"{config} w{config.num_warps} s{config.num_stages} g{config.group_m} {further or ''}"


def tune(problem: Problem, built: Sequence[tuple[str, Config, Future[Built | str]]], load: float) -> Iterator[dict[str, Any]]:
    """A row per config, one of cuBLAS's bf16 and, of int8 x int8, one of its _int_mm, whose int32 has no scale.

    load: seconds of each before it is timed.
    """
    op, tensors = problem.operands("cuda")
    expected = op(tensors).clone()
    exact = {name: tensors[name].clone() for name in tensors if name != "w"}
    w = tensors["w"]
    copies = [w, *(w.clone() for _ in range(int(COLD_BYTES / w.nbytes) + 1))]
    dense = [torch.randn(problem.n, problem.k, dtype=torch.bfloat16, device="cuda") for _ in range(max(2, len(copies) // 2))]
    x = torch.randn(problem.m, problem.k, dtype=torch.bfloat16, device="cuda")
    held: list[torch.Tensor] = []  # so that no two results share memory
    base = _time([lambda d=d: held.append(torch.nn.functional.linear(x, d)) for d in dense], load)
    held.clear()
    del dense
    y = torch.empty(problem.m, problem.n, dtype=torch.bfloat16, device="cuda")
    scale = tensors["scale"]
    # by id of what is passed: what the next layer of a model has of its own
    layers = [{id(w): w_copy, id(scale): scale.clone().uniform_(*SCALES), id(y): torch.empty_like(y)} for w_copy in copies]
    yield {"kernel": "bf16", "config": "", "us": base, "ratio": 1.0, "note": ""}
    if problem.m > 16 and tensors["x"].dtype == w.dtype == torch.int8 and w.shape == (problem.n, problem.k):
        _randomize(tensors)
        us = _time([lambda c=c: held.append(torch._int_mm(tensors["x"], c.t())) for c in copies], load)
        held.clear()
        yield {"kernel": "_int_mm", "config": "", "us": us, "ratio": base / us, "note": " no scale"}
    for kernel, config, future in built:
        row = {"kernel": kernel, "config": _text(config)}
        try:
            if isinstance(b := future.result(), str):
                raise render.CannotRun(b)
            row["config"] = _text(b.config)
            for name, values in exact.items():
                tensors[name].copy_(values)
            y.fill_(float("nan"))
            rendered = render.Rendered(op, tensors, b.code, b.names)
            args, grid = render.call(rendered, b.name, y)
            launch = partial(render.load_file(b.path, b.name)[grid], **b.options)
            wrong = 0
            for _ in range(3):  # on the same counters
                compiled = launch(*render.described(rendered, args))
                wrong += int((y != expected).sum())
            rotated = [render.described(rendered, [layer.get(id(a), a) for a in args]) for layer in layers]
            _randomize(tensors)
            us = _time([partial(launch, *a) for a in rotated], load)
            # int32 to bf16 by way of fp32 rounds twice
            note = f"WRONG {wrong}" if wrong > (3 * y.numel() // 1000 if "x_scale" in tensors else 0) else ""
            note += f" regs {compiled.n_regs} spills {compiled.n_spills}"
            yield {**row, "us": us, "ratio": base / us, "note": note}
        except Exception:
            why = traceback.format_exc(limit=0).strip()[-160:].replace("\n", " ")
            yield {**row, "us": float("inf"), "ratio": 0.0, "note": why}


def _randomize(tensors: render.Tensors) -> None:
    """Values as a model has them: a card at its power limit is faster by a tenth on small integers and scales of 1."""
    x = tensors["x"]
    if x.is_floating_point():
        x.normal_()
    else:
        x.copy_((32 * torch.randn(x.shape, device=x.device)).round().clamp(-127, 127))


def _time(calls: Sequence[Any], load: float, reps: int = 7) -> float:
    """Microseconds per call after `load` seconds of them."""
    return statistics.median(measure.gpu_time({"": calls}, 1, reps, load, visits=1)[""])


def _own(problem: Problem) -> Space:
    ours = QUANTIZING if problem.quantizing else KERNELS
    return {k.template: [c for same in ours if same.template == k.template for c in same.configs] for k in ours}


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--schemes", default="int8wo,int8dq")
    p.add_argument("--shapes", default="llama8b-o,llama8b-gate-up,llama8b-down", help="comma-separated NxK or names")
    p.add_argument("--m", default="1,16,64,256,1024,4096")
    p.add_argument("--quantizing", action="store_true", help="kernels that quantize x themselves, for few rows")
    p.add_argument("--space", type=Path, help="Python that defines SPACE and may define PROBLEMS")
    p.add_argument("--load", type=float, default=0.1, help="seconds of a config before it is timed (default: %(default)s)")
    p.add_argument("--best", type=int, default=4, help="configs printed per problem")
    p.add_argument("--csv", type=Path, help="where to append the rows of each problem once it is measured")
    p.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    args = p.parse_args(argv)
    given = runpy.run_path(str(args.space)) if args.space else {}
    space = given.get("SPACE", _own)
    problems = [
        Problem(*of, args.quantizing)
        for of in given.get("PROBLEMS") or (
            (s, *shape, m)
            for s in args.schemes.split(",") for shape in shapes.parse(args.shapes) for m in map(int, args.m.split(","))
        )
    ]
    around = machine.environment("cuda") | {"ptxas": ".".join(map(str, Card.of(torch.device("cuda", 0)).ptxas))}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=f"{folder}/cache"),  # Inductor gives its processes another one
        ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        built = {
            problem: [
                (name, config, pool.submit(build, problem, name, config, Path(folder)))
                for name, configs in space(problem).items() for config in configs
            ]
            for problem in problems
        }
        print(f"{machine.card('cuda')[1]}, torch {torch.__version__}: {sum(map(len, built.values()))} configs", flush=True)
        for problem, futures in built.items():
            found = sorted(tune(problem, futures, args.load), key=lambda row: row["us"])
            if args.csv:
                measure.extend(args.csv, [{**vars(problem), **row} | around for row in found])
            print(f"{problem.scheme} {problem.n}x{problem.k} M={problem.m}")
            further = (r for r in found[args.best :] if r["kernel"] in REFERENCES or "WRONG" in r["note"])
            for row in (*found[: args.best], *further):
                print(f"  {row['us']:9.2f} us {row['ratio']:5.2f}x {row['kernel']} {row['config']} {row['note']}", flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
