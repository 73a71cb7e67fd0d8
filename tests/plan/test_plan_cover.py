"""A plan makes the kernels compute exactly the pairs that the mask shows, each as often as it is covered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_emulation import cost, multiplicity, used_tiles, walk

from magi_attention.mask import Mask
from magi_attention.mask.bands import transpose
from magi_attention.plan import TileConfig, build_plan, choose_tiles
from magi_attention.plan.tiles import max_num_tiles
from magi_attention.testing.strategies import families, masks

blocks = st.tuples(st.sampled_from([1, 4, 16, 32]), st.sampled_from([1, 4, 16]))


def check_cover(mask, block_rows, block_cols):
    plan = build_plan(mask.bands, mask.num_rows, block_rows, block_cols)
    owners, count = walk(plan, mask.num_rows, mask.num_cols)
    assert (owners == 1).all()
    assert (count == multiplicity(mask)).all()
    costs = [cost(plan, tile) for tile in used_tiles(plan)]
    assert costs == sorted(costs, reverse=True)
    assert plan.num_tiles <= max_num_tiles(mask.num_rows, len(mask.bands), block_rows)


@given(masks(min_size=0), blocks)
def test_every_pair_is_computed_as_often_as_bands_cover_it(mask, block):
    check_cover(mask, *block)


@given(families(), blocks)
def test_named_masks_are_covered(mask, block):
    check_cover(mask, *block)


@given(masks(min_size=0), blocks)
def test_the_plan_of_the_transposed_bands_covers_the_transposed_mask(mask, block):
    plan = build_plan(transpose(mask.bands), mask.num_cols, *block)
    owners, count = walk(plan, mask.num_cols, mask.num_rows)
    assert (owners == 1).all()
    assert (count == multiplicity(mask).T).all()


@given(masks())
def test_a_band_holds_a_tile_entirely_or_not_at_all(mask):
    plan = build_plan(mask.bands, mask.num_rows, 16, 16)
    for begin, end, *_ in used_tiles(plan):
        holds = (plan.bands[:, 0] <= begin) & (end <= plan.bands[:, 1])
        misses = (end <= plan.bands[:, 0]) | (plan.bands[:, 1] <= begin)
        assert (holds | misses).all()


def test_interior_blocks_of_a_large_band_need_no_mask():
    plan = build_plan(Mask.causal(256).bands, 256, 32, 16)
    by_rows = {int(tile[0]): cost(plan, tile) for tile in used_tiles(plan)}
    assert by_rows == {begin: (begin + 32) // 16 for begin in range(0, 256, 32)}
    assert used_tiles(plan)[:, 0].tolist() == list(range(224, -1, -32))


def test_a_mask_without_rows_has_no_tiles():
    assert build_plan(np.zeros((0, 6), dtype=np.int64), 0, 16, 16).num_tiles == 0
    assert max_num_tiles(0, 3, 16) == 0


def test_rows_that_see_nothing_still_have_an_owner():
    plan = build_plan(np.zeros((0, 6), dtype=np.int64), 40, 16, 16)
    assert sorted(used_tiles(plan)[:, :2].tolist()) == [[0, 16], [16, 32], [32, 40]]
    assert (plan.tiles[:, 3] == 0).all()


@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkdv"])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 256])
def test_every_kernel_has_a_tile_for_every_head_dimension(kernel, head_dim):
    for element_size in (2, 4):
        assert isinstance(choose_tiles(kernel, head_dim, element_size), TileConfig)


@pytest.mark.parametrize("size", [0, 8, 24, 100])
def test_tile_sizes_are_powers_of_two_from_16(size):
    with pytest.raises(ValueError, match="power of two"):
        TileConfig(size, 32, 4, 1)
    with pytest.raises(ValueError, match="power of two"):
        TileConfig(32, size, 4, 1)
