"""The tables of the README, each a function of the result files of a card. Of rows measured twice the newest counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from benchmarks import plots as made
from benchmarks.bench_profile import MAKERS
from benchmarks.markup import bold, markdown, source
from benchmarks.measure import RESULTS
from benchmarks.rows import EAGER, Row, newest, of_models, of_profiles, speeds, speeds_in, split
from benchmarks.tables_linear import linear, peers, tune


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


def coverage(card: str) -> str:
    """Of each architecture, which linears were quantized, and how close the model stays to bf16."""
    path = RESULTS / f"{card}.coverage.csv"
    rows = newest(path, "model", "scheme")
    table = [[r["model"], r["scheme"], f"{r['quantized']} of {r['linears']}", r["left"] or "-", r["sqnr_db"]] for r in rows]
    return markdown(["architecture", "scheme", "linears quantized", "left", "SQNR to bf16, dB"], table) + source(rows, path)


def accuracy(card: str) -> str:
    path = RESULTS / f"{card}.accuracy.csv"
    rows = newest(path, "scheme")
    table = [
        [row["scheme"], f"{float(row['ppl']):.3f} ({float(row['ppl_ratio']):.4f})", row["kl"], row["top1"], row["layers"]]
        for row in rows
    ]
    head = ["SmolLM2-135M, inputs of 2048 tokens", "perplexity (ratio)", "KL", "top-1", "layers"]
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


def _gigabytes(row: Row) -> str:
    return f"{float(row['resident_mb']) / 1e3:.2f} GB" if row["resident_mb"] else "-"


def _step(row: Row, bf16: Row) -> str:
    """Milliseconds; and what they are to be read against, where that is not the row of bf16 in the table."""
    other = f"{float(row['bf16_ms']):.3f}" if row["bf16_ms"] else "not in its run"
    return f"{float(row['ms']):.3f} ms" + (f" (bf16 {other})" if row["bf16_ms"] != bf16["ms"] else "")


def model(card: str) -> str:
    """Every case and scheme of a card: speed against compiled bf16, rate, host time, memory, error."""
    path = RESULTS / f"{card}.model.csv"
    rows = of_models(path)
    table = [
        [
            row["case"], row["scheme"], bold(speed), f"{float(row['rate']):,.1f} {row['unit']}", _step(row, shown[0][0]),
            f"{float(row['host_ms']):.3f} ms" if row["host_ms"] else "-", _gigabytes(row),
            f"{row['error_db']} dB" if row["error_db"] else "-", row["quantized"] or "-",
        ]
        for shown in (speeds(rows, case) for case in dict.fromkeys(row["case"] for row in rows)) for row, speed in shown
    ]
    head = ["case", "scheme", "speed", "rate", "step", "host", "resident", "SQNR to bf16", "linears"]
    return markdown(head, table) + source(rows, path)


def profiles() -> str:
    """Per card, case and scheme: launches and share of a step's kernels by who made them."""
    table, sources = [], []
    files = {path: of_profiles(path) for path in sorted(RESULTS.glob("*.profile.csv"))}
    seen = {row["by"] for runs in files.values() for run in runs.values() for row in run}
    if not seen:
        return "No rows yet: `python -m benchmarks.bench_profile` writes `benchmarks/results/<card>.profile.csv`."
    makers = [maker for maker in (*MAKERS, "other") if maker in seen]
    for path, runs in files.items():
        for (case, scheme), run in runs.items():
            cells = []
            for maker in makers:
                own = [row for row in run if row["by"] == maker]
                share = sum(float(row["share"]) for row in own)
                cells.append(f"{sum(float(row['count']) for row in own):g}, {share:.1%}" if own else "-")
            whole = f"{sum(float(row['us']) for row in run):,.0f} us"
            table.append([f"{case}, {path.name.partition('.')[0]}", scheme, whole, *cells])
        sources.append(source([row for run in runs.values() for row in run], path))
    return markdown(["launches and share of", "scheme", "in all", *makers], table) + "".join(sources)


FIRST = (
    "qwen-decode-1", "llama-decode-1", "llama-decode-32", "llama-decode-32-flex", "llama-generate", "llama-prefill-4096",
    "sam-encoder", "voxtral", "dit",
)


def _last(rows: Sequence[Row], case: str) -> str:
    """When a case was measured, "" where it was not."""
    return max((row.get("date", "") for row in rows if row["case"] == case), default="")


def first() -> str:
    """The first screen: whole models against compiled bf16, speed, memory and accuracy, whoever wins."""
    table, sources = [], []
    files = {path: of_models(path) for path in sorted(RESULTS.glob("*.model.csv"))}
    # a case that ran on several cards is shown on the one that it ran on last
    last = {case: max(files, key=lambda path: _last(files[path], case)) for case in FIRST if files}
    for path, rows in files.items():
        shown = [row for row in rows if last.get(row["case"]) == path]
        for row, speed in (pair for case in FIRST for pair in speeds(shown, case)):
            if row["scheme"] != "bf16" and not split(row["scheme"])[0]:
                base = next(one for one in rows if (one["case"], one["scheme"]) == (row["case"], "bf16"))
                of = float(row["resident_mb"]) / float(base["resident_mb"]) if row["resident_mb"] else 0
                table.append([
                    f"{row['case']}, {path.name.partition('.')[0]}", row["scheme"], bold(speed),
                    f"{_gigabytes(row)}, {of:.2f}x" if of else "-", f"SQNR {row['error_db']} dB",
                ])
        if shown:
            sources.append(source(shown, path))
    for path in sorted(RESULTS.glob("*.demo.csv")):
        rows = newest(path, "scheme")
        size = {row["scheme"]: int(row["linear_bytes"]) for row in rows}
        for row in rows:
            if row["scheme"] != "bf16":
                table.append([
                    f"{row['model']} decode / prefill, {path.name.partition('.')[0]}", row["scheme"],
                    f"{bold(float(row['decode_x']))} / {bold(float(row['prefill_x']))}",
                    f"{size[row['scheme']] / size['bf16']:.2f}x of bf16's linears",
                    f"perplexity {float(row['ppl_ratio']):.4f}x, KL {row['kl']}",
                ])
        sources.append(source(rows, path))
    return markdown(["model, card", "scheme", "speed-up", "memory", "accuracy"], table) + "".join(sources)


LOSING = ("linear", "model", "host")


def losing(*cards: str) -> str:
    """Every row of ours below 1.00x of bf16: linears, models and host time of these cards, or of <card>.<one of them> alone."""
    lost: dict[tuple[str, str], list[str]] = {}
    seen = []
    for card in cards:
        for path in (RESULTS / f"{name}.csv" for name in ([card] if "." in card else [f"{card}.{b}" for b in LOSING])):
            if not path.exists():
                continue
            seen.append(f"[{path.name}](benchmarks/results/{path.name})")
            for what, scheme, where, ratio in speeds_in(path):
                if ratio < 1 and not split(scheme)[0] and not scheme.startswith(("bf16", EAGER)):
                    of = f"{what}, {path.name.removesuffix('.csv')}", scheme
                    lost.setdefault(of, []).append(f"{where} {bold(ratio)}".strip())
    table = [[*of, ", ".join(cells)] for of, cells in lost.items()]
    rows = markdown(["below bf16", "scheme", "speed"], table) if table else "None."
    return f"{rows}\n\n<sub>of {', '.join(seen)}</sub>"


def plots(*patterns: str) -> str:
    """The plots with such names that there are rows for; `python -m benchmarks.plots` makes them."""
    wanted = [plot for plot in made.plots(RESULTS) if any(fnmatchcase(plot.name, pattern) for pattern in patterns)]
    return "\n\n".join(f"![{plot.title}](benchmarks/plots/{plot.name}.svg)" for plot in wanted)


TABLES: Mapping[str, Callable[..., str]] = {
    "demo": demo, "accuracy": accuracy, "coverage": coverage, "host": host, "linear": linear, "peers": peers, "tune": tune,
    "memory": memory, "model": model, "first": first, "plots": plots, "losing": losing, "profiles": profiles,
}
