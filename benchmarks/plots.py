"""The plots of benchmarks/plots/, from benchmarks/results/*.csv; `--check` only says which are not those of the files.

What a plot shows is made here as plain data, and its digest is in the SVG: whether a plot is up to date needs no matplotlib.
draw.py draws. A plot without rows is not written, and that is said.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import RESULTS
from benchmarks.rows import EAGER, LADDER, Row, best_configs, linears, of_models, origin, speeds, split

PLOTS = RESULTS.parent / "plots"


@dataclass(frozen=True)
class Line:
    """(M, speed against bf16) per point. bound: no measurement, what the card's bandwidth and arithmetic allow."""

    scheme: str
    points: tuple[tuple[float, float], ...]
    bound: bool = False


@dataclass(frozen=True)
class Bar:
    """value as `unit` of its panel; text beside it."""

    label: str
    scheme: str
    value: float
    text: str


@dataclass(frozen=True)
class Panel:
    title: str
    lines: tuple[Line, ...] = ()
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True)
class Plot:
    """`source`: card, versions and commit of the rows; `axis`: what a bar's length or a line's height is."""

    name: str
    title: str
    axis: str
    source: str
    panels: tuple[Panel, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def _card(path: Path) -> str:
    return path.name.partition(".")[0]


def _ours_first(scheme: str) -> tuple[bool, str]:
    return bool(split(scheme)[0]), scheme


def _lines(rows: Sequence[Row]) -> tuple[Line, ...]:
    """Of one shape: a line per scheme over M, and its bound where rows have a roofline; bf16's time is value * ratio."""
    found = []
    for scheme in sorted({row["scheme"] for row in rows} - {"bf16"}, key=_ours_first):
        own = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: int(row["m"]))
        found.append(Line(scheme, tuple((int(row["m"]), float(row["ratio"])) for row in own)))
        bounds = tuple(
            (int(row["m"]), round(float(row["value"]) * float(row["ratio"]) / float(row["roofline"]), 3))
            for row in own if row["roofline"]
        )
        if bounds and not split(scheme)[0]:
            found.append(Line(scheme, bounds, bound=True))
    return tuple(found)


def linear(results: Path) -> Iterator[Plot]:
    """Speed of one linear over M, a panel per shape."""
    for path in sorted(results.glob("*.linear.csv")):
        rows = linears(path)
        shapes = dict.fromkeys(row["shape"] for row in rows)
        panels = tuple(Panel(shape, _lines([row for row in rows if row["shape"] == shape])) for shape in shapes)
        title = "One linear, N x K, over its rows M"
        yield Plot(f"{_card(path)}.linear", title, "speed against compiled bf16", origin(rows), panels)


def kernels(results: Path) -> Iterator[Plot]:
    """The best config of each kernel alone, as `benchmarks.tune` found it."""
    for path in sorted(results.glob("*.tune.csv")):
        best = best_configs(path)
        panels = []
        for shape in dict.fromkeys(shape for _, shape, _ in best):
            schemes = sorted({scheme for scheme, of, _ in best if of == shape})
            lines = (
                Line(s, tuple(sorted((m, float(row["ratio"])) for (of, at, m), row in best.items() if (of, at) == (s, shape))))
                for s in schemes
            )
            panels.append(Panel(shape, tuple(line for line in lines if len(line.points) > 1)))
        panels = [panel for panel in panels if panel.lines]
        yield Plot(
            f"{_card(path)}.kernels", "Kernels alone, best config, without the quantization of activations",
            "speed against cuBLAS in bf16", origin(list(best.values())), tuple(panels),
        )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _cases(path: Path, ladder: bool) -> Iterator[tuple[str, list[Row]]]:
    """(case, its rows) of a model file."""
    rows = of_models(path)
    for case in dict.fromkeys(row["case"] for row in rows):
        if case.endswith(LADDER) == ladder:
            yield case, [row for row in rows if row["case"] == case]


def models(results: Path) -> Iterator[Plot]:
    """Speed-up per model and scheme, a panel per case."""
    for path in sorted(results.glob("*.model.csv")):
        panels = []
        for case, rows in _cases(path, ladder=False):
            bars = tuple(
                Bar(row["scheme"], row["scheme"], round(speed, 3), f"{speed:.2f}x, {_rate(float(row['rate']))} {row['unit']}")
                for row, speed in speeds(rows, case)
            )
            if len(bars) > 1:
                panels.append(Panel(case, bars=bars))
        if panels:
            yield Plot(
                f"{_card(path)}.model", "Whole models", "speed against compiled bf16", origin(of_models(path)), tuple(panels)
            )


def ladder(results: Path) -> Iterator[Plot]:
    """Milliseconds of a step on each rung, and the speed against the first: bf16 without a compiler, then with."""
    for path in sorted(results.glob("*.model.csv")):
        panels, used = [], []
        for case, rows in _cases(path, ladder=True):
            own = sorted(rows, key=lambda row: (row["scheme"] != EAGER, row["scheme"] != "bf16"))
            used += own
            first = float(own[0]["ms"])
            bars = (
                Bar(f"compiled {row['scheme']}" if row["scheme"] == "bf16" else row["scheme"],
                    "bf16" if "bf16" in row["scheme"] else "int8dq", float(row["ms"]),
                    f"{float(row['ms']):.2f} ms, {first / float(row['ms']):.2f}x")
                for row in own
            )
            panels.append(Panel(f"{case.removesuffix(LADDER)}, {own[0]['mode']} mode", bars=tuple(bars)))
        if panels:
            yield Plot(f"{_card(path)}.ladder", "Up the ladder", "milliseconds of a step", origin(used), tuple(panels))


KINDS: Mapping[str, Callable[[Path], Iterator[Plot]]] = {
    "linear": linear, "kernels": kernels, "model": models, "ladder": ladder,
}


def plots(results: Path) -> list[Plot]:
    """Everything there are rows for."""
    return [plot for kind in KINDS.values() for plot in kind(results) if plot.panels]


def stale(wanted: Sequence[Plot], folder: Path) -> list[str]:
    """Files that are missing, that show other numbers, or that have no rows any more."""
    there = {path.name: path.read_text() for path in folder.glob("*.svg")}
    digests = {f"{plot.name}.svg": plot.digest for plot in wanted}
    wrong = [name for name, digest in digests.items() if f"data {digest}" not in there.get(name, "")]
    return sorted([*wrong, *(there.keys() - digests.keys())])


def version(svg: str) -> str:
    """The matplotlib that drew a file: another one may place a letter elsewhere."""
    found = re.search(r"Matplotlib v([\w.]+)", svg)
    return found[1] if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the CSV files lie")
    p.add_argument("--plots", type=Path, default=PLOTS, metavar="DIR", help="where the SVG files go; it holds nothing else")
    p.add_argument("--check", action="store_true", help="write nothing; 1 if a plot is not what the files say")
    args = p.parse_args(argv)
    wanted = plots(args.results)
    for kind in KINDS:
        if not any(plot.name.endswith(f".{kind}") for plot in wanted):
            print(f"{kind}: no rows in {args.results}, no plot")
    old = stale(wanted, args.plots)
    if args.check:
        for name in old:
            print(f"{name} is not what the files say: python -m benchmarks.plots")
        return int(bool(old))
    from benchmarks import draw

    args.plots.mkdir(parents=True, exist_ok=True)
    for plot in wanted:
        path = args.plots / f"{plot.name}.svg"
        path.write_text(draw.svg(plot))
        print(f"{path}: {len(plot.panels)} panel(s)")
    for name in stale(wanted, args.plots):  # what is left has no rows any more
        (args.plots / name).unlink()
        print(f"{name}: its rows are gone, removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
