"""The README's tables, written from benchmarks/results/*.csv; `--check` only compares.

A block of the README between `<!-- table: KIND CARD ... -->` and `<!-- end -->` holds the table that TABLES[KIND] makes of
<CARD>.<file>.csv. Of rows measured twice the newest counts.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import RESULTS

README = RESULTS.parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- table: ([\w .:-]+?) -->\n).*?(<!-- end -->)", re.S)
Row = Mapping[str, str]


def newest(path: Path, *key: str) -> list[Row]:
    """The rows of a file, one per key: the last one, in the order the keys first appear. Raises FileNotFoundError."""
    with path.open(newline="") as file:
        return list({tuple(row[k] for k in key): row for row in csv.DictReader(file)}.values())


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(rows: Sequence[Row], path: Path) -> str:
    """What the numbers were measured on, from the rows themselves."""
    several = lambda key: ", ".join(dict.fromkeys(row[key] for row in rows if row[key]))  # noqa: E731
    threads = f"{several('threads')} CPU thread(s), " if several("threads") else ""
    text = f"{several('card')}, {threads}torch {several('torch')}, commit {several('commit')}"
    return f"\n\n<sub>[{path.name}](benchmarks/results/{path.name}): {text}</sub>"


def demo(card: str) -> str:
    path = RESULTS / f"{card}.demo.csv"
    rows = newest(path, "scheme")
    table = [
        [
            row["scheme"], f"{float(row['decode']):.1f} ({float(row['decode_x']):.2f}x)",
            f"{float(row['prefill']):.0f} ({float(row['prefill_x']):.2f}x)", f"{int(row['linear_bytes']) / 1e6:.0f} MB",
            f"{float(row['ppl']):.3f} ({float(row['ppl_ratio']):.4f})", row["kl"] or "-", row["top1"] or "-", row["layers"],
        ]
        for row in rows
    ]
    head = ["SmolLM2-135M", "decode tok/s", "prefill tok/s", "linear weights", "perplexity (ratio)", "KL", "top-1", "layers"]
    return markdown(head, table) + source(rows, path)


def host(card: str, *schemes: str) -> str:
    path = RESULTS / f"{card}.host.csv"
    rows = newest(path, "shape", "scheme", "mode")
    found = {(row["shape"], row["mode"], row["scheme"]): row for row in rows}
    table = [
        [shape, mode, f"{float(found[shape, mode, 'bf16']['value']):.0f} us",
         *(f"{float(row['value']):.0f} us ({1 / float(row['ratio']):.2f}x)" if (row := found.get((shape, mode, s))) else "-"
           for s in schemes)]
        for shape, mode in dict.fromkeys((row["shape"], row["mode"]) for row in rows if row["mode"])
    ]
    check = next(row for row in rows if row["what"] == "stale_check")
    note = f"\n\nOf it, the check for changed weights: {float(check['value']):.1f} us per {check['shape']}."
    return markdown(["model", "mode", "bf16", *schemes], table) + note + source(rows, path)


def linear(card: str, *names: str) -> str:
    """Speed against bf16, one row per shape and scheme, one column per M; below 1 in bold."""
    path = RESULTS / f"{card}.linear.csv"
    rows = newest(path, "shape", "m", "scheme")
    ms = sorted({int(row["m"]) for row in rows})
    found = {(row["shape"], row["scheme"], int(row["m"])): row for row in rows}
    table = []
    for shape, scheme in dict.fromkeys((row["shape"], row["scheme"]) for row in rows):
        if scheme not in ("bf16", *names):
            continue
        cells = [found.get((shape, scheme, m)) for m in ms]
        if scheme == "bf16":
            table.append([f"**{shape}**, bf16, us", *("-" if c is None else f"{float(c['value']):.1f}" for c in cells)])
            continue
        ratios = [None if c is None else float(c["ratio"]) for c in cells]
        table.append([scheme, *("-" if r is None else _ratio(r) for r in ratios)])
    return markdown(["N x K, scheme \\ M", *map(str, ms)], table) + source(rows, path)


def tune(card: str, *shapes: str) -> str:
    """The best config that was right: microseconds and speed against bf16; below 1 in bold."""
    paths = [RESULTS / f"{card}.{name}.csv" for name in ("tune", "int4.tune")]
    rows = [row for path in paths for row in newest(path, "scheme", "n", "k", "m", "kernel", "config") if row["us"]]
    best: dict[tuple[str, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: -float(row["us"])):
        # a carried sum needs a newer ptxas than Triton brings
        if row["kernel"] != "bf16" and "wrong" not in row["note"].lower() and "carried" not in row["config"]:
            best[row["scheme"], f"{row['n']}x{row['k']}", int(row["m"])] = row
    ms = [m for m in sorted({m for _, _, m in best}) if m in (1, 16, 64, 256, 1024, 4096)]
    table = []
    for shape in shapes:
        for scheme in dict.fromkeys(scheme for scheme, of, _ in best if of == shape):
            cells = [best.get((scheme, shape, m)) for m in ms]
            text = ["-" if c is None else f"{float(c['us']):.1f} us, {_ratio(float(c['ratio']))}" for c in cells]
            table.append([f"{scheme}, {shape}", *text])
    sources = [source(newest(path, "scheme", "n", "k", "m", "config"), path) for path in paths]
    return markdown(["M =", *map(str, ms)], sorted(table)) + "".join(sources)


def _ratio(r: float) -> str:
    return f"{r:.2f}x" if r >= 1 else f"**{r:.2f}x**"


def memory(card: str) -> str:
    path = RESULTS / f"{card}.memory.csv"
    rows = newest(path, "shape", "scheme", "mode", "what")
    found = {(row["shape"], row["scheme"], row["mode"], row["what"]): float(row["value"]) for row in rows}
    table = []
    for shape, scheme, mode in dict.fromkeys((row["shape"], row["scheme"], row["mode"]) for row in rows):
        get = lambda what: found[shape, scheme, mode, what]  # noqa: E731, B023
        who = "aoquant" if mode == "pack" else mode
        table.append([
            f"{shape}, {scheme}, {who}", f"{get('resident') / 1e3:.1f} GB", f"{get('linears_left'):.3f}",
            f"{get('peak') / 1e3:.1f} GB", f"{get('peak_over_model') / 1e3:.2f} GB", f"{get('seconds'):.1f} s",
        ])
    head = ["", "resident", "linears, of bf16's bytes", "peak while packing", "of it beyond the bf16 model", "time to pack"]
    return markdown(head, table) + source(rows, path)


TABLES: Mapping[str, Callable[..., str]] = {
    "demo": demo, "host": host, "linear": linear, "tune": tune, "memory": memory,
}


def fill(text: str) -> str:
    """The README with every block made anew. Raises KeyError for a kind of table that is none."""

    def block(match: re.Match[str]) -> str:
        kind, *arguments = match[2].split()
        return f"{match[1]}{TABLES[kind](*arguments)}\n{match[3]}"

    return BLOCK.sub(block, text)


def main(argv: Sequence[str]) -> int:
    old = README.read_text()
    new = fill(old)
    if "--check" in argv:
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
