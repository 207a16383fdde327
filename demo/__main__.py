"""SmolLM2-135M through torch.compile's backend "aoquant", against compiled bf16 of the same run.

Exit status: 0 all gates held, 1 a gate or the download failed, 2 usage.
"""

from __future__ import annotations

import argparse
import copy
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.measure import append
from demo.evaluate import WINDOW, Score, reference, score, text, windows
from demo.speed import PREFILL, Runner, Timing, measure
from demo.weights import WeightsError, fetch, load

BASELINE = "bf16"
AGAIN = "bf16 again"  # the baseline timed twice: how far equal models seem apart in this run
LINEARS = 210  # 30 layers x 7; the tied head stays bf16
QUESTION = "What is the capital of France, and what is it known for?"
ANSWER_IDS = 24
Say = Callable[[str], None]


@dataclass(frozen=True)
class Gate:
    """Upper bounds against bf16 on the same tokens; None: not judged."""

    ratio: float
    kl: float | None = None


GATES = {"int8wo": Gate(1.005, 0.006), "int8dq": Gate(1.04, 0.05), "int4wo-32-asym": Gate(1.35)}


@dataclass(frozen=True)
class Row:
    """What one scheme did; `quantized` and `summary` are the backend's own report, None for the baseline."""

    scheme: str
    timing: Timing
    score: Score
    weight_bytes: int
    answer: str
    quantized: int | None = None
    summary: str | None = None


def main() -> int:
    start = time.perf_counter()
    args = arguments()
    device = torch.device(args.device)
    try:
        with progress(start) as say, torch.no_grad():
            rows, again = run(args.schemes, args.tokens, device, say)
    except (WeightsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    failures = failed(rows)
    elapsed = time.perf_counter() - start
    print(render(rows, again, args.tokens // WINDOW * WINDOW, device))
    print(f"\n{elapsed:.0f} s in all")
    if args.results:
        append([figures(row, rows[0], args.tokens) for row in rows], "demo", args.device, args.results)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schemes", default=",".join(GATES), help="comma-separated (default: %(default)s)")
    windows_of = f"tokens to score, in windows of {WINDOW} (default: %(default)s)"
    parser.add_argument("--tokens", type=int, default=2048, help=windows_of)
    parser.add_argument("--results", type=Path, metavar="DIR", help="also append the figures to DIR/<card>.demo.csv")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    args.schemes = [scheme for scheme in args.schemes.split(",") if scheme]
    if not args.schemes:
        parser.error("--schemes names none")
    if args.tokens < WINDOW:
        parser.error(f"--tokens must be at least {WINDOW}, one window")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


@contextmanager
def progress(start: float) -> Iterator[Say]:
    """One changing line on a terminal, a line per step elsewhere; both begin with the seconds so far."""

    def stamp(what: str) -> str:
        return f"{time.perf_counter() - start:4.0f} s  {what}"

    if sys.stdout.isatty():
        from rich.console import Console

        with Console().status("starting") as status:
            yield lambda what: status.update(stamp(what))
    else:
        yield lambda what: print(stamp(what), flush=True)


def run(schemes: list[str], tokens: int, device: torch.device, say: Say) -> tuple[list[Row], Timing]:
    """The whole experiment: compile everything, time interleaved, score, generate; and the baseline again."""
    import aoquant_inductor  # registers the backend; with the wheel installed its entry point does

    say("weights")
    model, tokenizer = load(fetch())
    nn.Module.to(model, device)
    ids: list[int] = tokenizer(text()).input_ids
    scored = [window.to(device) for window in windows(ids, tokens)]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    prompt: list[int] = tokenizer(chat).input_ids

    # One deep copy (270 MB) and one compiled object per scheme, all alive at once, so that timing can go
    # round them: with torch.compiler.reset() between schemes the baseline would be minutes away from what is
    # divided by it. The copies share code objects, hence Dynamo's cache: its limit of 8 graphs becomes
    # what this run needs and one more (at the limit aoquant warns), and fullgraph=True makes a further one an error.
    torch._dynamo.config.recompile_limit = 2 * (len(schemes) + 1) + 1
    static: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    compiled: dict[str, Any] = {BASELINE: torch.compile(model, **static)}
    for scheme in schemes:
        options: Any = {"schemes": {"lm_head": None}, "default": scheme}
        aoquant_inductor.plan(model, options)  # a typo is an error now, not after minutes of compiling bf16
        compiled[scheme] = torch.compile(copy.deepcopy(model), backend="aoquant", options=options, **static)
    runners = {name: Runner(model, forward) for name, forward in compiled.items()}
    for name, runner in runners.items():
        say(f"{name}: compiling prefill (1 of 2 graphs)")
        runner.cache.reset()
        runner.step(ids[:PREFILL], 0)
        say(f"{name}: compiling decode (2 of 2 graphs)")
        runner.step(ids[:1], PREFILL)

    timings = measure({**runners, AGAIN: runners[BASELINE]}, ids[:PREFILL], say)
    say(f"{BASELINE}: reference logits")
    truth = reference(runners[BASELINE].logits, scored)
    rows = []
    for name, runner in runners.items():
        say(f"{name}: scoring {tokens // WINDOW * WINDOW} tokens, then an answer")
        points = score(runner.logits, scored, truth)
        answer = str(tokenizer.decode(runner.generate(prompt, ANSWER_IDS, tokenizer.eos_token_id)))
        if name == BASELINE:
            size = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
            rows.append(Row(name, timings[name], points, size, answer))
        else:
            report = aoquant_inductor.report(runner.compiled)
            size, count = report.totals["bytes_after"], report.totals["quantized"]
            rows.append(Row(name, timings[name], points, size, answer, count, report.summary()))
    return rows, timings[AGAIN]


def failed(rows: list[Row]) -> list[str]:
    """One line per broken bound; a NaN breaks every bound."""
    lines = []
    base = rows[0].score.ppl
    for row in rows[1:]:
        gate = GATES.get(row.scheme)
        ratio = row.score.ppl / base
        if gate and not ratio <= gate.ratio:
            lines.append(f"{row.scheme}: perplexity is {ratio:.4f} x bf16, allowed {gate.ratio}")
        if gate and gate.kl is not None and not (row.score.kl is not None and row.score.kl <= gate.kl):
            lines.append(f"{row.scheme}: KL is {row.score.kl} nats/token, allowed {gate.kl}")
        if row.quantized != LINEARS:
            lines.append(f"{row.scheme}: {row.quantized} linears quantized, not {LINEARS} ({row.summary})")
    return lines


def figures(row: Row, base: Row, tokens: int) -> dict[str, Any]:
    """One line of the CSV; speeds in tokens/s, _x against compiled bf16 of the same rounds, kl in nats/token."""
    speeds = {name: round(value, 3) for name, value in asdict(row.timing).items() if name != "rounds"}
    return {
        "model": "SmolLM2-135M", "scheme": row.scheme, **speeds,
        "linear_bytes": row.weight_bytes, "ppl": round(row.score.ppl, 4), "ppl_ratio": round(row.score.ppl / base.score.ppl, 5),
        "kl": "" if row.score.kl is None else round(row.score.kl, 5),
        "top1": "" if row.score.top1 is None else round(row.score.top1, 4),
        "tokens": tokens // WINDOW * WINDOW, "layers": row.quantized or 0,
    }


def render(rows: list[Row], again: Timing, tokens: int, device: torch.device) -> str:
    """The table, what it was measured on, the backend's summaries, and what each model says."""
    base = rows[0]
    table = [["scheme", "decode tok/s", "prefill tok/s", "linear weights", "ppl", "KL", "top-1", "layers"]]
    for row in rows:
        table.append([
            row.scheme,
            f"{row.timing.decode:.1f} ({row.timing.decode_x:.2f}x)",
            f"{row.timing.prefill:.0f} ({row.timing.prefill_x:.2f}x)",
            f"{row.weight_bytes / 1e6:.0f} MB",
            f"{row.score.ppl:.3f} ({row.score.ppl / base.score.ppl:.4f})",
            "-" if row is base or row.score.kl is None else f"{row.score.kl:.4f}",
            "-" if row is base or row.score.top1 is None else f"{row.score.top1:.3f}",
            "-" if row.quantized is None else str(row.quantized),
        ])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        "",
        f"SmolLM2-135M-Instruct, batch 1; {machine(device)}.",
        f"x: against torch.compile bf16, paired within each of {base.timing.rounds} interleaved rounds; prefill of "
        f"{PREFILL} tokens with all logits.",
        f"{AGAIN}: decode {again.decode_x:.2f}x, prefill {again.prefill_x:.2f}x; less is noise.",
        f"ppl (ratio), KL (nats/token), top-1 agreement: against bf16 on the same {tokens} tokens of pydoc.",
        "The weights come from a 4-bit (Q4_1) file: an int4 row proves the path, not int4 quality.",
        "",
    ]
    lines += [f"{row.scheme}: {row.summary}" for row in rows if row.summary]
    lines += ["", f"{QUESTION} ({ANSWER_IDS} tokens, greedy)"]
    lines += [f"{row.scheme}: {' '.join(row.answer.split())}" for row in rows]
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """Device, threads and versions, in words: a figure never travels without them."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{processor()}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"


def processor() -> str:
    """The CPU's name; Linux tells it in /proc only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
