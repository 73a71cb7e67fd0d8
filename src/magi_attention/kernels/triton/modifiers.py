"""Dropout and ALiBi of the Triton kernels, as ``kernels.reference.modifiers`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from magi_attention.kernels.triton.primitives import LOG2E


@triton.jit
def row_keys(RNG_STATE, batch_head, rows, DROPOUT: tl.constexpr):
    """The two 32-bit keys of each row; zeros without dropout."""
    first = (rows * 0).to(tl.uint32)
    second = first
    if DROPOUT:
        seed, offset = tl.load(RNG_STATE), tl.load(RNG_STATE + 1)
        low = first + (offset & 0xFFFFFFFF).to(tl.uint32)
        high = first + (offset >> 32).to(tl.uint32)
        first, second, _, _ = tl.philox(seed, rows.to(tl.uint32), first + batch_head.to(tl.uint32), low, high)
    return first, second


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def keys_kernel(
    RNG_STATE,
    KEYS,  # int32 (2, B, H, T), contiguous
    num_rows, num_keys: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of all rows, for kernels in which rows change from block to block; ``num_keys`` is B * H * T."""
    blocks = tl.cdiv(num_rows, BLOCK)
    batch_head = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first, second = row_keys(RNG_STATE, batch_head, rows, True)
    at = KEYS + batch_head.to(tl.int64) * num_rows + rows
    tl.store(at, first.to(tl.int32, bitcast=True), mask=rows < num_rows)
    tl.store(at + num_keys, second.to(tl.int32, bitcast=True), mask=rows < num_rows)


@triton.jit
def load_keys(KEYS, num_keys, at, live, DROPOUT: tl.constexpr):
    """The two keys of the rows at ``at`` in what ``keys_kernel`` wrote; anything without dropout."""
    first, second = at, at
    if DROPOUT:
        first = tl.load(KEYS + at, mask=live, other=0).to(tl.uint32, bitcast=True)
        second = tl.load(KEYS + num_keys + at, mask=live, other=0).to(tl.uint32, bitcast=True)
    return first, second


@triton.jit
def kept(first, second, cols, kept_below):
    """Which weights dropout keeps; keys and columns broadcast against each other."""
    x = (cols >> 1).to(tl.uint32) * 0x9E3779B1 + first
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ second ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    half = tl.where((cols & 1) == 0, x, x >> 16) & 0xFFFF
    return half.to(tl.int32) < kept_below


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
