"""What the command lines of all benchmarks share: options, output, tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, measure


def parser(description: str, reps: int, schemes: Sequence[str]) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--schemes", default=",".join(schemes), help="comma-separated (default: %(default)s)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads; 1 measures CPU time, more measure wall time")
    p.add_argument("--reps", type=int, default=reps, help="interleaved rounds (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print the rows as JSON instead of tables")
    p.add_argument("--results", type=Path, default=measure.RESULTS, metavar="DIR", help="where the CSV files lie")
    return p


def parse(p: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; sets torch's threads, and notes the commit now, since the tree may move on during a run."""
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)
    machine.commit()
    return args


def finish(written: Sequence[Mapping[str, Any]], text: str, refused: Sequence[str], args: argparse.Namespace) -> int:
    """Prints the written rows as JSON, or the table; 1 if anything was refused."""
    if args.json:
        print(json.dumps({"rows": list(written), "refused": list(refused)}, indent=1))
    else:
        print(f"{machine.card(args.device)[1]}, torch {torch.__version__}, {torch.get_num_threads()} CPU thread(s)")
        print(text)
        for line in refused:
            print(f"REFUSED {line}")
    return 1 if refused else 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
