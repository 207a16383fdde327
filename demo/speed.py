"""Prefill and decode at batch 1 through a compiled forward with a StaticCache, several models interleaved.

The arrangement that compiles each shape once and never again:
- `dynamic=False`: prefill (128 ids) and decode (1 id) are two static graphs. The default would make the
  second length it sees symbolic, and time that.
- No third graph for the evaluation: a window goes through the prefill graph in pieces of 128, which is why
  that graph returns all logits (the head is a fifth of its multiplications, and bf16 in every scheme). A
  graph of this model takes 40 to 95 s to compile on two cores; and what is scored is exactly what is timed.
- `fullgraph=True`: a graph break, or more graphs than Dynamo's limit, raises. Silently running eager bf16
  instead would make a figure that looks fine.
- One cache per model, allocated before the first call and reset afterwards: transformers marks its tensors as
  static addresses, so a new cache may be a new graph. It counts its length in a tensor: no Python number
  changes.
- Inputs are contiguous: a slice [:, i : i + 1] of a longer row has another stride, and that is another graph.
- A chat prompt goes through the decode graph id by id; a prefill of its length would be one more graph.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import StaticCache

PREFILL = 128  # ids of the timed prompt
CACHE = 512  # ids the cache holds; decode attends over all of them, whatever the position
BLOCK = 12  # decode steps per visit
LEAST, MOST = 5, 15  # rounds: for a median
SECONDS = 90.0  # that rounds may take beyond the least: on a CPU without bf16 arithmetic one takes 25


@dataclass(frozen=True)
class Timing:
    """Tokens per second, medians over the rounds; _x: the median of each round's ratio to the baseline."""

    decode: float
    prefill: float
    decode_x: float = 1.0
    prefill_x: float = 1.0
    rounds: int = 1


@dataclass
class Runner:
    """One compiled forward and its cache; `model`, a transformers Llama, gives config, dtype and device."""

    model: Any
    compiled: Callable[..., Any]
    cache: Any = field(init=False)

    def __post_init__(self) -> None:
        config = self.model.config
        self.cache = StaticCache(config=config, max_cache_len=CACHE)
        self.cache.early_initialization(
            batch_size=1,
            num_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            dtype=self.model.dtype,
            device=self.model.device,
        )

    def step(self, ids: Sequence[int] | torch.Tensor, start: int) -> torch.Tensor:
        """(ids[T], their first position) -> logits[T, vocabulary]; the cache grows by T."""
        device = self.model.device
        positions = torch.arange(start, start + len(ids), device=device)
        return self.forward(torch.as_tensor(ids, device=device)[None], positions[None])

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(ids[1, T], positions[1, T]) -> logits[T, vocabulary]; the cache grows by T."""
        out = self.compiled(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True)
        logits: torch.Tensor = out.logits[0]
        return logits

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """(ids[T]) -> logits[T, vocabulary]; T a multiple of PREFILL, at most CACHE."""
        self.cache.reset()
        return torch.cat([self.step(ids[i : i + PREFILL], i) for i in range(0, len(ids), PREFILL)])

    def generate(self, prompt: Sequence[int], count: int, stop: int) -> list[int]:
        """Greedy continuation of at most `count` ids; ends before `stop`."""
        if len(prompt) + count > CACHE:
            raise ValueError(f"{len(prompt)} + {count} ids do not fit the cache of {CACHE}.")
        self.cache.reset()
        ids = list(prompt)
        for position in range(len(prompt) + count - 1):
            logits = self.step([ids[position]], position)
            if position >= len(prompt) - 1:
                ids.append(int(logits[-1].argmax()))
                if ids[-1] == stop:
                    return ids[len(prompt) : -1]
        return ids[len(prompt) :]


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, the device's queue empty before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def rounds_of(seconds: float) -> int:
    """How many rounds are timed where one takes so long."""
    return min(MOST, max(LEAST, int(SECONDS / seconds)))


def measure(runners: dict[str, Runner], prompt: Sequence[int], say: Callable[[str], None]) -> dict[str, Timing]:
    """Times a prefill of `prompt` and BLOCK decode steps per model and round; the ids are fixed, so sampling
    is no part of it. The first runner is the baseline of the ratios.

    Every round visits every model, each time starting with another one, and a ratio is formed within a round:
    drift (clock, other people's processes) hits both of its sides. A block of steps per visit lets each model
    warm the caches as it would alone; its median step ignores a burst. Four copies of one bf16 graph, with
    blocks of 32 summed and ratios of medians, spread over 0.89 to 1.19 on two shared cores: hence all this.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    order = list(runners)
    say("timing, warm-up")
    start = time.perf_counter()
    for name in order:
        visit(runners[name], prompt)
    rounds = rounds_of(time.perf_counter() - start)
    for round_ in range(rounds):
        say(f"timing, round {round_ + 1} of {rounds}")
        first = round_ % len(order)
        for name in order[first:] + order[:first]:
            times[name].append(visit(runners[name], prompt))
    return {name: summary(times[order[0]], mine, len(prompt)) for name, mine in times.items()}


def visit(runner: Runner, prompt: Sequence[int]) -> tuple[float, float]:
    """(seconds of the prefill, median seconds of a decode step after it)"""
    device, count = runner.model.device, len(prompt)
    whole = torch.tensor([prompt], device=device), torch.arange(count, device=device)[None]
    steps = [tuple(torch.tensor([[n]], device=device) for n in (prompt[i], count + i)) for i in range(BLOCK)]
    runner.cache.reset()
    prefill = seconds(partial(runner.forward, *whole), device)
    return prefill, statistics.median(seconds(partial(runner.forward, *step), device) for step in steps)


def summary(base: Sequence[tuple[float, float]], mine: Sequence[tuple[float, float]], count: int) -> Timing:
    """(prefill seconds, step seconds) per round, the baseline's and one model's -> medians over the rounds"""
    prefill, decode = (statistics.median(column) for column in zip(*mine, strict=True))
    ratios = [(b[0] / m[0], b[1] / m[1]) for b, m in zip(base, mine, strict=True)]
    prefill_x, decode_x = (statistics.median(column) for column in zip(*ratios, strict=True))
    return Timing(1 / decode, count / prefill, decode_x, prefill_x, len(mine))
