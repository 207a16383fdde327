"""Activations that the graph writes to, in place, between linears that read them: nothing of before is shared with after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from util import FP32, assert_counts, run, sqnr_db, tokens

from aoquant_inductor import lowering


def add(h: torch.Tensor) -> None:
    h.add_(1.0)


def part(h: torch.Tensor) -> None:
    h[:, :8] = 5.0


def augmented(h: torch.Tensor) -> None:
    h *= 3.0


def of_a_view(h: torch.Tensor) -> None:
    h.view(2, -1)[0] += 2.0


def of_data(h: torch.Tensor) -> None:
    h.data.mul_(2.0)


def out(h: torch.Tensor) -> None:
    torch.exp(h, out=h)


def inplace(h: torch.Tensor) -> None:
    nn.functional.relu(h, inplace=True)


def several(h: torch.Tensor) -> None:
    torch._foreach_mul_([h], 2.0)


def op(h: torch.Tensor) -> None:
    torch.ops.aten.mul_.Tensor(h, torch.full_like(h, 2.0))


def positional(h: torch.Tensor) -> None:
    nn.functional.relu6(h.data, True)


def nothing(h: torch.Tensor) -> None:
    h.add(1.0)


class Two(nn.Module):
    """b reads what `write` made of what a reads."""

    def __init__(self, write: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(32, 64)  # rows that can be packed side by side
        self.write = write

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x * 2
        y = self.a(h)
        self.write(h)
        return y, self.b(h)


WRITES = (add, part, augmented, of_a_view, of_data, out, inplace, several, op, positional)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("scheme", ["int8dq", "int8wo"])
@pytest.mark.parametrize("write", WRITES)
def test_each_linear_reads_what_is_there(
    write: Callable[[torch.Tensor], None], scheme: str, without: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "TOGETHER", frozenset({"cpu"}))
    model, x = Two(write).eval(), tokens(6, 32, FP32)
    with without():
        want = model(x)
        _, got, report = run(model, x, schemes=scheme)
    assert_counts(report, 2)
    assert not any(layer.siblings for layer in report.layers)
    assert all(sqnr_db(y, z) > 30 for y, z in zip(got, want, strict=True))


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_what_is_only_read_is_shared(without: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "TOGETHER", frozenset({"cpu"}))
    model, x = Two(nothing).eval(), tokens(6, 32, FP32)
    with without():
        _, _, report = run(model, x, schemes="int8dq")
    assert all(layer.siblings for layer in report.layers)


def test_weights_of_one_flat_buffer_are_written_by_nobody() -> None:
    """Those that begin within their storage: Dynamo's fake tensors of them count a version."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        flat = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(flat, model.parameters())
    assert model[2].weight.storage_offset() > 0
    x = tokens(4, 32, FP32)
    _, y, report = run(model, x)
    assert_counts(report, 2)
    assert sqnr_db(y, model(x)) > 30


def test_a_weight_of_a_flat_buffer_that_the_graph_writes_is_left() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.b.weight.mul_(1.5)
            y: torch.Tensor = self.b(self.a(x))
            return y

    model = Writes().eval().requires_grad_(False)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    _, _, report = run(model, tokens(4, 32, FP32))
    assert_counts(report, 0, 2, written=2)  # what is written to is the buffer of both


def test_two_parameters_of_one_memory_are_written_by_nobody() -> None:
    """As a tied model is after load_state_dict(assign=True)."""
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    model[2].weight = model[0].weight
    model.load_state_dict(model.state_dict(), assign=True)
    assert model[0].weight is not model[2].weight and model[0].weight.data_ptr() == model[2].weight.data_ptr()
    x = tokens(4, 32, FP32)
    _, y, report = run(model, x)
    assert_counts(report, 2)
    assert sqnr_db(y, model(x)) > 30
