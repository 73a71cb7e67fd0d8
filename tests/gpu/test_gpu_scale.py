"""Long inputs: 64-bit addresses, sampled rows of 64k tokens, device plans of a thousand documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, case_of, on_device

from magi_attention.mask import Mask
from magi_attention.mask.bands import transpose
from magi_attention.plan.tiles import build_plan
from magi_attention.plan.tiling import choose_tiles
from magi_attention.testing import assert_matches_oracle

pytestmark = pytest.mark.gpu

LONG = 65537
# Not the first rows: with two or three keys the rounding of out decides dq, and the rule speaks of many rows.
ROWS = [127, *range(300, LONG, 1700), LONG - 1]


def documents(count: int, tokens: int = LONG) -> Mask:
    """Random causal documents, some of them empty."""
    cuts = np.sort(np.random.default_rng(0).integers(0, tokens + 1, count - 1))
    return Mask.varlen([0, *cuts, tokens], causal=True)


@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv"])
@pytest.mark.parametrize("count", [1, 1000, 9000])
def test_device_plan_is_the_host_plan(kernel, count):
    from magi_attention.plan.device import build_device_plan

    mask, tile = documents(count), choose_tiles(kernel, 128, 2)
    transposed = kernel == "backward_dkdv"
    sizes = (mask.num_rows, mask.num_cols, tile.block_rows, tile.block_cols)
    got = build_device_plan(mask.table.to(DEVICE), *sizes, transposed=transposed)
    bands = transpose(mask.bands) if transposed else mask.bands
    want = build_plan(bands, mask.num_rows, tile.block_rows, tile.block_cols)
    assert torch.equal(got.bands.cpu(), want.bands)
    assert torch.equal(got.tiles[: want.num_tiles].cpu(), want.tiles)
    assert (got.tiles[want.num_tiles :] == 0).all()
    if len(got.band_list) >= len(want.band_list):
        assert torch.equal(got.band_list[: len(want.band_list)].cpu(), want.band_list)


@pytest.mark.parametrize("place", [lambda mask: mask, on_device], ids=["host", "device"])
@pytest.mark.parametrize(
    "mask",
    [Mask.causal(LONG), Mask.sliding_window(LONG, window=(1023, 0), keep_first=4), documents(1000)],
    ids=["causal", "window", "documents"],
)
def test_sampled_rows_of_a_long_input(mask, place):
    assert_matches_oracle(case_of(place(mask), heads=(2, 1)), rows=ROWS)


def test_addresses_beyond_32_bits():
    tokens, heads = 131_100, 128
    assert tokens * heads * 128 > 2**31
    mask = Mask.sliding_window(tokens, window=(200, 0))
    case = case_of(mask, heads=(heads, heads))
    assert_matches_oracle(case, rows=[tokens - 300, tokens - 131, tokens - 1])


def test_addresses_beyond_32_bits_in_the_batch_axis():
    tokens, heads, batch = 16_500, 32, 32
    assert batch * tokens * heads * 128 > 2**31
    mask = Mask.sliding_window(tokens, window=(200, 0))
    case = case_of(mask, heads=(heads, 8), batch=batch)
    assert_matches_oracle(case, rows=[tokens - 131, tokens - 1])
