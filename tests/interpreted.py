"""Kernels run by Triton's interpreter against the reference: `TRITON_INTERPRET=1 python interpreted.py PART OF` runs every OF-th
case and prints "right" for each that is. A process of its own, since Triton asks for the variable when it is imported.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import offline
import ptx
import torch

from aoquant_inductor import lowering_triton
from aoquant_inductor._inductor_choices import COUNTERS
from aoquant_inductor.templates import Config, Kernel, int4, int4_few, linear

Forced = tuple[Kernel, Config] | None
LEFT = -3 << 20  # in a counter: what kernels of large tiles leave after thousands of launches

# bf16 is broken in Triton's interpreter but for what ptx.py teaches it: the general kernel in fp16 and fp32, bf16 on the card.
SPLIT = (linear.GENERAL, Config(16, 32, 128, 4, 3, split_k=4))
SWAPPED = (linear.GENERAL, Config(32, 64, 128, 4, 3, swap=True, split_k=2))
HELD = (linear.GENERAL, replace(SWAPPED[1], extra=(("HELD", True),)))
# tiles that their programs add up together; one after the other, as the interpreter runs them, all leave it to the last. SHORT: more
# programs than blocks of 8 rows
UNSLICED = (linear.GENERAL, Config(64, 64, 128, 4, 3, split_k=4))
SLICED = (linear.GENERAL, Config(64, 64, 128, 4, 3, swap=True, split_k=4))
SLICED_SHORT = (linear.GENERAL, Config(32, 128, 64, 4, 3, swap=True, split_k=8))
# 27 tiles, 7 more than 20 multiprocessors have at once: of 132 programs the interpreter would begin one after the other
TAIL, TAIL_SWAPPED = ((linear.GENERAL, Config(32, 32, 128, 4, 3, swap=swap, split_k=2, tail=1)) for swap in (False, True))
DOTS = (linear.GENERAL, Config(32, 64, 64, 4, 2, swap=True, split_k=2, extra=(("DOTS", 2),)))
FORCED = [("int8dq", "float16", 5, 70, 1025, SPLIT), ("int8dq-asymact", "float16", 5, 70, 1025, SWAPPED),
          ("int8wo", "float16", 33, 70, 1024, SWAPPED), ("int8wo", "float16", 33, 70, 1024, HELD),
          ("int8dq-asymact", "float16", 262, 80, 1025, TAIL), ("int8wo", "float16", 262, 80, 1024, TAIL_SWAPPED),
          ("int8wo-64", "float16", 262, 80, 1024, TAIL_SWAPPED),
          ("int8dq-asymact", "float16", 70, 70, 1025, UNSLICED), ("int8dq-asymact", "float16", 70, 70, 1025, SLICED), ("int8dq", "float16", 50, 70, 1025, SLICED_SHORT),
          ("int8wo", "float16", 33, 70, 1024, SLICED), ("int8wo", "float16", 33, 170, 1024, SLICED_SHORT), ("int8wo", "float16", 33, 70, 576, DOTS), ("int8wo", "float16", 5, 70, 1024, DOTS), ("int4wo-32-asym", "float16", 5, 33, 129, SWAPPED)]
# ten tiles below each other, two more than a group has; sixteen, two groups
FORCED += [("int8dq", "float16", m, 70, 129, (linear.GENERAL, Config(16, 32, 128, 4, 3))) for m in (150, 250)]
# splits that are no power of two
FORCED += [
    ("int8dq", "float16", 5, 70, 1025, (linear.GENERAL, Config(16, 32, 128, 4, 3, split_k=3))),
    ("int8dq-asymact", "float16", 70, 70, 1025, (linear.GENERAL, Config(64, 64, 128, 4, 3, split_k=5))),
    *(("int8dq-asymact", "float16", 70, 70, 1537, (linear.GENERAL, replace(SLICED[1], block_k=64, split_k=split))) for split in (3, 6, 12)),
    ("int8wo", "float16", 33, 170, 1024, (linear.GENERAL, replace(SLICED_SHORT[1], split_k=12))),
]
CASES = [
    ("int8wo", "float16", 5, 33, 65), ("int8wo-32", "float32", 3, 40, 33), ("int8dq", "float16", 5, 70, 129),
    ("int8dq-asymact", "float32", 3, 33, 31), ("int4wo-32-asym", "float16", 5, 33, 129), ("int4wo-32-asymfloat", "float32", 2, 20, 70),
    ("int4wo-row-asym", "float16", 2, 33, 65), ("int8dq-int4w-32-asym-asymact", "float32", 5, 33, 129),
    ("int8dq-int4w-asym-asymact", "float16", 3, 33, 65),
]
FEW_ROWS = [("int8wo", "float16", 1, 70, 1024), ("int8wo", "bfloat16", 1, 70, 1024), ("int8wo-128", "bfloat16", 1, 33, 512), ("int8wo", "float16", 2, 35, 704), ("int8wo-128", "float16", 2, 33, 512), ("int8wo", "float16", 3, 33, 528),
            # several steps of which the last ends beyond K, in either order; a group for every two threads; rows of three
            ("int8wo", "bfloat16", 1, 33, 4864), ("int8wo", "float16", 1, 33, 2320), ("int8wo-32", "float16", 2, 33, 4112), ("int8wo-64", "bfloat16", 3, 20, 4864)]
INT4 = [
    ("int4wo-128", 3, 40, 400, None), ("int4wo-128", 6, 40, 400, (int4_few.GEMV, int4_few.GEMV_WIDE)), ("int4wo-128-asym", 2, 40, 1100, (int4_few.GEMV, Config(8, 16, 256, 1, 1, split_k=2))),
    ("int4wo-256-asymfloat", 4, 40, 600, None), ("int4wo-row-asym", 3, 33, 300, None), ("int4wo-row-asym", 3, 33, 300, (int4_few.GEMV, int4_few.GEMV_WIDE)), ("int4wo-128-asym", 20, 70, 400, None),
    ("int4wo-128", 20, 70, 1100, (int4.SUMS, Config(16, 64, 256, 4, 3, split_k=2))), ("int4wo-row-asym", 9, 70, 400, None),
    ("int4wo-32-asym", 20, 70, 400, None), ("int4wo-64-asymfloat", 5, 70, 400, None),
    ("int4wo-128-asym", 50, 70, 1100, (int4.SUMS, Config(64, 64, 128, 4, 3, split_k=4))),
    ("int8dq-int4w-asym-asymact", 50, 70, 1100, (int4.DYNAMIC_ROW, Config(64, 64, 128, 4, 3, split_k=4))),
    ("int4wo-128-asym", 50, 70, 1100, (int4.SUMS, Config(64, 64, 128, 4, 3, split_k=3))), ("int4wo-128", 20, 70, 1100, (int4.SUMS, Config(16, 64, 128, 4, 3, split_k=6))),
    ("int8dq-int4w-asym-asymact", 50, 70, 1100, (int4.DYNAMIC_ROW, Config(64, 64, 128, 4, 3, split_k=6))),
    ("int4wo-32", 100, 70, 400, (int4.ONE_SUM, int4.S128)), ("int8dq-int4w", 5, 70, 400, None),
    ("int8dq-int4w-asym-asymact", 5, 70, 400, None), ("int8dq-int4w-128", 5, 70, 400, None),
    ("int8dq-int4w-128-asym-asymact", 5, 70, 400, None), ("int8dq-int4w-256-asym", 40, 70, 700, None),
]
WORDS = [
    ("int8wo", "bfloat16", 9, 70, 576, None), ("int8wo", "bfloat16", 40, 70, 1024, (linear.INT8_WEIGHT_ONLY, linear.W64)),
    ("int8wo", "bfloat16", 40, 70, 448, (linear.INT8_WEIGHT_ONLY, Config(64, 64, 64, 4, 2, swap=True, extra=(("DOTS", 2),)))),
    ("int8wo-128", "bfloat16", 5, 70, 1024, None),
]
INT4 += [
    ("int4wo-128", 136, 266, 1100, (int4.SUMS, Config(32, 64, 128, 4, 3, tail=1))),
    ("int8dq-int4w", 70, 70, 400, (int4.DYNAMIC_ROW, Config(32, 64, 128, 4, 3, tma=True))),
    ("int8dq-int4w-128-asym-asymact", 70, 70, 400, (int4.DYNAMIC_GROUPS, Config(32, 64, 128, 4, 3, tma=True))),
    ("int8dq-int4w-asym-asymact", 70, 310, 1104, (int4.DYNAMIC_ROW, Config(32, 64, 256, 4, 3, tma=True))),
    # 25 tiles of 20 programs
    ("int8dq-int4w-asym-asymact", 136, 266, 272, (int4.DYNAMIC_ROW, Config(32, 64, 128, 4, 3, tma=True, programs=1))),
    ("int8dq-int4w-128-asym", 136, 266, 260, (int4.DYNAMIC_GROUPS, Config(32, 64, 128, 4, 3, programs=1))),
]
INT4 += [
    ("int4wo-128", 1, 64, 1100, (int4_few.FMA, Config(1, 8, 1024, 1, 1))), ("int4wo-128-asym", 1, 70, 1100, (int4_few.FMA, Config(1, 16, 1024, 1, 1))),
    ("int4wo-32", 1, 64, 1100, (int4_few.FMA, Config(1, 8, 1024, 1, 1))), ("int4wo-row-asym", 1, 70, 1100, (int4_few.FMA, Config(1, 16, 1024, 1, 1))),
    ("int4wo-32-asym", 1, 64, 1100, (int4_few.FMA, Config(1, 4, 1024, 1, 1))), ("int4wo-64-asymfloat", 1, 48, 2048, (int4_few.FMA, Config(1, 4, 2048, 2, 1))),
    ("int4wo-64", 3, 96, 1100, (int4_few.GEMV_GROUPS, int4_few.GEMV_PAIR)), ("int4wo-32-asym", 4, 40, 1100, (int4_few.GEMV_GROUPS_ZERO, int4_few.GEMV_WIDE)),
    ("int4wo-32-asymfloat", 2, 40, 1100, (int4_few.GEMV_GROUPS_ZERO, int4_few.GEMV_SHORT)),
    # columns of the tensor core that are parts of K: one token, two, three and four; a last step beyond the end of K
    ("int4wo-128", 1, 40, 1104, (int4_few.GEMV, int4_few.GEMV_EIGHT)), ("int4wo-128-asym", 3, 40, 2064, (int4_few.GEMV, int4_few.GEMV_ALL)),
    ("int4wo-row-asym", 2, 33, 1040, (int4_few.GEMV, int4_few.GEMV_TWO)), ("int4wo-row", 4, 33, 1024, (int4_few.GEMV, int4_few.GEMV_FOUR_SHORT)),
    ("int4wo-64", 4, 96, 1104, (int4_few.GEMV_GROUPS, int4_few.GEMV_TWO_PAIR)), ("int4wo-32", 1, 48, 2048, (int4_few.GEMV_GROUPS, int4_few.GEMV_EIGHT_LONG)),
    ("int4wo-32-asym", 2, 40, 2064, (int4_few.GEMV_GROUPS_ZERO, int4_few.GEMV_FOUR)), ("int4wo-32-asymfloat", 3, 40, 1104, (int4_few.GEMV_GROUPS_ZERO, int4_few.GEMV_EIGHT)),
    ("int4wo-256-asymfloat", 1, 40, 2064, (int4_few.GEMV_FLOAT, int4_few.GEMV_ALL)), ("int4wo-32", 3, 40, 4112, (int4_few.GEMV_GROUPS, int4_few.GEMV_ALL_LONG)), ("int4wo-256-asym", 4, 90, 4864, (int4_few.GEMV, int4_few.GEMV_ALL_PAIR)), ("int4wo-32-asym", 2, 40, 200, (int4_few.GEMV_GROUPS_ZERO, int4_few.GEMV_ONE)),
    ("int4wo-64", 1, 48, 2048, (int4_few.FMA, Config(1, 2, 2048, 2, 1))), ("int4wo-256-asymfloat", 1, 64, 2048, (int4_few.FMA, Config(1, 8, 2048, 2, 1))),
    ("int4wo-row", 1, 64, 2048, (int4_few.FMA, Config(1, 8, 2048, 2, 1))),
    # rows that no block divides; several steps or parts, of which the last ends beyond K; x in words, or an element at a time
    ("int4wo-128", 1, 33, 4864, (int4_few.FMA, int4_few.FMA_HALF)), ("int4wo-row-asym", 1, 37, 4864, (int4_few.FMA, int4_few.FMA_SHORT)),
    ("int4wo-256-asym", 1, 70, 5000, (int4_few.FMA, Config(1, 8, 4096, 4, 1))), ("int4wo-32-asymfloat", 1, 33, 4864, (int4_few.FMA, int4_few.FMA_FULL)),
    ("int4wo-64-asym", 1, 33, 896, (int4_few.FMA, int4_few.FMA_SHORT)), ("int4wo-128", 1, 33, 3001, (int4_few.FMA, int4_few.FMA_SHORT)),
    ("int4wo-128-asym", 1, 33, 4864, (int4_few.FMA, int4_few.FMA_LONG)), ("int4wo-row-asym", 1, 33, 4101, (int4_few.FMA, int4_few.FMA_FULL)),
    ("int4wo-128", 40, 70, 1104, (int4.SUMS, Config(32, 64, 128, 4, 3, tma=True))),
    ("int4wo-row-asym", 40, 70, 400, (int4.ONE_SUM, Config(32, 64, 128, 4, 3, split_k=2, tma=True))),
]
WORDS += [
    ("int8wo", "bfloat16", 70, 70, 1088, (linear.INT8_WEIGHT_ONLY, Config(64, 64, 128, 4, 3, swap=True, split_k=2, tma=True))),
    ("int8wo-128", "bfloat16", 40, 70, 1024, (linear.INT8_WEIGHT_ONLY, Config(32, 64, 128, 4, 3, swap=True, tma=True))),
]
PERSISTENT = (linear.PERSISTENT, Config(32, 32, 64, 4, 3, programs=1))
WORDS += [("int8dq", "bfloat16", 200, 310, 208, PERSISTENT), ("int8dq-asymact", "float16", 5, 33, 1040, PERSISTENT), ("int8dq", "bfloat16", 250, 310, 80, (linear.PERSISTENT, replace(PERSISTENT[1], group_m=2)))]
CASES = [(*case, None) for case in CASES + FEW_ROWS] + FORCED + WORDS
DENSE = (  # all of a weight in bf16
    ("int4wo-128-asym", 300), ("int4wo-row", 300), ("int4wo-row-asym", 300), ("int4wo-64-asymfloat", 300), ("int4wo-32", 300),
    ("int8wo", 320), ("int8wo-64", 320), ("int8wo-128", 512),
)
CASES += [(scheme, "bfloat16", *size, config) for scheme, *size, config in INT4]
PARTS = [
    ("int4wo-128", "bfloat16", 3, 400), ("int4wo-128-asym", "bfloat16", 1, 1104), ("int4wo-32", "bfloat16", 1, 1104), ("int4wo-128-asym", "bfloat16", 20, 400), ("int4wo-32-asym", "bfloat16", 40, 300),
    ("int4wo-64-asymfloat", "bfloat16", 5, 400), ("int8dq-int4w-128-asym", "bfloat16", 20, 400), ("int8wo-64", "bfloat16", 20, 512),
    ("int8wo-128", "float16", 1, 512), ("int4wo-32-asym", "float16", 5, 96),
]
ROWS = tuple(f"int4wo-{size}-large8" for size in ("128", "32-asym", "row", "row-asym", "64-asymfloat", "256-asym", "256-asymfloat"))


def launch(r: offline.Rendered, y: torch.Tensor, folder: Path) -> list[torch.Tensor]:
    """Runs the one kernel of `r` into y, which may hold anything; the counters of its tiles as they are left."""
    name, source, _, _ = offline.kernel(r.code)
    args, grid = offline.call(r, name, y)
    counters = [arg for arg in args if arg.dtype == torch.int32 and arg.shape == (COUNTERS,)]
    for each in counters:
        each.fill_(LEFT)
    offline.load(name, source, folder)[grid](*offline.described(r, args))
    return counters


def noise(y: torch.Tensor, want: torch.Tensor) -> float:
    """|y - want|^2 / |want|^2."""
    want = want.double()
    return float((y.double() - want).square().sum()) / float(want.square().sum())


def one(scheme: str, dtype: str, m: int, n: int, k: int, forced: Forced, folder: Path) -> None:
    several = forced is not None and bool(forced[1].tail or forced[1].programs)  # tiles of a program, one after the other
    r = offline.render(scheme, m, n, k, getattr(torch, dtype), config=forced, sms=20 if several else 132)
    assert not several or r.config.programs or r.config.rest(m, n) < r.config.tiles(m, n)
    y = torch.full((m, n), float("nan"), dtype=getattr(torch, dtype))
    for counters in launch(r, y, folder):
        assert set(counters.tolist()) <= {LEFT, LEFT + (1 << 20), 0}  # as they were, with a launch more, or at zero
    # a few bf16 results may round the other way; int4 sums are the reference's but where the scale of a small group is multiplied
    # into a bf16 weight
    small = {"32", "64"} & set(scheme.split("-")) or (forced is not None and forced[0].template == "int4_fma")
    limit = 10**-5.5 if dtype != "bfloat16" else 10**-5 if small else 10**-7
    assert noise(y, r.expected) <= limit, noise(y, r.expected)


def part(scheme: str, dtype: str, m: int, k: int, folder: Path) -> None:
    """One of three linears whose packs lie side by side."""
    r = offline.render_part(scheme, m, (48, 32, 64), k, getattr(torch, dtype))
    assert "triton_poi" not in r.code.replace("fused_full", ""), r.code
    y = torch.full((m, 64), float("nan"), dtype=getattr(torch, dtype))
    launch(r, y, folder)
    assert noise(y, r.expected) <= 10**-5, noise(y, r.expected)


def dense(scheme: str, k: int, folder: Path) -> None:
    """The bf16 copy of a weight."""
    with mock.patch.object(lowering_triton, "default", return_value=None):
        r = offline.render(scheme, 4096, 203, k, torch.bfloat16, bias=False)
    y = torch.full((203, k), float("nan"), dtype=torch.bfloat16)
    launch(r, y, folder)
    want = r.op({**r.tensors, "x": torch.eye(k).bfloat16()}).t()
    one_more_rounding = 2**-7 if "row" in scheme else 0.0
    assert float((y - want).abs().max()) <= one_more_rounding * float(want.abs().max())


def rows(scheme: str, folder: Path) -> None:
    """The int8 copy of an int4 weight."""
    r, _ = offline.render_rows(scheme, 203, 300)
    y = torch.full((203, 300), 99, dtype=torch.int8)
    launch(r, y, folder)
    assert torch.equal(y, r.expected)


def everything() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """(what to say of it, what to run)."""
    for kind, cases in ((one, CASES), (part, PARTS), (dense, DENSE), (rows, [(scheme,) for scheme in ROWS])):
        for case in cases:
            words = (f"{word[0].template} {word[1]}" if isinstance(word, tuple) else str(word) for word in case)
            yield f"{kind.__name__} {' '.join(words)}", partial(kind, *case)


def main(which: int, of: int) -> None:
    ptx.teach()
    with tempfile.TemporaryDirectory() as folder:
        for name, run in list(everything())[which::of]:
            torch.manual_seed(0)  # what one case draws is nothing to the others
            try:
                run(Path(folder))
            except Exception as error:
                raise AssertionError(name) from error
            print("right", name)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
