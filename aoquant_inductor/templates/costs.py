"""What default mode chooses by: the time of a config on a card, from costs.csv, which benchmarks/fit.py makes of measurements.

The numbers are of Hopper cards with 132 multiprocessors. A card that is faster or slower in all of them takes the same configs;
one with more or fewer multiprocessors has other waves, which the model knows.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from aoquant_inductor.templates.kernel import Config

FILE = Path(__file__).parent / "costs.csv"
COLUMNS = ("kernel", "config", "start", "step", "pair", "full")
BF16 = ("bf16", "")
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # of K that are thought of; five and seven gained nothing (H200)
SPLIT_AREA = 8192  # elements of a tile, the unit of what adding up its parts costs
SLICED_AREA = 4096  # elements of a tile, from which on each of its programs adds up some rows, not the last to come all
MOST_SLICED = 8  # programs of such a tile: 12 and 16 were the fastest of no problem (H200)
NORM = 2  # arithmetic and memory: the longer one, and a little of the other
MOST_WAVES = 4  # of programs that share their tiles
HIGH = 128  # rows of a tile, whose tail is of use whatever M is
PAIR = 2  # programs of a multiprocessor
FULL_AREA = 32768  # elements of a tile whose program has a multiprocessor for itself
BYTES_PER_US = 3.3e6  # of memory
WRITE_LEAST = 2.0  # us, of a launch
NOT_COPIED = 256  # rows: up to so many, a weight's copy in bf16 and cuBLAS were the fastest of no problem (H200)
HEAT, HEAT_FROM = 0.06, 700.0
"""What keeps the card busy for longer than so many us meets its power limit: up to so much slower, at twice the time (H200:
weight-only kernels of 1.3 ms take 1.05 to 1.07 of what their rate in shorter ones says, cuBLAS's 1.05 to 1.1).
"""
NEAR, NEAR_BYTES = 8e6, 1.6
"""Elements of a weight, up to which its bf16 copy is read from the L2 cache that it was written to, before memory has it:
what the copy takes then are its instructions, an element's as long as so many bytes of memory (H200, beyond cuBLAS alone: 2.3
to 2.6 us for 4.4 million elements of 4 or 8 bits, 4 to 5 for 6.6 million; larger ones take what their bytes do, or less).
"""


class Cost(NamedTuple):
    """Microseconds: to begin and to end; a step of K of a program with a multiprocessor for itself; of each of two that share
    one, which hide most of each other's waits; of each of several, one after the other, as those of a tail are.
    """

    start: float
    step: float
    pair: float
    full: float

    def us(self, waves: float, steps: int, memory: float, written: float = 0.0) -> float:
        """waves: programs of a multiprocessor, of so many steps each; no whole number is a tail's, whose last one is a part.
        `memory`: microseconds that the weight takes to be read, whatever is done with it. written: microseconds of y that
        nobody hides.
        """
        each = self.pair if waves in range(PAIR + 1) else self.full
        work = steps * max(self.step, waves * each)
        return heated(self.start + float((work**NORM + memory**NORM) ** (1 / NORM)) + written)

    def left(self, split: int, steps: int, before: int, area: int) -> float:
        """Microseconds that whole tiles take when the parts of a tail's are done: what hides adding these up."""
        return steps * (1 - 1 / split) * self.step if hides(before, area) else 0.0


def heated(us: float) -> float:
    return us * (1 + HEAT * min(1.0, max(0.0, us / HEAT_FROM - 1)))


def key_of(config: Config) -> str:
    """A config in costs.csv, where its splits are one, and its stages say whether it is alone."""
    return f"{replace(config, split_k=1, tail=0, alone=False)} w{config.num_warps} s{config.num_stages} g{config.group_m}"


@functools.cache
def costs() -> dict[tuple[str, str], Cost]:
    with FILE.open(newline="") as file:
        return {(row[0], row[1]): Cost(*map(float, row[2:])) for row in list(csv.reader(file))[1:]}


def sliced(area: int, tail: bool = False) -> bool:
    """Whether a tile that is split, all of K or as one of a tail, is added up by all of its programs."""
    return tail or area >= SLICED_AREA


def slices(split: int) -> int:
    """Of a tile that all of `split` programs add up: a power of two, so that of three programs one has none."""
    return 1 << (split.bit_length() - 1)


def height_fits(block_m: int, m: int, dynamic: bool) -> bool:
    """Whether a tile is worth a thought, and a price: half as high as there are rows, or as high; 64 are half of any more. With
    int8 activations 32 are not for 64: one of 30 problems was 15 % faster, the rest 2 % slower in the mean (H200).
    """
    rows = 1 << (m - 1).bit_length()
    return min(rows if dynamic and rows == 64 else rows // 2, 64) <= block_m <= max(16, rows)


def tail_fits(block_m: int, m: int, steps: int, dynamic: bool) -> bool:
    """Whether a tail is worth a thought. Of low tiles: short ones hide no sums (H200, int8 activations: 8 to 19 % slower than
    whole ones by 4 and 5 steps); in bf16, where M is beyond their height, high ones and splits are faster, but for a short K.
    """
    if block_m >= HIGH or dynamic:
        return block_m >= HIGH or steps >= 8
    return steps >= 10 and (m <= block_m or (block_m >= 32 and m <= 2 * block_m and steps <= 12))


def splits_fit(split: int, tiles: int, area: int, warps: int, sms: int) -> bool:
    """Whether it is worth a thought: programs that add up a tile together have to run at the same time. Two programs of eight
    warps that each add up half of a large tile need more registers than there are (H200: 1.5 times the price in two waves).
    """
    if split == 1 or not sliced(area):
        return split == 1 or split * tiles <= MOST_WAVES * sms
    alone = area >= FULL_AREA or (warps == 8 and 2 * area >= FULL_AREA and slices(split) < 4)
    return split <= MOST_SLICED and split * tiles <= (1 if alone else 2) * sms


def split_of(label: str, area: int, tail: bool = False) -> tuple[str, str]:
    """Where the splits of a kernel are, for tiles of `area` elements."""
    return f"{label} {'sliced' if sliced(area, tail) else 'split'}", ""


def shared(split: int, tiles: int, area: int, tail: bool = False) -> tuple[float, int]:
    """How many parts of a tile a program adds up, of rows of its own all but its own; how many programs do so at once."""
    return ((split - 1) / slices(split), split * tiles) if sliced(area, tail) else (split, tiles)


def bytes_written(m: int, n: int, area: int) -> int:
    """Of bf16 y[M, N], while no other program of a multiprocessor multiplies."""
    return 2 * m * n if area >= FULL_AREA else 0


def waves_of(programs: int, split: int, before: int, sms: int) -> float:
    """Programs of a multiprocessor, where a tail has `before` whole ones of each and a part of one more."""
    return before + 1 / split if before else math.ceil(programs / sms)


def hides(before: int, area: int) -> bool:
    """Whether a tail is added up while whole tiles of the multiprocessor still multiply: one of each or two small ones (H200:
    20 % too dear otherwise, within 5 % so; behind more, and of the largest tiles, it shows).
    """
    return before > 0 and (before - 1) * area < SPLIT_AREA and area < FULL_AREA


def of_split(split: int, tiles: int, area: int, sms: int, cost: Cost, left: float = 0.0, tail: bool = False) -> float:
    """Microseconds of adding up the parts of tiles of `area` elements: by one program, and by all through memory. left: of
    whole tiles that hide it, those of a tail.
    """
    if split == 1:
        return 0.0
    start, step, _, full = cost
    one, others = shared(split, tiles, area, tail)
    return max(0.0, start + one * area / SPLIT_AREA * (step + full * others / sms) - left)


def of_bf16(m: int, n: int, k: int, sms: int, cost: Cost | None = None) -> float:
    """Microseconds of cuBLAS for bf16 x[M, K] and w[N, K]: it has a tile for every shape, so that there are parts of waves, but
    each step of K takes its time, however small the tile.
    """
    start, step, _, full = cost or costs()[BF16]
    steps = -(-k // 64)
    work = max(2 * n * k / BYTES_PER_US, steps * m * n / (128 * 128) / sms * full)
    return heated(start + math.hypot(work, steps * step))


def of_copy(m: int, n: int, k: int, bits: int, sms: int) -> float:
    """Microseconds of making bf16 w[N, K] in memory of one with so many bits, and of cuBLAS with it."""
    each = bits / 8 + 2 if n * k > NEAR else NEAR_BYTES
    return max(WRITE_LEAST, n * k * each / BYTES_PER_US) + of_bf16(m, n, k, sms)
