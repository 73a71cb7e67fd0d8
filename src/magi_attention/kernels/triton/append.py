"""Write new keys and values into a cache, and turn them and the queries by rotary position embeddings on the way.

One program for each token and tensor. Strides are in units of ``UNIT`` elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(token, CUTS, each, batch_size, BLOCK_B: tl.constexpr):
    """(sequence, number in it) of a token: ``each`` a sequence, or between ``CUTS``."""
    batch, index = token // tl.maximum(each, 1), token % tl.maximum(each, 1)
    if CUTS is not None:
        entries = tl.arange(0, BLOCK_B)
        ends = tl.load(CUTS + 1 + entries, mask=entries < batch_size, other=2147483647)
        batch = tl.sum((ends <= token).to(tl.int32), 0)
        index = token - tl.load(CUTS + batch)
    return batch, index


@triton.jit
def number_of(NUMBERS, default, batch):
    """A sequence's entry in a tensor, or without one the same number for all."""
    number = default
    if NUMBERS is not None:
        number = tl.load(NUMBERS + batch).to(tl.int32)
    return number


@triton.jit
def copy_heads(
    SOURCE, TARGET, heads, stride_source, stride_target, COS, SIN, stride_table, angle, num_angles, TURNED: tl.constexpr,
    INTERLEAVED: tl.constexpr, R: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, UNIT_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The heads of a token, turned by row ``angle`` of the tables; beyond the tables they stay as they are."""
    dims = tl.arange(0, BLOCK_D)
    for first in range(0, heads, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        live = (head < heads)[:, None] & (dims < D)[None, :]
        source = SOURCE + (head * stride_source * UNIT)[:, None]
        x = tl.load(source + dims[None, :], mask=live, other=0.0)
        if TURNED:
            half: tl.constexpr = R // 2
            if INTERLEAVED:
                pair, partner, is_first = dims // 2, dims ^ 1, dims % 2 == 0
            else:
                pair, is_first = dims % half, dims < half
                partner = tl.where(is_first, dims + half, dims - half)
            turns = (dims < R) & (angle >= 0) & (angle < num_angles)
            other = tl.load(source + partner[None, :], mask=live & turns[None, :], other=0.0).to(tl.float32)
            at = angle.to(tl.int64) * stride_table + pair
            cos = tl.load(COS + at, mask=turns, other=1.0).to(tl.float32)
            sin = tl.load(SIN + at, mask=turns, other=0.0).to(tl.float32)
            x = x.to(tl.float32) * cos[None, :] + tl.where(is_first[None, :], -other, other) * sin[None, :]
        target = TARGET + (head * stride_target * UNIT_T)[:, None] + dims[None, :]
        tl.store(target, x.to(TARGET.dtype.element_ty), mask=live)


_SIZES = [
    *("num_new", "num_queries", "batch_size", "num_kv_heads", "num_heads", "used", "page_size", "num_pages", "capacity"),
    *("num_angles", "new_tokens", "query_tokens", "stride_table", "stride_angle"),
    *(f"stride_{tensor}{axis}" for tensor in ("k", "v", "q") for axis in "bth"),
    *(f"stride_{tensor}{axis}" for tensor in ("kc", "vc") for axis in "bth"),
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def append_kernel(
    K, stride_kb, stride_kt, stride_kh, V, stride_vb, stride_vt, stride_vh, Q, stride_qb, stride_qt, stride_qh,
    K_CACHE, stride_kcb, stride_kct, stride_kch, V_CACHE, stride_vcb, stride_vct, stride_vch,
    TURNED_Q,  # (tokens, H, D), contiguous
    USED, ROWS, POSITIONS,  # integers (B,), or None; where angles begin, if not at USED
    CU_NEW, CU_Q,  # int32 (B + 1,), or None
    TABLE, stride_table,  # int32 (B, blocks), or None
    COS, SIN, stride_angle,  # (num_angles, R / 2)
    num_new, num_queries, new_tokens, query_tokens, batch_size, num_kv_heads, num_heads, used, page_size, num_pages,
    capacity, num_angles,
    TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, QUERIES_MOVE: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, UNIT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Axis 1 of the grid: keys, values, and with angles queries."""
    token, what = tl.program_id(0), tl.program_id(1)
    if what == 2:
        batch, index = place_of(token, CU_Q, num_queries, batch_size, BLOCK_B)
        if (token < query_tokens) & (batch < batch_size):
            angle = number_of(USED if POSITIONS is None else POSITIONS, used, batch)
            if QUERIES_MOVE:
                angle += index
            row = token if CU_Q is not None else index
            source = Q + (batch.to(tl.int64) * stride_qb + row.to(tl.int64) * stride_qt) * UNIT
            copy_heads(source, TURNED_Q + token.to(tl.int64) * num_heads * D, num_heads, stride_qh, D, COS, SIN,
                       stride_angle, angle, num_angles, TURNED, INTERLEAVED, R, D, UNIT, 1, BLOCK_H, BLOCK_D)  # fmt: skip
    else:
        batch, index = place_of(token, CU_NEW, num_new, batch_size, BLOCK_B)
        if (token < new_tokens) & (batch < batch_size):
            position = tl.maximum(number_of(USED, used, batch), 0) + index
            if position < capacity:
                row, slot = batch, position
                if TABLE is not None:
                    row = tl.load(TABLE + batch.to(tl.int64) * stride_table + position // page_size)
                    slot = position % page_size
                elif ROWS is not None:
                    row = tl.load(ROWS + batch).to(tl.int32)
                row = tl.minimum(tl.maximum(row, 0), num_pages - 1).to(tl.int64)
                at = token if CU_NEW is not None else index
                if what == 0:
                    angle = number_of(USED if POSITIONS is None else POSITIONS, used, batch) + index
                    copy_heads(
                        K + (batch.to(tl.int64) * stride_kb + at.to(tl.int64) * stride_kt) * UNIT,
                        K_CACHE + (row * stride_kcb + slot.to(tl.int64) * stride_kct) * UNIT, num_kv_heads, stride_kh,
                        stride_kch, COS, SIN, stride_angle, angle, num_angles, TURNED, INTERLEAVED, R, D, UNIT, UNIT,
                        BLOCK_H, BLOCK_D,
                    )  # fmt: skip
                else:
                    copy_heads(
                        V + (batch.to(tl.int64) * stride_vb + at.to(tl.int64) * stride_vt) * UNIT,
                        V_CACHE + (row * stride_vcb + slot.to(tl.int64) * stride_vct) * UNIT, num_kv_heads, stride_vh,
                        stride_vch, COS, SIN, stride_angle, 0, 0, False, INTERLEAVED, R, DV, UNIT, UNIT, BLOCK_H, BLOCK_D,
                    )  # fmt: skip
