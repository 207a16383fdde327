"""The rewritten graph as text, and what is left alone, each with the number of matches."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from util import BF16, Graph, assert_counts, compiled, run, tokens

import aoquant_inductor
from aoquant_inductor import packing_cpu
from aoquant_inductor.patterns import dynamic


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of a device without kernels of its own: a golden holds on every machine."""
    monkeypatch.setattr(packing_cpu, "instruction_set", lambda: None)


def text(graph: Graph) -> str:
    """Code without the frees, which say nothing here."""
    lines = [line.split(";  ")[0].rstrip() for line in graph.code.splitlines()]
    return "\n".join(lines) + "\n"


class QKV(nn.Module):
    """Three linears of one activation, one with a bias; a fourth reads another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, n, bias=n == 32, dtype=BF16) for n in (32, 16, 16))
        self.o = nn.Linear(32, 8, bias=False, dtype=BF16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = self.q(x)
        return q, self.k(x), self.v(x), self.o(q)


@pytest.mark.usefixtures("plain")
def test_golden_weight_only(graphs: list[Graph]) -> None:
    _, _, report = run(QKV().eval(), tokens(), schemes="int4wo-32-asym")
    assert_counts(report, 4)
    assert len(graphs) == 1
    assert_expected_inline(text(graphs[0]), """\
def forward(self, aoquant_0, aoquant_1, aoquant_2, aoquant_3, aoquant_4, aoquant_5, aoquant_6, aoquant_7, aoquant_8, aoquant_9, aoquant_10, aoquant_11, L_self_modules_q_parameters_bias_ : torch.nn.parameter.Parameter, L_x_ : torch.Tensor):
    l_self_modules_q_parameters_bias_ = L_self_modules_q_parameters_bias_
    l_x_ = L_x_
    linear_wo_default = torch.ops.aoquant.linear_wo.default(l_x_, aoquant_0, aoquant_1, aoquant_2, l_self_modules_q_parameters_bias_, 32, 32, 'int4', 32, 'int', 'plain')
    linear_wo_default_1 = torch.ops.aoquant.linear_wo.default(l_x_, aoquant_3, aoquant_4, aoquant_5, None, 32, 16, 'int4', 32, 'int', 'plain')
    linear_wo_default_2 = torch.ops.aoquant.linear_wo.default(l_x_, aoquant_6, aoquant_7, aoquant_8, None, 32, 16, 'int4', 32, 'int', 'plain')
    linear_wo_default_3 = torch.ops.aoquant.linear_wo.default(linear_wo_default, aoquant_9, aoquant_10, aoquant_11, None, 32, 8, 'int4', 32, 'int', 'plain')
    return (linear_wo_default, linear_wo_default_1, linear_wo_default_2, linear_wo_default_3)
""")


@pytest.mark.usefixtures("plain")
def test_golden_dynamic_shares_one_quantization(graphs: list[Graph]) -> None:
    _, _, report = run(QKV().eval(), tokens(), schemes="int8dq-asymact")
    assert_counts(report, 4)
    assert graphs[0].code.count("aoquant.quantize_per_token_asym") == 2, "q, k and v share one; o has its own"
    assert_expected_inline(text(graphs[0]), """\
def forward(self, aoquant_0, aoquant_1, aoquant_2, aoquant_3, aoquant_4, aoquant_5, aoquant_6, aoquant_7, aoquant_8, aoquant_9, aoquant_10, aoquant_11, L_self_modules_q_parameters_bias_ : torch.nn.parameter.Parameter, L_x_ : torch.Tensor):
    l_self_modules_q_parameters_bias_ = L_self_modules_q_parameters_bias_
    l_x_ = L_x_
    quantize_per_token_asym_default = torch.ops.aoquant.quantize_per_token_asym.default(l_x_)
    getitem = quantize_per_token_asym_default[0]
    getitem_1 = quantize_per_token_asym_default[1]
    getitem_2 = quantize_per_token_asym_default[2]
    linear_dynamic_default = torch.ops.aoquant.linear_dynamic.default(getitem, getitem_1, getitem_2, aoquant_0, aoquant_1, None, aoquant_2, l_self_modules_q_parameters_bias_, 32, 32, 'int8', 0, 'int', 'plain', torch.bfloat16)
    linear_dynamic_default_1 = torch.ops.aoquant.linear_dynamic.default(getitem, getitem_1, getitem_2, aoquant_3, aoquant_4, None, aoquant_5, None, 32, 16, 'int8', 0, 'int', 'plain', torch.bfloat16)
    linear_dynamic_default_2 = torch.ops.aoquant.linear_dynamic.default(getitem, getitem_1, getitem_2, aoquant_6, aoquant_7, None, aoquant_8, None, 32, 16, 'int8', 0, 'int', 'plain', torch.bfloat16)
    quantize_per_token_asym_default_1 = torch.ops.aoquant.quantize_per_token_asym.default(linear_dynamic_default)
    getitem_3 = quantize_per_token_asym_default_1[0]
    getitem_4 = quantize_per_token_asym_default_1[1]
    getitem_5 = quantize_per_token_asym_default_1[2]
    linear_dynamic_default_3 = torch.ops.aoquant.linear_dynamic.default(getitem_3, getitem_4, getitem_5, aoquant_9, aoquant_10, None, aoquant_11, None, 32, 8, 'int8', 0, 'int', 'plain', torch.bfloat16)
    return (linear_dynamic_default, linear_dynamic_default_1, linear_dynamic_default_2, linear_dynamic_default_3)
""")


class Mixed(nn.Module):
    """What is no quantizable linear, beside one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32, dtype=BF16)
        self.keep = nn.Linear(32, 32, dtype=BF16)
        self.wide = nn.Linear(32, 32, dtype=torch.float64)
        self.good = nn.Linear(32, 32, dtype=BF16)
        self.scale = nn.Parameter(torch.ones(32, 32, dtype=BF16))
        self.register_buffer("fixed", torch.randn(32, 32, dtype=BF16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.keep(self.embed(ids))
        x = nn.functional.linear(x, self.scale * 2)
        x = nn.functional.linear(x, self.fixed)
        return self.good(self.wide(x.double()).to(BF16))


def test_negatives(graphs: list[Graph]) -> None:
    _, _, report = run(Mixed().eval(), torch.arange(4), schemes={"keep": None, "*": "int8wo"})
    assert_counts(report, 1, 5, user=1, not_parameter=2, dtype=1)
    status = {layer.name: layer.reason or layer.status for layer in report.layers}
    assert status["keep"] == "user"
    assert status["wide"] == "dtype"
    assert status["good"] == "quantized"
    assert "embed" not in status
    (graph,) = graphs
    assert graph.code.count("torch.ops.aoquant.") == 1
    assert graph.code.count("torch._C._nn.linear(") == 4
    details = {layer.name: layer.detail for layer in report.layers}
    assert details["wide"] == "is torch.float64, not bf16, fp16 or fp32."


def test_no_default_leaves_what_no_key_names(graphs: list[Graph]) -> None:
    _, _, report = run(QKV().eval(), tokens(), schemes={"q": "int8wo"})
    assert_counts(report, 1, 4, no_match=3)
    assert {layer.name: layer.matched_by for layer in report.layers} == {"q": "q", "k": None, "v": None, "o": None}
    assert graphs[0].code.count("torch.ops.aoquant.linear_wo") == 1


class Twice(nn.Module):
    """One linear called twice, and a weight that something else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32, bias=False, dtype=BF16)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(self.a(x)), self.a.weight.sum()


def test_one_linear_called_twice_has_one_pack_and_a_weight_read_elsewhere_stays_an_input(graphs: list[Graph]) -> None:
    model, x = Twice().eval(), tokens()
    _, (_, total), report = run(model, x)
    assert_counts(report, 1)
    assert graphs[0].code.count("torch.ops.aoquant.linear_wo") == 2
    assert len(graphs[0].packs) == 2, "one pair of w and scale"
    assert torch.equal(total, torch.compile(lambda w: w.sum())(model.a.weight))


def test_weights_of_one_name_are_what_autocast_makes_of_them() -> None:
    """Autocast casts the weight inside the graph's linear: an fp32 model in bf16 autocast is quantized from fp32."""
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    function = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        y = function(torch.randn(4, 32))
    assert y.dtype == BF16
    report = aoquant_inductor.report(function)
    assert_counts(report, 1)
    assert report.layers[0].sqnr_db > 40


@pytest.mark.parametrize(("m", "told"), [(1, True), (4, True), (5, False)])
def test_few_rows_tell_the_op_what_was_quantized(m: int, told: bool, graphs: list[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel may quantize by itself; here none does, and nothing changes."""
    model, x = QKV().eval(), tokens(m)
    _, want, _ = run(model, x, schemes="int8dq")
    assert "x = " not in graphs[0].code
    torch.compiler.reset()
    monkeypatch.setitem(dynamic.TOLD_ROWS, "cpu", 4)
    _, got, report = run(model, x, schemes="int8dq", dynamic=False)
    assert_counts(report, 4)
    assert [graphs[1].code.count(f"x = {name}") for name in ("l_x_", "linear_dynamic_default")] == [3 * told, 1 * told]
    assert graphs[1].code.count("aoquant.quantize_per_token") == 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
