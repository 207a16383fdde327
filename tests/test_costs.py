"""Prices against measurements: what default mode takes and what a search tries, of everything that was measured."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from gpu.odd_shapes import COPIED
from test_templates import BY_PTXAS, H100, default, problem

from aoquant_inductor import lowering_triton
from aoquant_inductor.card import Card
from aoquant_inductor.scheme import SCHEMES
from aoquant_inductor.templates import KERNELS, Config, Kernel, costs, linear
from benchmarks import fit
from benchmarks.measure import RESULTS
from benchmarks.rows import linears

Which = tuple[str, str, int, bool]


def key(kernel: Kernel, config: Config) -> Which:
    """What a measured row calls it."""
    return kernel.label, costs.key_of(config).replace("persistent ", ""), config.split_k, config.tail > 0


Times = dict[Which, float]


def everything_measured(card: Card) -> dict[tuple[str, str, int, int, int], Times]:
    """(card, scheme, N, K, M) -> microseconds of every config that there is and `card` may run."""
    measured: dict[tuple[str, str, int, int, int], Times] = {}
    for row in fit.rows(RESULTS):
        may = row.label != "bf16" and (row.label, row.config) in costs.costs() and (card.may_carry or "carried" not in row.config)
        if may and "asym" not in row.problem[1]:
            measured.setdefault(row.problem, {})[row.label, row.config, row.split, row.before > 0] = row.us
    return measured


def in_graphs() -> dict[tuple[str, str, int, int, int], tuple[str, float]]:
    """(card, scheme, N, K, M) -> the kernel that a graph of one weight-only linear, or bf16, took, and its microseconds there."""
    found = {}
    for card in fit.RATES:
        for row in linears(RESULTS / f"{card}.linear.csv"):
            if row["scheme"] == "bf16" or (row["scheme"] in SCHEMES and SCHEMES[row["scheme"]].activation is None):
                n, k = map(int, row["shape"].split("x"))
                found[card, row["scheme"], n, k, int(row["m"])] = row["kernel"], float(row["value"])
    return found


def time_of(times: Times, kernel: Kernel, config: Config, in_graph: tuple[str, float]) -> float | None:
    """What was measured of a config alone, or else in a graph, or, as the most that it takes, of the one that it outdoes."""
    name, us = in_graph
    if key(kernel, config) not in times and name.startswith(f"Triton {kernel.template} ") and name.endswith(f" {config}"):
        return us
    return times.get(key(kernel, config), times.get(key(kernel, replace(config, carried=False, tma=False))))


@pytest.mark.parametrize("ptxas", BY_PTXAS)
def test_the_default_is_about_the_fastest_of_everything_measured(ptxas: tuple[int, int]) -> None:
    """Not only where the prices come from: of configs that may run, with what else a default depends on."""
    card, ratios = replace(H100, ptxas=ptxas), {}
    for of, times in everything_measured(card).items():
        found = default(problem(*of[1:], card), card)
        if found is not None and key(*found) in times:
            ratios[of] = times[key(*found)] / min(times.values())
    assert len(ratios) > 200
    assert sum(ratios.values()) / len(ratios) < 1.02
    assert max(ratios.values()) < 1.25, max(ratios, key=ratios.__getitem__)


@pytest.mark.parametrize("ptxas", BY_PTXAS)
def test_a_search_has_the_fastest_of_everything_measured_and_little_else(ptxas: tuple[int, int]) -> None:
    card, ratios, counts, graphs = replace(H100, ptxas=ptxas), {}, [], in_graphs()
    for of, times in everything_measured(card).items():
        p = problem(*of[1:], card)
        tried = lowering_triton.search(p, card, [kernel for kernel in KERNELS if kernel.fits(p, card)])
        known = [us for one in tried if (us := time_of(times, *one, graphs.get(of, ("", 0.0)))) is not None]
        counts.append(len(tried))
        if known:
            ratios[of] = min(known) / min(times.values())
    assert len(ratios) > 250
    assert sum(ratios.values()) / len(ratios) < 1.005
    assert max(ratios.values()) < 1.1, max(ratios, key=ratios.__getitem__)
    assert sum(counts) / len(counts) < 8 and max(counts) <= 16, "each is seconds of a compile"


def test_a_tail_is_priced_by_the_programs_of_a_multiprocessor() -> None:
    """192 tiles of 64 steps: 132 at once, then 60 with two programs each."""
    card = replace(H100, ptxas=(13, 5))
    p, whole = problem("int8wo", 6144, 4096, 1024, card), linear.W_CARRIED
    kernel = replace(linear.INT8_WEIGHT_ONLY, configs=(whole, replace(whole, tail=1)))
    (slow, _), (fast, config) = kernel.priced(p, card)
    cost = costs.costs()["W8A16", costs.key_of(whole)]
    read, written = 6144 * 4096 / costs.BYTES_PER_US, 1024 * 6144 * 2 / costs.BYTES_PER_US
    assert (config.tail, config.split_k) == (132, 2)
    assert slow == pytest.approx(cost.us(2, 64, read) + written)
    adding = costs.of_split(2, 60, 256 * 128, 132, costs.costs()["W8A16 sliced", ""])
    assert fast - adding == pytest.approx(cost.us(1.5, 64, read) + written)
    assert cost.us(1.5, 64, read) > cost.us(1, 96, read)  # one after the other hides nothing
    assert fast < slow and fast / slow == pytest.approx(90.17 / 95.21, rel=0.07)  # as measured, h200.tune.csv


# added up by the last program, by all; with a tail, whose sums the whole tiles hide or do not
@pytest.mark.parametrize(("block", "tails"), [((64, 32), False), ((64, 64), True), ((128, 64), True), ((256, 128), True)])
def test_a_fit_finds_the_costs_that_times_were_made_of(block: tuple[int, int], tails: bool) -> None:
    """By the formula that default mode chooses by: the two are written apart."""
    true, split = costs.Cost(2.5, 0.4, 0.22, 0.28), costs.Cost(0.8, 0.3, 0.0, 2.0)
    area, measured = block[0] * block[1], []
    for n, k, m in itertools.product((896, 4096, 6144, 28672), (1280, 4096, 14336), (64, 256, 1024)):
        tiles, steps = -(-m // block[0]) * -(-n // block[1]), k // 128
        for parts in (1, 2, 4):
            row = fit.Row(("h200", "int8dq", n, k, m), "W8A8", "a config", parts, tiles, area, -(-steps // parts), 0.0)
            if parts > 1 and tails and tiles > fit.SMS:
                whole, rest = divmod(tiles, fit.SMS)
                row = replace(row, tiles=rest, steps=steps, before=whole)
            left = true.left(parts, row.steps, row.before, area)
            us = true.us(row.waves, row.steps, row.memory, row.written)
            measured.append(replace(row, us=us + costs.of_split(parts, row.tiles, area, fit.SMS, split, left)))
    assert tails == any(row.before for row in measured) and (area >= costs.FULL_AREA) == any(row.written for row in measured)
    assert (block in {(64, 64), (128, 64)}) == any(costs.hides(row.before, area) for row in measured)
    found = fit.fit(measured)
    assert found["W8A8", "a config"] == pytest.approx(true, rel=0.05)
    assert found[costs.split_of("W8A8", area)] == pytest.approx(split, rel=0.2)


def test_a_config_measured_in_two_waves_alone_is_not_free_in_more() -> None:
    """It was .3 us a step then, whatever a step took: less than in two, so that it was taken for thousands of tiles."""
    true, measured = costs.Cost(3.0, 0.9, 0.6, 0.0), []
    for tiles, steps in itertools.product((60, 132, 200, 264), (10, 20, 40, 80)):
        us = true.us(costs.waves_of(tiles, 1, 0, fit.SMS), steps, 0.01)
        measured.append(fit.Row(("h200", "int8dq", 128, 64, 64), "W8A8", "a config", 1, tiles, 8192, steps, us))
    _, _, pair, full = fit.fit(measured)["W8A8", "a config"]
    assert pair == pytest.approx(true.pair, rel=0.05)
    assert full == pytest.approx(1.2 * pair, rel=0.1)


def test_a_fit_finds_the_costs_of_cublas() -> None:
    true, measured = costs.Cost(3.0, 0.08, 0.0, 0.4), []
    for n, k, m in itertools.product((896, 5120, 28672), (896, 5120, 14336), (256, 1024, 4096)):
        us = costs.of_bf16(m, n, k, fit.SMS, true)
        measured.append(fit.Row(("h200", "int8wo", n, k, m), "bf16", "", 1, 0, 0, 0, us))
    measured += [replace(row, label="W8A16", us=1.0) for row in measured]
    assert fit.fit_cublas(measured) == pytest.approx(true, rel=0.05)


def copying(m: int, n: int, k: int, bits: int) -> float:
    """Microseconds that a copy in bf16 takes beyond cuBLAS alone."""
    return costs.of_copy(m, n, k, bits, fit.SMS) - costs.of_bf16(m, n, k, fit.SMS)


def test_a_copy_that_stays_in_the_cache_costs_its_instructions() -> None:
    """On an H200 2.3 to 5 us more than cuBLAS alone; one that does not, what its bytes do; the smallest, a launch."""
    for n, k, bits, least in ((5120, 1280, 8, 3), (5120, 1280, 4, 3), (896, 4864, 4, 2)):
        assert least < copying(1024, n, k, bits) < least + 2
    assert copying(4096, 4096, 4096, 8) == pytest.approx(3 * 4096 * 4096 / costs.BYTES_PER_US)
    assert copying(1024, 896, 896, 8) == pytest.approx(costs.WRITE_LEAST)


def test_up_to_some_rows_no_copy_is_thought_of() -> None:
    """5120x1280, M = 256: 12.9 us by the copy, whose price is 11.4, 10.7 by a kernel."""
    card = replace(H100, ptxas=(13, 5))
    assert default(problem("int4wo-32", 5120, 1280, costs.NOT_COPIED, card), card) is not None
    assert default(problem("int4wo-32", 5120, 1280, 2 * costs.NOT_COPIED, card), card) is None


def test_no_default_took_much_longer_in_a_graph_than_a_copy_would() -> None:
    """A tail at 1280x5120, M = 4096 was priced at 73 us and took 100, for the 82 of a copy."""
    card, ratios, graphs = replace(H100, ptxas=(13, 5)), {}, in_graphs()
    for (on, scheme, n, k, m), (name, us) in graphs.items():
        found = default(problem(scheme, n, k, m, card), card) if m > costs.NOT_COPIED and scheme != "bf16" else None
        if found is not None and name.endswith(f" {found[1]}"):
            copy = graphs[on, "bf16", n, k, m][1] + copying(m, n, k, SCHEMES[scheme].weight.bits)
            ratios[on, scheme, n, k, m] = us / copy
    assert len(ratios) > 30
    assert max(ratios.values()) < 1.06, max(ratios, key=ratios.__getitem__)


@pytest.mark.parametrize("ptxas", sorted(BY_PTXAS))
@pytest.mark.parametrize("scheme", COPIED[0])
def test_the_memory_check_meets_a_copy(scheme: str, ptxas: tuple[int, int]) -> None:
    """Of tests/gpu/odd_shapes.py, which asks for that kind of kernel by a shape that is cheaper so."""
    card = replace(H100, ptxas=ptxas)
    assert default(problem(scheme, *COPIED[1], COPIED[2], card), card) is None
