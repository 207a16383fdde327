"""What a config costs, of everything that benchmarks/tune.py measured: benchmarks/results/*.tune.csv -> templates/costs.csv.

    us = start + norm(steps * max(step, waves * (pair or full)), bytes of the weight / rate),
       + bytes of y / rate where a program has a multiprocessor for itself, all of it times costs.HEAT where it is long,
       and for split K + split.start + one * block_m * block_n / 8192 * (split.step + split.full * others / multiprocessors),
       less what whole tiles hide of it (Cost.left)

steps: of K, by one program. waves: programs of a multiprocessor (costs.waves_of); pair: for one and two; full: of a tail.
one, others: split, tiles; of a large tile 1, split * tiles. Four numbers for a config, three for each kind of splits of a
kernel, by the least sum of |log(model / measured)| ** POWER. What is printed says how good they are: the time of the config
that the model takes over that of the fastest one measured.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aoquant_inductor.scheme import resolve
from aoquant_inductor.templates import KERNELS
from aoquant_inductor.templates import costs as prices
from aoquant_inductor.templates.costs import BF16, COLUMNS, FILE, NORM, SPLIT_AREA, Cost, key_of, of_bf16, of_split, split_of
from benchmarks.measure import RESULTS

SMS = 132  # of both cards measured
RATES = {"h100-80gb-hbm3": 3.0e6, "h200": 4.0e6}  # bytes/us that their memory gives
LABELS = {  # (template, scheme) of a row -> Kernel.label
    ("linear", "int8wo"): "W8A16", ("linear", "int8dq"): "W8A8", ("persistent", "int8dq"): "W8A8 persistent",
    ("int4_linear", "int4wo-128"): "W4A16", ("int4_linear", "int4wo-32"): "W4A16 one sum",
    ("int4_linear", "int4wo-32-asym"): "W4A16 one sum", ("int4_dynamic", "int8dq-int4w"): "W4A8",
    ("int4_dynamic", "int8dq-int4w-128"): "W4A8 groups",
}
STEPS, WEIGHT = 3000, 1e-3  # of the fit: of gradient descent, of what holds numbers without rows
POWER = 1.25  # of an error: by 1 some configs are 10 % off wherever K is short, by 1.5 all are a little
FEWEST = 16  # rows: below, kernels of other kinds run
DESCRIBED = "2026-11-28T16"  # UTC: rows before are of kernels that made their own descriptors,
LATER, EACH_LATER, PERSISTENT_LATER = 0.35, 0.33, 2.0  # us, and for every wave (H200: 192 configs of both kinds, in one run)


@dataclass(frozen=True)
class Row:
    """One measured config: where, which, its tiles of M x N, the steps of K of a program; of a tail, the tiles that are left,
    the steps of a whole one, and how many such a multiprocessor had `before`.
    """

    problem: tuple[str, str, int, int, int]  # card, scheme, N, K, M
    label: str
    config: str
    split: int
    tiles: int
    area: int
    steps: int
    us: float
    before: int = 0

    @property
    def tail(self) -> bool:
        return self.before > 0

    @property
    def memory(self) -> float:
        """Microseconds that the weight takes to be read."""
        card, scheme, n, k, _ = self.problem
        return n * k * resolve(scheme).weight.bits / 8 / RATES[card]

    @property
    def waves(self) -> float:
        return prices.waves_of(self.tiles * self.split, self.split, self.before, SMS)

    @property
    def written(self) -> float:
        card, _, n, _, m = self.problem
        return prices.bytes_written(m, n, self.area) / RATES[card]


def rows(folder: Path) -> Sequence[Row]:
    """Every config measured; of one of ours that was measured again, the last, of cuBLAS all."""
    newest, cublas = {}, []
    for path in sorted(folder.glob("*.tune.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                us = float(line["us"] or "inf")
                if line["quantizing"] == "True" or not math.isfinite(us) or "WRONG" in line["note"] or int(line["m"]) < FEWEST:
                    continue
                row = _row(path.name.partition(".")[0], line, us)
                if row and row.label == "bf16":
                    cublas.append(row)
                elif row:
                    newest[replace(row, us=0.0)] = row
    return [*newest.values(), *cublas]


def _row(card: str, line: dict[str, str], us: float) -> Row | None:
    n, k, m = (int(line[name]) for name in "nkm")
    problem = card, line["scheme"], n, k, m
    if line["kernel"] == "bf16":
        return Row(problem, "bf16", "", 1, 0, 0, -(-k // 64), us)
    label = LABELS.get((line["kernel"], line["scheme"]))
    if label is None:
        return None
    tail = " tail" in line["config"]
    text = re.sub(r" persistent| tail| alone| \{.*", "", line["config"]).strip()
    bm, bn, bk = map(int, re.match(r"(\d+)x(\d+)x(\d+)", text).groups())  # type: ignore[union-attr]
    found = re.search(r" split (\d+)", text)
    split = int(found.group(1)) if found else 1
    steps = -(-k // (bk * (2 if " dots" in text else 1)))
    tiles = -(-m // bm) * -(-n // bn)
    warps = int(re.search(r" w(\d+)", text).group(1))  # type: ignore[union-attr]
    dynamic = resolve(line["scheme"]).activation is not None
    if not prices.height_fits(bm, m, dynamic) or not (tail or prices.splits_fit(split, tiles, bm * bn, warps, SMS)):
        return None
    each, before = -(-steps // split), 0
    if tail:
        before, tiles, each = tiles // SMS, tiles % SMS, steps
    if line["date"] < DESCRIBED and line["kernel"] == "persistent":
        us -= PERSISTENT_LATER
    elif line["date"] < DESCRIBED and " tma" in text:
        us -= LATER + EACH_LATER * math.ceil(prices.waves_of(tiles * split, split, before, SMS))
    return Row(problem, label, re.sub(r" split \d+", "", text), split, tiles, bm * bn, each, us, before)


def fit(measured: Sequence[Row]) -> dict[tuple[str, str], list[float]]:
    """{(label, config): [start, step, pair, full]}, and the splits of each label."""
    configs = sorted({(r.label, r.config) for r in measured})
    place = {key: i for i, key in enumerate(configs)}
    ways = sorted({split_of(r.label, r.area, r.tail) for r in measured if r.split > 1})
    of = torch.tensor([ways.index(split_of(r.label, r.area, r.tail)) if r.split > 1 else 0 for r in measured])
    index = torch.tensor([place[r.label, r.config] for r in measured])
    steps = torch.tensor([float(r.steps) for r in measured])
    waves = torch.tensor([float(r.waves) for r in measured])
    few = (waves <= prices.PAIR) & (waves == waves.floor())
    is_split = torch.tensor([float(r.split > 1) for r in measured])
    left = torch.tensor([(1 - 1 / r.split) * r.steps * prices.hides(r.before, r.area) for r in measured])
    shared = [prices.shared(r.split, r.tiles, r.area, r.tail) for r in measured]  # by one program, by others
    parts = torch.tensor([one * r.area / SPLIT_AREA for (one, _), r in zip(shared, measured, strict=True)]) * is_split
    others = torch.tensor([others / SMS for _, others in shared])
    us, memory, written = (torch.tensor([getattr(r, name) for r in measured]) for name in ("us", "memory", "written"))
    # [start, what a step takes more than pair when it has nobody to hide its waits behind, pair, full as a multiple of it]
    first = torch.tensor([3.0, 0.3, 0.3, 1.2]).log().repeat(len(configs), 1)
    raw, split = first.clone(), torch.tensor([1.0, 0.3, 0.3]).log().repeat(max(1, len(ways)), 1)
    raw.requires_grad_(), split.requires_grad_()
    optimizer = torch.optim.Adam([raw, split], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        start, alone, pair, times_pair = raw.exp().unbind(1)
        cost = torch.stack([start, pair * (1 + alone), pair, pair * times_pair], 1)
        once, by_one, by_all = split.exp()[of].unbind(1)
        begin, step, pair, full = cost[index].unbind(1)
        more = (is_split * once + parts * (by_one + others * by_all) - left * step).clamp_min(0)
        work = steps * torch.maximum(step, waves * torch.where(few, pair, full))
        work = (work**NORM + memory**NORM) ** (1 / NORM)
        cool = begin + work + written
        hot = cool * (1 + prices.HEAT * (cool / prices.HEAT_FROM - 1).clamp(0, 1))
        error = (torch.log(hot + more) - us.log()).abs()
        loss = (error**POWER).mean() ** (1 / POWER) + WEIGHT * (raw - first).square().mean()  # where there are few rows
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    cost, split, error = cost.detach(), split.detach(), error.detach()
    median, mean = float(error.median()), float(error.mean())
    print(f"{len(measured)} rows, {len(configs)} configs: median error {median:.1%}, mean {mean:.1%}")
    splits = {way: [once, by_one, 0.0, by_all] for way, (once, by_one, by_all) in zip(ways, split.exp().tolist(), strict=False)}
    return {key: cost[i].tolist() for key, i in place.items()} | splits


def fit_cublas(measured: Sequence[Row]) -> list[float]:
    """[start, step, 0, full] of cuBLAS's bf16 (costs.of_bf16), by trying a little more and a little less of each."""
    many = [r for r in measured if r.label == "bf16" and r.problem[4] >= prices.NOT_COPIED]  # with fewer the others are worse
    problems = [((r.problem[4], *r.problem[2:4]), r.us) for r in many]

    def loss(cost: Sequence[float]) -> float:
        return sum(abs(math.log(of_bf16(*of, SMS, Cost(*cost)) / us)) for of, us in problems) / len(problems)

    best = [3.0, 0.05, 0.0, 0.27]
    for scale in (1.5, 1.2, 1.1, 1.05, 1.02, 1.01) * 3:
        for i in (0, 1, 3):
            for factor in (scale, 1 / scale):
                tried = [*best[:i], best[i] * factor, *best[i + 1 :]]
                best = tried if loss(tried) < loss(best) else best
    print(f"cuBLAS: {len(problems)} rows, mean error {loss(best):.1%}; {' '.join(f'{value:.3f}' for value in best)}")
    return best


def judge(measured: Sequence[Row], costs: dict[tuple[str, str], list[float]]) -> None:
    """Prints how far the model's choices are from the fastest measured."""
    def modelled(r: Row) -> float:
        cost = Cost(*costs[r.label, r.config])
        us = cost.us(r.waves, r.steps, r.memory, r.written)
        if r.split == 1:
            return us
        left, adding = cost.left(r.split, r.steps, r.before, r.area), Cost(*costs[split_of(r.label, r.area, r.tail)])
        return us + of_split(r.split, r.tiles, r.area, SMS, adding, left, r.tail)

    problems = defaultdict(list)
    for r in measured:
        problems[r.problem].append(r)
    found = []
    text = lambda r: f"{r.config}{' tail' * bool(r.before)} split {r.split}"  # noqa: E731
    for problem, tried in problems.items():
        taken, best = min(tried, key=modelled), min(tried, key=lambda r: r.us)
        found.append((taken.us / best.us, problem, text(taken), text(best)))
    found.sort(reverse=True)
    print(f"{len(found)} problems: taken / fastest {sum(f[0] for f in found) / len(found):.3f} in the mean; the worst:")
    for ratio, problem, taken, fastest in found[:8]:
        print(f"  {ratio:.2f} {' '.join(map(str, problem))}: {taken}, not {fastest}")


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--to", type=Path, default=FILE)
    args = p.parse_args(argv)
    everything = rows(args.results)
    alone = {(kernel.label, key_of(config)): config.alone for kernel in KERNELS for config in kernel.configs}
    measured = [
        r for r in everything
        if (key := (r.label, r.config)) in alone and (not alone[key] or r.tiles * r.split <= SMS)
    ]
    torch.manual_seed(0)
    costs = fit(measured)
    judge(measured, costs)
    costs[BF16] = fit_cublas(everything)
    with args.to.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([*key, *(f"{value:.3f}" for value in cost)] for key, cost in sorted(costs.items()))
    missing = {key for key in alone if key not in costs and key[0]}
    for label, config in sorted(missing):
        print(f"not measured: {label} {config}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
