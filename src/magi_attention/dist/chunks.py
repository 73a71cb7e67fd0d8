"""The rows of a mask in chunks: what each costs, and which keys it needs. Integer arithmetic only: equal on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from magi_attention.mask.bands import K0, K1, Bands, areas, compact, is_empty, split, tighten

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
    """

    size: int
    num_rows: int
    num_cols: int
    pieces: Bands
    chunk: Ints
    band: Ints

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
        tiles, which, _ = split(self.pieces, cuts_of(self.num_rows, TILE_ROWS))
        tiles = tighten(tiles)
        blocks = -(-(tiles[:, K1] - tiles[:, K0]) // TILE_COLS)
        return self._sums(blocks * TILE_ROWS * TILE_COLS, self.chunk[which])

    @cached_property
    def sample(self) -> Ints:
        """(n,) the band that has most of each chunk's area, -1 where nothing is visible."""
        found = np.full(len(self), -1, dtype=np.int64)
        order = np.argsort(areas(self.pieces), kind="stable")
        found[self.chunk[order]] = self.band[order]  # the largest comes last
        return found

    def cells(self) -> tuple[Ints, NDArray[np.bool_], NDArray[np.bool_]]:
        """Keys in stretches that no chunk needs a part of.

        Returns:
            (c + 1,) edges of the stretches, (n, c) whether a chunk needs one, and (n, c) whether it holds one, if keys
            lie where queries do.
        """
        own = self.rows
        edges = np.unique(np.concatenate([[0, self.num_cols], own.ravel(), self.pieces[:, K0], self.pieces[:, K1]]))
        edges = edges[edges <= self.num_cols]
        steps = np.zeros((len(self), len(edges)), dtype=np.int64)
        np.add.at(steps, (self.chunk, np.searchsorted(edges, self.pieces[:, K0])), 1)
        np.add.at(steps, (self.chunk, np.searchsorted(edges, self.pieces[:, K1])), -1)
        needed = steps.cumsum(axis=1)[:, :-1] > 0
        begins = edges[:-1]
        held = (begins >= own[:, :1]) & (begins < own[:, 1:])
        return edges, needed, held

    def _sums(self, values: Ints, chunk: Ints | None = None) -> Ints:
        found = np.zeros(len(self), dtype=np.int64)
        np.add.at(found, self.chunk if chunk is None else chunk, values)
        return found


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
