"""Who may be carried, and the check of what Inductor compiled: with the parts that need a card replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from util import block, compiled, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import _inductor, _inductor_machine, card, lowering, machine_code, ptxas
from aoquant_inductor.errors import UnsafeMachineCode

KERNEL = """
{name} = async_compile.triton('{name}', '''
def {name}():
    CARRIED : tl.constexpr = {carried}
''', device_str='cuda')
"""
GOOD, BAD, ODD = b"good", b"bad", b"odd"
WGMMA = "/*0010*/ HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;\n"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is disassembled from here on: GOOD, BAD with a hazard, and ODD that cannot be."""
    found: list[bytes] = []

    def disassemble(cubin: bytes) -> str | None:
        found.append(cubin)
        return {GOOD: WGMMA, BAD: WGMMA + "/*0020*/ MOV R9, R2 ;\n"}.get(cubin)

    monkeypatch.setattr(machine_code, "disassemble", disassemble)
    monkeypatch.setattr(_inductor_machine, "_clean", set())
    return found


def of_triton(cubin: bytes) -> Any:
    return SimpleNamespace(compile_results=[SimpleNamespace(kernel=SimpleNamespace(asm={"ptx": "", "cubin": cubin}))])


class Launched:
    """A compile result of Inductor's own launcher, after its kernel was loaded onto the card."""

    def __init__(self, file: Path | None) -> None:
        self.file, self.kernel = file, SimpleNamespace(cubin_path=None, cubin_raw=None)

    def reload_cubin_path(self) -> None:
        if self.file is None:
            raise RuntimeError("not found")
        self.kernel.cubin_path = str(self.file)


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(carried kernels by name, others) -> a CompiledFxGraph as far as the check asks."""

    def make(kernels: dict[str, Any], others: dict[str, Any] | None = None) -> Any:
        source = "".join(KERNEL.format(name=name, carried=name in kernels) for name in {**(others or {}), **kernels})
        monkeypatch.setitem(sys.modules, "torch._inductor.runtime.compile_tasks.key", SimpleNamespace(**kernels, **(others or {})))
        return SimpleNamespace(source_code=source + "def call(args):\n    pass\n", cache_key="key")

    return make


def test_only_carried_kernels_are_read_and_each_once(read: list[bytes], graph: Any, tmp_path: Path) -> None:
    (tmp_path / "k.cubin").write_bytes(GOOD)
    _inductor_machine.check(graph({}, {"a": of_triton(BAD)}))
    assert read == []
    _inductor_machine.check(graph({"b": of_triton(GOOD)}, {"a": of_triton(BAD), "c": None}))
    _inductor_machine.check(graph({"b": of_triton(GOOD), "d": SimpleNamespace(compile_results=[Launched(tmp_path / "k.cubin")])}))
    assert read == [GOOD]
    _inductor_machine.check(SimpleNamespace())  # a graph without kernels is a function


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        (of_triton(BAD), 'of b that touches registers which the tensor core still works on, at 1 places, first "0x20 MOV R9, R2"'),
        (of_triton(ODD), "cannot be read"), (None, "cannot be read"), (SimpleNamespace(compile_results=[]), "cannot be read"),
        (SimpleNamespace(compile_results=[Launched(None)]), "cannot be read"),
        (SimpleNamespace(compile_results=[SimpleNamespace(kernel=SimpleNamespace(asm={"ptx": ""}))]), "cannot be read"),
        (SimpleNamespace(compile_results=[*of_triton(GOOD).compile_results, *of_triton(BAD).compile_results]), "would be wrong"),
    ],
)
def test_what_is_wrong_or_cannot_be_read_is_an_error_each_time(read: list[bytes], graph: Any, kernel: Any, text: str) -> None:
    for _ in range(2):
        with pytest.raises(UnsafeMachineCode) as caught:
            _inductor_machine.check(graph({"b": kernel}))
        assert text in str(caught.value)


def test_a_module_that_is_not_found_or_not_understood_is_an_error(read: list[bytes], graph: Any) -> None:
    compiled = graph({"b": of_triton(GOOD)})
    compiled.cache_key = "other"
    with pytest.raises(UnsafeMachineCode, match="of b cannot be read"):
        _inductor_machine.check(compiled)
    with pytest.raises(UnsafeMachineCode, match="of a kernel cannot be read"):
        _inductor_machine.check(SimpleNamespace(source_code=_inductor_machine.CARRIED, cache_key="key"))


CACHED = """
import sys, torch
from pathlib import Path
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from aoquant_inductor import _inductor_machine, backend, native
from aoquant_inductor.errors import UnsafeMachineCode

native._build = lambda ready: None  # half a minute of a core for an empty cache: the check for changed weights is in Python

def check(compiled):
    module = sys.modules[f"torch._inductor.runtime.compile_tasks.{compiled.cache_key}"]
    print("checked", "def call" in compiled.source_code and Path(module.__file__).read_text() == compiled.source_code)

_inductor_machine.on_hopper = lambda packs: True
real, _inductor_machine.check = _inductor_machine.check, check
with fresh_cache(), torch.no_grad():
    for i in range(4):
        if i == 2:  # as if the kernels were carried, and none is found
            _inductor_machine.CARRIED, _inductor_machine.check = "def call", real
        torch.compiler.reset()
        backend._seen.clear()
        counters.clear()
        try:
            torch.compile(torch.nn.Linear(32, 32), backend="aoquant")(torch.ones(2, 32))
        except UnsafeMachineCode as error:
            print("wrong", "cannot be read" in str(error))
        print("hits", counters["inductor"]["fxgraph_cache_hit"])
"""


def test_every_graph_is_checked_also_from_the_cache_and_a_wrong_one_leaves_it() -> None:
    """On a CPU, as if it were a Hopper card."""
    env = os.environ | {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "PYTHONPATH": str(Path(aoquant_inductor.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", CACHED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == [
        "checked True", "hits 0", "checked True", "hits 1", "wrong True", "hits 1", "wrong True", "hits 0",
    ]  # fmt: skip


@pytest.mark.parametrize(("version", "found"), [((12, 8), False), ((13, 2), False), ((13, 3), True), (card.UNKNOWN, False)])
def test_carried_needs_a_new_ptxas_whose_code_can_be_read(version: Any, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(machine_code, "disassembler", lambda: "nvdisasm")
    h100 = card.Card(90, 132, 232448, version)
    assert h100.may_carry == found
    with config.patch(cpp_wrapper=True):
        assert not h100.may_carry
    with config.patch(force_disable_caches=True):
        assert not h100.may_carry
    monkeypatch.setattr(machine_code, "disassembler", lambda: None)
    assert not h100.may_carry and card.Card(0, 304, 65536, card.UNKNOWN).may_carry


def test_the_cache_key_names_the_assembler_of_carried_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setattr(machine_code, "disassembler", lambda: "nvdisasm")

    def key(version: tuple[int, int], packs: Any = (pack, pack)) -> Any:
        monkeypatch.setattr(card.Card, "of", lambda device: card.Card(90, 132, 232448, version))
        variant = _inductor_machine.assembler(packs)
        return _inductor._with_version({}, variant)["post_grad_custom_post_pass"].uuid()

    assert key((12, 8)) == key((13, 0)) == key((13, 5), [torch.ones(2)]), "the kernels are the same"
    assert len({key((12, 8)), key((13, 3)), key((13, 5))}) == 3


def test_who_has_wgmma(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    for capability, found in (((8, 0), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, of=capability: of)
        assert _inductor_machine.on_hopper([pack]) == found  # type: ignore[list-item]
    assert not _inductor_machine.on_hopper([torch.ones(2)])


def test_the_path_of_the_installed_ptxas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ptxas, "ptxas_version", lambda arch: (13, 4))
    monkeypatch.setattr(ptxas, "version_of", lambda path: (13, 5))
    monkeypatch.setattr(ptxas, "installed", lambda: Path("/there/ptxas"))
    assert (ptxas.main(), capsys.readouterr()) == (0, ("/there/ptxas\n", ""))
    monkeypatch.setattr(ptxas, "version_of", lambda path: (13, 3))
    assert ptxas.main() == 1
    assert capsys.readouterr() == ("", "/there/ptxas is ptxas 13.3, older than Triton's own, which is 13.4.\n")
    monkeypatch.setattr(ptxas, "installed", lambda: None)
    assert ptxas.main() == 1
    assert capsys.readouterr() == ("", 'no ptxas is installed beside Triton\'s own: pip install "aoquant-inductor[cuda]".\n')


def test_the_installed_ptxas_runs() -> None:
    path = ptxas.installed()
    if path is None:
        pytest.skip("no ptxas of nvidia-cuda-nvcc, of the extra dev")
    done = subprocess.run([sys.executable, "-m", "aoquant_inductor.ptxas"], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip()) == (0, str(path)), done.stderr
    assert card.version_of(str(path)) >= (13, 3) and card.version_of("/nowhere/ptxas") == card.UNKNOWN


def test_the_report_says_once_that_a_newer_ptxas_would_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lowering.HINTS, "cpu", lambda device, layout, dtype: f"get {dtype}")
    model, x = block(), tokens()
    report = run(model, x, schemes="int8wo")[2]
    assert report.totals["hints"] == ["get torch.bfloat16"]
    assert str(report).splitlines()[-2:] == report.summary().splitlines() and report.summary().endswith("\nget torch.bfloat16")


@pytest.mark.parametrize(
    ("arch", "version", "layout", "dtype", "said"),
    [
        (90, (12, 8), "wgmma", torch.bfloat16, True), (90, (12, 8), "cuda_bf16", torch.bfloat16, True),
        (90, (13, 3), "wgmma", torch.bfloat16, False), (90, (12, 8), "wgmma", torch.float16, False),
        (80, (12, 8), "cuda_bf16", torch.bfloat16, False), (90, card.UNKNOWN, "wgmma", torch.bfloat16, False),
        (90, (12, 8), "plain", torch.bfloat16, False),
    ],
)  # fmt: skip
def test_who_gains_by_a_newer_ptxas(arch: int, version: Any, layout: str, dtype: torch.dtype, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card.Card, "of", lambda device: card.Card(arch, 132, 232448, version))
    text = 'ptxas 12.8: faster kernels for many rows need 13.3 (pip install "aoquant-inductor[cuda]", see its README).'
    assert lowering.hint(torch.device("cuda", 0), layout, dtype) == (text if said else None)
    assert lowering.hint(torch.device("cpu"), layout, dtype) is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_with_wrong_machine_code_is_compiled_again_by_other_kernels(
    dynamic: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU, as if its kernels were carried where they may be."""
    from aoquant_inductor import lowering_cpu

    may_carry: list[bool] = []

    def linear(p: Any, original: Any = lowering_cpu.linear) -> Any:
        may_carry.append(_inductor_machine.readable())
        name, node = original(p) or lowering.portable.linear(p)
        return f"{name} carried" if may_carry[-1] else name, node

    def refuse(compiled: Any) -> None:
        if may_carry[-1]:
            raise UnsafeMachineCode("a kernel", ["0x20 MOV R9, R2"])

    monkeypatch.setattr(machine_code, "disassembler", lambda: "nvdisasm")
    monkeypatch.setitem(lowering.BACKENDS, "cpu", (linear,))
    monkeypatch.setitem(lowering.M_RANGES, "cpu", (4,))
    monkeypatch.setattr(_inductor_machine, "on_hopper", lambda packs: True)
    monkeypatch.setattr(_inductor_machine, "check", refuse)
    model = block()
    function = compiled(model, "int8wo", dynamic=dynamic)
    with torch.no_grad(), caplog.at_level("WARNING", "aoquant_inductor"):
        for m in (7, 3) if dynamic else (7,):
            x = torch.randn(m, 32, dtype=torch.bfloat16)
            assert sqnr_db(function(x), model.reference(x)) > 45
    report = aoquant_inductor.report(function)
    assert may_carry == [True, False] * (2 if dynamic else 1) and len(caplog.records) == len(may_carry) // 2
    assert "carried" not in "".join(str(layer.kernel) for layer in report.layers), str(report)
    assert report.totals["quantized"] == 1 and len(report.totals["hints"]) == 1
    assert report.summary().endswith("Others were taken.")
