"""The Triton templates without a GPU: compiled for several architectures, and what their graphs hold."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the template itself", allow_module_level=True)

import offline
from interpreted import ROWS

from aoquant_inductor import card
from aoquant_inductor._inductor_choices import EARLY
from aoquant_inductor._inductor_reduction import warps
from aoquant_inductor.templates import Config, Kernel, gemv, int4, int4_few, linear

INT8 = {80: "m16n8k32.*s32.s8.s8", 90: "(wgmma.*|m16n8k32.*)s32.s8.s8", 100: "(tcgen05.mma.*|m16n8k32.*s32.s8.s8)"}
BF16 = {80: "m16n8k16.*f32.bf16.bf16", 90: "(wgmma.*|m16n8k16.*)f32.bf16.bf16", 100: "(tcgen05.mma.*kind::f16|m16n8k16.*bf16.bf16)"}
WANTED = {
    "int8wo": BF16, "int8dq": INT8, "int4wo-32-asym": BF16, "int4wo-128": BF16, "int8dq-int4w-128-asym-asymact": INT8,
}


def check(rendered: offline.Rendered, folder: Path, arch: int) -> str:
    """The PTX of the kernel; ptxas spilled nothing and serialized no wgmma."""
    built = offline.assemble(rendered.code, folder, arch)
    log = offline.ptxas_log(built, folder)
    assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", log), log
    assert "serializ" not in log, log
    return str(built.asm["ptx"])


@pytest.mark.parametrize("arch", [80, 86, 90, 100])
@pytest.mark.parametrize("scheme", WANTED)
def test_defaults_compile_to_the_instruction_meant(scheme: str, arch: int, tmp_path: Path) -> None:
    for m in (8, 256):
        rendered = offline.render(scheme, m, 256, 576, torch.bfloat16, arch=arch)
        ptx = check(rendered, tmp_path, arch)
        wanted = WANTED[scheme][arch // 10 * 10]
        assert re.search(wanted, ptx), (m, sorted(set(re.findall(r"(?:wgmma|mma)\.\S+", ptx))))
        assert arch != 90 or m == 8 or "wgmma.mma_async" in ptx


@pytest.mark.parametrize("arch", [90, 100])
def test_many_rows_of_int8_beside_a_bias(arch: int, tmp_path: Path) -> None:
    rendered = offline.render("int8dq", 4096, 4096, 1024, torch.bfloat16, arch=arch)
    assert re.search(INT8[arch], check(rendered, tmp_path, arch))


@pytest.mark.parametrize("arch", [80, 89, 120])
@pytest.mark.parametrize("scheme", ["int4wo-128", "int4wo-32-asym", "int8dq-int4w-128-asym-asymact", "int8wo"])
def test_a_default_has_the_shared_memory_that_it_needs(scheme: str, arch: int, tmp_path: Path) -> None:
    """More than there is fails at the first launch; and 128 rows of int4 fit, which count a buffer less than stages."""
    for m in (64, 256):
        rendered = offline.render(scheme, m, 6144, 2048, torch.bfloat16, arch=arch)
        built = offline.assemble(rendered.code, tmp_path, arch)
        assert built.metadata.shared <= offline.SHARED[arch], rendered.code
        assert m == 64 or not scheme.startswith("int4wo") or "BLOCK_M : tl.constexpr = 128" in rendered.code


def distinct(kernel: Kernel) -> list[Config]:
    """Its configs, each with one split: the machine code differs in nothing else."""
    return list(dict.fromkeys(replace(config, split_k=min(2, abs(config.split_k))) for config in kernel.configs))


FAST = (
    ("int8dq", 256, linear.INT8_DYNAMIC), ("int8dq", 256, linear.PERSISTENT), ("int8dq-asymact", 256, linear.PERSISTENT), ("int8wo", 256, linear.INT8_WEIGHT_ONLY), ("int8wo", 1, gemv.KERNEL), ("int8wo", 3, gemv.KERNEL),
    ("int4wo-128", 1, int4_few.GEMV), ("int4wo-128", 4, int4_few.GEMV), ("int4wo-128", 8, int4_few.GEMV), ("int4wo-row-asym", 2, int4_few.GEMV), ("int4wo-32", 1, int4_few.GEMV_GROUPS), ("int4wo-32-asym", 3, int4_few.GEMV_GROUPS_ZERO), ("int4wo-128", 1, int4_few.FMA), ("int4wo-32", 1, int4_few.FMA),
    ("int4wo-32-asym", 1, int4_few.FMA), ("int4wo-128-asym", 1, int4_few.GEMV), ("int4wo-128-asymfloat", 1, int4_few.GEMV_FLOAT), ("int4wo-64", 8, int4_few.GEMV_GROUPS), ("int4wo-32-asym", 1, int4_few.GEMV_GROUPS_ZERO), ("int4wo-32-asym", 8, int4_few.GEMV_GROUPS_ZERO), ("int4wo-32-asymfloat", 1, int4_few.GEMV_GROUPS_ZERO), ("int4wo-32-asymfloat", 8, int4_few.GEMV_GROUPS_ZERO), ("int4wo-128-asym", 256, int4.SUMS), ("int4wo-32", 256, int4.ONE_SUM),
    ("int4wo-row", 256, int4.ONE_SUM), ("int8dq-int4w", 256, int4.DYNAMIC_ROW), ("int8dq-int4w-128", 256, int4.DYNAMIC_GROUPS),
)
CONFIGS = [(scheme, m, kernel, config) for scheme, m, kernel in FAST for config in distinct(kernel) if not config.carried and not offline.crowded(scheme, m, kernel, config)]
CONFIGS += [("int8wo-128", 64, linear.INT8_WEIGHT_ONLY, config) for config in (linear.W16, linear.W64_WIDE, linear.W128)]


@pytest.mark.parametrize(("scheme", "m", "kernel", "config"), CONFIGS, ids=lambda v: str(v) if isinstance(v, Config) else "")
def test_every_config_compiles_without_spills(scheme: str, m: int, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    m, n = (config.block_m, 17920) if config.tail else (m, 256)  # of a tail some tiles more than multiprocessors
    rendered = offline.render(scheme, m, n, max(2048, config.block_k), torch.bfloat16, bias=False, config=(kernel, config))
    assert ("TAIL : tl.constexpr = 132" in rendered.code) == bool(config.tail)
    ptx = check(rendered, tmp_path, 90)
    few = {"gemv": "fma.rn.f32", "int4_fma": "fma.rn.f32", "int4_gemv": "mma.sync.aligned.m16n8k16"}
    assert few.get(kernel.template, "wgmma.mma_async") in ptx
    # the hazard of `carried` needs a wgmma that is still running when its registers are written again
    assert set(re.findall(r"wgmma.wait_group.sync.aligned (\d+)", ptx)) <= {"0"}


INT8_ZEROS = {"weight": "int8", "symmetric": False}


@pytest.mark.parametrize(("scheme", "m", "n", "k"), [
    (INT8_ZEROS, 256, 5120, 1280), (INT8_ZEROS | {"activation": "int8"}, 1024, 1280, 5120), (INT8_ZEROS | {"group_size": 64}, 256, 5120, 1280),
])
def test_int8_with_zeros_compiles_where_others_take_a_tail(scheme: dict[str, Any], m: int, n: int, k: int, tmp_path: Path) -> None:
    check(offline.render(scheme, m, n, k, torch.bfloat16), tmp_path, 90)


def test_int8_with_zeros_is_copied_by_what_knows_them() -> None:
    """In default mode at 1280x5120, and in a backward: Inductor's own kernel writes the weight."""
    code = offline.render(INT8_ZEROS, 1024, 1280, 5120, torch.bfloat16).code
    assert "extern_kernels." in code and "aoquant_int8_dense" not in code
    for more in ({}, {"group_size": 64}, {"zero_point": "float"}):
        rendered, layout = offline.render_grad(INT8_ZEROS | more, 64, 256, 256, torch.bfloat16)
        assert layout == "wgmma" and "extern_kernels.mm" in rendered.code and "aoquant_int8_dense" not in rendered.code


def test_the_version_of_ptxas_is_known_here() -> None:
    assert card.ptxas_version(90) >= (12, 0)


@pytest.mark.parametrize("scheme", ["int8dq", "int8dq-asymact"])
def test_quantized_once_in_the_producer_and_all_else_in_the_epilogue(scheme: str) -> None:
    """RMSNorm -> two linears -> silu(a) * b + residual: one kernel before the matmuls, none between them or after, no int32 tile."""
    rendered = offline.render_gated(scheme, 512, 2048, 1024)
    names = re.findall(r"^(triton_\w+) = async_compile", rendered.code, re.M)
    counts = Counter(name.split("_")[1] for name in names)
    assert counts["per"] + counts["red"] == 1 and not counts["poi"], names
    calls = re.findall(r"triton_tem\w+\.run\(", rendered.code)
    assert len(calls) == 2, rendered.code
    sizes = re.findall(r"empty_strided_cuda\(\((?:512, \d{2,})\), \S+ 1\), torch.(\w+)\)", rendered.code)
    assert sorted(sizes) == ["bfloat16", "bfloat16", "int8"], sizes


@pytest.mark.parametrize(("start", "k", "by_tma"), [(0, 1024, True), (8, 1024, True), (1, 1024, False), (0, 1020, False)])
def test_x_comes_by_tma_only_where_its_rows_begin_with_16_bytes(start: int, k: int, by_tma: bool) -> None:
    config, rows = (int4.SUMS, Config(64, 64, 128, 4, 3, tma=True)), torch.randn(start + 200 * k).bfloat16()
    rendered = offline.render("int4wo-128", 200, 128, k, torch.bfloat16, config=config, x=(rows, lambda x: x.as_strided((200, k), (k, 1), start)))
    assert ("x_blocks.load" in rendered.code) == by_tma
    # the host makes the descriptor of what begins with its memory
    assert ("@describing(" in rendered.code) == (by_tma and not start)


@offline.FIXED_ROWS
@pytest.mark.parametrize("m", [2, 512])
@pytest.mark.parametrize("k", [4096, 14336])
def test_a_row_is_read_once_to_be_quantized(m: int, k: int) -> None:
    rendered = offline.render_gated("int8dq", m, 64, k)
    names = re.findall(r"^(triton_\w+) = async_compile", rendered.code, re.M)
    # a "poi" of two rows fills the counters of split-K
    assert [kind for name in names if (kind := name.split("_")[1]) in ("unk", "per", "red")] == ["unk"], names
    # "unk": a config of ours


@offline.FIXED_ROWS
def test_a_row_of_a_window_is_read_once_to_be_quantized() -> None:
    """Rows that are taken in another order than they lie, as SAM's windows of 14x14, which Inductor does not call INNER."""

    def windows(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(torch.nn.functional.layer_norm(x, (1280,)), (0, 0, 0, 6, 0, 6))
        return x.reshape(2, 5, 14, 5, 14, 1280).permute(0, 1, 3, 2, 4, 5).reshape(50, 14, 14, 1280)

    code = offline.render_chain("int8dq", torch.randn(2, 64, 64, 1280).bfloat16(), 1, of=windows).code
    assert offline.launches(code) == ["red", "unk", "tem"], code  # LayerNorm's statistics, the codes, the linear


def test_warps_that_a_row_is_a_multiple_of() -> None:
    assert {k: warps(k) for k in (1280, 3072, 4096, 4864, 5120, 8192, 14336, 16384)} == {
        1280: 1, 3072: 4, 4096: 8, 4864: 4, 5120: 4, 8192: 8, 14336: 16, 16384: 16,
    }


def test_no_row_is_fixed_where_inductor_fails_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.0"))
    code = offline.render_chain("int8dq", torch.randn(64, 1280).bfloat16(), 1).code
    assert offline.launches(code) == ["per", "tem"]


@offline.FIXED_ROWS
@pytest.mark.parametrize(("patches", "kind"), [({}, "unk"), ({"coordinate_descent_tuning": True}, "per")])
def test_where_inductor_measures_configs_they_are_its_own(patches: dict[str, Any], kind: str) -> None:
    code = offline.render_chain("int8dq", torch.randn(64, 1280).bfloat16(), 1, patches=patches).code
    assert offline.launches(code) == [kind, "tem"]
    assert ("{'XBLOCK': 1, 'num_warps': 1}" in code) == (kind == "unk")


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("scheme", ROWS)
def test_the_int8_weight_compiles_without_spills(scheme: str, arch: int, tmp_path: Path) -> None:
    rendered, p = offline.render_rows(scheme, 256, 2048)
    assert p.layout == "cuda_bf16"
    ptx = check(rendered, tmp_path, arch)
    assert "st.global.v4.b32" in ptx, "16 values of int8 at once"


def test_many_rows_are_three_kernels() -> None:
    """x quantized, the weight made int8, one matmul of integers with all else in its epilogue."""
    rendered = offline.render_large("int4wo-128-large8", 512, 2048, 1024)
    calls = re.findall(r"(triton_\w+?)_?\d*\.run\(", rendered.code)
    assert sorted("template" if "tem" in call else call for call in calls)[:2] == ["template", "template"], calls
    assert len(calls) == 3 and "extern_kernels." not in rendered.code, rendered.code


@pytest.mark.parametrize(
    ("scheme", "dtype", "layout"),
    [("int8wo", torch.bfloat16, "wgmma"), ("int4wo-128-asym", torch.bfloat16, "cuda_bf16"), ("int8dq", torch.bfloat16, "plain"),
     ("int8dq-int4w", torch.bfloat16, "cuda_int8"), ("int4wo-32-asymfloat", torch.float16, "plain")],
)  # fmt: skip
def test_the_backward_dequantizes_and_multiplies(scheme: str, dtype: torch.dtype, layout: str) -> None:
    """In the graph, by one kernel and one matmul: no call of the eager reference."""
    rendered, found = offline.render_grad(scheme, 32, 256, 384, dtype)
    assert found == layout
    assert "extern_kernels.mm(" in rendered.code
    assert "aoquant.linear_grad.default(" not in rendered.code


EARLY_CASES = [
    (scheme, m) for scheme in ("int8wo", "int8dq", "int4wo-128", "int4wo-32", "int8dq-int4w-128") for m in (1, 16, 64)
]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("scheme", "m"), EARLY_CASES)
def test_kernels_of_few_rows_overlap_where_asked_and_wait_before_they_read(
    scheme: str, m: int, arch: int, tmp_path: Path
) -> None:
    from torch._inductor import config

    def ours(code: str) -> str:
        (text,) = (part for part in code.split("async_compile.triton(")[1:] if part.startswith("'triton_tem"))
        return text

    plain = ours(offline.render(scheme, m, 512, 1024, torch.bfloat16, arch=arch).code)
    with config.patch({"triton.enable_pdl": True}):
        rendered = offline.render(scheme, m, 512, 1024, torch.bfloat16, arch=arch)
    early = ours(rendered.code)
    assert "gdc_" not in plain and "'launch_pdl': True" not in plain
    if arch < 90 or m > EARLY:
        assert "gdc_" not in early and "'launch_pdl': True" not in early
        return
    assert "'launch_pdl': True" in early
    ptx = offline.assemble(rendered.code, tmp_path, arch).asm["ptx"]
    wait, release = (ptx.index(f"griddepcontrol.{word}") for word in ("wait", "launch_dependents"))
    assert wait < min(ptx.index(word) for word in ("ld.global", "cp.async") if word in ptx)
    assert wait < release < ptx.rindex("st.global")
