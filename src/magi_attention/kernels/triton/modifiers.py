"""Dropout and ALiBi of the Triton kernels, as ``kernels.reference.modifiers`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from magi_attention.kernels.triton.primitives import LOG2E


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_cols", "col_stride"])
def keys_kernel(
    RNG_STATE,
    ROW_KEYS,  # int32 (2, B, H, T), contiguous
    COL_KEYS,  # int32 (COPIES, S), rows ``col_stride`` apart; key n of row r is that of column n + r
    num_heads, num_rows, num_cols, col_stride,
    BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """The keys of BLOCK rows of a head or, in the programs after those, of BLOCK columns; ``num_heads`` is B * H."""
    row_blocks = tl.cdiv(num_rows, BLOCK)
    head = tl.program_id(0) // tl.maximum(row_blocks, 1)
    is_rows = tl.program_id(0) < row_blocks * num_heads
    block = tl.where(
        is_rows, tl.program_id(0) % tl.maximum(row_blocks, 1), tl.program_id(0) - row_blocks * num_heads
    )
    at = block * BLOCK + tl.arange(0, BLOCK)
    seed, offset = tl.load(RNG_STATE), tl.load(RNG_STATE + 1)
    zero = (at * 0).to(tl.uint32)
    owner = zero + tl.where(is_rows, head, -1).to(tl.uint32)
    low = zero + (offset & 0xFFFFFFFF).to(tl.uint32)
    high = zero + (offset >> 32).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, at.to(tl.uint32), owner, low, high)
    first, second = first.to(tl.int32, bitcast=True), second.to(tl.int32, bitcast=True)
    rows = ROW_KEYS + head.to(tl.int64) * num_rows + at
    tl.store(rows, first | 1, mask=is_rows & (at < num_rows))
    tl.store(rows + num_rows.to(tl.int64) * num_heads, second, mask=is_rows & (at < num_rows))
    for moved in tl.static_range(COPIES):
        inside = (at >= moved) & (at < num_cols) & (is_rows == 0)
        tl.store(COL_KEYS + moved * col_stride + at - moved, first, mask=inside)


@triton.jit
def load_keys(ROW_KEYS, num_keys, at, live, DROPOUT: tl.constexpr):
    """The two keys of the rows at ``at``, of ``num_keys`` in all; anything without dropout."""
    first, second = at, at
    if DROPOUT:
        first = tl.load(ROW_KEYS + at, mask=live, other=0)
        second = tl.load(ROW_KEYS + num_keys + at, mask=live, other=0)
    return first, second


@triton.jit
def load_column_keys(COL_KEYS, cols, last, DROPOUT: tl.constexpr):
    """The keys of the columns before ``last``; anything without dropout."""
    keys = cols
    if DROPOUT:
        keys = tl.load(COL_KEYS + cols, mask=cols < last, other=0)
    return keys


@triton.jit
def kept(multiplier, offset, column_key, kept_below):
    """Which weights dropout keeps; keys of rows and columns broadcast against each other."""
    return multiplier * column_key + offset < kept_below


@triton.jit
def slope_of(SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS, batch, band, head, ALIBI: tl.constexpr):
    """(slope in units of log2, diagonal) of a band and head; zeros without ALiBi."""
    slope, diagonal = 0.0, 0
    if ALIBI:
        slope = LOG2E * tl.load(SLOPES + batch * stride_ab + band * stride_an + head * stride_ah)
        diagonal = tl.load(DIAGONALS + band)
    return slope, diagonal


@triton.jit
def biased(s, rows, cols, slope, diagonal, ALIBI: tl.constexpr):
    """Scores in units of log2 with their linear bias; rows and columns broadcast against each other."""
    if ALIBI:
        s = s - slope * tl.abs(cols - rows - diagonal).to(tl.float32)
    return s
