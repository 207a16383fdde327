"""torch.nn's attention on the card: its linears by our kernels, its op gone from the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from util import BF16, assert_counts, run, sqnr_db

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scheme", ["int8wo", "int8dq"])
def test_an_encoder_layer(scheme: str, padded: bool, mode: str | None) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, activation="gelu")

        def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
            y: torch.Tensor = self.layer(x, src_key_padding_mask=padding)
            return y

    model = Layer().to("cuda", BF16).eval().requires_grad_(False)
    x = torch.randn(2, 48, 256, device="cuda", dtype=BF16)
    masks = ((torch.arange(48, device="cuda") > 40).expand(2, 48),) if padded else ()
    _, y, report = run(model, x, *masks, schemes=scheme, **({"mode": mode} if mode else {}))
    assert_counts(report, 4)
    assert all("Triton" in str(layer.kernel) for layer in report.layers), str(report)
    with torch.no_grad():
        assert sqnr_db(y, model.float()(x.float(), *masks)) >= 35


def test_one_that_looks_at_itself_and_one_that_looks_elsewhere() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.own, self.other = (nn.MultiheadAttention(256, 4, batch_first=True) for _ in range(2))

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            x = self.own(x, x, x, need_weights=False)[0]
            y: torch.Tensor = self.other(x, memory, memory, need_weights=False)[0]
            return y

    model = Two().to("cuda", BF16).eval().requires_grad_(False)
    x, memory = (torch.randn(2, rows, 256, device="cuda", dtype=BF16) for rows in (16, 48))
    _, y, report = run(model, x, memory)
    assert_counts(report, 3, of=4, not_parameter=1)
    with torch.no_grad():
        assert 30 <= sqnr_db(y, model(x, memory)) < 60
