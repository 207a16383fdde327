"""What comes before a quantization, as Inductor's kernel for both: SAM's windows, whose rows lie in another order than they are read."""

from __future__ import annotations

import pytest
import torch
from util import assert_counts, compiled, sqnr_db

import aoquant_inductor
from benchmarks.models_vision import sam_block

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [{}, {"coordinate_descent_tuning": True}], ids=["default", "tuned"])
def test_rows_of_windows(options: dict[str, bool]) -> None:
    model, inputs = sam_block("cuda", batch=1)
    function = compiled(model, "int8dq", **options)
    with torch.no_grad():
        got, want = inputs(function)(), inputs(model)()
    report = aoquant_inductor.report(function)
    assert_counts(report, 4)
    assert all("Triton" in str(layer.kernel) for layer in report.layers), str(report)
    assert sqnr_db(got, want) > 40
