"""torch.nn's own attention, whose op stands for several linears: each is found, and the model computes what it did."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from util import BF16, assert_counts, compiled, dequantized_twin, run, sqnr_db

import aoquant_inductor
from aoquant_inductor import attention

E, HEADS, ROWS = 64, 4, 16
X = torch.randn(3, ROWS, E, dtype=BF16, generator=torch.Generator().manual_seed(0))
FLOAT_MASK = torch.randn(ROWS, ROWS, generator=torch.Generator().manual_seed(1)).to(BF16)
MASK = (FLOAT_MASK > 0.5).fill_diagonal_(False)
PADDING = (torch.arange(ROWS) > 11).expand(3, ROWS)

Call = Callable[..., torch.Tensor]


class Attention(nn.Module):
    def __init__(self, call: Call, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.call = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, **how}), call

    def forward(self, x: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
        return self.call(self.attention, x, *masks)


def on_itself(attention: nn.Module, x: torch.Tensor, **how: Any) -> torch.Tensor:
    y: torch.Tensor = attention(x, x, x, need_weights=False, **how)[0]
    return y


def with_weights(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y, weights = attention(x, x, x)
    return y + weights.sum()  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Attention, tuple[torch.Tensor, ...]]] = {
    "batch first": (Attention(on_itself), ()),
    "sequence first": (Attention(on_itself, batch_first=False), ()),
    "no bias": (Attention(on_itself, bias=False), ()),
    "a row to all": (Attention(on_itself, add_bias_kv=True, add_zero_attn=True), ()),
    "with its weights": (Attention(with_weights), ()),
    "added mask": (Attention(lambda a, x, m: on_itself(a, x, attn_mask=m)), (FLOAT_MASK,)),
    "mask": (Attention(lambda a, x, m: on_itself(a, x, attn_mask=m)), (MASK,)),
    "padding": (Attention(lambda a, x, m: on_itself(a, x, key_padding_mask=m)), (PADDING,)),
}


def cast(model: nn.Module) -> nn.Module:
    return model.to(BF16).eval().requires_grad_(False)


@pytest.mark.parametrize(("model", "masks"), WAYS.values(), ids=WAYS)
def test_both_linears_of_an_attention_are_found(model: Attention, masks: tuple[torch.Tensor, ...]) -> None:
    _, y, report = run(cast(model), X, *masks)
    assert_counts(report, 2)
    assert [layer.name for layer in report.layers] == ["attention.in_proj_weight", "attention.out_proj"]
    twin = dequantized_twin(model, "int8wo")
    twin.attention.in_proj_weight.data = _as_packed(model.attention.in_proj_weight)
    with torch.no_grad():
        wanted = twin.float()(X.float(), *(m.float() if m.is_floating_point() else m for m in masks))
    assert y.shape == wanted.shape and y.dtype == BF16
    assert sqnr_db(y, wanted) >= 40


def _as_packed(weight: torch.Tensor) -> torch.Tensor:
    holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    holder[0].weight.data = weight.detach()
    return dequantized_twin(holder, "int8wo")[0].weight.detach()


def layer(**how: Any) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    made = nn.TransformerEncoderLayer(E, HEADS, 2 * E, batch_first=True, **how)
    cast(made)
    return made


MASKS: dict[str, dict[str, torch.Tensor]] = {
    "all seen": {}, "mask": {"src_mask": MASK}, "padding": {"src_key_padding_mask": PADDING},
    "both": {"src_mask": MASK, "src_key_padding_mask": PADDING},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("gelu", "norm_first"), list(itertools.product([False, True], repeat=2)))
def test_the_fused_encoder_layer_is_written_out(gelu: bool, norm_first: bool, masks: dict[str, torch.Tensor]) -> None:
    model = layer(activation="gelu" if gelu else "relu", norm_first=norm_first)

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x, **masks)
            return y

    _, y, report = run(Called().eval(), X)
    assert_counts(report, 4)
    with torch.no_grad():
        assert sqnr_db(y, model.float()(X.float(), **masks)) >= 38


def test_what_no_scheme_asks_for_stays_fused() -> None:
    model = nn.ModuleDict({"encoder": layer(), "head": cast(nn.Linear(E, E))})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.parts["head"](self.parts["encoder"](x))
            return y

    def code(schemes: object) -> tuple[str, aoquant_inductor.api.Report]:
        function = compiled(Both().eval(), schemes)
        with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
            _, found = run_and_get_code(function, X)
        return "".join(found), aoquant_inductor.report(function)

    text, report = code({"*head": "int8wo"})
    assert "_transformer_encoder_layer_fwd" in text
    assert_counts(report, 1, of=4, no_match=3)
    text, report = code("int8wo")
    assert "_transformer_encoder_layer_fwd" not in text
    assert_counts(report, 5)


def test_a_function_of_several_modules_names_them_by_its_variables() -> None:
    encoder, decoder = layer(), layer()
    function = compiled(lambda x: decoder(encoder(x)), {"encoder.*": "int8wo"})
    with torch.no_grad():
        y = function(X)
        assert 38 <= sqnr_db(y, decoder(encoder(X))) < 60
    names = {one.name for one in aoquant_inductor.report(function).quantized}
    assert names == {f"encoder.{name}" for name in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")}


@pytest.mark.parametrize("batch", [2, 5])
def test_sizes_may_be_symbols(batch: int) -> None:
    model = cast(Attention(on_itself))
    function = compiled(model, dynamic=True)
    with torch.no_grad():
        function(X)
        x = torch.randn(batch, ROWS + batch, E, dtype=BF16)
        assert 38 <= sqnr_db(function(x), model(x)) < 60
    report = aoquant_inductor.report(function)
    assert_counts(report, 2)
    assert report.totals["graphs"] <= 2  # Dynamo's own way to specialize x


def test_what_differs_is_cut_into_parts_and_said() -> None:
    """q, k and v of one parameter: only the linear behind them is packed."""
    model = cast(Attention(lambda a, x: a(x, x + 1, x + 1, need_weights=False)[0]))
    _, y, report = run(model, X)
    assert_counts(report, 1, of=2, not_parameter=1)
    (left,) = (one for one in report.layers if one.status == "skipped")
    assert left.name == "attention.in_proj_weight" and "parts" in str(left.detail)
    with torch.no_grad():
        assert 38 <= sqnr_db(y, model(X)) < 60


def test_a_change_of_the_packed_projection_is_seen() -> None:
    model = cast(Attention(on_itself))
    function, before, _ = run(model, X)
    with torch.no_grad():
        model.attention.in_proj_weight.mul_(0.5)
        assert 38 <= sqnr_db(function(X), model(X)) < 60
        assert sqnr_db(function(X), before) < 20


def test_released_weights_of_an_attention() -> None:
    model = cast(Attention(on_itself))
    with torch.no_grad():
        wanted = model(X)
    function, y, report = run(model, X, release_weights=True)
    assert_counts(report, 2)
    with torch.no_grad():
        assert torch.equal(function(X), y)
    assert 38 <= sqnr_db(y, wanted) < 60


def test_what_cannot_be_traced_stays_and_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(attention.tracing, "trace", fails)
    model = cast(Attention(on_itself))
    _, y, report = run(model, X)
    assert_counts(report, 0, of=1, other_op=1)
    with torch.no_grad():
        assert sqnr_db(y, model(X)) >= 45


def test_within_a_checkpoint() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(on_itself)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)
            return y

    model = cast(Inside())
    _, y, report = run(model, X)
    assert_counts(report, 2)
    with torch.no_grad():
        assert 38 <= sqnr_db(y, model(X)) < 60


def test_a_model_that_trains_keeps_its_op() -> None:
    model = Attention(on_itself).to(BF16)
    function = compiled(model)
    y = function(X)
    y.sum().backward()
    totals = aoquant_inductor.report(function).totals
    assert totals["quantized"] == 0 and sum(totals["reasons"].values()) == 1
    assert torch.equal(y, model(X)) or sqnr_db(y, model(X)) >= 45


@pytest.mark.parametrize("training", [False, True])
def test_what_is_before_a_frozen_attention_trains(training: bool) -> None:
    model = Attention(on_itself).to(BF16).requires_grad_(False).train(training)
    function, grads = compiled(model), []
    for run_by in (function, model):
        x = X.clone().requires_grad_()
        run_by(x).square().sum().backward()
        grads.append(x.grad)
    assert_counts(aoquant_inductor.report(function), 2)
    assert 38 <= sqnr_db(*grads) < 60


def test_under_an_autocast_around_the_call() -> None:
    model = Attention(on_itself).eval().requires_grad_(False)
    with torch.autocast("cpu", dtype=BF16):
        _, y, report = run(model, X.float())
        with torch.no_grad():
            wanted = model(X.float())
    assert_counts(report, 2)
    assert y.dtype == wanted.dtype and 35 <= sqnr_db(y, wanted) < 60


def test_under_an_autocast_of_its_own_it_stays() -> None:
    """The tracer does not see it, and the dtypes would differ."""

    class Cast(Attention):
        def forward(self, x: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=BF16):
                return super().forward(x, *masks)

    model = Cast(on_itself).eval().requires_grad_(False)
    _, y, report = run(model, X.float())
    assert_counts(report, 0, of=1, other_op=1)
    with torch.no_grad():
        wanted = model(X.float())
    assert y.dtype == wanted.dtype and sqnr_db(y, wanted) >= 45
