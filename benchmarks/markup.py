"""What every table of the README is written with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row, origin


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(rows: Sequence[Row], path: Path) -> str:
    return f"\n\n<sub>[{path.name}](benchmarks/results/{path.name}): {origin(rows)}</sub>"


def bold(r: float) -> str:
    return f"{r:.2f}x" if r >= 1 else f"**{r:.2f}x**"
