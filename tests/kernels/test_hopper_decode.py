"""The Hopper kernel for caches: its arithmetic, emulated on the CPU; what it compiles to for sm_90."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gluon_emulation as emulation
import pytest
import torch

pytest.importorskip("triton")

from ahead_of_time import SHARED_MEMORY, run_program
from cache_cases import cache_case
from test_decode import is_for_kernels, run

from magi_attention.kernels import cache_ops
from magi_attention.kernels.cache_problem import CacheProblem
from magi_attention.kernels.hopper import decode as kernels
from magi_attention.kernels.hopper import decode_launch as hopper
from magi_attention.kernels.triton import decode_launch as portable


class Emulated:
    """Takes the kernel's place in the launch: its programs run one after the other, in an order of their own."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            constants.pop("num_warps")
            given = dict(zip(kernels.decode_kernel.arg_names, map(emulation.given, args), strict=False))
            for program in torch.randperm(*grid).tolist():
                emulation.run(Path(kernels.__file__), "decode_kernel", program, *grid, {**given, **constants})

        return launch


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", "triton")
    monkeypatch.setattr(hopper, "decode_kernel", Emulated())
    monkeypatch.setattr(
        cache_ops, "_kernels_for", lambda problem: hopper if hopper.takes(problem) else portable
    )
    yield
    portable.num_programs_on.cache_clear()


@pytest.mark.parametrize("seed", range(500, 540))
def test_whatever_goes_together(seed, monkeypatch):
    monkeypatch.setattr(portable, "_PROGRAMS_ON_CPU", (1, 2, 3, 7, 20)[seed % 5])
    case = cache_case(seed, dtype=torch.float16, most=200, head_dims=(64, 128, 96))
    if is_for_kernels(case):
        run(case)


def test_many_seeds_reach_the_kernel(monkeypatch):
    reached = []
    monkeypatch.setattr(hopper, "decode", lambda problem: reached.append(problem) or portable.decode(problem))
    for seed in range(500, 540):
        if is_for_kernels(case := cache_case(seed, dtype=torch.float16, most=200, head_dims=(64, 128, 96))):
            case.call()
    assert len(reached) >= 20


@pytest.mark.parametrize("page", [0, 8, 24, 64, 256])
def test_keys_of_many_blocks(page, monkeypatch):
    monkeypatch.setattr(portable, "_PROGRAMS_ON_CPU", 3)
    lengths = torch.tensor([768, 1, 0, 501], dtype=torch.int32)
    q = torch.randn(4, 2, 6, 64, dtype=torch.float16)
    k, v = torch.randn(2, 4, 768, 2, 64, dtype=torch.float16)
    problem = CacheProblem(q, k, v, lengths, 0.25, window=(-1, 0))
    if page:
        order = torch.randperm(4 * 768 // page)
        k, v = (x.reshape(-1, page, 2, 64)[order.argsort()] for x in (k, v))
        problem = replace(problem, k=k, v=v, block_table=order.to(torch.int32).view(4, -1))
    assert hopper.takes(problem)
    found, expected = hopper.decode(problem, stages=2), portable.decode(problem)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_a_deadlock_is_told(monkeypatch):
    monkeypatch.setattr(emulation, "_PATIENCE", 0.2)
    with pytest.raises(AssertionError, match="nobody ends the wait"):
        emulation.Waiting().wait("a barrier", 0)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return run_program("hopper_decode_compile.py")


# Bytes that ptxas spilled in the first measured version, and a quarter more.
MOST_SPILLS = {"256": 105, "64 rows, pages of 8, kept": 120}


def test_compiled_kernels_fit_and_do_not_spill(compiled):
    for name, found in compiled.items():
        assert found["shared"] <= SHARED_MEMORY and found["products"] > 0 and found["copies"] > 0, (
            name,
            found,
        )
        assert found["spills"] <= MOST_SPILLS.get(name, 0), (name, found)
