"""A mask is a list of bands; a band is a rectangle of the (query, key) plane cut by two diagonals.

Row ``i`` sees column ``j`` through the band ``(q0, q1, k0, k1, lo, hi)`` iff

    q0 <= i < q1,   k0 <= j < k1,   lo <= j - i <= hi.

``lo = -INF`` and ``hi = INF`` switch a diagonal off. The functions here take and return int64 tables of
shape (n, 6); bands are closed under every one of them.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from magi_attention.errors import complaint

INF = 1 << 30
"""A diagonal at or beyond ``INF`` does not cut. Token counts must stay below ``INF // 2``."""

Bands = NDArray[np.int64]

Q0, Q1, K0, K1, LO, HI = range(6)


def as_bands(table: object) -> Bands:
    """(n, 6) int64 copy of ``table`` with diagonals clamped to [-INF, INF].

    Raises:
        ValueError: not six columns.
        TypeError: not integers.
    """
    raw = np.asarray(table)
    if raw.size == 0:
        return np.zeros((0, 6), dtype=np.int64)
    if raw.ndim > 2 or raw.shape[-1] != 6:
        raise ValueError(complaint("bands shape", "(n, 6): q0, q1, k0, k1, lo, hi", raw.shape))
    if raw.dtype.kind not in "iu":
        raise TypeError(
            complaint("bands dtype", "integers", raw.dtype, "Use INF for a diagonal that is off.")
        )
    bands = raw.astype(np.int64).reshape(-1, 6)
    bands[:, LO:] = np.clip(bands[:, LO:], -INF, INF)
    return bands


def shift_diagonal(diagonal: NDArray[np.int64], by: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """``diagonal + by`` where it cuts; an infinite diagonal stays infinite."""
    return np.where(np.abs(diagonal) >= INF, diagonal, diagonal + by)


def shift(bands: Bands, rows: int = 0, cols: int = 0) -> Bands:
    """Move every band down by ``rows`` and right by ``cols``."""
    moved = bands.copy()
    moved[:, Q0 : Q1 + 1] += rows
    moved[:, K0 : K1 + 1] += cols
    moved[:, LO:] = shift_diagonal(bands[:, LO:], cols - rows)
    return moved


def transpose(bands: Bands) -> Bands:
    """Swap queries and keys: ``j - i`` becomes ``i - j``."""
    return np.stack(
        [bands[:, K0], bands[:, K1], bands[:, Q0], bands[:, Q1], -bands[:, HI], -bands[:, LO]], axis=1
    )


def intersect(a: Bands, b: Bands) -> Bands:
    """Row-wise intersection of two equally long tables (or of a table with one broadcast band)."""
    low, high = np.maximum(a, b), np.minimum(a, b)
    return np.stack([low[:, Q0], high[:, Q1], low[:, K0], high[:, K1], low[:, LO], high[:, HI]], axis=1)


def clip(bands: Bands, rows: tuple[int, int], cols: tuple[int, int]) -> Bands:
    """Restrict to a sub-rectangle, keeping global coordinates. Bands may become empty."""
    return intersect(bands, np.array([[*rows, *cols, -INF, INF]], dtype=np.int64))


def tighten(bands: Bands) -> Bands:
    """Shrink each band to the rows and columns that it uses; an empty one becomes (0, 0, 0, 0, -INF, INF)."""
    q0 = np.maximum(bands[:, Q0], bands[:, K0] - bands[:, HI])
    q1 = np.minimum(bands[:, Q1], bands[:, K1] - bands[:, LO])
    k0 = np.maximum(bands[:, K0], q0 + bands[:, LO])
    k1 = np.minimum(bands[:, K1], q1 + bands[:, HI])
    empty = (q0 >= q1) | (k0 >= k1) | (bands[:, LO] > bands[:, HI])
    tight = np.stack([q0, q1, k0, k1, bands[:, LO], bands[:, HI]], axis=1)
    tight[empty] = (0, 0, 0, 0, -INF, INF)
    return tight


def _triangle(n: NDArray[np.int64]) -> NDArray[np.int64]:
    """1 + 2 + ... + n, and 0 for n <= 0."""
    n = np.maximum(n, 0)
    return n * (n + 1) // 2


def _pairs_below(bands: Bands, diagonal: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pairs of each rectangle with ``j - i <= d``: sum over its rows of clip(i + d + 1 - k0, 0, width)."""
    q0, q1, k0, k1 = bands[:, Q0], bands[:, Q1], bands[:, K0], bands[:, K1]
    width = np.maximum(k1 - k0, 0)

    def ramp(offset: NDArray[np.int64]) -> NDArray[np.int64]:
        return _triangle(q1 - 1 + offset) - _triangle(q0 - 1 + offset)

    first = diagonal + 1 - k0
    return np.where(q1 > q0, ramp(first) - ramp(first - width), 0)


def areas(bands: Bands) -> NDArray[np.int64]:
    """Visible pairs of each band, in closed form."""
    tight = tighten(bands)
    return _pairs_below(tight, _finite(tight, HI)) - _pairs_below(tight, _finite(tight, LO) - 1)


def _finite(bands: Bands, which: int) -> NDArray[np.int64]:
    """The diagonal clamped to the rectangle's corners, so that squares of it stay far from overflow."""
    lowest, highest = bands[:, K0] - bands[:, Q1], bands[:, K1] - bands[:, Q0]
    return np.clip(bands[:, which], lowest, highest)


def is_empty(bands: Bands) -> NDArray[np.bool_]:
    """Which bands of a tight table hold no pair."""
    return bands[:, Q1] <= bands[:, Q0]


def compact(bands: Bands) -> Bands:
    """Tight bands without the empty ones, in the same order."""
    tight = tighten(bands)
    return tight[~is_empty(tight)]


def relax(tight: Bands) -> Bands:
    """Tight bands with diagonals that cut nothing off their rectangle moved to infinity."""
    relaxed = tight.copy()
    relaxed[tight[:, LO] <= tight[:, K0] - (tight[:, Q1] - 1), LO] = -INF
    relaxed[tight[:, HI] >= tight[:, K1] - 1 - tight[:, Q0], HI] = INF
    return relaxed


def canonical(bands: Bands) -> Bands:
    """Tight, none empty, idle diagonals at infinity, sorted: equal tables for reordered equal lists."""
    relaxed = relax(compact(bands))
    return relaxed[np.lexsort(relaxed.T[::-1])]


def fingerprint(bands: Bands, num_rows: int, num_cols: int) -> str:
    """128-bit hex digest of the canonical form: equal for masks that list the same bands in any order."""
    digest = hashlib.blake2b(np.array([num_rows, num_cols], dtype=np.int64).tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(canonical(bands)).tobytes())
    return digest.hexdigest()


def overlapping_intervals(
    starts: NDArray[np.int64], ends: NDArray[np.int64], cuts: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (interval, segment) that overlap.

    ``cuts`` (m, 2) are sorted, disjoint segments [begin, end). Returns two equally long index arrays.
    """
    first = np.searchsorted(cuts[:, 1], starts, side="right")
    last = np.searchsorted(cuts[:, 0], ends, side="left")
    counts = np.where(ends > starts, np.maximum(last - first, 0), 0)
    interval = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(interval)) - np.repeat(np.cumsum(counts) - counts, counts)
    return interval, first[interval] + within


def localise(bands: Bands, row_ranges: NDArray[np.int64], col_ranges: NDArray[np.int64]) -> Bands:
    """Bands in the coordinates of concatenated row ranges x concatenated column ranges.

    ``row_ranges`` (m, 2) and ``col_ranges`` (p, 2) are disjoint global intervals; local row 0 is the first
    row of the first range, and so on in the order given. What no pair of ranges holds is dropped.
    """
    by_rows = _localise_rows(compact(bands), row_ranges)
    return transpose(_localise_rows(transpose(by_rows), col_ranges))


def _localise_rows(bands: Bands, ranges: NDArray[np.int64]) -> Bands:
    joined = _join_neighbours(np.asarray(ranges, dtype=np.int64).reshape(-1, 2))
    lengths = joined[:, 1] - joined[:, 0]
    offsets = np.cumsum(lengths) - lengths - joined[:, 0]
    order = np.argsort(joined[:, 0])
    pieces, _, segment = split(bands, joined[order])
    offset = offsets[order][segment]
    pieces[:, Q0 : Q1 + 1] += offset[:, None]
    pieces[:, LO:] = shift_diagonal(pieces[:, LO:], -offset[:, None])
    return compact(pieces)


def _join_neighbours(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same tokens in the same order: ranges that continue their predecessor joined to it, none empty."""
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    first = np.ones(len(ranges), dtype=bool)
    first[1:] = ranges[1:, 0] != ranges[:-1, 1]
    last = np.append(first[1:], True) if len(ranges) else first
    return np.stack([ranges[first, 0], ranges[last, 1]], axis=1)


def split(
    bands: Bands, segments: NDArray[np.int64], start: int = Q0
) -> tuple[Bands, NDArray[np.int64], NDArray[np.int64]]:
    """Each band cut to each of the segments that it meets.

    ``segments`` (m, 2) are sorted and disjoint, of rows when ``start`` is ``Q0``, of columns when it is
    ``K0``. Returns the pieces, and for each the index of its band and of its segment.
    """
    which, segment = overlapping_intervals(bands[:, start], bands[:, start + 1], segments)
    pieces = bands[which]
    pieces[:, start] = np.maximum(pieces[:, start], segments[segment, 0])
    pieces[:, start + 1] = np.minimum(pieces[:, start + 1], segments[segment, 1])
    return pieces, which, segment


def cell_areas(bands: Bands, row_edges: NDArray[np.int64], col_edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Visible pairs in each cell of a grid, a pair counted once per band that covers it.

    ``row_edges`` (m + 1,) and ``col_edges`` (p + 1,) strictly increase. Returns an (m, p) table.
    """
    num_rows, num_cols = len(row_edges) - 1, len(col_edges) - 1
    strips, _, row = split(compact(bands), np.stack([row_edges[:-1], row_edges[1:]], axis=1), Q0)
    cells, strip, col = split(tighten(strips), np.stack([col_edges[:-1], col_edges[1:]], axis=1), K0)
    counts = np.zeros(num_rows * num_cols, dtype=np.int64)
    np.add.at(counts, row[strip] * num_cols + col, areas(cells))
    return counts.reshape(num_rows, num_cols)


def row_intervals(bands: Bands, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and one past the last visible column of each row in each band: two (n, len(rows)) arrays."""
    inside = (rows >= bands[:, Q0, None]) & (rows < bands[:, Q1, None])
    left = np.maximum(bands[:, K0, None], rows + bands[:, LO, None])
    right = np.minimum(bands[:, K1, None], rows + bands[:, HI, None] + 1)
    right = np.where(inside, np.maximum(right, left), left)
    return left, right
