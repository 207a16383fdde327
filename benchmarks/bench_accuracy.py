"""Perplexity, KL and top-1 agreement of SmolLM2-135M against its bf16 self, every window one prefill of 2048 tokens.

The demo feeds windows in pieces of 128, which is below scheme.LARGE_M: what `large_m` costs in accuracy shows here. Each
decoder layer is compiled by itself, so that a scheme costs two compilations of one layer. Needs the extra [demo].

    python -m benchmarks.bench_accuracy --schemes int4wo-128,int4wo-128-large8 --tokens 4096
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

import aoquant_inductor
from benchmarks import cli, measure
from demo.evaluate import Score, reference, score, text, windows
from demo.weights import fetch, load

SCHEMES = ("int8dq", "int4wo-128", "int4wo-128-large8", "int4wo-32-asym", "int4wo-32-asym-large8")
LENGTH = 2048


def logits_of(model: Any) -> Any:
    return lambda ids: model(input_ids=ids[None], use_cache=False).logits[0]


def figures(name: str, found: Score, base: Score, tokens: int, layers: Sequence[aoquant_inductor.Layer]) -> dict[str, Any]:
    """One line of the CSV; kl in nats/token against eager bf16 on the same tokens."""
    return {
        "model": "SmolLM2-135M", "scheme": name, "length": LENGTH, "tokens": tokens, "layers": len(layers),
        "ppl": round(found.ppl, 4), "ppl_ratio": round(found.ppl / base.ppl, 5), "kl": round(found.kl or 0, 5),
        "top1": round(found.top1 or 0, 4), "kernel": "; ".join(sorted({str(layer.kernel) for layer in layers})),
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = cli.parser(__doc__ or "", reps=1, schemes=SCHEMES)
    p.add_argument("--tokens", type=int, default=2 * LENGTH, help=f"to score, in windows of {LENGTH} (default: %(default)s)")
    args = cli.parse(p, argv)
    rows, refused = [], []
    with torch.no_grad():
        model, tokenizer = load(fetch())
        torch.nn.Module.to(model, args.device)
        scored = [window.to(args.device) for window in windows(tokenizer(text()).input_ids, args.tokens, LENGTH)]
        count = LENGTH * len(scored)
        truth = reference(logits_of(model), scored)
        base = score(logits_of(model), scored, truth)
        rows.append(figures("bf16", base, base, count, ()))
        for name in [scheme for scheme in args.schemes.split(",") if scheme]:
            torch.compiler.reset()  # the layers of every scheme share their code, and with it Dynamo's limit of graphs
            mine: Any = copy.deepcopy(model)
            for layer in mine.model.layers:
                layer.compile(backend="aoquant", dynamic=False, options={"default": name})
            found = score(logits_of(mine), scored, truth)
            layers = [one for layer in mine.model.layers for one in aoquant_inductor.report(layer).quantized]
            rows.append(figures(name, found, base, count, layers))
            if len(layers) != 7 * len(mine.model.layers):
                refused.append(f"{name}: {len(layers)} linears quantized")
    written = measure.append(rows, "accuracy", args.device, args.results)
    head = ("scheme", "ppl", "ppl_ratio", "kl", "top1", "layers")
    return cli.finish(written, cli.table(head, [[str(row[key]) for key in head] for row in rows]), refused, args)


if __name__ == "__main__":
    raise SystemExit(main())
