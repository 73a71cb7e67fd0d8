"""Forward: one program owns one tile of query rows of one head and walks the runs of its bands (online softmax).

Scores live in units of log2: s = scale * log2(e) * q.k, so that exp becomes exp2. Columns of partial blocks outside
the run are never loaded: what nobody sees may hold NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magi_attention.kernels.triton.modifiers import (
    biased,
    kept,
    load_column_keys,
    load_keys,
    slope_of,
)
from magi_attention.kernels.triton.primitives import (
    LN2,
    LOG2E,
    RUNTIME_SIZES,
    head_of,
    load_band,
    load_rows,
    program_of,
    rows_at,
    run_of,
    tanh,
    visible,
)


@triton.jit
def _attend(
    acc, total, top, q, K, stride_kt, V, stride_vt, rows, first, last, lo, hi, begin, end, gap_begin, gap,
    scale, softcap, key_a, key_b, COL_KEYS, kept_below, slope, diagonal,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Blocks [begin, end) of a run, skipping ``gap`` blocks at ``gap_begin`` (those that need no mask)."""
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    for step in range(begin, end):
        block = step
        if MASKED:
            block = step + tl.where(step >= gap_begin, gap, 0)
        start = first + block * BLOCK_N
        cols = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, start, last - start, stride_kt, dims, MASKED, BLOCK_N, D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = softcap * LOG2E * tanh(s * (scale / softcap))
        elif MASKED or ALIBI:
            s = s * (scale * LOG2E)
        s = biased(s, rows[:, None], cols[None, :], slope, diagonal, ALIBI)
        if MASKED:
            s = tl.where(visible(rows, cols, last, lo, hi), s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - pivot[:, None])
            fade = tl.exp2(top - pivot)
        else:
            if SOFTCAP or ALIBI:
                new_top = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - new_top[:, None])
            else:
                new_top = tl.maximum(top, tl.max(s, 1) * (scale * LOG2E))
                p = tl.exp2(s * (scale * LOG2E) - new_top[:, None])
            fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, 1)
        if DROPOUT:
            column_keys = load_column_keys(COL_KEYS, cols, last, DROPOUT)
            p = tl.where(kept(key_a[:, None], key_b[:, None], column_keys[None, :], kept_below), p, 0.0)
        acc = acc * fade[:, None]
        v = load_rows(V, start, last - start, stride_vt, dims_v, MASKED, BLOCK_N, DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def forward_kernel(
    Q, stride_qb: tl.int64, stride_qt: tl.int32, stride_qh: tl.int64,
    K, stride_kb: tl.int64, stride_kt: tl.int32, stride_kh: tl.int64,
    V, stride_vb: tl.int64, stride_vt: tl.int32, stride_vh: tl.int64,
    OUT, stride_ob: tl.int64, stride_ot: tl.int32, stride_oh: tl.int64,  # fp32 with ACCUMULATE
    SINK, stride_sb: tl.int64, stride_st: tl.int64, stride_sh: tl.int64,  # one sink logit a row and head
    LSE,  # fp32 (B, T, H), contiguous; with ACCUMULATE it and OUT hold an earlier result, over other columns
    MAX_LOGITS,  # fp32 (H,), starts at -inf
    TILES, BAND_LIST, BANDS, num_tiles, num_heads, heads_per_batch, wave, group, num_rows,
    scale: tl.float32, softcap: tl.float32,
    ROW_KEYS, num_keys: tl.int64, COL_KEYS, kept_below, kept_scale: tl.float32,
    SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
    HAS_SINK: tl.constexpr, HAS_MAX: tl.constexpr, ACCUMULATE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``num_heads`` counts batch * heads; ``group`` query heads share one K/V head; ``scale`` is not negative.
    Dropout divides by ``1 - p``, which is multiplying by ``kept_scale``.

    Strides of Q, K, V and OUT are in units of 8 elements.
    """
    entry, batch_head = program_of(TILES, num_tiles, num_heads, wave)
    row_begin, row_end = tl.load(entry), tl.load(entry + 1)
    if row_begin >= row_end:
        return
    batch, head = batch_head // heads_per_batch, batch_head % heads_per_batch
    Q = head_of(Q, batch, head, stride_qb, stride_qh)
    kv_head = head // group
    K = head_of(K, batch, kv_head, stride_kb, stride_kh)
    V = head_of(V, batch, kv_head, stride_vb, stride_vh)

    rows = row_begin + tl.arange(0, BLOCK_M)
    live = rows < row_end
    q = load_rows(Q, row_begin, row_end - row_begin, stride_qt, tl.arange(0, BLOCK_D), True, BLOCK_M, D)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    at_keys = batch_head.to(tl.int64) * num_rows + rows
    key_a, key_b = load_keys(ROW_KEYS, num_keys, at_keys, live, DROPOUT)

    list_begin, list_count = tl.load(entry + 2), tl.load(entry + 3)
    for at in range(list_begin, list_begin + list_count):
        band = tl.load(BAND_LIST + at)
        q0, q1, k0, k1, lo, hi = load_band(BANDS, band)
        slope, diagonal = slope_of(
            SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS, batch, band, head, ALIBI
        )
        first, last, num_blocks, full_begin, full_end = run_of(
            row_begin, row_end, q0, q1, k0, k1, lo, hi, BLOCK_N
        )
        num_full = full_end - full_begin
        acc, total, top = _attend(
            acc, total, top, q, K, stride_kt, V, stride_vt, rows, first, last, lo, hi, full_begin, full_end, 0, 0,
            scale, softcap, key_a, key_b, COL_KEYS, kept_below, slope, diagonal, False, SOFTCAP, DROPOUT, ALIBI, D, DV,
            BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        acc, total, top = _attend(
            acc, total, top, q, K, stride_kt, V, stride_vt, rows, first, last, lo, hi, 0, num_blocks - num_full,
            full_begin, num_full, scale, softcap, key_a, key_b, COL_KEYS, kept_below, slope, diagonal, True, SOFTCAP,
            DROPOUT, ALIBI, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip

    if HAS_MAX:
        tl.atomic_max(MAX_LOGITS + head, tl.max(tl.where(live, top, float("-inf")), 0) * LN2)
    if HAS_SINK:
        at_sink = SINK + batch.to(tl.int64) * stride_sb + rows.to(tl.int64) * stride_st + head * stride_sh
        sink = tl.load(at_sink, mask=live, other=float("-inf")) * LOG2E
        new_top = tl.maximum(top, sink)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - pivot)
        total = total * fade + tl.exp2(sink - pivot)
        acc = acc * fade[:, None]
        top = new_top
    row_head = (batch.to(tl.int64) * num_rows + rows) * heads_per_batch + head
    dims_v = tl.arange(0, BLOCK_DV)
    out = rows_at(head_of(OUT, batch, head, stride_ob, stride_oh), row_begin, stride_ot, BLOCK_M, dims_v)
    if ACCUMULATE:
        earlier = tl.load(LSE + row_head, mask=live, other=float("-inf")) * LOG2E
        new_top = tl.maximum(top, earlier)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - pivot)
        share = tl.exp2(earlier - pivot)
        total = total * fade + share
        # Rows without an earlier result may hold anything.
        held = (share > 0)[:, None] & (dims_v < DV)[None, :]
        acc = acc * fade[:, None] + tl.load(out, mask=held, other=0.0) * share[:, None]
        top = new_top
    if DROPOUT:
        acc = acc * kept_scale
    seen = total > 0
    acc = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    tl.store(LSE + row_head, lse, mask=live)
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=live[:, None] & (dims_v < DV)[None, :])
