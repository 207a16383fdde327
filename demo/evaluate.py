"""Perplexity, KL and top-1 agreement of a quantized model against its bf16 self, on the same tokens.

Only the paired figures (ratio, KL, top-1) mean something at a few thousand tokens: the perplexity itself has
a standard error of about 5 % there, the difference of two models on the same tokens one below .2 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch.nn.functional import log_softmax

LogitsFn = Callable[[torch.Tensor], torch.Tensor]  # ids[T] int64 -> logits[T, vocabulary]

WINDOW = 512


@dataclass(frozen=True)
class Score:
    """ppl over all tokens; kl in nats/token and top1 in 0..1 against the reference, None without one."""

    ppl: float
    kl: float | None = None
    top1: float | None = None


def text() -> str:
    """The standard library's help pages: on every machine, the same for one Python version."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(ids: Sequence[int], tokens: int, length: int = WINDOW) -> list[torch.Tensor]:
    """`tokens // length` windows of length + 1 ids; neighbours share one id, so that every id but the first
    is predicted once. No beginning-of-sequence token is put in front: the file says add_bos_token = False.

    Raises ValueError when that gives no window, or when `ids` is too short.
    """
    count = tokens // length
    if count < 1:
        raise ValueError(f"{tokens} tokens do not fill one window; ask for {length} or more.")
    if len(ids) < count * length + 1:
        raise ValueError(f"the text has {len(ids)} tokens, {count * length + 1} are needed; ask for fewer.")
    return [torch.tensor(ids[i * length : (i + 1) * length + 1]) for i in range(count)]


def reference(logits_fn: LogitsFn, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every window in the model's own dtype: bf16 loses nothing there (100 MB per 1024 tokens),
    while bf16 log-probabilities would."""
    return [logits_fn(window[:-1]).clone() for window in windows]


def score(
    logits_fn: LogitsFn, windows: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] | None = None
) -> Score:
    """ppl = exp(mean(-log q(target))); kl = mean(sum_v p (log p - log q)), p the reference's distribution;
    float32 per token, float64 across tokens."""
    nll = kl = agree = 0.0
    for i, window in enumerate(windows):
        log_q = log_softmax(logits_fn(window[:-1]).float(), dim=-1)
        nll -= log_q.gather(1, window[1:, None]).double().sum().item()
        if reference is not None:
            log_p = log_softmax(reference[i].float(), dim=-1)
            agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
    count = sum(len(window) - 1 for window in windows)
    ppl = math.exp(nll / count) if nll / count < 700 else math.inf  # overflow, NaN: fail the gates
    return Score(ppl) if reference is None else Score(ppl, kl / count, agree / count)
