"""explain says which backend runs and why, and its counts are those of the mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from magi_attention import DeviceMask, Mask, explain
from magi_attention.explain import kernel_tiles
from magi_attention.kernels.select import BACKENDS, Request, choose_backend, describe, modifiers_of
from magi_attention.plan.tiling import choose_tiles


def tensors(num_tokens: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(num_tokens, 1, dim, dtype=dtype) for _ in range(3))


def test_lists_every_backend_and_the_reason_of_the_choice() -> None:
    found = explain(*tensors(64), Mask.causal(64))
    assert found.backend == "blockwise" and "automatic" in found.reason
    assert all(name in str(found) for name in BACKENDS)
    assert explain(*tensors(64), Mask.causal(64), backend="dense").reason == "asked for by name"


def test_names_the_environment_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGI_ATTENTION_BACKEND", "dense")
    found = explain(*tensors(64), Mask.causal(64))
    assert found.backend == "dense" and "MAGI_ATTENTION_BACKEND" in found.reason


def test_blocks_of_a_full_mask_are_full_and_nothing_is_wasted() -> None:
    found = explain(*tensors(1024), Mask.full(1024))
    assert found.area == 1024 * 1024 and found.density == 1.0
    for work in found.work:
        assert work.num_tiles == work.num_runs == 1024 // work.tile.block_rows
        assert work.full_blocks == work.num_tiles * 1024 // work.tile.block_cols
        assert work.partial_blocks == 0 and work.efficiency == 1.0


def test_blocks_of_a_causal_mask_are_those_on_and_below_the_diagonal() -> None:
    size = 1024
    (forward, *_) = explain(*tensors(size), Mask.causal(size)).work
    tile = choose_tiles("forward", 64, 2)
    assert (forward.tile.block_rows, forward.tile.block_cols) == (tile.block_rows, tile.block_cols)
    per_tile = [
        -(-min(row + tile.block_rows, size) // tile.block_cols) for row in range(0, size, tile.block_rows)
    ]
    full = [(row + 1) // tile.block_cols for row in range(0, size, tile.block_rows)]
    assert forward.full_blocks == sum(full)
    assert forward.full_blocks + forward.partial_blocks == sum(per_tile)
    computed = sum(per_tile) * tile.block_rows * tile.block_cols
    assert forward.efficiency == pytest.approx(size * (size + 1) / 2 / computed)


def test_efficiency_never_exceeds_one_even_for_pairs_covered_twice() -> None:
    bands = Mask.causal(300).bands.tolist() * 2
    found = explain(*tensors(300), Mask(bands, 300, 300))
    assert all(0 < work.efficiency <= 1 for work in found.work)


def test_a_device_mask_has_bounds_instead_of_counts() -> None:
    host = Mask.varlen([0, 100, 130, 400], causal=True)
    exact = explain(*tensors(400), host)
    bounds = explain(*tensors(400), DeviceMask(host.table, 400, 400))
    assert bounds.area is None and bounds.density is None and "device" in str(bounds)
    for bound, work in zip(bounds.work, exact.work, strict=True):
        assert bound.num_tiles >= work.num_tiles and bound.num_runs is None


def test_an_empty_mask_has_no_work() -> None:
    found = explain(*tensors(10), Mask([], 10, 10))
    assert found.area == 0
    assert all(work.num_tiles == 0 and work.efficiency is None for work in found.work)
    assert "0 visible pairs" in str(found)


def test_head_dimensions_beyond_the_kernels_have_no_tiles() -> None:
    assert explain(*tensors(10, dim=512), Mask.causal(10)).work == ()


def test_a_named_backend_that_refuses_raises() -> None:
    with pytest.raises(NotImplementedError, match="triton"):
        explain(*tensors(10, dtype=torch.float64), Mask.causal(10), backend="triton")


def test_something_else_than_a_mask_is_refused() -> None:
    with pytest.raises(TypeError, match="mask: expected Mask or DeviceMask, got ndarray"):
        explain(*tensors(10), Mask.causal(10).bands)


def test_the_hopper_kernels_count_tokens_of_packed_heads() -> None:
    request = Request("cuda", torch.bfloat16, 128, 128, (9, 0))
    forward, backward = kernel_tiles("hopper", request, 4, 16384, 1)
    assert forward == ("forward", 32, 128, False) and backward == ("backward", 128, 64, True)
    # Heads are packed where documents are short.
    assert kernel_tiles("hopper", request, 4, 16384, 100)[1].block_cols == 16
    biased = replace(request, modifiers=modifiers_of(False, True))
    assert kernel_tiles("hopper", biased, 4, 16384, 100)[1].block_cols == 64
    wide = kernel_tiles("hopper", replace(request, head_dim=256, head_dim_v=256), 1, 16384, 1)
    assert wide == (("forward", 128, 64, False), ("backward", 64, 64, True))


def test_what_a_backend_does_not_have_is_said() -> None:
    request = Request("cuda", torch.bfloat16, 192, 192, (9, 0), modifiers_of(True, True))
    assert choose_backend(request) == "triton"
    assert "no: it has dropout and ALiBi up to head dimension 128 only" in describe(request)
    x = torch.zeros(8, 2, 16)
    assert explain(x, x, x, Mask.full(8), dropout_p=0.1, alibi_slopes=torch.ones(2)).backend == "blockwise"
