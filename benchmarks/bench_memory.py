"""What packing a whole model costs on the device: bytes resident afterwards, the peak meanwhile, seconds.

Every row starts from a fresh bf16 model on the device (models.py, random weights) and packs each of its linears as a compile
with "release_weights" does, the original let go before the next one comes; nothing is compiled. `cpu` and `file` rows start
from a model on the CPU, and from a meta model and safetensors: aoquant_inductor.load, so that the bf16 model is never on the
device; --limit holds the device to so many GB meanwhile. Peers (peers.py) quantize in place, where they are installed. ratio is
bf16's resident bytes over the row's.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import aoquant_inductor
from aoquant_inductor import packing, watch
from aoquant_inductor.entry import Release
from aoquant_inductor.scheme import resolve
from aoquant_inductor.weights import STORE
from benchmarks import build, cli, measure, models_text, peers
from benchmarks.measure import Row

BENCH = "memory"


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def pack(model: nn.Module, scheme: str, device: str) -> nn.Module:
    """Each linear packed and let go, in order. Raises Refused for one that stays."""
    spec = resolve(scheme)
    for name, linear in linears(model).items():
        layout = packing.choose(spec, linear.weight.device, linear.weight.dtype, linear.weight.shape)
        entry, _, _ = STORE.pack(linear.weight, spec, layout)
        if not entry.let_go(Release(name, False)):
            raise build.Refused(f"{name} stays in memory")
    return model


def load(model: nn.Module, scheme: str, device: str, files: Sequence[Path] = ()) -> nn.Module:
    report = aoquant_inductor.load(model, files, device=device, options={"schemes": scheme})
    if len(report.quantized) != len(linears(model)):
        raise build.Refused(report.summary())
    return model


def peer(model: nn.Module, scheme: str, device: str, whose: str) -> nn.Module:
    if not peers.PEERS[whose].quantize(model, scheme, device):
        raise build.Refused(f"{whose} has no such scheme, or is not installed")
    return model


def on_meta(model: nn.Module, name: str, folder: Path) -> tuple[nn.Module, list[Path]]:
    """The model without its parameters, and the file that has them."""
    path = folder / f"{name}.safetensors"
    save_file({key: t.contiguous() for key, t in model.named_parameters()}, path)
    empty = models_text.llm("meta", name)
    for key, buffer in model.named_buffers():
        owner, _, last = key.rpartition(".")
        empty.get_submodule(owner)._buffers[last] = buffer
    return empty, [path]


WAYS: dict[str, Callable[..., nn.Module]] = {
    "pack": pack, "cpu": load, "file": load, **{whose: partial(peer, whose=whose) for whose in peers.PEERS}
}


def memory(device: str) -> tuple[int, int]:
    """(bytes allocated, the most since the last reset); 0 where the allocator does not count."""
    if device != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def clean(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return memory(device)[0]


def measure_way(way: str, name: str, scheme: str, device: str, limit: float, folder: Path) -> list[Row]:
    before = clean(device)
    model = models_text.llm(device, name)
    linear_bytes = sum(m.weight.nbytes for m in linears(model).values())
    whole = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    more: tuple[Any, ...] = ()
    if way in ("cpu", "file"):
        model = model.cpu()
    if way == "file":
        model, *more = on_meta(model, name, folder)  # type: ignore[assignment]
    clean(device)
    if device == "cuda" and limit and way in ("cpu", "file"):
        torch.cuda.set_per_process_memory_fraction(limit * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    started = time.perf_counter()
    with torch.no_grad():
        WAYS[way](model, scheme, device, *more)
    resident, peak = (value - before for value in memory(device))
    seconds = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    left = (resident - (whole - linear_bytes)) / linear_bytes

    def row(what: str, value: float, unit: str, ratio: float | None = None) -> Row:
        value = round(value, 4)
        return Row(BENCH, name, 0, scheme, way, what, value, unit, ratio, value, value, value, 1)

    rows = [row("seconds", seconds, "s")]
    if device == "cuda":
        rows += [
            row("resident", resident / 1e6, "MB", round(whole / resident, 3)), row("peak", peak / 1e6, "MB"),
            row("linears_left", left, "of bf16"), row("peak_over_model", (peak - whole) / 1e6, "MB"),
        ]
    return rows


def warm(device: str) -> None:
    """The allocator, the kernels of quantization and the native part, outside of the clocks."""
    watch.settle()
    for scheme in ("int8wo", "int4wo-128"):
        pack(nn.Sequential(nn.Linear(256, 256, device=device, dtype=torch.bfloat16)), scheme, device)


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__, reps=1, schemes=("int8wo", "int4wo-128"))
    p.add_argument("--model", default="llama3.1-8b", choices=tuple(models_text.LLMS))
    p.add_argument("--limit", type=float, default=0.0, help="GB of the device for `cpu` and `file` (default: all)")
    p.add_argument("--ways", default=",".join(WAYS), help="comma-separated (default: %(default)s)")
    args = cli.parse(p, argv)
    warm(args.device)
    rows: list[Row] = []
    refused: list[str] = []
    for scheme in args.schemes.split(","):
        for way in args.ways.split(","):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    rows += measure_way(way, args.model, scheme, args.device, args.limit, Path(folder))
            except build.Refused as why:
                refused += [] if way in peers.PEERS else [f"{args.model} {way} {scheme}: {why}"]
    written: list[dict[str, Any]] = measure.write(rows, args.device, args.results)
    cells = [(f"{r.shape} {r.mode}", r.scheme, r.what, f"{r.value:.3f}", r.unit, str(r.ratio or "")) for r in rows]
    head = ("model, way", "scheme", "what", "value", "unit", "bf16 / this")
    return cli.finish(written, cli.table(head, cells), refused, args)


if __name__ == "__main__":
    sys.exit(main())
