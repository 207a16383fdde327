"""Rows of benchmarks/results/*.csv as tables and plots want them: of what was measured twice, the newest."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, str]
EAGER = "eager bf16"
LADDER = "-ladder"  # ends the names of the cases that climb a tutorial's steps
PEERS = ("torchao", "gemlite")
REFERENCES = ("bf16", "_int_mm")  # cuBLAS's, as the kernels of tune.csv


def split(scheme: str) -> tuple[str, str]:
    """(whose, the scheme itself) of a row: "torchao int8wo" is torchao's int8wo, "int8wo" ours, whose name is empty."""
    whose, _, rest = scheme.partition(" ")
    return (whose, rest) if whose in PEERS else ("", scheme)


def newest(path: Path, *key: str) -> list[Row]:
    """The rows of a file, one per key: the last one, in the order the keys first appear. Raises FileNotFoundError."""
    with path.open(newline="") as file:
        return list({tuple(row[k] for k in key): row for row in csv.DictReader(file)}.values())


def origin(rows: Sequence[Row]) -> str:
    """What the numbers were measured on, from the rows themselves."""
    several = lambda key: ", ".join(dict.fromkeys(row[key] for row in rows if row[key]))  # noqa: E731
    threads = f"{several('threads')} CPU thread(s), " if several("threads") else ""
    return f"{several('card')}, {threads}torch {several('torch')}, commit {several('commit')}"


def linears(path: Path, *further: str) -> list[Row]:
    """One row per shape, M, scheme and `further` columns: of two modes the default one, of bf16's the faster, which the ratios
    are against.

    The largest weight first, then by M, whenever they were measured.
    """
    found: dict[tuple[str, ...], Row] = {}
    for row in newest(path, "shape", "m", "scheme", "mode", *further):
        key = tuple(row[column] for column in ("shape", "m", "scheme", *further))
        if key not in found or (
            float(row["value"]) < float(found[key]["value"]) if row["scheme"] == "bf16" else row["mode"] == "default"
        ):
            found[key] = row
    return sorted(found.values(), key=lambda r: (-math.prod(map(int, r["shape"].split("x"))), r["shape"], int(r["m"])))


def best_configs(path: Path) -> dict[tuple[str, str, int], Row]:
    """(scheme, NxK, M) -> the fastest config that was right."""
    rows = [row for row in newest(path, "scheme", "n", "k", "m", "kernel", "config") if row["us"]]
    best: dict[tuple[str, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: -float(row["us"])):
        if row["kernel"] not in REFERENCES and "wrong" not in row["note"].lower():
            best[row["scheme"], f"{row['n']}x{row['k']}", int(row["m"])] = row
    return best


def of_models(path: Path) -> list[Row]:
    """The newest row of each case and scheme; `bf16_ms`: what bf16 took in the run that it is of, "" where bf16 was not in it.

    A run writes bf16 first.
    """
    found: dict[tuple[str, str], Row] = {}
    base: dict[tuple[str, str], Row] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            of = row["case"], row["mode"]
            if row["scheme"] == "bf16":
                base[of] = row
            found[row["case"], row["scheme"]] = row | {"bf16_ms": base[of]["ms"] if of in base else ""}
    return list(found.values())


def speeds(rows: Sequence[Row], case: str) -> list[tuple[Row, float]]:
    """(row, its speed against bf16 of its own run) of one case, bf16 first, of bf16's mode; nothing where bf16 has no row.

    A row whose run had no bf16 is set against bf16's newest.
    """
    own = sorted((row for row in rows if row["case"] == case), key=lambda row: row["scheme"] != "bf16")
    if not own or own[0]["scheme"] != "bf16":
        return []
    same = [row for row in own if row["mode"] == own[0]["mode"]]
    return [(row, float(row["bf16_ms"] or own[0]["ms"]) / float(row["ms"])) for row in same]


def of_profiles(path: Path) -> dict[tuple[str, str], list[Row]]:
    """(case, scheme) -> the kernels of its last run."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {(row["case"], row["scheme"]): row["date"] for row in rows}
    return {key: [row for row in rows if (row["case"], row["scheme"], row["date"]) == (*key, last[key])] for key in last}


def speeds_in(path: Path) -> list[tuple[str, str, str, float]]:
    """(what, scheme, at which M or in which mode, speed against bf16) of every row of a linear, model or host file."""
    bench = path.name.split(".")[-2]
    if bench == "model":
        rows = of_models(path)
        cases = dict.fromkeys(row["case"] for row in rows)
        found = ((case, row["scheme"], speed) for case in cases for row, speed in speeds(rows, case))
        return [(case, scheme, "", speed) for case, scheme, speed in found if scheme != "bf16"]
    if bench == "linear":
        return [(r["shape"], r["scheme"], f"M = {r['m']}", float(r["ratio"])) for r in linears(path) if r["scheme"] != "bf16"]
    rows = newest(path, "shape", "scheme", "mode")
    named = [row for row in rows if row["ratio"] and row["scheme"] != "bf16"]
    return [(row["shape"], row["scheme"], row["mode"], float(row["ratio"])) for row in named]
