"""A Plot of plots.py as SVG text, by matplotlib: the same text for the same plot and version, no date, sizes in inches."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.plots import Panel, Plot
from benchmarks.rows import split

# families told apart without colour vision, too; the longest prefix counts
MIXED = " + "  # schemes of one model
COLORS = {
    "bf16": "#888888", "int8wo": "#0072b2",
    "int8dq": "#d55e00", "int4wo": "#009e73", "int8dq-int4w": "#aa4499", MIXED: "#b8860b",
}
MARKERS = "osv^Dx"
WIDTH, LEFT, RIGHT, TOP, BOTTOM, GAP = 11.0, 0.75, 0.2, 0.75, 1.2, 0.55  # inches
HEIGHT, WIDEST, BAR = 2.9, 6.0, 0.26  # of a panel of lines, of one bar
ACROSS = 3
DASHES = {"": "-", "torchao": "--", "gemlite": "-."}
STYLE: dict[str, Any] = {
    "svg.hashsalt": "aoquant", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 10,
}


def color(scheme: str) -> str:
    if MIXED in scheme:
        return COLORS[MIXED]
    family = max((f for f in COLORS if split(scheme)[1].startswith(f)), key=len, default="bf16")
    return COLORS[family]


def svg(plot: Plot) -> str:
    with style.context(["default", STYLE]):
        figure = lines(plot) if plot.panels[0].lines else bars(plot)
        text = io.StringIO()
        metadata = {"Date": None, "Title": plot.title, "Identifier": f"data {plot.digest}"}
        figure.savefig(text, format="svg", metadata=metadata, facecolor="white")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def frame(plot: Plot, height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height))
    figure.text(LEFT / WIDTH, 1 - 0.25 / height, plot.title, fontsize=12, weight="bold", va="center")
    figure.text(LEFT / WIDTH, 0.15 / height, plot.source, fontsize=7, color="#555555", va="center")
    return figure


def lines(plot: Plot) -> Figure:
    """Speed over M, both logarithmic, ACROSS panels a row; bounds are dotted, peers dashed."""
    across = min(ACROSS, len(plot.panels))
    down = -(-len(plot.panels) // across)
    height = TOP + down * (HEIGHT + GAP) - GAP + BOTTOM
    figure = frame(plot, height)
    width = min(WIDEST, (WIDTH - LEFT - RIGHT - (across - 1) * GAP) / across)
    speeds = [value for panel in plot.panels for line in panel.lines for _, value in line.points]
    limits = min([*speeds, 0.5]) / 1.1, max([*speeds, 2.0]) * 1.1
    schemes = list(dict.fromkeys(split(line.scheme)[1] for panel in plot.panels for line in panel.lines))
    handles: dict[str, Any] = {}
    for i, panel in enumerate(plot.panels):
        x, y = LEFT + i % across * (width + GAP), height - TOP - HEIGHT - i // across * (HEIGHT + GAP)
        axes = figure.add_axes((x / WIDTH, y / height, width / WIDTH, HEIGHT / height))
        handles |= speed_over_m(axes, panel, schemes, limits)
        if i % across == 0:
            axes.set_ylabel(plot.axis)
        if i + across >= len(plot.panels):
            axes.set_xlabel("M")
    legend = [label for label in handles if label != BOUND] + [BOUND] * (BOUND in handles)
    figure.legend(
        [handles[label] for label in legend], legend, loc="center", bbox_to_anchor=(0.5, 0.5 / height),
        ncols=min(6, len(legend)), frameon=False, fontsize=8, columnspacing=1.2,
    )
    return figure


BOUND = "roofline of an H200"


def speed_over_m(axes: Any, panel: Panel, schemes: Sequence[str], limits: tuple[float, float]) -> dict[str, Any]:
    """Draws one panel; label -> what the legend shows for it."""
    handles: dict[str, Any] = {}
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axhline(1, color=COLORS["bf16"], linewidth=1)
    for line in panel.lines:
        peer, scheme = split(line.scheme)
        at = schemes.index(scheme)
        dashes = ":" if line.bound else DASHES[peer]
        marker = "" if line.bound else MARKERS[at % len(MARKERS)]
        (drawn,) = axes.plot(
            *zip(*line.points, strict=True), dashes, color=color(line.scheme), marker=marker, markersize=4,
            linewidth=1.1 if line.bound or peer else 1.6, markerfacecolor="white" if peer else None,
        )
        handles.setdefault(BOUND if line.bound else line.scheme, drawn)
    ms = sorted({m for line in panel.lines for m, _ in line.points})
    low, high = limits
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(apart(ms)))
    axes.yaxis.set_major_locator(FixedLocator([2.0**i for i in range(-6, 7) if low <= 2.0**i <= high]))
    for axis, form in ((axes.xaxis, "{:g}"), (axes.yaxis, "{:g}x")):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form.format(value)))
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.25)
    axes.set_title(panel.title, loc="left")
    return handles


def apart(ms: Sequence[float]) -> list[float]:
    """Those of ascending values whose labels have room on a logarithmic axis; the last one among them."""
    room = math.log2(ms[-1] / ms[0]) / 11
    kept = [ms[-1]]
    for m in reversed(ms[:-1]):
        if math.log2(kept[-1] / m) >= room:
            kept.append(m)
    return kept[::-1]


def bars(plot: Plot) -> Figure:
    """Bars from above to below, one block per panel, on a common scale where the unit is a speed, else on the panel's own."""
    sizes = [BAR * len(panel.bars) + 0.12 for panel in plot.panels]
    height = TOP + sum(sizes) + GAP * (len(sizes) - 1) + 0.65
    figure = frame(plot, height)
    left, top = 3.3, TOP
    common = plot.axis.startswith("speed")
    most = max(bar.value for panel in plot.panels for bar in panel.bars)
    for i, (panel, size) in enumerate(zip(plot.panels, sizes, strict=True)):
        axes = figure.add_axes((left / WIDTH, 1 - (top + size) / height, (WIDTH - left - RIGHT) / WIDTH, size / height))
        top += size + GAP
        scale = 1.25 * (most if common else max(bar.value for bar in panel.bars))
        for y, bar in enumerate(panel.bars):
            peer, _ = split(bar.scheme)
            axes.barh(
                y, bar.value, 0.72, color="white" if peer else color(bar.scheme), edgecolor=color(bar.scheme),
                hatch="////" if peer else None,
            )
            axes.text(bar.value + scale * 0.006, y, bar.text, va="center", fontsize=8)
        if common:
            axes.axvline(1, color=COLORS["bf16"], linewidth=1)
        axes.set_xlim(0, scale)
        axes.set_ylim(len(panel.bars) - 0.4, -0.6)
        axes.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_title(panel.title, loc="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if i == len(sizes) - 1:
            axes.set_xlabel(plot.axis)
    return figure
