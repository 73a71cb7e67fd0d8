"""Hypothesis strategies for masks that find the corners of band arithmetic.

Odd lengths down to 1 (or 0), more rows than columns and fewer, empty bands, bands whose rows overlap, pairs
covered twice, rows that see nothing, diagonals that are off or far outside.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from magi_attention.mask import INF, Mask


@st.composite
def bands(draw: st.DrawFn, num_rows: int, num_cols: int) -> list[int]:
    """One band ``[q0, q1, k0, k1, lo, hi]`` inside the rectangle, possibly empty."""
    q0, q1 = draw(_ranges(num_rows))
    k0, k1 = draw(_ranges(num_cols))
    diagonal = st.integers(-num_rows - 2, num_cols + 2)
    lo = draw(st.just(-INF) | diagonal)
    hi = draw(st.just(INF) | diagonal)
    return [q0, q1, k0, k1, lo, hi]


@st.composite
def _ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    ends = draw(st.just((0, size)) | st.tuples(st.integers(0, size), st.integers(0, size)))
    return min(ends), max(ends)


@st.composite
def masks(draw: st.DrawFn, min_size: int = 1, max_size: int = 60, max_bands: int = 6) -> Mask:
    """A mask of up to ``max_bands`` random bands, sometimes one of them twice."""
    sizes = st.integers(min_size, max_size)
    num_rows, num_cols = draw(sizes), draw(sizes)
    table = draw(st.lists(bands(num_rows, num_cols), max_size=max_bands))
    table += draw(st.lists(st.sampled_from(table), max_size=1)) if table else []
    return Mask(np.array(table, dtype=np.int64), num_rows, num_cols)


@st.composite
def families(draw: st.DrawFn, max_size: int = 60) -> Mask:
    """A mask of a family with a name: causal, window, packed documents, prefix tree, ..."""
    size = draw(st.integers(1, max_size))
    lengths = draw(st.lists(st.integers(1, max(1, max_size // 4)), min_size=1, max_size=4))
    cuts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    window = (draw(st.integers(0, 9)), draw(st.integers(0, 9)))
    return draw(
        st.sampled_from(
            [
                Mask.full(size, lengths[0]),
                Mask.causal(size),
                Mask.causal(lengths[0], size),
                Mask.sliding_window(size, window=window),
                Mask.varlen(cuts, causal=True),
                Mask.varlen(cuts, window=window, keep_first=2),
                Mask.prefix_tree(lengths, [-1] + [0] * (len(lengths) - 1)),
            ]
        )
    )
