"""How a Triton kernel loads and stores, by its PTX, without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU is not pretended", allow_module_level=True)

import offline

from aoquant_inductor.machine_code import disassemble
from aoquant_inductor.templates import Config, Kernel, costs, gemv, int4, int4_few, linear


@pytest.mark.parametrize(("scheme", "kernel", "config", "loads"), [
    ("int4wo-32", int4_few.FMA, int4_few.FMA_HALF, {"v4.b32"}), ("int4wo-32-asym", int4_few.FMA, int4_few.FMA_HALF, {"v4.b32"}),
    ("int4wo-32", int4_few.GEMV_GROUPS, int4_few.GEMV_TWO_PAIR, {"v4.b32"}), ("int4wo-64", int4_few.GEMV_GROUPS, int4_few.GEMV_TWO_PAIR, {"v2.b32"}),
], ids=lambda v: v if isinstance(v, str) else "")
def test_the_scales_of_a_chunk_are_one_load(scheme: str, kernel: Kernel, config: Config, loads: set[str], tmp_path: Path) -> None:
    rendered = offline.render(scheme, 1, 256, 4096, torch.bfloat16, bias=False, config=(kernel, config))
    ptx = str(offline.assemble(rendered.code, tmp_path).asm["ptx"])
    # weights and x have a policy of eviction, scales and zeros have none
    assert set(re.findall(r"ld\.global\.((?:v\d\.)?b\d+)", ptx)) == loads


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("scheme", ["int4wo-128-asym", "int4wo-32"])
def test_one_tokens_weights_are_on_their_way_before_x(scheme: str, rows: int, tmp_path: Path) -> None:
    """All of K at once, 16 bytes a load; then x, of which nothing moves between warps."""
    rendered = offline.render(scheme, 1, 256, 4096, torch.bfloat16, bias=False, config=(int4_few.FMA, replace(int4_few.FMA_FULL, block_n=rows)))
    built = offline.assemble(rendered.code, tmp_path)
    ptx = str(built.asm["ptx"])
    loads = re.findall(r"ld\.global\.L1::(evict_\w+)\S*\.v4\.b32|(bar\.sync)", ptx[: ptx.index("fma.rn.f32")])
    assert [a or b for a, b in loads] == ["evict_first"] * rows + ["bar.sync"] + ["evict_last"] * 4, loads
    assert ptx.index("evict_first") < max(m.start() for m in re.finditer(r"ld\.global\.(?:v\d\.)?b", ptx)) < ptx.index("bar.sync"), "scales"
    assert built.metadata.shared <= 4096


@pytest.mark.parametrize(("scheme", "m"), [("int4wo-128", 1), ("int4wo-128", 3), ("int4wo-32", 1)])
def test_few_tokens_move_nothing_between_threads_but_sums(scheme: str, m: int, tmp_path: Path) -> None:
    """Columns of the tensor core that are parts of K: of x a thread loads two words for a token and a chunk, which nobody else has."""
    kernel = int4_few.GEMV if scheme == "int4wo-128" else int4_few.GEMV_GROUPS
    rendered = offline.render(scheme, m, 256, 4096, torch.bfloat16, bias=False, config=(kernel, int4_few.GEMV_ALL))
    ptx = str(offline.assemble(rendered.code, tmp_path).asm["ptx"])
    before = ptx[: [at.start() for at in re.finditer("mma.sync", ptx)][-1]]
    assert not re.search(r"bar\.sync|st\.shared|shfl", before)
    steps = 2
    assert len(re.findall(r"evict_last\S*\.b32", before)) == steps * 2 * (1 if m == 1 else 4)
    assert len(re.findall(r"evict_first\S*\.v4\.b32", before)) == steps * 2


@pytest.mark.parametrize("k", [4096, 14336])
def test_the_first_weights_are_on_their_way_while_x_is_paired_up(k: int, tmp_path: Path) -> None:
    """Four threads exchange what they loaded of x: within their warp, and before they need a weight."""
    rendered = offline.render("int8wo", 1, 256, k, torch.bfloat16, bias=False, config=(gemv.KERNEL, gemv.FOUR if k == 4096 else gemv.STEPPED))
    ptx = str(offline.assemble(rendered.code, tmp_path).asm["ptx"])
    order = re.findall(r"ld\.global\.L1::(evict_\w+)\S*\.v4\.b32|(bar\.sync|ldmatrix)", ptx[: ptx.index("fma.rn.f32")])
    x, w, exchange = "evict_last", "evict_first", "ldmatrix"
    whole = [x] * 4 + [w] * 8 + ["bar.sync"] + [exchange] * 4 + ["bar.sync"]
    stepped = [w] * 4 + ["bar.sync"] + [x] * 2 + ["bar.sync"] + [exchange] * 2
    assert [a or b for a, b in order] == (whole if k == 4096 else stepped), order


@pytest.mark.parametrize(("scheme", "kernel", "config"), [
    ("int8wo", linear.INT8_WEIGHT_ONLY, replace(linear.W16, split_k=4)), ("int8wo", linear.INT8_WEIGHT_ONLY, replace(linear.W64, split_k=16)),
    ("int8wo", linear.INT8_WEIGHT_ONLY, replace(linear.W128, split_k=2)), ("int8dq", linear.INT8_DYNAMIC, replace(linear.D64_WIDE, split_k=4)),
    ("int4wo-128", int4.SUMS, replace(int4.L16, split_k=8)), ("int4wo-128", int4.SUMS, replace(int4.L128_WIDE, split_k=2)),
    ("int8dq-int4w", int4.DYNAMIC_ROW, replace(int4.D_SMALL, split_k=2)),
], ids=lambda v: v if isinstance(v, str) else "")
def test_a_part_of_a_sum_goes_to_memory_as_the_tensor_core_holds_it(scheme: str, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    """16 bytes of a thread at once, and nothing through shared memory or between threads before it is counted."""
    rendered = offline.render(scheme, config.block_m, 256, 4096, torch.bfloat16, bias=False, config=(kernel, config))
    ptx = str(offline.assemble(rendered.code, tmp_path).asm["ptx"])
    stores, _ = ptx[ptx.rindex("wgmma.wait_group") :].split("atom.", 1)
    assert not re.search(r"[sl][td]\.shared|stmatrix|shfl", stores), stores
    assert re.findall(r"st\.global\.(\S+)", stores) == ["v4.b32"] * (config.block_m * config.block_n // (128 * config.num_warps))


@pytest.mark.parametrize(("m", "divides"), [(256, False), (2048, False), (1100, True)])  # two tiles below each other; two groups of eight; nine
def test_a_program_divides_for_its_tile_only_where_groups_are_not_equal(m: int, divides: bool, tmp_path: Path) -> None:
    """A division by what only a program knows takes 200 clocks, which every load waits for."""
    rendered = offline.render("int8dq", m, 5120, 1280, torch.bfloat16, config=(linear.INT8_DYNAMIC, Config(128, 64, 128, 4, 4)))
    ptx = str(offline.assemble(rendered.code, tmp_path).asm["ptx"])
    before = ptx[: ptx.index("cp.async")]
    assert bool(re.search(r"\b(?:div|rem)\.[su]32", before)) == divides


@pytest.mark.parametrize(("scheme", "m", "kernel", "config"), [
    ("int8wo", 16, linear.INT8_WEIGHT_ONLY, replace(linear.W16, split_k=4)), ("int4wo-128", 16, int4.SUMS, replace(int4.L16, split_k=6)),
    ("int8dq", 256, linear.INT8_DYNAMIC, replace(linear.D512, split_k=2)), ("int4wo-128", 256, int4.SUMS, replace(int4.L128, split_k=2)),
], ids=lambda v: str(v) if isinstance(v, Config) else "")
def test_parts_are_loaded_past_l1_and_behind_their_count(scheme: str, m: int, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    """The machine code: a program's part is in memory before it counts, and no other's is asked for before it has. Of a small tile
    nothing empties L1.
    """
    rendered = offline.render(scheme, m, 256, 4096, torch.bfloat16, bias=False, config=(kernel, config))
    text = disassemble(offline.assemble(rendered.code, tmp_path).asm["cubin"])
    assert text is not None
    found = [what for what, _ in groupby(re.findall(r"\b(MEMBAR|ATOMG|CCTL\.IVALL|LDG\.E\.128\.STRONG\.GPU)", text))]
    assert found[:2] == ["MEMBAR", "ATOMG"] and found[-1] == "LDG.E.128.STRONG.GPU", found
    assert found.count("LDG.E.128.STRONG.GPU") == 1, found
    assert ("CCTL.IVALL" in found) == costs.sliced(config.block_m * config.block_n), found
