"""Small pieces that the Triton kernels are written in: tiles, bands, runs and scores."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


RUNTIME_SIZES = [
    *("num_tiles", "num_heads", "heads_per_batch", "wave", "group", "num_rows", "num_keys", "kept_below"),
    *(
        f"stride_{tensor}{axis}"
        for tensor in ("q", "k", "v", "o", "g", "d", "dk", "dv", "s", "l")
        for axis in "bth"
    ),
    *("stride_ab", "stride_an", "stride_ah"),
]
"""Arguments that kernels are not specialised on: lengths and masks change without a recompilation."""


@triton.jit
def program_of(TILES, num_tiles, num_heads, wave):
    """(tile entry, batch * heads index) of this program.

    Programs go through the heads ``wave`` at a time, so that tiles which run together share K and V in L2; inside a
    wave the longest tiles go first.
    """
    pid = tl.program_id(0)
    per_wave = num_tiles * wave
    first_head = pid // per_wave * wave
    within = pid % per_wave
    here = tl.minimum(wave, num_heads - first_head)
    return TILES + 4 * (within // here), first_head + within % here


@triton.jit
def load_band(BANDS, n):
    """The six numbers of band ``n``: q0, q1, k0, k1, lo, hi."""
    band = BANDS + 6 * n
    return (
        tl.load(band),
        tl.load(band + 1),
        tl.load(band + 2),
        tl.load(band + 3),
        tl.load(band + 4),
        tl.load(band + 5),
    )


@triton.jit
def run_of(row_begin, row_end, q0, q1, k0, k1, lo, hi, BLOCK_COLS: tl.constexpr):
    """The tile's run in a band, as in plan.tiles.run_geometry: first, last, num_blocks, full_begin, full_end."""
    inside = (q0 <= row_begin) & (row_begin < q1)
    first = tl.maximum(k0, row_begin + lo)
    last = tl.where(inside, tl.minimum(k1, row_end + hi), first)
    num_blocks = (tl.maximum(last - first, 0) + BLOCK_COLS - 1) // BLOCK_COLS
    all_from = tl.maximum(k0, row_end - 1 + lo)
    all_to = tl.minimum(k1, row_begin + hi + 1)
    full_begin = tl.minimum((all_from - first + BLOCK_COLS - 1) // BLOCK_COLS, num_blocks)
    full_end = tl.minimum(tl.maximum(all_to - first, 0) // BLOCK_COLS, num_blocks)
    return first, last, num_blocks, full_begin, tl.maximum(full_end, full_begin)


@triton.jit
def visible(rows, cols, last, lo, hi):
    """Which (row, col) pairs of a partial block the band shows; columns start at the run's first one."""
    diagonal = cols[None, :] - rows[:, None]
    return (cols < last)[None, :] & (diagonal >= lo) & (diagonal <= hi)


@triton.jit
def rows_at(pointer, first_row, stride, ROWS: tl.constexpr, dims):
    """Pointers of a (ROWS, dims) tile that starts at ``first_row``.

    Strides come in units of 8 elements, so that 16-byte accesses are provable. The start is one 64-bit address, the
    offsets inside the tile are 32-bit and the same for every tile of a loop.
    """
    start = pointer + first_row.to(tl.int64) * stride * 8
    return start + (tl.arange(0, ROWS)[:, None] * (stride * 8) + dims[None, :])


@triton.jit
def load_rows(
    pointer, first_row, num_live, stride, dims, MASKED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """(ROWS, dims) tile; when MASKED, rows from ``num_live`` on read as zero and are not touched (they may hold NaN)."""
    at = rows_at(pointer, first_row, stride, ROWS, dims)
    live = (tl.arange(0, ROWS) < num_live)[:, None]
    if dims.shape[0] == DIM:
        if MASKED:
            return tl.load(at, mask=live, other=0.0)
        else:
            return tl.load(at)
    else:
        inside = (dims < DIM)[None, :]
        if MASKED:
            return tl.load(at, mask=live & inside, other=0.0)
        else:
            return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_block(
    DESC, batch, head, pointer, first_row, num_live, stride, dims,
    MASKED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(ROWS, dims) tile of one head: whole blocks by the copy engine where there is one, partial ones by pointers."""
    if TMA and not MASKED:
        return DESC.load([batch, first_row, head, 0]).reshape(ROWS, dims.shape[0])
    else:
        return load_rows(pointer, first_row, num_live, stride, dims, MASKED, ROWS, DIM)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (tl.exp2(2.0 * LOG2E * x) + 1.0)


@triton.jit
def head_of(pointer, batch, head, stride_b, stride_h):
    """Start of one head; strides in units of 8 elements."""
    return pointer + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * 8
