"""What default mode takes on cards that nothing was measured on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from test_templates import CARDS, check_that_a_copy_wins, default, problem

from aoquant_inductor.card import Card
from aoquant_inductor.templates import KERNELS, linear


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_many_rows_of_what_only_the_general_kernel_does_are_a_copy(card: Card) -> None:
    """Weight-only int8 whose K 64 does not divide, or that sm_90 is not for; int8 activations have no copy to gain by."""
    k = 4304
    assert default(problem("int8wo", 1152, k, 1024, card), card) is None
    few, dynamic = default(problem("int8wo", 1152, k, 512, card), card), default(problem("int8dq", 1152, k, 1024, card), card)
    assert few is not None and few[0] is linear.GENERAL
    assert dynamic is not None


@pytest.mark.parametrize(("card", "sms"), [(86, 82), (86, 28), (120, 170), (80, 108)])
@pytest.mark.parametrize("scheme", ["int8wo", "int8dq", "int4wo-128", "int4wo-32-asym", "int8dq-int4w", "int8dq-int4w-128"])
def test_no_default_lost_stages_on_a_card_with_less_shared_memory(scheme: str, card: int, sms: int) -> None:
    """What costs.csv has was measured with all of them: one stage waits for every load."""
    here = Card(card, sms, 166912 if card == 80 else 101376, (12, 8))
    for n, k, m in itertools.product((896, 6144, 28672), (1280, 4096), (16, 64, 256, 1024)):
        p = problem(scheme, n, k, m, here)
        found = default(p, here)
        if found is None:
            check_that_a_copy_wins(p, here)
            continue
        kernel, config = found
        tile = lambda c: (c.block_m, c.block_n, c.block_k, c.num_warps, c.group_m)  # noqa: E731
        assert not kernel.label or config.num_stages in {c.num_stages for c in kernel.configs if tile(c) == tile(config)}, config


@pytest.mark.parametrize("arch", [70, 75])
def test_int8_activations_before_sm_80_are_not_ours(arch: int) -> None:
    card = Card(arch, 40, 65536, (12, 8))
    for scheme, own in (("int8dq", False), ("int8wo", True)):
        p = replace(problem(scheme, 1024, 1024, 64, card), key=(1024, 1024, "int8", 0, "int", "plain"))
        assert any(kernel.fits(p, card) for kernel in KERNELS) == own


@pytest.mark.parametrize("m", [1, 4, 16, 300])
@pytest.mark.parametrize("scheme", ["int8dq", "int8wo", "int8wo-128"])
def test_nothing_with_assembly_of_nvidias_is_for_other_cards(scheme: str, m: int) -> None:
    card = CARDS["mi300"]
    p = problem(scheme, 4096, 4096, m, card)
    fitting = [kernel for kernel in KERNELS if kernel.fits(p, card)]
    assert [kernel.template for kernel in fitting] == ["linear"]
    assert not any(kernel.keywords(p, config).get("WORDS") for kernel in fitting for config in kernel.able(p, card))
