"""What a plan makes a kernel do, pair by pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask import Mask
from magi_attention.mask.bands import HI, LO
from magi_attention.plan.tiles import TilePlan, run_geometry


def multiplicity(mask: Mask) -> NDArray[np.int64]:
    """How many bands cover each pair, by the definition of a band."""
    i, j = np.arange(mask.num_rows)[:, None], np.arange(mask.num_cols)[None, :]
    count = np.zeros((mask.num_rows, mask.num_cols), dtype=np.int64)
    for q0, q1, k0, k1, lo, hi in mask.bands.tolist():
        count += (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
    return count


def used_tiles(plan: TilePlan) -> NDArray[np.int64]:
    """Tiles with rows, in the plan's order."""
    tiles = plan.tiles.numpy().astype(np.int64)
    return tiles[tiles[:, 0] < tiles[:, 1]]


def bands_of(plan: TilePlan, tile: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bands that the tile walks."""
    _, _, begin, count = tile
    return plan.bands.numpy().astype(np.int64)[plan.band_list.numpy()[begin : begin + count]]


def cost(plan: TilePlan, tile: NDArray[np.int64]) -> int:
    """Blocks that the tile walks."""
    bands = bands_of(plan, tile)
    ends = np.full(len(bands), tile[0]), np.full(len(bands), tile[1])
    return int(run_geometry(*ends, bands, plan.block_cols).num_blocks.sum())


def walk(plan: TilePlan, num_rows: int, num_cols: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(num_rows,) owners of each row and (num_rows, num_cols) how often each pair is computed.

    As in the kernels: a block that counts as full is computed whole, without looking at the band; a partial
    one only where the diagonals and the run's last column allow.
    """
    owners = np.zeros(num_rows, dtype=np.int64)
    count = np.zeros((num_rows, num_cols), dtype=np.int64)
    for tile in used_tiles(plan):
        rows = slice(tile[0], tile[1])
        owners[rows] += 1
        assert tile[1] - tile[0] <= plan.block_rows
        for band in bands_of(plan, tile):
            first, last, num_blocks, full_begin, full_end = (
                int(x[0]) for x in run_geometry(tile[:1], tile[1:2], band[None], plan.block_cols)
            )
            assert 0 <= full_begin <= full_end <= num_blocks or num_blocks == 0
            for block in range(num_blocks):
                begin = first + block * plan.block_cols
                end = begin + plan.block_cols
                if full_begin <= block < full_end:
                    assert end <= num_cols, "a full block reaches outside the keys"
                    count[rows, begin:end] += 1
                else:
                    cols = np.arange(begin, min(end, last))
                    diagonal = cols[None, :] - np.arange(tile[0], tile[1])[:, None]
                    count[rows, cols] += (diagonal >= band[LO]) & (diagonal <= band[HI])
    return owners, count
