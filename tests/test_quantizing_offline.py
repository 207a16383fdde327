"""int8 activations quantized in the matmul of a few rows, without a GPU: the codes, the launches, the instructions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernel itself", allow_module_level=True)

import offline
from test_triton_offline import check, distinct

from aoquant_inductor.patterns import dynamic
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates import Config, Kernel, gemv, int4_gemv_dynamic

SCHEMES = ["int8dq", "int8dq-asymact"]
INT4 = ["int8dq-int4w", "int8dq-int4w-asymact", "int8dq-int4w-128"]


def rows(m: int, k: int = 64) -> torch.Tensor:
    return torch.randn(m, k).bfloat16()


@pytest.mark.parametrize("scheme", SCHEMES + INT4)
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_a_chain_is_one_launch_per_linear(scheme: str, m: int) -> None:
    code = offline.render_chain(scheme, rows(m, 64 if scheme != "int8dq-int4w-128" else 256), 5).code
    assert offline.launches(code) == ["tem"] * 5, code
    assert "torch.int8" not in code.split("def call(")[1].split("return (")[0], "no x_q in memory"


def test_what_is_not_told_or_not_fit_stays_two_launches() -> None:
    assert offline.launches(offline.render_chain("int8dq", rows(1), 3, told=False).code) == ["per", "tem"] * 3
    # too many rows; rows that are no multiple of 16 bytes
    for scheme, x in (("int8dq", rows(5)), ("int8dq", rows(1, 72)), ("int8dq-int4w", rows(5)), ("int8dq-int4w", rows(2, 76))):
        launched = offline.launches(offline.render_chain(scheme, x, 2).code)
        assert launched.count("per") == launched.count("tem") == 2, launched


@pytest.mark.parametrize("scheme", SCHEMES + INT4)
def test_a_producer_that_runs_anyway_stays_one_kernel(scheme: str) -> None:
    code = offline.render_gated(scheme, 1, 256, 1024, told=True).code
    assert offline.launches(code) == ["per", "tem", "tem"], code


def test_a_strided_x_is_not_copied_for_it() -> None:
    """Its quantization reads it as it lies: a copy would be the launch that is to be saved."""
    for x, of, launched in (
        (rows(64, 2), lambda x: x.t(), ["per", "tem"]),
        (rows(2, 64), lambda x: x, ["tem"]),
        (rows(2, 64), lambda x: x * 2, ["poi", "tem"]),
        (torch.randn(1, 4, 16).bfloat16(), lambda x: x.transpose(1, 2).reshape(1, 64), ["per", "tem"]),
        (torch.randn(1, 4, 1, 16).bfloat16(), lambda x: x.transpose(1, 2).reshape(1, 1, 64), ["tem"]),
    ):
        assert offline.launches(offline.render_chain("int8dq", x, 1, of=of).code) == launched


@pytest.mark.parametrize("together", [True, False])
def test_in_a_search_either_form_may_win(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import select_algorithm
    from torch._inductor.codegen import subgraph
    from torch._inductor.graph import GraphLowering

    sizes: list[int] = []
    lowered: list[Any] = []
    monkeypatch.setattr(subgraph, "benchmarker", mock.MagicMock())
    monkeypatch.setattr(GraphLowering, "compile_to_module", lambda self: lowered.append(self) or mock.MagicMock())

    def choose(name: str, callers: list[Any], nodes: Any, layout: Any, **rest: Any) -> Any:
        if len(callers) == 1:  # the second kernel in a reference that is measured: its default
            return callers[0].output_node()
        sizes.append(len(callers))
        callers[-1].benchmark(out=torch.empty(0))  # the reference's own graph is lowered for it
        last = callers[-1].name.endswith("_portable") and not together and len(sizes) == 1
        return callers[-1 if last else 0].output_node()

    monkeypatch.setattr(select_algorithm, "autotune_select_algorithm", choose)
    code = offline.render_chain("int8dq", rows(2, 4096), 1, patches={"max_autotune": True}).code
    assert sizes[0] == len(distinct(gemv.DYNAMIC)) + 1, "every config, and the two kernels"
    launched = [kind for kind in offline.launches(code) if kind != "poi"]
    assert launched == (["tem"] if together else ["per", "tem"])
    assert len(sizes) == (1 if together else 2), "the second kernel is searched for, too"
    assert len(lowered) == len(sizes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_search_measures_both_forms_over_the_same_tensors(symmetric: bool) -> None:
    scheme = SCHEMES[not symmetric]
    with offline.pretended_gpu():
        op, t, _ = offline._operands(scheme, 3, 33, 64, torch.bfloat16, True, True)
    key = (64, 33, "int8", 0, "int", "plain")
    problem = Problem(
        t["x"], None, None, t["w"], t["scale"], None, t.get("sums"), t["bias"], key, torch.bfloat16, (3,), 3, torch.device("cpu"), symmetric
    )
    assert list(problem.inputs) == ["X", "W", "WS", *([] if symmetric else ["WSUM"]), "BIAS"]
    assert torch.equal(problem.call(*problem.inputs.values()), op(t))


def test_the_graph_tells_x_where_a_kernel_takes_it() -> None:
    assert dynamic.TOLD_ROWS == {"cuda": gemv.MOST_ROWS}


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
@pytest.mark.parametrize("scheme", [*SCHEMES, *INT4, "int8dq-int4w-128-asym-asymact"])
def test_the_default_compiles_to_the_instruction_meant(scheme: str, arch: int, tmp_path: Path) -> None:
    for m, n, k in ((1, 64, 64), (4, 4099, 4112)):
        rendered = offline.render(scheme, m, n, k, torch.bfloat16, arch=arch, quantizing=True)
        ptx = check(rendered, tmp_path, arch)
        assert "dp4a.s32.s32" in ptx and not re.search("mma", ptx)
        # 16 bytes of w at once, and of x for its range
        assert k == 64 or {"evict_first", "evict_last"} == set(re.findall(r"ld\.global\.L1::(\w+)\S*\.v4\.b32", ptx))


CONFIGS = [
    (scheme, m, kernel, config)
    for kernel, problems in (
        (gemv.DYNAMIC, [("int8dq", 1), ("int8dq-asymact", 2), ("int8dq-asymact", 4)]),
        (
            int4_gemv_dynamic.KERNEL,
            [("int8dq-int4w", 1), ("int8dq-int4w", 4), ("int8dq-int4w-asym-asymact", 2), ("int8dq-int4w-128-asym-asymact", 4)],
        ),
    )
    for scheme, m in problems for config in distinct(kernel)
]


@pytest.mark.parametrize(("scheme", "m", "kernel", "config"), CONFIGS, ids=lambda v: getattr(v, "template", str(v)))
def test_every_config_compiles_without_spills(scheme: str, m: int, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    dtype = torch.float16 if kernel is gemv.DYNAMIC else torch.bfloat16
    n, k, sms = (1240, 4096, 20) if config.programs else (256, 14336, 132)  # more tiles than programs
    rendered = offline.render(scheme, m, n, k, dtype, config=(kernel, config), quantizing=True, sms=sms)
    assert "dp4a.s32.s32" in check(rendered, tmp_path, 90)
    assert rendered.config is not None and bool(rendered.config.programs) == bool(config.programs)
    assert rendered.config.programs < rendered.config.tiles(m, n)


@pytest.mark.parametrize(
    ("scheme", "m", "dtype", "parts"),
    [
        ("int8dq", 1, "bfloat16", 1), ("int8dq-asymact", 2, "float16", 1), ("int8dq", 4, "float32", 1),
        ("int8dq-int4w", 1, "bfloat16", 2), ("int8dq-int4w", 4, "bfloat16", 1),
    ],
)
def test_weights_are_on_their_way_before_x_is_waited_for(scheme: str, m: int, dtype: str, parts: int, tmp_path: Path) -> None:
    """All of them, or a step's; and nothing of x but its range moves between threads."""
    n, k, config = (896, 4864, None) if scheme in INT4 else (4096, 4096, (gemv.DYNAMIC, gemv.EIGHT_WARPS))
    rendered = offline.render(scheme, m, n, k, getattr(torch, dtype), bias=False, config=config, quantizing=True)
    built = offline.assemble(rendered.code, tmp_path)
    loads, rows = re.findall(r"bar\.sync|ld\.global\.L1::(evict_\w+)", built.asm["ptx"]), 8 * parts
    assert loads[: rows + 1] == ["evict_first"] * rows + [""] and "evict_first" not in loads[rows + 1 :], loads
    assert built.metadata.shared <= 1024


CASES = [
    ("int8dq", "bfloat16", 1, 33, 64), ("int8dq-asymact", "float16", 2, 35, 208), ("int8dq", "float16", 3, 5, 14336),
    ("int8dq-asymact", "bfloat16", 4, 6, 14336), ("int8dq-asymact", "bfloat16", 1, 19, 1040), ("int8dq", "bfloat16", 4, 33, 1040),
    ("int8dq", "float32", 2, 17, 2064), ("int8dq-asymact", "float32", 3, 17, 2064),
    ("int8dq", "bfloat16", 2, 40, 896), ("int8dq", "bfloat16", 1, 24, 4864), ("int8dq-asymact", "bfloat16", 3, 41, 528),
    # 9 tiles of 8 programs: a card of 132 multiprocessors takes the interpreter minutes
    ("int8dq", "bfloat16", 1, 17, 4112, Config(4, 2, 2048, 4, 1, programs=1)),
    ("int8dq-asymact", "float16", 4, 36, 1040, Config(4, 4, 1024, 2, 1, programs=1)),
    *(
        (scheme, "bfloat16", *size) for scheme, *size in (
            ("int8dq-int4w", 1, 48, 200), ("int8dq-int4w-asymact", 2, 35, 208), ("int8dq-int4w-asym-asymact", 4, 33, 1104),
            ("int8dq-int4w-asym", 3, 20, 20000), ("int8dq-int4w-128", 1, 33, 14336), ("int8dq-int4w-256-asym", 2, 33, 5000),
            ("int8dq-int4w-128-asym-asymact", 4, 20, 600), ("int8dq-int4w-128-asymact", 1, 19, 5000),
        )
    ),
]
RUN = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import pathlib, re, torch, offline, ptx
from aoquant_inductor import packing
from aoquant_inductor.templates import Config, gemv
ptx.teach()
torch.manual_seed(0)
for scheme, dtype, m, n, k, *config in {cases!r}:
    kind, asym = getattr(torch, dtype), "asymact" in scheme
    wanted, sms = ((gemv.DYNAMIC, *config), 8) if config else (None, 132)
    r = offline.render(scheme, m, n, k, kind, quantizing=True, config=wanted, sms=sms)
    assert not config or r.config.programs == sms < r.config.tiles(m, n)
    name, source, signature, _ = offline.kernel(r.code)
    assert r.code.count(".run(") == 1
    t, function = r.tensors, offline.load(name, source, pathlib.Path({tmp!r}))
    def run():
        y = torch.full((m, n), float("nan"), dtype=kind)
        args, grid = offline.call(r, name, y)
        function[grid](*args)
        return y
    # a code that differs is 1e-4 of the whole, an fp32 result differs from the reference's by 1e-6
    t["x"].copy_(t["x"].bfloat16())  # values whose quotients lie on a tie, as those of a model do
    y, want = run(), r.expected
    assert float((y.double() - want.double()).abs().max()) <= float(want.abs().max()) * {close!r}[dtype], (scheme, dtype)
    if kind == torch.float32:  # every value on a tie, up to the rounding of its scale and of its product with it
        for top in (1.25, 1.375, 1.5, 1.75, 1.875):
            t["x"].copy_((torch.randint(0 if asym else -127, 127, (m, k)) + 0.5) * top)
            t["x"][:, 1] = (255 if asym else 127) * top
            tied, want = run(), r.expected
            assert float((tied.double() - want.double()).abs().max()) <= float(want.abs().max()) * {close!r}[dtype], (scheme, top)
        t["x"].normal_()
        y = run()
    # rows without a range, and not finite: each its own
    t["x"][0] = 0
    assert torch.equal(run()[0], t["bias"])
    t["x"][0, k // 2] = float("nan")
    y2 = run()
    assert y2[0].isnan().all() and torch.equal(y2[1:], y[1:]), (scheme, dtype)
    # integers that are their own codes, scales of 1: the sums themselves
    t["x"].copy_(torch.randint(0 if asym else -7, 8, (m, k)))
    t["x"][:, -1] = 255 if asym else 127
    w = t["w"].random_(-127, 128) if "int4" not in scheme else packing.unpack(t["w"], k, n, "int4", "cuda_int8")
    t["scale"].fill_(1)
    t["bias"].copy_(torch.randint(-9, 10, (n,)))
    if asym:
        t["sums"][:, :n] = w.sum(1).float()
    groups = [int(size) for size in re.findall(r"w-(\\d+)", scheme)] or [k]
    z = t["zero"].double()[:, :n].repeat_interleave(groups[0], 0)[:k].t() if "zero" in t else 0
    want = t["x"].double() @ (w.double() - z).t() + t["bias"].double()
    assert torch.equal(run(), want.to(kind)) and torch.equal(r.expected, want.to(kind)), (scheme, dtype)
    print("right", scheme)
"""


def test_the_interpreter_agrees_with_the_reference(tmp_path: Path) -> None:
    here = Path(__file__).parent
    close = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2e-6}
    script = RUN.format(tests=str(here), root=str(here.parent), cases=CASES, tmp=str(tmp_path), close=close)
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("right") == len(CASES)


@offline.FIXED_ROWS
@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_quantized_without_a_conversion_per_element(scheme: str) -> None:
    """A GPU rounds, and makes an integer of fp32, at a quarter of its rate: more than the bytes of a row cost."""
    code = offline.render_chain(scheme, rows(64, 1280), 1).code
    assert offline.launches(code) == ["unk", "tem"]
    kernel = code.split("def triton_unk")[1].split("device_str")[0]
    assert ".to(tl.int32, bitcast=True)" in kernel
    assert not re.search(r"nearbyint|rint|round", kernel), kernel
