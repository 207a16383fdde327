"""What becomes of packs where weights die, threads share them, modules are pickled, a graph comes from a cache; weights of other kinds."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from util import BF16, INT8, Graph, assert_counts, block, compiled, our_kernel, run, sqnr_db, tokens

import aoquant_inductor
from aoquant_inductor import watch
from aoquant_inductor.entry import Entry
from aoquant_inductor.report import Report
from aoquant_inductor.weights import STORE


def test_packs_die_with_their_weights() -> None:
    gc.collect()
    model, x = block(), tokens()
    held = len(STORE)
    function, _, _ = run(model, x)
    assert len(STORE) == held + 1
    del model, function
    torch.compiler.reset()
    gc.collect()
    assert len(STORE) == held


def test_a_hundred_rounds_leave_nothing() -> None:
    """Compiled, called, looked up by a second instance, dropped: no pack, entry or watched weight stays behind."""
    gc.collect()
    held, x = len(STORE), tokens()
    keep = block()
    run(keep, x)
    live: list[int] = []
    for i in range(100):
        model = block()
        _, y, _ = run(model, x)
        assert i % 25 or sqnr_db(y, model.reference(x)) > 45
        del model
        if i % 25 == 24:
            gc.collect()
            live.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
            assert len(STORE) == held + 1
    assert max(live[1:]) <= live[0] + 5


def test_eight_threads(graphs: list[Graph]) -> None:
    """First calls, calls and updates at the same time: no error, and after it every answer is right."""
    models, x = [block() for _ in range(4)], tokens()
    functions = [compiled(model) for model in models]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for n in range(30):
                with torch.no_grad():
                    functions[(i + n) % 4](x)
                    if n % 10 == 9:
                        models[i % 4].a.weight.mul_(1.01)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with torch.no_grad():
        for function, model in zip(functions, models, strict=True):
            assert sqnr_db(function(x), model.reference(x)) > 45
    assert all(graph.packs for graph in graphs)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_pickled_module_is_independent(compiled_first: bool) -> None:
    first, x = block(), tokens()
    function, y, _ = run(first, x)
    second = pickle.loads(pickle.dumps(function if compiled_first else first))
    other = second if compiled_first else compiled(second)
    with torch.no_grad():
        second.a.weight.neg_()
        z = other(x)
        assert sqnr_db(z, getattr(second, "_orig_mod", second).reference(x)) > 45
        assert torch.equal(function(x), y)
    assert_counts(aoquant_inductor.report(other), 1)
    assert sqnr_db(z, y) < 10


def test_weights_that_are_quantized_already_are_left_alone(graphs: list[Graph]) -> None:
    """A subclass of Parameter, and a tensor subclass as torchao's: the same bits out as without us."""

    class Params8(nn.Parameter):
        pass

    model, x = nn.Sequential(*(nn.Linear(32, 32, bias=False, dtype=BF16) for _ in range(3))).eval(), tokens()
    model[0].weight = Params8(model[0].weight.detach(), requires_grad=False)
    model[1].weight = nn.Parameter(TwoTensor(model[1].weight.detach(), model[1].weight.detach()), requires_grad=False)
    with torch.no_grad():
        want = torch.compile(model[:2], backend="inductor")(x)
    _, y, report = run(model[:2], x, on_unsupported="report", schemes={"*": "int8wo"})
    assert_counts(report, 0, 2, subclass=1, already_quantized=1)
    assert report.layers[0].detail == "is a Params8, and what such a Parameter does is not known."
    assert torch.equal(y if not isinstance(y, TwoTensor) else y.a, want if not isinstance(want, TwoTensor) else want.a)
    _, _, report = run(model, x)
    assert_counts(report, 1, 3, subclass=1, already_quantized=1)


def test_distributed_parameters_are_refused_by_name(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, x = nn.Sequential(*(nn.Linear(32, 32, dtype=BF16) for _ in range(2))).eval(), tokens()
    want = model(x).detach()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallelize_module(model[0], init_device_mesh("cpu", (1,)), ColwiseParallel())
        _, y, report = run(model, x)
        assert_counts(report, 1, 2, dtensor=1)
        assert "0 is torch.bfloat16 in a DTensor." in str(report)
        assert sqnr_db(y, want) > 40
    finally:
        distributed.destroy_process_group()


def test_weights_that_ddp_hides_say_how_they_are_seen(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))  # 1 MB of gradients each: several graphs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x).relu()
            return x

    model = Deep()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for cut in (True, False):
            torch._dynamo.reset()
            parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1.1).eval()
            with torch._dynamo.config.patch(optimize_ddp=cut), torch.no_grad():
                _, _, report = run(parallel, torch.randn(4, 512))
            reasons = {layer.reason for layer in report.layers}
            assert ("ddp_optimizer" in reasons and "optimize_ddp = False" in str(report)) if cut else (reasons == {None}), str(report)
    finally:
        distributed.destroy_process_group()


CACHED = """
import os, sys, torch
sys.path[:0] = [{tests!r}]
from torch._inductor.utils import fresh_cache
from torch._dynamo.utils import counters
from util import Block, run, sqnr_db, tokens
from aoquant_inductor.scheme import resolve
torch.manual_seed(int(sys.argv[1]))
model, x = Block().eval(), tokens()
for scheme in sys.argv[2:]:
    _, y, report = run(model, x, schemes=scheme)
    assert report.totals["schemes"] == {{scheme: 1}}
    good = sqnr_db(y, model.reference(x, resolve(scheme)))
    print("right" if good > 45 else good, counters["inductor"]["fxgraph_cache_hit"], report.layers[0].kernel)
"""


def test_a_warm_graph_cache_with_other_weights_and_other_schemes(tmp_path: Path) -> None:
    """Two processes, one cache: other weights hit it and are right, and the report names the kernels that its compile took;
    another scheme misses.
    """
    from aoquant_inductor._inductor import cache_folder

    watch.settle()  # what is being built, perhaps by another test process, has names that come and go
    shutil.copytree(cache_folder(), tmp_path / "aoquant")  # the check in C++ need not be built again
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    code = CACHED.format(tests=str(Path(__file__).parent))

    def process(*args: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    (first,) = process("0", "int8wo")
    kernel = first.removeprefix("right 0 ")
    assert our_kernel(kernel) or kernel == "portable"
    hit, missed = process("1", "int8wo", "int4wo-32")
    assert hit == f"right 1 {kernel}"
    assert missed.startswith("right 1 ") and "cached" not in missed


@pytest.mark.parametrize("schemes", [("int8wo", "int4wo-32"), ("int4wo-32-asym", "int8wo")])
def test_two_schemes_of_one_module(schemes: tuple[str, str]) -> None:
    """One code object, one weight, two option sets: each compiled object has its own."""
    model, x = block(), tokens()
    functions = [run(model, x, schemes=s) for s in schemes]
    from aoquant_inductor.scheme import resolve

    for (function, y, report), name in zip(functions, schemes, strict=True):
        assert report.totals["schemes"] == {name: 1}
        assert sqnr_db(y, model.reference(x, resolve(name))) > 45
        with torch.no_grad():
            assert torch.equal(function(x), y)
    assert INT8.name in schemes


def test_weights_of_one_call_leave_nothing_in_the_report() -> None:
    model, x = block(), tokens()
    function = compiled(model)

    def call() -> int:
        new = {name: nn.Parameter(torch.randn_like(p)) for name, p in model.named_parameters()}
        with torch.no_grad():
            torch.func.functional_call(function, {f"_orig_mod.{name}": p for name, p in new.items()}, (x,))
        return sum(type(one) is Report for one in gc.get_objects())

    counts = [call() for _ in range(12)]
    assert counts[-1] <= counts[5] + 1, counts
    assert_counts(aoquant_inductor.report(function), 1)


def test_packs_of_weights_that_were_replaced_go_with_them() -> None:
    """The report remembers what was compiled, not what it packed."""

    def orphans() -> int:
        gc.collect()
        return sum(isinstance(one, Entry) and one.ref() is None for one in gc.get_objects())

    before = orphans()  # Dynamo keeps what runs behind a graph break of a function, in the globals of its module
    model, x = block(), tokens()
    function = compiled(model)
    for _ in range(6):
        model.a.weight = nn.Parameter(torch.randn(32, 32).to(model.a.weight))
        with torch.no_grad():
            assert sqnr_db(function(x), model.reference(x)) > 45
    assert orphans() <= before + 1, "a constant graph has its first"
    assert aoquant_inductor.refresh(function) == 1
