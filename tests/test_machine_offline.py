"""What two versions of ptxas make of the carried configs: the new one no hazard, the old one many."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import offline
from test_triton_offline import distinct

from aoquant_inductor import _inductor_machine, card, ptxas
from aoquant_inductor.machine_code import disassemble, hazards
from aoquant_inductor.templates import Config, Kernel, int4, int4_few, linear

NEWER = ptxas.installed()
SCHEMES = {
    "int8wo": linear.INT8_WEIGHT_ONLY, "int4wo-128": int4.SUMS, "int4wo-128-asym": int4.SUMS, "int4wo-32": int4.ONE_SUM, "int4wo-32-asym": int4.ONE_SUM,
    "int4wo-row": int4.ONE_SUM, "int4wo-64-asymfloat": int4.ONE_SUM,
}
CARRIED = [(scheme, kernel, config) for scheme, kernel in SCHEMES.items() for config in distinct(kernel) if config.carried and not offline.crowded(scheme, 256, kernel, config)]
IN_THREE = [("int8wo", linear.INT8_WEIGHT_ONLY, replace(linear.W_CARRIED, split_k=3)), ("int4wo-128", int4.SUMS, replace(int4.L_CARRIED, split_k=3))]
CARRIED += [*IN_THREE, *((scheme, kernel, replace(config, split_k=6)) for scheme, kernel, config in IN_THREE)]
needs_newer = pytest.mark.skipif(NEWER is None, reason="no ptxas of nvidia-cuda-nvcc, of the extra dev")


@contextlib.contextmanager
def assembler(path: Path, folder: Path) -> Iterator[None]:
    """Triton assembles with this ptxas, and takes nothing from its cache that another one made."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    get_ptxas_version.cache_clear()
    variables = dict.fromkeys(ptxas.VARIABLES, str(path)) | {"TRITON_CACHE_DIR": str(folder / str(card.version_of(str(path))))}
    try:
        with mock.patch.dict(os.environ, variables):
            yield
    finally:
        get_ptxas_version.cache_clear()


def machine_code(rendered: offline.Rendered, folder: Path) -> str:
    built = offline.assemble(rendered.code, folder)
    log = offline.ptxas_log(built, folder)
    assert "serializ" not in log and "0 bytes spill stores, 0 bytes spill loads" in log
    text = disassemble(built.asm["cubin"])
    assert text is not None and re.search(r"HGMMA\.64x\d+x16\.F32\.BF16 R\d+, R\d+, gdesc", text)
    return text


@needs_newer
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scheme", "kernel", "config"), CARRIED, ids=lambda v: str(v) if isinstance(v, Config) else "")
def test_a_new_ptxas_makes_every_carried_config_right(scheme: str, kernel: Kernel, config: Config, bias: bool, tmp_path: Path) -> None:
    assert NEWER is not None and card.version_of(str(NEWER)) >= card.SAFE_PTXAS
    if config.split_k == 3 and bias and int4_few.spills_sooner():
        pytest.skip("8 bytes on the stack by Triton 3.8")
    n, k = (17920, 512) if config.tail else (256, 2048)  # more tiles than multiprocessors
    with assembler(NEWER, tmp_path):
        rendered = offline.render(scheme, 256, n, k, torch.bfloat16, bias=bias, config=(kernel, config))
        assert ("TAIL : tl.constexpr = 132" in rendered.code) == bool(config.tail)
        assert hazards(machine_code(rendered, tmp_path)) == []


@needs_newer
@pytest.mark.parametrize(
    ("scheme", "kernel", "config"),
    [("int8wo", linear.INT8_WEIGHT_ONLY, linear.W_CARRIED), ("int4wo-32-asym", int4.ONE_SUM, int4.L_CARRIED), ("int4wo-32-asym", int4.ONE_SUM, int4.L128_CARRIED)],
)
def test_two_steps_of_k_are_right_and_one_is_no_choice(scheme: str, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    """ptxas 13.5 makes one wrong, of int4wo-32-asym with a bias."""
    assert NEWER is not None
    config = replace(config, split_k=1)
    with assembler(NEWER, tmp_path):
        rendered = offline.render(scheme, 256, 256, 2 * config.block_k, torch.bfloat16, config=(kernel, config))
        assert hazards(machine_code(rendered, tmp_path)) == []
        with pytest.raises(Exception, match="CannotRun"):
            offline.render(scheme, 256, 256, config.block_k, torch.bfloat16, config=(kernel, config))


@needs_newer
@pytest.mark.parametrize(("scheme", "kernel", "config"), [("int8wo", linear.INT8_WEIGHT_ONLY, linear.W_CARRIED), ("int4wo-128", int4.SUMS, int4.L_CARRIED)])
def test_an_old_ptxas_does_not(scheme: str, kernel: Kernel, config: Config, tmp_path: Path) -> None:
    import triton

    old = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not card.UNKNOWN < card.version_of(str(old)) < card.SAFE_PTXAS:
        pytest.skip("Triton brings no old ptxas")
    assert NEWER is not None
    with assembler(NEWER, tmp_path):
        rendered = offline.render(scheme, 256, 256, 2048, torch.bfloat16, bias=False, config=(kernel, config))
    with assembler(old, tmp_path):
        assert len(hazards(machine_code(rendered, tmp_path))) > 10
        with pytest.raises(Exception, match="CannotRun"):
            offline.render(scheme, 256, 256, 2048, torch.bfloat16, bias=False, config=(kernel, config))


@needs_newer
@pytest.mark.parametrize("static", [False, True], ids=["Triton's launcher", "Inductor's"])
def test_the_check_finds_the_machine_code_of_what_inductor_compiled(static: bool, tmp_path: Path) -> None:
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    assert NEWER is not None
    with assembler(NEWER, tmp_path), config.patch(use_static_triton_launcher=static):
        plain, rendered = (
            offline.render("int8wo", 256, 256, 2048, torch.bfloat16, config=(linear.INT8_WEIGHT_ONLY, taken))
            for taken in (linear.W128, replace(linear.W_CARRIED, tma=False))  # a descriptor needs memory: Triton's launcher
        )
        assert _inductor_machine.carried(plain.code) == []
        (name,) = _inductor_machine.carried(rendered.code)
        source = re.search(rf"{name} = async_compile\.triton\('{name}', '''(.*?)''', device_str", rendered.code, re.S)
        assert source is not None
        with offline.pretended_gpu(), mock.patch.object(triton_helpers, "set_driver_to_gpu"):
            PyCodeCache.cache_clear()
            tuner = getattr(PyCodeCache.load(source.group(1)), name)
            tuner._precompile_worker()
            (result,) = tuner.compile_results
            cubin = _inductor_machine._cubin(result)
            assert cubin is not None and (type(result).__name__ == "StaticTritonCompileResult") == static
            if static:  # as it is once the kernel is on the card
                result.kernel.cubin_path = result.kernel.cubin_raw = None
                assert _inductor_machine._cubin(result) == cubin
            _inductor_machine._check_kernel(name, tuner)
