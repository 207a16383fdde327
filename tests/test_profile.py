"""The profile runs, writes rows that can travel and counts our kernels. Tiny; no number is judged."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the cases need the extra [demo]")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not in the wheel

from aoquant_inductor import packing_cpu
from benchmarks import bench_profile

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(folder: Path, bench: str) -> list[dict[str, str]]:
    (path,) = folder.glob(f"*.{bench}.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_profile_names_one_kernel_of_ours_per_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--device", "cpu", "--case", "toy", "--scheme", "int8wo", "--reps", "3", "--results", str(tmp_path)]
    assert bench_profile.main(argv) == 0
    rows = rows_of(tmp_path, "profile")
    ours = [row for row in rows if row["by"] == "aoquant"]
    # the two linears; without our kernels Inductor makes them, dequantize and product fused into one
    assert sum(float(row["count"]) for row in ours) == (2 if packing_cpu.instruction_set() else 0), rows
    assert any("linear_wo" in row["kernel"] or row["by"] == "aoquant" for row in rows), rows
    assert not [row for row in rows if row["by"] in ("matmul", "other")], rows
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)
    assert [float(row["us"]) for row in rows] == sorted((float(row["us"]) for row in rows), reverse=True)
    assert ("aoquant" in capsys.readouterr().out) == (packing_cpu.instruction_set() is not None)


def test_makers_by_the_names_that_cuda_shows() -> None:
    names = {
        "triton_tem_fused_add_linear_wo_mul_12": "aoquant",
        "triton_tem_fused_linear_dynamic_3": "aoquant",
        "triton_tem_fused_mm_0": "inductor",
        "triton_poi_fused_linear_wo_mul_silu_4": "inductor",
        "triton_red_fused__scaled_dot_product_flash_attention_add_mean_mul_pow_rsqrt_1": "inductor",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64>>": "attention",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNN": "matmul",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmul",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>": "convolution",
        "Memcpy DtoD (Device -> Device)": "copy",
        "void at::native::vectorized_elementwise_kernel<4>": "other",
    }
    assert {name: bench_profile.maker(name) for name in names} == names


def test_kernels_are_counted_and_timed_per_step() -> None:
    found = bench_profile.kernels([("a", 1.0), ("b", 6.0), ("a", 3.0), ("b", 10.0)], steps=2)
    assert [(k.kernel, k.count, k.us, k.share) for k in found] == [("b", 1.0, 8.0, 0.8), ("a", 1.0, 2.0, 0.2)]
