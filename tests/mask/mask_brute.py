"""The definition of a band, pair by pair, and random masks to hold the library against it."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from magi_attention.mask import INF, Mask


def count(bands: NDArray[np.int64], num_rows: int, num_cols: int) -> NDArray[np.int64]:
    """How many bands cover each pair."""
    i, j = np.arange(num_rows)[:, None], np.arange(num_cols)[None, :]
    total = np.zeros((num_rows, num_cols), dtype=np.int64)
    for q0, q1, k0, k1, lo, hi in np.asarray(bands).tolist():
        total += (q0 <= i) & (i < q1) & (k0 <= j) & (j < k1) & (lo <= j - i) & (j - i <= hi)
    return total


def count_of(mask: Mask) -> NDArray[np.int64]:
    return count(mask.bands, mask.num_rows, mask.num_cols)


def picture(text: str) -> NDArray[np.bool_]:
    """Boolean matrix from lines of ``x`` and ``.``."""
    return np.array([[c == "x" for c in line] for line in text.split()], dtype=bool)


@st.composite
def band(draw: st.DrawFn, num_rows: int, num_cols: int) -> list[int]:
    q = sorted(draw(st.tuples(st.integers(0, num_rows), st.integers(0, num_rows))))
    k = sorted(draw(st.tuples(st.integers(0, num_cols), st.integers(0, num_cols))))
    diagonal = st.integers(-num_rows - 2, num_cols + 2)
    lo = draw(st.just(-INF) | diagonal)
    hi = draw(st.just(INF) | diagonal)
    return [*q, *k, lo, hi]


@st.composite
def masks(draw: st.DrawFn, max_size: int = 11, max_bands: int = 5) -> Mask:
    num_rows, num_cols = draw(st.integers(0, max_size)), draw(st.integers(0, max_size))
    table = draw(st.lists(band(num_rows, num_cols), max_size=max_bands))
    return Mask(table, num_rows, num_cols)


@st.composite
def selections(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Disjoint ranges of [0, size), some left out, some empty, in random order."""
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=5)))
    pieces = list(zip([0, *cuts], [*cuts, size], strict=True))
    kept = [piece for piece in pieces if draw(st.booleans())]
    return draw(st.permutations(kept))


def indices(ranges: list[tuple[int, int]]) -> list[int]:
    return [index for begin, end in ranges for index in range(begin, end)]
