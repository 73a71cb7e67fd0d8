"""Backward in three kernels, each of which owns what it writes: no atomics, the same bits every time.

    delta_i = o_i . do_i - dlse_i                  p_ij  = exp(s_ij - lse_i)
    dv_j    = sum_i p_ij r_ij do_i                 ds_ij = p_ij (r_ij do_i . v_j - delta_i) cap'(s_ij)
    dq_i    = scale * sum_j ds_ij k_j              dk_j  = scale * sum_i ds_ij q_i
    dsink_i = -exp(z_i - lse_i) delta_i

with r the dropout: 0, or 1 / (1 - p); s is with its linear bias, cap' of the score before it.

``dq`` walks the forward plan; ``dk``/``dv`` walk the plan of the transposed mask, where a tile owns keys and the columns
are queries, and sum over the query heads of a group inside the program.
Strides of the (B, T, H, D) tensors are in units of 8 elements.
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
    LOG2E,
    RUNTIME_SIZES,
    head_of,
    load_band,
    load_block,
    load_rows,
    program_of,
    rows_at,
    run_of,
    tanh,
    visible,
)


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, "tiles_per_unit"])
def delta_kernel(
    OUT, stride_ob: tl.int64, stride_ot: tl.int32, stride_oh: tl.int64,
    DOUT, stride_gb: tl.int64, stride_gt: tl.int32, stride_gh: tl.int64,
    SINK, stride_sb: tl.int64, stride_st: tl.int64, stride_sh: tl.int64,
    DLSE, stride_lb: tl.int64, stride_lt: tl.int64, stride_lh: tl.int64,
    LSE, DSINK,  # fp32 (B, T, H), contiguous
    LSE2, DELTA,  # fp32 (B, H / PACK, T, PACK), contiguous: what the gradient kernels read, lse in units of log2
    ROW_KEYS, num_keys: tl.int64,  # of the dropout
    tiles_per_unit, num_rows, num_heads,
    HAS_SINK: tl.constexpr, HAS_DLSE: tl.constexpr, DROPOUT: tl.constexpr, TILE: tl.constexpr, PACK: tl.constexpr,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """TILE > 0 stores -lse (-inf for a row that sees nothing: its weights become 0) and -delta in LSE2, in tiles of TILE
    rows, ``tiles_per_unit`` for each unit of PACK heads: TILE values of the one, then TILE of the other, and with dropout
    of the bits of both keys."""
    # Heads of the same rows run together: their memory is contiguous.
    head, batch = tl.program_id(0) % num_heads, tl.program_id(1)
    first_row = tl.program_id(0) // num_heads * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    live = rows < num_rows
    dims = tl.arange(0, BLOCK_DV)
    out_head = head_of(OUT, batch, head, stride_ob, stride_oh)
    dout_head = head_of(DOUT, batch, head, stride_gb, stride_gh)
    num_live = num_rows - first_row
    out = load_rows(out_head, first_row, num_live, stride_ot, dims, True, BLOCK_M, DV).to(tl.float32)
    dout = load_rows(dout_head, first_row, num_live, stride_gt, dims, True, BLOCK_M, DV).to(tl.float32)
    # A row that sees nothing has out = 0 whatever its dout holds.
    delta = tl.sum(tl.where(out == 0.0, 0.0, out * dout), 1)
    if HAS_DLSE:
        at_dlse = DLSE + batch.to(tl.int64) * stride_lb + rows.to(tl.int64) * stride_lt + head * stride_lh
        delta -= tl.load(at_dlse, mask=live, other=0.0)
    at = (batch.to(tl.int64) * num_rows + rows) * num_heads + head
    lse = tl.load(LSE + at, mask=live, other=float("-inf"))
    blind = lse == float("-inf")
    delta = tl.where(blind, 0.0, delta)
    unit = batch.to(tl.int64) * (num_heads // PACK) + head // PACK
    if TILE > 0:
        row_in_unit = rows * PACK + head % PACK
        tile = unit * tiles_per_unit + row_in_unit // TILE
        STATISTICS: tl.constexpr = 4 if DROPOUT else 2
        at_tile = tile * (STATISTICS * TILE) + row_in_unit % TILE
        tl.store(LSE2 + at_tile, tl.where(blind, lse, -lse * LOG2E), mask=live)
        tl.store(LSE2 + at_tile + TILE, -delta, mask=live)
        if DROPOUT:
            at_keys = (batch.to(tl.int64) * num_heads + head) * num_rows + rows
            first, second = load_keys(ROW_KEYS, num_keys, at_keys, live, DROPOUT)
            tl.store(LSE2 + at_tile + 2 * TILE, first.to(tl.float32, bitcast=True), mask=live)
            tl.store(LSE2 + at_tile + 3 * TILE, second.to(tl.float32, bitcast=True), mask=live)
    else:
        at_stats = (unit * num_rows + rows) * PACK + head % PACK
        tl.store(DELTA + at_stats, delta, mask=live)
        tl.store(LSE2 + at_stats, lse * LOG2E, mask=live)
    if HAS_SINK:
        at_sink = SINK + batch.to(tl.int64) * stride_sb + rows.to(tl.int64) * stride_st + head * stride_sh
        sink = tl.load(at_sink, mask=live, other=float("-inf"))
        weight = tl.exp2((sink - tl.where(blind, 0.0, lse)) * LOG2E)
        tl.store(DSINK + at, -weight * delta, mask=live)


@triton.jit
def _score_gradient(
    s, dp, lse2, delta, scale, softcap, seen, rows, cols, slope, diagonal,
    key_a, key_b, column_keys, kept_below, kept_scale,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """(weights that dv sees, ds) from raw scores q.k and dp = do.v.

    ``lse2`` (log2 units), ``delta``, ``rows`` (queries), ``cols`` (keys) and the dropout's keys are already broadcast.
    """
    if SOFTCAP:
        capped = tanh(s * (scale / softcap))
        s = capped * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    p = tl.exp2(biased(s, rows, cols, slope, diagonal, ALIBI) - lse2)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    weights = p
    if DROPOUT:
        keep = kept(key_a, key_b, column_keys, kept_below)
        weights = tl.where(keep, p * kept_scale, 0.0)
        dp = tl.where(keep, dp * kept_scale, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    return weights, ds


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse2, delta, K_DESC, K, stride_kt, V_DESC, V, stride_vt, batch, kv_head, rows,
    first, last, lo, hi, begin, end, gap_begin, gap, scale, softcap,
    key_a, key_b, COL_KEYS, kept_below, kept_scale, slope, diagonal,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
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
        k = load_block(
            K_DESC, batch, kv_head, K, start, last - start, stride_kt, dims, MASKED, BLOCK_N, D, TMA
        )
        v = load_block(
            V_DESC, batch, kv_head, V, start, last - start, stride_vt, dims_v, MASKED, BLOCK_N, DV, TMA
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        seen = visible(rows, cols, last, lo, hi)
        column_keys = load_column_keys(COL_KEYS, cols, last, DROPOUT)
        _, ds = _score_gradient(
            s, dp, lse2[:, None], delta[:, None], scale, softcap, seen, rows[:, None], cols[None, :],
            slope, diagonal, key_a[:, None], key_b[:, None], column_keys[None, :], kept_below, kept_scale,
            MASKED, SOFTCAP, DROPOUT, ALIBI,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def dq_kernel(
    Q, stride_qb: tl.int64, stride_qt: tl.int32, stride_qh: tl.int64,
    K, stride_kb: tl.int64, stride_kt: tl.int32, stride_kh: tl.int64,
    V, stride_vb: tl.int64, stride_vt: tl.int32, stride_vh: tl.int64,
    DOUT, stride_gb: tl.int64, stride_gt: tl.int32, stride_gh: tl.int64,
    Q_DESC, DOUT_DESC, K_DESC, V_DESC,  # tensor descriptors when TMA
    DQ, stride_db: tl.int64, stride_dt: tl.int32, stride_dh: tl.int64,
    LSE2, DELTA,  # fp32 (B, H, T), contiguous
    TILES, BAND_LIST, BANDS, num_tiles, num_heads, heads_per_batch, wave, group, num_rows,
    scale: tl.float32, softcap: tl.float32,
    ROW_KEYS, num_keys: tl.int64, COL_KEYS, kept_below, kept_scale: tl.float32,
    SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, ROWS_TMA: tl.constexpr,
):  # fmt: skip
    entry, batch_head = program_of(TILES, num_tiles, num_heads, wave)
    row_begin, row_end = tl.load(entry), tl.load(entry + 1)
    if row_begin >= row_end:
        return
    batch, head = batch_head // heads_per_batch, batch_head % heads_per_batch
    Q = head_of(Q, batch, head, stride_qb, stride_qh)
    kv_head = head // group
    K = head_of(K, batch, kv_head, stride_kb, stride_kh)
    V = head_of(V, batch, kv_head, stride_vb, stride_vh)
    DOUT = head_of(DOUT, batch, head, stride_gb, stride_gh)

    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = row_begin + tl.arange(0, BLOCK_M)
    live = rows < row_end
    # The copy engine's blocks become register operands. Rows of other tiles may come along: they stay in their rows
    # of dq, which are not stored.
    num_live = row_end - row_begin
    q = load_block(
        Q_DESC, batch, head, Q, row_begin, num_live, stride_qt, dims, not ROWS_TMA, BLOCK_M, D, ROWS_TMA
    )
    dout = load_block(
        DOUT_DESC,
        batch,
        head,
        DOUT,
        row_begin,
        num_live,
        stride_gt,
        dims_v,
        not ROWS_TMA,
        BLOCK_M,
        DV,
        ROWS_TMA,
    )
    at = batch_head.to(tl.int64) * num_rows + rows
    lse2 = tl.load(LSE2 + at, mask=live, other=float("inf"))
    delta = tl.load(DELTA + at, mask=live, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_a, key_b = load_keys(ROW_KEYS, num_keys, at, live, DROPOUT)

    list_begin, list_count = tl.load(entry + 2), tl.load(entry + 3)
    for item in range(list_begin, list_begin + list_count):
        band = tl.load(BAND_LIST + item)
        q0, q1, k0, k1, lo, hi = load_band(BANDS, band)
        slope, diagonal = slope_of(
            SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS, batch, band, head, ALIBI
        )
        first, last, num_blocks, full_begin, full_end = run_of(
            row_begin, row_end, q0, q1, k0, k1, lo, hi, BLOCK_N
        )
        num_full = full_end - full_begin
        dq = _accumulate_dq(
            dq, q, dout, lse2, delta, K_DESC, K, stride_kt, V_DESC, V, stride_vt, batch, kv_head, rows,
            first, last, lo, hi, full_begin, full_end, 0, 0, scale, softcap,
            key_a, key_b, COL_KEYS, kept_below, kept_scale, slope, diagonal,
            False, SOFTCAP, DROPOUT, ALIBI, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
        )  # fmt: skip
        dq = _accumulate_dq(
            dq, q, dout, lse2, delta, K_DESC, K, stride_kt, V_DESC, V, stride_vt, batch, kv_head, rows,
            first, last, lo, hi, 0, num_blocks - num_full, full_begin, num_full, scale, softcap,
            key_a, key_b, COL_KEYS, kept_below, kept_scale, slope, diagonal,
            True, SOFTCAP, DROPOUT, ALIBI, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, TMA,
        )  # fmt: skip
    out = rows_at(head_of(DQ, batch, head, stride_db, stride_dh), row_begin, stride_dt, BLOCK_M, dims)
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=live[:, None] & (dims < D)[None, :])


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, Q_DESC, Q, stride_qt, stride_qh, DOUT_DESC, DOUT, stride_gt, stride_gh, LSE2, DELTA, num_rows,
    batch, first_head, group, keys, first, last, lo, hi, begin, num_blocks, gap_begin, gap, scale, softcap,
    ROW_KEYS, num_keys, column_keys, kept_below, kept_scale, SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS, band,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A run of the transposed mask for all heads of a group: columns are queries, scores are (keys, queries).

    One loop over heads and blocks keeps loads in flight from one head to the next.
    """
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    for step in range(group * num_blocks):
        member = step // num_blocks
        block = begin + step - member * num_blocks
        if MASKED:
            block = block + tl.where(block >= gap_begin, gap, 0)
        head = first_head + member
        start = first + block * BLOCK_M
        cols = start + tl.arange(0, BLOCK_M)
        q_head = Q + head.to(tl.int64) * stride_qh * 8
        q = load_block(
            Q_DESC, batch, head, q_head, start, last - start, stride_qt, dims, MASKED, BLOCK_M, D, TMA
        )
        at = head.to(tl.int64) * num_rows + cols
        if MASKED:
            lse2 = tl.load(LSE2 + at, mask=cols < last, other=float("inf"))
            delta = tl.load(DELTA + at, mask=cols < last, other=0.0)
        else:
            lse2 = tl.load(LSE2 + at)
            delta = tl.load(DELTA + at)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dout_head = DOUT + head.to(tl.int64) * stride_gh * 8
        dout = load_block(
            DOUT_DESC,
            batch,
            head,
            dout_head,
            start,
            last - start,
            stride_gt,
            dims_v,
            MASKED,
            BLOCK_M,
            DV,
            TMA,
        )
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        seen = visible(keys, cols, last, lo, hi)
        key_a, key_b = load_keys(ROW_KEYS, num_keys, at, cols < last, DROPOUT)
        slope, diagonal = slope_of(
            SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS, batch, band, head, ALIBI
        )
        p, ds = _score_gradient(
            s, dp, lse2[None, :], delta[None, :], scale, softcap, seen, cols[None, :], keys[:, None],
            slope, diagonal, key_a[None, :], key_b[None, :], column_keys[:, None], kept_below, kept_scale,
            MASKED, SOFTCAP, DROPOUT, ALIBI,
        )  # fmt: skip
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def dkdv_kernel(
    Q, stride_qb: tl.int64, stride_qt: tl.int32, stride_qh: tl.int64,
    K, stride_kb: tl.int64, stride_kt: tl.int32, stride_kh: tl.int64,
    V, stride_vb: tl.int64, stride_vt: tl.int32, stride_vh: tl.int64,
    DOUT, stride_gb: tl.int64, stride_gt: tl.int32, stride_gh: tl.int64,
    Q_DESC, DOUT_DESC,  # tensor descriptors when TMA
    DK, stride_dkb: tl.int64, stride_dkt: tl.int32, stride_dkh: tl.int64,
    DV_OUT, stride_dvb: tl.int64, stride_dvt: tl.int32, stride_dvh: tl.int64,
    LSE2, DELTA,  # fp32 (B, H, T), contiguous
    TILES, BAND_LIST, BANDS, num_tiles, num_heads, heads_per_batch, wave, group, num_rows,
    scale: tl.float32, softcap: tl.float32,
    ROW_KEYS, num_keys: tl.int64, COL_KEYS, kept_below, kept_scale: tl.float32,
    SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``num_heads`` counts batch * K/V heads, ``heads_per_batch`` K/V heads."""
    entry, batch_head = program_of(TILES, num_tiles, num_heads, wave)
    key_begin, key_end = tl.load(entry), tl.load(entry + 1)
    if key_begin >= key_end:
        return
    batch, kv_head = batch_head // heads_per_batch, batch_head % heads_per_batch
    K = head_of(K, batch, kv_head, stride_kb, stride_kh)
    V = head_of(V, batch, kv_head, stride_vb, stride_vh)

    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = key_begin + tl.arange(0, BLOCK_N)
    live = keys < key_end
    list_begin, list_count = tl.load(entry + 2), tl.load(entry + 3)
    # Keys that nobody sees have an empty list: never load them.
    num_live = tl.where(list_count > 0, key_end - key_begin, 0)
    k = load_rows(K, key_begin, num_live, stride_kt, dims, True, BLOCK_N, D)
    v = load_rows(V, key_begin, num_live, stride_vt, dims_v, True, BLOCK_N, DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    Q += batch.to(tl.int64) * stride_qb * 8
    DOUT += batch.to(tl.int64) * stride_gb * 8
    heads_before = batch * heads_per_batch * group
    column_keys = load_column_keys(COL_KEYS, keys, key_end, DROPOUT)
    if DROPOUT:
        ROW_KEYS += heads_before.to(tl.int64) * num_rows
    LSE2 += heads_before.to(tl.int64) * num_rows
    DELTA += heads_before.to(tl.int64) * num_rows
    for item in range(list_begin, list_begin + list_count):
        band = tl.load(BAND_LIST + item)
        q0, q1, k0, k1, lo, hi = load_band(BANDS, band)
        first, last, num_blocks, full_begin, full_end = run_of(
            key_begin, key_end, q0, q1, k0, k1, lo, hi, BLOCK_M
        )
        num_full = full_end - full_begin
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, Q_DESC, Q, stride_qt, stride_qh, DOUT_DESC, DOUT, stride_gt, stride_gh, LSE2, DELTA, num_rows,
            batch, kv_head * group, group, keys, first, last, lo, hi, full_begin, num_full, 0, 0, scale, softcap,
            ROW_KEYS, num_keys, column_keys, kept_below, kept_scale, SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
            band, False, SOFTCAP, DROPOUT, ALIBI, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, PRECISION, TMA,
        )  # fmt: skip
        dk, dv = _accumulate_dkdv(
            dk, dv, k, v, Q_DESC, Q, stride_qt, stride_qh, DOUT_DESC, DOUT, stride_gt, stride_gh, LSE2, DELTA, num_rows,
            batch, kv_head * group, group, keys, first, last, lo, hi, 0, num_blocks - num_full, full_begin, num_full,
            scale, softcap,
            ROW_KEYS, num_keys, column_keys, kept_below, kept_scale, SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
            band, True, SOFTCAP, DROPOUT, ALIBI, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, PRECISION, TMA,
        )  # fmt: skip
    out = rows_at(head_of(DK, batch, kv_head, stride_dkb, stride_dkh), key_begin, stride_dkt, BLOCK_N, dims)
    tl.store(out, (dk * scale).to(DK.dtype.element_ty), mask=live[:, None] & (dims < D)[None, :])
    out = rows_at(
        head_of(DV_OUT, batch, kv_head, stride_dvb, stride_dvh), key_begin, stride_dvt, BLOCK_N, dims_v
    )
    tl.store(out, dv.to(DV_OUT.dtype.element_ty), mask=live[:, None] & (dims_v < DV)[None, :])


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, "tiles_per_unit"])
def gather_dq_kernel(
    DQ_SUM,  # fp32 (units, tiles_per_unit, PARTS, 4096): (64, 64) parts of dQ blocks in the order of registers
    DQ_STATE,  # int32 (units, tiles_per_unit): 0 where DQ_SUM was not written and may hold anything
    DQ, stride_db: tl.int64, stride_dt: tl.int32, stride_dh: tl.int64,
    num_rows, num_heads, tiles_per_unit, scale: tl.float32,
    PACK: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dq of one part of a block: 64 columns of its 64 rows, or, with BLOCK_Q = 128, 64 of its 128 rows."""
    tile, part = tl.program_id(0), tl.program_id(1)
    unit = tile // tiles_per_unit
    batch, first_head = unit // (num_heads // PACK), unit % (num_heads // PACK) * PACK
    at_sum = DQ_SUM + (tile.to(tl.int64) * PARTS + part) * 4096 + tl.arange(0, 4096)
    values = tl.load(at_sum, mask=tl.load(DQ_STATE + tile) != 0, other=0.0) * scale
    # (j, warp, r, c, h, p) -> row = 16 warp + 8 h + r, column = 8 j + 2 c + p
    values = tl.reshape(tl.permute(tl.reshape(values, [8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5]), [64, 64])
    row, column = tile % tiles_per_unit * BLOCK_Q + tl.arange(0, 64), tl.arange(0, 64)
    if BLOCK_Q == 64:
        column += part * 64
    else:
        row += part * 64
    token, head = row // PACK, first_head + row % PACK
    at = batch.to(tl.int64) * stride_db + token.to(tl.int64) * stride_dt + head.to(tl.int64) * stride_dh
    inside = (token < num_rows)[:, None] & (column < D)[None, :]
    tl.store(DQ + at[:, None] * 8 + column[None, :], values.to(DQ.dtype.element_ty), mask=inside)
