"""The rows of a mask in chunks: what each costs, and which keys it needs. Integers only: equal on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import Intervals, merge, stack, unstack
from magi_attention.errors import complaint
from magi_attention.mask.bands import K0, K1, Bands, areas, compact, is_empty, shift, split, tighten

Ints = NDArray[np.int64]
TILE_ROWS, TILE_COLS = 128, 128
"""What kernels cut masks into: a tile costs the same however little of it is visible."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """A mask cut at multiples of ``size`` rows; the last chunk may be short.

    Attributes:
        size, num_rows, num_cols: of the mask and its chunks.
        pieces: (m, 6) tight bands, none empty, each within the rows of one chunk.
        chunk, band: (m,) which chunk each piece is in, and which band of the mask it comes from.
        num_masks: masks in one, see ``joint``; keys of each come ``num_cols`` behind those of the one before.
    """

    size: int
    num_rows: int
    num_cols: int
    pieces: Bands
    chunk: Ints
    band: Ints
    num_masks: int = 1

    def __len__(self) -> int:
        return -(-self.num_rows // self.size)

    @property
    def rows(self) -> Ints:
        """(n, 2) rows of each chunk."""
        return cuts_of(self.num_rows, self.size)

    @cached_property
    def areas(self) -> Ints:
        """(n,) visible pairs of each chunk."""
        return self._sums(areas(self.pieces))

    @cached_property
    def work(self) -> Ints:
        """(n,) pairs in all tiles that hold a visible one: what a kernel computes."""
        work, which = work_of(self.pieces, self.num_rows)
        return self._sums(work, self.chunk[which])

    @cached_property
    def sample(self) -> Ints:
        """(n,) the band that has most of each chunk's area, -1 where nothing is visible."""
        found = np.full(len(self), -1, dtype=np.int64)
        order = np.argsort(areas(self.pieces), kind="stable")
        found[self.chunk[order]] = self.band[order]  # the largest comes last
        return found

    @property
    def stride(self) -> int:
        """Above all positions of keys, those of one mask behind those of the other."""
        return self.num_masks * self.num_cols + 1

    @cached_property
    def needed(self) -> Intervals:
        """Merged intervals of the keys that chunks need, those of chunk n moved by n * ``stride``."""
        return merge(stack(self.pieces[:, K0 : K1 + 1], self.chunk, self.stride))

    @cached_property
    def held(self) -> Intervals:
        """Merged intervals of the keys that chunks hold, if keys lie where queries do; moved in the same way."""
        own = np.minimum(self.rows, self.num_cols)
        own = np.concatenate([own + mask * self.num_cols for mask in range(self.num_masks)])
        chunk = np.tile(np.arange(len(self)), self.num_masks)
        live = own[:, 1] > own[:, 0]
        return merge(stack(own[live], chunk[live], self.stride))

    def cells(self) -> tuple[Ints, NDArray[np.bool_], NDArray[np.bool_]]:
        """Keys in stretches that no chunk needs or holds a part of.

        Returns:
            (c + 1,) edges of the stretches, (n, c) whether a chunk needs one, and (n, c) whether it holds one.
        """
        (seen, seer), (own, owner) = (unstack(table, self.stride) for table in (self.needed, self.held))
        edges = np.unique(np.concatenate([[0, self.stride - 1], own.ravel(), seen.ravel()]))
        return (
            edges,
            spread(np.searchsorted(edges, seen), seer, len(self), len(edges) - 1) > 0,
            spread(np.searchsorted(edges, own), owner, len(self), len(edges) - 1) > 0,
        )

    def _sums(self, values: Ints, chunk: Ints | None = None) -> Ints:
        return sums(values, self.chunk if chunk is None else chunk, len(self))


def sums(values: Ints, label: Ints, count: int) -> Ints:
    """(count,) of the values with each label."""
    found = np.zeros(count, dtype=np.int64)
    np.add.at(found, label, values)
    return found


def spread(places: Intervals, row: Ints, num_rows: int, width: int) -> NDArray[np.int16]:
    """(num_rows, width) how many of the intervals ``places`` of each row lie over a column."""
    steps = np.zeros((num_rows, width + 1), dtype=np.int16)
    np.add.at(steps, (row, places[:, 0]), 1)
    np.add.at(steps, (row, places[:, 1]), -1)
    return steps.cumsum(axis=1, dtype=np.int16)[:, :-1]


def work_of(bands: Bands, num_rows: int) -> tuple[Ints, Ints]:
    """Pairs in the tiles that each tight band touches in each strip of ``TILE_ROWS`` rows, and which band that is."""
    tiles, which, _ = split(bands, cuts_of(num_rows, TILE_ROWS))
    tiles = tighten(tiles)
    return -(-(tiles[:, K1] - tiles[:, K0]) // TILE_COLS) * TILE_ROWS * TILE_COLS, which


def joint(masks: Sequence[Chunks]) -> Chunks:
    """Several masks over the same tokens as one to place: work and keys to receive are summed.

    A mask that serves several layers may be listed as often.

    Raises:
        ValueError: no mask, or chunks or lengths that differ.
    """
    if not masks:
        raise ValueError(complaint("masks", "at least one", 0))
    shapes = sorted({(each.size, each.num_rows, each.num_cols) for each in masks})
    if len(shapes) > 1:
        raise ValueError(complaint("masks", "one size of chunks, number of rows and of columns", shapes))
    first = masks[0]
    pieces, bands, place, count = [], [], 0, 0
    for each in masks:
        pieces.append(shift(each.pieces, cols=place * first.num_cols))
        bands.append(each.band + count)
        place, count = place + each.num_masks, count + int(each.band.max(initial=-1)) + 1
    chunk = np.concatenate([each.chunk for each in masks])
    return Chunks(*shapes[0], np.concatenate(pieces), chunk, np.concatenate(bands), place)


def cuts_of(length: int, size: int) -> Ints:
    """(n, 2) pieces [begin, end) of ``size`` that ``length`` is cut into."""
    begins = np.arange(0, length, size, dtype=np.int64)
    return np.stack([begins, np.minimum(begins + size, length)], axis=1)


def cut(bands: Bands, num_rows: int, num_cols: int, size: int) -> Chunks:
    """The mask of these bands in chunks of ``size`` rows."""
    tight = compact(bands)
    pieces, band, chunk = split(tight, cuts_of(num_rows, size))
    pieces = tighten(pieces)
    live = ~is_empty(pieces)
    return Chunks(size, num_rows, num_cols, pieces[live], chunk[live], band[live])
