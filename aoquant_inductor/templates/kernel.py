"""What a Triton kernel is to the lowering: a frozen value, its configs as data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aoquant_inductor import _inductor_choices as inductor
from aoquant_inductor import _inductor_ir as ir
from aoquant_inductor.card import Card
from aoquant_inductor.problem import Problem
from aoquant_inductor.templates import costs

FOLDER = Path(__file__).parent
FILL, FILL_TWICE = -1, -2
ANY = 1 << 62
MAX_SPLIT = 16


@dataclass(frozen=True)
class Config:
    """One program makes block_m x block_n of y in steps of block_k.

    swap: the dot is w @ x^T, so that a small M is the narrow side of the tensor core. split_k: so many programs share a tile,
    each a part of K; FILL is as many as give every multiprocessor one, n * FILL n. tail: that many tiles of a multiprocessor
    are done at once, and only those that are left in the end are split. carried: accumulators stay in the loop although a
    converted weight feeds the tensor core from registers, which a ptxas before 13.3 miscompiles. programs: so
    many for a multiprocessor, each with one tile after the other; 0 is one for every tile. tma: x comes by the tensor memory
    accelerator, where it can. alone: for problems where each program has a multiprocessor for itself, and its shared memory for
    more stages. extra: further constants.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    swap: bool = False
    split_k: int = 1
    tail: int = 0
    carried: bool = False
    programs: int = 0
    tma: bool = False
    alone: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = ["swapped"] * self.swap + ["carried"] * self.carried + ["tma"] * self.tma + ["alone"] * self.alone
        words += [name.lower() for name, on in self.extra if on]
        words += ["tail"] * bool(self.tail) + [f"split {self.split_k}"] * (self.split_k > 1)
        return " ".join([f"{self.block_m}x{self.block_n}x{self.block_k}", *words])

    def tiles(self, m: int, n: int) -> int:
        return -(-m // self.block_m) * -(-n // self.block_n)

    def steps(self, k: int) -> int:
        return -(-k // (self.block_k * int(dict(self.extra).get("DOTS", 1))))

    def rest(self, m: int, n: int) -> int:
        """The tiles that split_k is for: all, or those of the tail, 0 where no others come before it."""
        tiles = self.tiles(m, n)
        return tiles if not self.tail else tiles % self.tail if tiles > self.tail else 0

    def keywords(self) -> dict[str, Any]:
        sliced = self.split_k > 1 and costs.sliced(self.block_m * self.block_n, self.tail > 0)
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP_M": self.group_m,
            "SWAP": self.swap, "SPLIT_K": self.split_k, "TAIL": self.tail, "CARRIED": self.carried, "PROGRAMS": self.programs,
            "TMA": self.tma, "SLICE_M": max(8, self.block_m // costs.slices(self.split_k)) if sliced else self.block_m,
            "num_warps": self.num_warps, "num_stages": self.num_stages, **dict(self.extra),
        }


@dataclass(frozen=True)
class Default:
    """What default mode takes for M <= upto, N >= n, K >= k, N * K <= elements, where every multiprocessor gets at least
    `waves` tiles, and, if weight_only, no activation is int8; None is the portable lowering.
    """

    config: Config | None
    upto: int = ANY
    n: int = 0
    k: int = 0
    waves: float = 0
    elements: int = ANY
    weight_only: bool = False

    def covers(self, p: Problem, card: Card) -> bool:
        m = ir.rows_hint(p.m)
        enough = self.config is None or self.config.tiles(m, p.n) >= self.waves * card.sms
        kind = not (self.weight_only and p.dynamic)
        return m <= self.upto and p.n >= self.n and p.k >= self.k and p.n * p.k <= self.elements and enough and kind


@dataclass(frozen=True)
class Kernel:
    """template: the stem of its source; kernels may share one. fits: whether it can do a problem at all. configs: what a search
    tries. keywords: constants by the problem. adapt: a config made right for problem and card, None if it cannot be. Without a
    search the first of `defaults` that covers the problem is taken, or, by `label`, the cheapest of the configs in costs.csv.
    """

    template: str
    fits: Callable[[Problem, Card], bool]
    configs: tuple[Config, ...]
    keywords: Callable[[Problem, Config], dict[str, Any]]
    adapt: Callable[[Problem, Card, Config], Config | None] = lambda p, card, config: config
    defaults: tuple[Default, ...] = ()
    label: str = ""

    def config(self, p: Problem, card: Card, wanted: Config) -> Config | None:
        """`wanted` as it can run: FILL resolved, as many stages as the card's shared memory holds; None if it cannot."""
        # with a single step of K nothing is carried, and ptxas 13.5 makes some such kernels wrong beside a bias
        if wanted.carried and (not card.may_carry or wanted.steps(p.k) < 2 * max(1, wanted.split_k)):
            return None
        if wanted.tma and not (card.has_tma and p.by_tma):
            wanted = replace(wanted, tma=False)
        config = self.adapt(p, card, wanted)
        while config is not None and _shared(p, config, card) > card.shared:
            config = replace(config, num_stages=config.num_stages - 1) if config.num_stages > 1 else None
        if config is None:
            return None
        config = replace(config, programs=config.programs * card.sms, tail=config.tail * card.sms)
        m = ir.most_rows(p.m)
        done = self._tailed(p, config) if config.tail else self._split(p, card, config, m)
        if done is not None and done.alone and (m is None or done.split_k * done.tiles(m, p.n) > card.sms):
            return None
        return done

    def _split(self, p: Problem, card: Card, config: Config, m: int | None) -> Config | None:
        """With FILL resolved, for up to m rows; None where K has not so many parts, or there are more tiles than counters."""
        if config.split_k == 1:
            return config
        if m is None:  # the counters bound the number of tiles
            return replace(config, split_k=1) if config.split_k < 0 else None
        tiles, steps, split = config.tiles(m, p.n), -(-p.k // config.block_k), config.split_k
        if split < 0:
            wanted_programs, split = -split * card.sms, 1
            # a part shorter than its pipeline never fills it, and the sums of a high tile cost what a long part saves
            least = max(max(2, config.num_stages), -(-8 * config.block_m // config.block_k))
            while 2 * split * tiles <= wanted_programs and 2 * split * least <= steps and split < MAX_SPLIT:
                split *= 2
        if split > steps or (split > 1 and tiles > inductor.COUNTERS):
            return None
        return replace(config, split_k=split)

    def _tailed(self, p: Problem, config: Config) -> Config | None:
        """With as many programs for a tile of the tail as all run at once; None where none is left, or M is not known."""
        rest, steps, split = config.rest(ir.static(p.m) or 0, p.n), config.steps(p.k), 1
        while rest and 2 * split * rest <= config.tail and 4 * split <= steps and split < MAX_SPLIT:
            split *= 2
        return replace(config, split_k=split) if split > 1 and rest <= inductor.COUNTERS else None

    def able(self, p: Problem, card: Card) -> Iterator[Config]:
        """Every config that can run here, as it would."""
        for wanted in self.configs:
            if not self.outdone(p, card, wanted) and (config := self.config(p, card, wanted)) is not None:
                yield config

    def outdone(self, p: Problem, card: Card, config: Config) -> bool:
        """Whether its tile can do without the waits here, or, of a low tail, a high one is alone: 1 to 9 % faster (H200)."""
        twin = replace(config, carried=True, tma=True, split_k=1)
        high = range(costs.HIGH, ir.rows_hint(p.m) + 1) if config.tail and config.block_m < costs.HIGH else ()
        better = [other for other in self.configs if other.alone and other.block_m in high]
        if twin != replace(config, split_k=1) and any(replace(other, split_k=1) == twin for other in self.configs):
            better.append(twin)
        return any(self.config(p, card, other) is not None for other in better)

    def priced(self, p: Problem, card: Card) -> Iterator[tuple[float, Config]]:
        """(microseconds, config) of every config with a price that can run here, in each split of K worth a thought."""
        if not self.label:
            return
        m = ir.rows_hint(p.m)
        splits: dict[Config, bool] = {}
        for config in self.configs:
            base = replace(config, split_k=1)
            splits[base] = splits.get(base, False) or config.split_k != 1
        for base, may in splits.items():
            tiles, steps = base.tiles(m, p.n), base.steps(p.k)
            vain = base.tail and not costs.tail_fits(base.block_m, m, steps, p.dynamic)
            if vain or not costs.height_fits(base.block_m, m, p.dynamic) or self.outdone(p, card, base):
                continue
            for split in costs.SPLITS if may and not base.tail else (1,):
                fits = costs.splits_fit(split, tiles, base.block_m * base.block_n, base.num_warps, card.sms)
                if split > 1 and (2 * split > steps or not fits):
                    break
                able = self.config(p, card, replace(base, split_k=split))
                # with fewer stages than it was measured with it is another config, with one it waits for every load
                if able is not None and able.num_stages >= base.num_stages:
                    yield self._us(p, card, base, able), able

    def _us(self, p: Problem, card: Card, wanted: Config, config: Config) -> float:
        """The price of `wanted` as it can run."""
        m, memory, known = ir.rows_hint(p.m), p.n * p.k * p.bits / 8 / costs.BYTES_PER_US, costs.costs()
        split, tiles, steps, area = config.split_k, wanted.tiles(m, p.n), wanted.steps(p.k), wanted.block_m * wanted.block_n
        rest, before = config.rest(m, p.n), tiles // config.tail if config.tail else 0
        steps = steps if before else -(-steps // split)
        written = costs.bytes_written(m, p.n, area) / costs.BYTES_PER_US
        cost = known[self.label, costs.key_of(wanted)]
        us = cost.us(costs.waves_of(rest * split, split, before, card.sms), steps, memory, written)
        if split > 1:
            left = cost.left(split, steps, before, area)
            adding = known[costs.split_of(self.label, area, before > 0)]
            us += costs.of_split(split, rest, area, card.sms, adding, left, before > 0)
        return us

    def choice(self, p: Problem, config: Config) -> inductor.TritonChoice:
        most = ir.most_rows(p.m)
        # a range of M is said by its largest, which most calls are below
        few = most is not None and (most < config.block_m or (most == config.block_m and ir.static(p.m) is None))
        high = None if most is None else -(-most // config.block_m)
        even = high is not None and ir.static(p.m) is not None and high % config.group_m == 0
        tiles = {"FEW": few, "HIGH": high, "EVEN_HIGH": even, "EVEN_N": p.n % config.block_n == 0}
        keywords = {**common_keywords(p), **tiles, **self.keywords(p, config), **config.keywords()}
        scratch = 0
        if config.split_k > 1:
            scratch = 4 * config.split_k * config.rest(most or 0, p.n) * config.block_m * config.block_n
        kind = f"W{p.bits}A{8 if p.dynamic else 16}"
        label = f"Triton {self.template} {kind} {config}"
        return inductor.TritonChoice(label, template(self.template), keywords, scratch)


def _shared(p: Problem, config: Config, card: Card) -> int:
    """At most so many bytes of shared memory are a program's."""
    x_bytes, buffers, more = config.block_m * p.x.get_dtype().itemsize, config.num_stages, 0
    if card.by_mma_sync:  # a step is loaded where the one before last was; a weight in bf16 passes through it to other lanes
        buffers, more = max(1, buffers - 1), 2048 if p.dynamic or p.bits == 8 else 256 * config.block_n + 5120
    step = config.block_k * int(dict(config.extra).get("DOTS", 1)) * (x_bytes + config.block_n * p.bits // 8)
    return int(buffers * step + more)


@functools.cache
def template(name: str) -> Any:
    """The macros that kernels share, then the kernel."""
    shared = [path for path in sorted(FOLDER.glob("*.jinja")) if not path.name.endswith(".py.jinja")]
    source = "".join(path.read_text() for path in (*shared, FOLDER / f"{name}.py.jinja"))
    return inductor.triton_template(f"aoquant_{name}", source)


def common_keywords(p: Problem) -> dict[str, Any]:
    """What every kernel may ask of its problem; a template's text is shaped by them."""
    has = {f"HAS_{name}": name in p.inputs for name in ("XS", "XZ", "WSUM", "WZ", "BIAS")}
    return {
        "BITS": p.bits, "GROUPS": p.groups, "GROUP": p.group_size, "DYNAMIC": p.dynamic,
        "ZERO_POINT_INT": p.zero_point == "int", "PDL": inductor.early_launch(p.device, p.m), **has,
    }
