"""The README's tables of single linears."""

from __future__ import annotations

from itertools import product

from benchmarks.markup import bold, markdown, source
from benchmarks.measure import RESULTS
from benchmarks.rows import PEERS, best_configs, linears, split


def linear(card: str, *names: str) -> str:
    """Speed against bf16, one row per shape and scheme, one column per M; below 1 in bold."""
    path = RESULTS / f"{card}.linear.csv"
    rows = linears(path)
    ms = sorted({int(row["m"]) for row in rows})
    found = {(row["shape"], row["scheme"], int(row["m"])): row for row in rows}
    table = []
    for shape, scheme in product(dict.fromkeys(row["shape"] for row in rows), ("bf16", *names)):
        cells = [found.get((shape, scheme, m)) for m in ms]
        if scheme == "bf16":
            table.append([f"**{shape}**, bf16, us", *("-" if c is None else f"{float(c['value']):.1f}" for c in cells)])
            continue
        ratios = [None if c is None else float(c["ratio"]) for c in cells]
        table.append([scheme, *("-" if r is None else bold(r) for r in ratios)])
    return markdown(["N x K, scheme \\ M", *map(str, ms)], table) + source(rows, path)


def peers(card: str, *shapes: str) -> str:
    """Microseconds of bf16, ours and each peer at one row and 16, and speed against bf16, of the last run that had peers."""
    path = RESULTS / f"{card}.linear.csv"
    rows = [row for row in linears(path, "date") if row["shape"] in shapes and row["m"] in ("1", "16")]
    found = {(row["shape"], row["m"], row["scheme"], row["date"]): row for row in rows}
    runs: dict[tuple[str, str, str], str] = {}  # when
    for row in rows:
        whose, scheme = split(row["scheme"])
        if whose:
            key = row["shape"], row["m"], scheme
            runs[key] = max(row["date"], runs.get(key, ""))
    table, seen = [], []
    for (shape, m, scheme), date in runs.items():
        cells = [found.get((shape, m, name, date)) for name in (scheme, *(f"{peer} {scheme}" for peer in PEERS))]
        text = ["-" if c is None else f"{float(c['value']):.1f} us, {bold(float(c['ratio']))}" for c in cells]
        there = [c for c in cells if c is not None]
        bf16 = float(there[0]["value"]) * float(there[0]["ratio"])
        table.append([f"{shape}, M = {m}, {scheme}", f"{bf16:.1f}", *text])
        seen += there
    return markdown(["N x K", "bf16, us", "aoquant", *PEERS], table) + source(seen, path)


def tune(card: str, *shapes: str) -> str:
    """The best config that was right: microseconds and speed against bf16; below 1 in bold."""
    path = RESULTS / f"{card}.tune.csv"
    best = best_configs(path)
    ms = [m for m in sorted({m for _, _, m in best}) if m in (1, 16, 64, 256, 1024, 4096)]
    table = []
    for shape in shapes:
        for scheme in dict.fromkeys(scheme for scheme, of, _ in best if of == shape):
            cells = [best.get((scheme, shape, m)) for m in ms]
            text = ["-" if c is None else f"{float(c['us']):.1f} us, {bold(float(c['ratio']))}" for c in cells]
            table.append([f"{scheme}, {shape}", *text])
    return markdown(["M =", *map(str, ms)], sorted(table)) + source(list(best.values()), path)
