"""The tile plan: one owner per row tile, a short list of bands per tile, longest tile first.

Rows are cut where the set of active bands changes and every ``block_rows`` in between, so that each band holds a tile
entirely or not at all. What a tile walks in one band is a *run*: consecutive blocks of ``block_cols`` columns, of which
the middle ones are visible to every row (no mask code) and the outer ones are partial. A run follows from the tile's
rows and the band by a few min/max (``run_geometry``), so the plan stores band numbers only, and its size is bounded by
the number of rows and bands without looking at their values.

The same plan of the transposed bands gives the K/V-owning side of the backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from magi_attention.mask.bands import HI, K0, K1, LO, Q0, Q1, Bands, overlapping_intervals, tighten

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TilePlan:
    """Work list of one kernel over ``num_rows`` rows.

    Attributes:
        tiles: int32 (N, 4): row_begin, row_end, list_begin, list_count; longest first. Unused entries are zero.
        band_list: int32 (n + L,): 0..n-1, then the bands of each tile, ascending. A tile whose list did not
            fit points at the first n entries: all bands.
        bands: int32 (n, 6), tightened; empty bands are (0, 0, 0, 0, -INF, INF).
        block_rows, block_cols: tile height and block width.
    """

    tiles: torch.Tensor
    band_list: torch.Tensor
    bands: torch.Tensor
    block_rows: int
    block_cols: int

    @property
    def num_tiles(self) -> int:
        """Number of entries of ``tiles``, used or not."""
        return self.tiles.shape[0]


class Runs(NamedTuple):
    """Runs of several (tile, band) pairs; block ``b`` of a run covers columns ``begin + b * block_cols`` onwards.

    ``first`` and ``last`` bound the columns that some row of the tile sees; blocks ``full_begin <= b < full_end`` are
    visible to every row.
    """

    first: IntArray
    last: IntArray
    num_blocks: IntArray
    full_begin: IntArray
    full_end: IntArray


def run_geometry(row_begin: IntArray, row_end: IntArray, bands: Bands, block_cols: int) -> Runs:
    """Runs of tiles [row_begin, row_end) in ``bands``, element by element. A band that misses the tile has no blocks."""
    inside = (bands[:, Q0] <= row_begin) & (row_begin < bands[:, Q1])
    first = np.maximum(bands[:, K0], row_begin + bands[:, LO])
    last = np.where(inside, np.minimum(bands[:, K1], row_end + bands[:, HI]), first)
    num_blocks = np.maximum(-(-(last - first) // block_cols), 0)
    all_from = np.maximum(bands[:, K0], row_end - 1 + bands[:, LO])
    all_to = np.minimum(bands[:, K1], row_begin + bands[:, HI] + 1)
    full_begin = np.minimum(-(-(all_from - first) // block_cols), num_blocks)
    full_end = np.clip((all_to - first) // block_cols, full_begin, num_blocks)
    return Runs(first, last, num_blocks, full_begin, full_end)


def max_num_tiles(num_rows: int, num_bands: int, block_rows: int) -> int:
    """Upper bound on the tiles of any ``num_bands`` bands over ``num_rows`` rows: what the device builder allocates."""
    return min(num_rows, num_rows // block_rows + 2 * num_bands + 1)


def build_plan(bands: Bands, num_rows: int, block_rows: int, block_cols: int) -> TilePlan:
    """Tile plan on the CPU, for bands known to the host.

    Args:
        bands: int64 (n, 6).
        num_rows: rows to cut into tiles; every row belongs to exactly one tile, seen or not.
        block_rows, block_cols: tile height and block width.
    """
    tight = tighten(bands)
    row_begin, row_end = _cut_rows(tight, num_rows, block_rows)
    band, tile = overlapping_intervals(tight[:, Q0], tight[:, Q1], np.stack([row_begin, row_end], axis=1))
    order = np.argsort(tile, kind="stable")
    band, tile = band[order], tile[order]
    runs = run_geometry(row_begin[tile], row_end[tile], tight[band], block_cols)
    num_tiles = len(row_begin)
    cost = np.bincount(tile, weights=runs.num_blocks, minlength=num_tiles).astype(np.int64)
    count = np.bincount(tile, minlength=num_tiles)
    tiles = np.stack([row_begin, row_end, len(tight) + np.cumsum(count) - count, count], axis=1)
    tiles = tiles[np.argsort(-cost, kind="stable")]
    band_list = np.concatenate([np.arange(len(tight)), band])

    def tensor(array: IntArray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))

    return TilePlan(tensor(tiles), tensor(band_list), tensor(tight), block_rows, block_cols)


def _cut_rows(tight: Bands, num_rows: int, block_rows: int) -> tuple[IntArray, IntArray]:
    """Begin and end of every tile, in row order."""
    cuts = np.unique(np.concatenate([tight[:, Q0], tight[:, Q1], [0, num_rows]]))
    begin, length = cuts[:-1], np.diff(cuts)
    pieces = -(-length // block_rows)
    segment = np.repeat(np.arange(len(begin)), pieces)
    within = np.arange(len(segment)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    row_begin = begin[segment] + within * block_rows
    return row_begin, np.minimum(row_begin + block_rows, cuts[segment + 1])
