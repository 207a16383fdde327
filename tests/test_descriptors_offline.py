"""Descriptors that the launcher makes of x (_inductor_launcher): where they are all of x, and what Inductor's autotuner does with them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from util import BF16

pytest.importorskip("triton")
import offline
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_heuristics import CachingAutotuner, DebugAutotuner

from aoquant_inductor import _inductor_launcher
from aoquant_inductor.templates import Config, int4, linear

M, N, K = 256, 128, 1024
CONFIG = (int4.SUMS, Config(64, 64, 128, 4, 3, tma=True))


def rows(count: int, columns: int = K) -> torch.Tensor:
    return torch.randn(count, columns, dtype=BF16)


def rendered(x: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> offline.Rendered:
    return offline.render("int4wo-128", M, N, K, BF16, bias=False, config=CONFIG, x=(x, view))


def by_the_host(code: str) -> bool:
    described = "@describing(" in code
    assert described != ("tl.make_tensor_descriptor(" in code)
    return described


@pytest.mark.parametrize(
    ("x", "view", "whole"),
    [
        (rows(M), lambda x: x, True), (rows(2 * M), lambda x: x.narrow(0, 0, M), True), (rows(3 * M).view(3, M, K), lambda x: x.select(0, 0), True),
        (rows(M).view(torch.int16), lambda x: x.view(BF16), True), (rows(2 * M), lambda x: x.narrow(0, M, M), False),
        # what the kernel is given has fewer elements than its memory, or more
        (rows(M // 2, 2 * K)[:, :K], lambda x: x.as_strided((M, K), (K, 1)), False),
        (rows(M)[: M // 2], lambda x: x.as_strided((M, K), (K, 1)), False),
        (rows(M).expand(1000, M, K), lambda x: x.select(0, 0), False),
    ],
    ids=["dense", "first rows", "first of three", "other dtype", "last rows", "between gaps", "beyond its view", "expanded"],
)
def test_a_descriptor_is_the_hosts_where_all_of_x_is_in_what_the_kernel_is_given(
    x: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor], whole: bool
) -> None:
    code = rendered(x, view).code
    assert by_the_host(code) == whole
    if whole:
        (place,) = re.findall(r"@describing\(\d+, \[\(0, (\d+), \(64, 128\)\)\]\)", code)
        assert _inductor_launcher.descriptor(view(x), int(place), (64, 128)).shape == [view(x).numel() // K, K]


@pytest.mark.parametrize("name", ["cpp_wrapper", "static_launch_user_defined_triton_kernels"])
def test_a_kernel_that_others_call_makes_its_own(name: str) -> None:
    with torch._inductor.config.patch({name: True}):
        assert not by_the_host(rendered(rows(M)).code)


def autotuner(code: str, **inductor_meta: Any) -> Any:
    name, text = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", code, re.S)[0]
    text = text.replace("inductor_meta={", f"inductor_meta={{{''.join(f'{k!r}: {v!r}, ' for k, v in inductor_meta.items())}", 1)
    return getattr(PyCodeCache.load(text), name)


def launching(tuner: Any) -> list[tuple[Any, ...]]:
    """What its only launcher is called with, from here on."""
    calls: list[tuple[Any, ...]] = []

    def launcher(*args: Any, stream: int) -> None:
        calls.append(args)

    launcher.config = mock.Mock(found_by_coordesc=False)
    launcher.cache_hash, launcher.store_cubin = "none", False
    with mock.patch.object(CachingAutotuner, "_make_launchers", lambda self: setattr(self, "launchers", [launcher])):
        tuner._make_launchers()
    return calls


def test_a_launcher_has_the_descriptors_behind_the_kernels_arguments() -> None:
    tuner, x, other = autotuner(rendered(rows(M)).code), rows(M), torch.empty(16)
    calls = launching(tuner)
    assert (type(tuner).__name__, tuner.own, tuner.places) == ("Describing", 4, [(0, K, (64, 128))])
    for _ in range(2):
        with mock.patch.object(CachingAutotuner, "_make_launchers"):
            tuner._make_launchers()  # again, and not twice as many
        tuner.run(x, other, other, other, 8, 1, 1, stream=0)
    assert len(calls) == 2
    for args in calls:
        assert args[0] is x and args[4].base is x and (args[4].shape, args[4].block_shape) == ([M, K], [64, 128]) and args[5:] == (8, 1, 1)
    tuner.run(rows(0), other, other, other, 0, 1, 1, stream=0)
    assert len(calls) == 2, "Triton launches nothing for no rows"


def test_a_launcher_comes_back_from_a_compile_worker() -> None:
    tuner = autotuner(rendered(rows(M)).code)
    old = tuner.prepare_for_pickle()
    again = pickle.loads(pickle.dumps(tuner))
    tuner.restore_after_unpickle(old)
    assert type(again) is type(tuner) is _inductor_launcher.Describing
    assert (again.own, again.places) == (tuner.own, tuner.places)


def test_a_profile_of_bandwidth_has_the_kernel() -> None:
    tuner = autotuner(
        rendered(rows(M)).code, profile_bandwidth=True, profile_bandwidth_regex="", profile_bandwidth_with_do_bench_using_profiling=False
    )
    assert isinstance(tuner, DebugAutotuner) and type(tuner).run is DebugAutotuner.run and type(tuner) is _inductor_launcher.DescribingDebug


def test_what_prints_a_launch_has_a_value_for_every_name() -> None:
    tuner, x, other = autotuner(rendered(rows(M)).code), rows(M), torch.empty(16)
    args, grid = tuner._interpret_args_grid((x, other, other, other, 8, 2, 1), tuner.configs[0])
    assert len(args) == len(tuner.fn.arg_names) and args[4].base is x
    assert tuple(grid) == (8, 2, 1)


def test_both_sides_of_many_rows_of_int8_are_described() -> None:
    code = offline.render("int8dq", 1024, 256, K, BF16, config=(linear.PERSISTENT, linear.P_LARGE)).code
    assert re.search(r"@describing\(\d+, \[\(\d+, 1024, \(128, 128\)\), \(\d+, 1024, \(128, 128\)\)\]\)", code)
