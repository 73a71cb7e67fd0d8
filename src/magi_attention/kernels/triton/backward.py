"""Backward in three kernels, each of which owns what it writes: no atomics, the same bits every time.

    delta_i = o_i . do_i - dlse_i                  p_ij  = exp(s_ij - lse_i)
    dv_j    = sum_i p_ij do_i                      ds_ij = p_ij (do_i . v_j - delta_i) cap'(s_ij)
    dq_i    = scale * sum_j ds_ij k_j              dk_j  = scale * sum_i ds_ij q_i
    dsink_i = -exp(z_i - lse_i) delta_i

``dq`` walks the forward plan; ``dk``/``dv`` walk the plan of the transposed mask, where a tile owns keys and the columns
are queries, and sum over the query heads of a group inside the program.
Strides of the (B, T, H, D) tensors are in units of 8 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from magi_attention.kernels.triton.primitives import (
    LOG2E,
    head_of,
    load_band,
    load_rows,
    program_of,
    rows_at,
    run_of,
    tanh,
    visible,
)


@triton.jit(
    do_not_specialize=[
        "num_rows", "num_heads",
        "stride_ob", "stride_ot", "stride_oh", "stride_gb", "stride_gt", "stride_gh", "stride_sb", "stride_st", "stride_sh",
        "stride_lb", "stride_lt", "stride_lh",
    ]
)  # fmt: skip
def delta_kernel(
    OUT, stride_ob: tl.int64, stride_ot: tl.int64, stride_oh: tl.int64,
    DOUT, stride_gb: tl.int64, stride_gt: tl.int64, stride_gh: tl.int64,
    SINK, stride_sb: tl.int64, stride_st: tl.int64, stride_sh: tl.int64,
    DLSE, stride_lb: tl.int64, stride_lt: tl.int64, stride_lh: tl.int64,
    LSE, DELTA, DSINK,  # fp32 (B, T, H), contiguous
    num_rows, num_heads,
    HAS_SINK: tl.constexpr, HAS_DLSE: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, batch = tl.program_id(1), tl.program_id(2)
    live = rows < num_rows
    dims = tl.arange(0, BLOCK_DV)
    out_head = head_of(OUT, batch, head, stride_ob, stride_oh)
    dout_head = head_of(DOUT, batch, head, stride_gb, stride_gh)
    out = load_rows(out_head, rows, stride_ot, dims, live, True, DV, BLOCK_DV).to(tl.float32)
    dout = load_rows(dout_head, rows, stride_gt, dims, live, True, DV, BLOCK_DV).to(tl.float32)
    # A row that sees nothing has out = 0 whatever its dout holds.
    delta = tl.sum(tl.where(out == 0.0, 0.0, out * dout), 1)
    if HAS_DLSE:
        at_dlse = DLSE + batch.to(tl.int64) * stride_lb + rows.to(tl.int64) * stride_lt + head * stride_lh
        delta -= tl.load(at_dlse, mask=live, other=0.0)
    at = (batch.to(tl.int64) * num_rows + rows) * num_heads + head
    lse = tl.load(LSE + at, mask=live, other=float("-inf"))
    blind = lse == float("-inf")
    delta = tl.where(blind, 0.0, delta)
    tl.store(DELTA + at, delta, mask=live)
    if HAS_SINK:
        at_sink = SINK + batch.to(tl.int64) * stride_sb + rows.to(tl.int64) * stride_st + head * stride_sh
        sink = tl.load(at_sink, mask=live, other=float("-inf"))
        weight = tl.exp2((sink - tl.where(blind, 0.0, lse)) * LOG2E)
        tl.store(DSINK + at, -weight * delta, mask=live)


@triton.jit
def _score_gradient(s, dp, lse2, delta, scale, softcap, seen, MASKED: tl.constexpr, SOFTCAP: tl.constexpr):
    """(p, ds) from raw scores q.k and dp = do.v; ``lse2`` (log2 units) and ``delta`` already broadcast."""
    if SOFTCAP:
        capped = tanh(s * (scale / softcap))
        p = tl.exp2(capped * (softcap * LOG2E) - lse2)
    else:
        p = tl.exp2(s * (scale * LOG2E) - lse2)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    return p, ds


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse2, delta, K, stride_kt, V, stride_vt, rows, first, last, lo, hi, begin, end, gap_begin, gap,
    scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    for step in range(begin, end):
        block = step
        if MASKED:
            block = step + tl.where(step >= gap_begin, gap, 0)
        cols = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(K, cols, stride_kt, dims, cols < last, MASKED, D, BLOCK_D)
        v = load_rows(V, cols, stride_vt, dims_v, cols < last, MASKED, DV, BLOCK_DV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        seen = visible(rows, cols, last, lo, hi)
        p, ds = _score_gradient(s, dp, lse2[:, None], delta[:, None], scale, softcap, seen, MASKED, SOFTCAP)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "heads_per_batch", "wave", "group", "num_rows",
        "stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_kt", "stride_kh", "stride_vb", "stride_vt", "stride_vh",
        "stride_gb", "stride_gt", "stride_gh", "stride_db", "stride_dt", "stride_dh",
    ]
)  # fmt: skip
def dq_kernel(
    Q, stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,
    K, stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    V, stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    DOUT, stride_gb: tl.int64, stride_gt: tl.int64, stride_gh: tl.int64,
    DQ, stride_db: tl.int64, stride_dt: tl.int64, stride_dh: tl.int64,
    LSE, DELTA,  # fp32 (B, T, H), contiguous
    TILES, BAND_LIST, BANDS, num_tiles, num_heads, heads_per_batch, wave, group, num_rows,
    scale: tl.float32, softcap: tl.float32,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry, batch_head = program_of(TILES, num_tiles, num_heads, wave)
    row_begin, row_end = tl.load(entry), tl.load(entry + 1)
    if row_begin >= row_end:
        return
    batch, head = batch_head // heads_per_batch, batch_head % heads_per_batch
    Q = head_of(Q, batch, head, stride_qb, stride_qh)
    K = head_of(K, batch, head // group, stride_kb, stride_kh)
    V = head_of(V, batch, head // group, stride_vb, stride_vh)
    DOUT = head_of(DOUT, batch, head, stride_gb, stride_gh)

    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    rows = row_begin + tl.arange(0, BLOCK_M)
    live = rows < row_end
    q = load_rows(Q, rows, stride_qt, dims, live, True, D, BLOCK_D)
    dout = load_rows(DOUT, rows, stride_gt, dims_v, live, True, DV, BLOCK_DV)
    at = (batch.to(tl.int64) * num_rows + rows) * heads_per_batch + head
    lse2 = tl.load(LSE + at, mask=live, other=float("inf")) * LOG2E
    delta = tl.load(DELTA + at, mask=live, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    list_begin, list_count = tl.load(entry + 2), tl.load(entry + 3)
    for item in range(list_begin, list_begin + list_count):
        q0, q1, k0, k1, lo, hi = load_band(BANDS, tl.load(BAND_LIST + item))
        first, last, num_blocks, full_begin, full_end = run_of(row_begin, row_end, q0, q1, k0, k1, lo, hi, BLOCK_N)
        num_full = full_end - full_begin
        dq = _accumulate_dq(
            dq, q, dout, lse2, delta, K, stride_kt, V, stride_vt, rows, first, last, lo, hi, full_begin, full_end, 0, 0,
            scale, softcap, False, SOFTCAP, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        dq = _accumulate_dq(
            dq, q, dout, lse2, delta, K, stride_kt, V, stride_vt, rows, first, last, lo, hi, 0, num_blocks - num_full,
            full_begin, num_full, scale, softcap, True, SOFTCAP, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    out = rows_at(head_of(DQ, batch, head, stride_db, stride_dh), rows, stride_dt, dims)
    tl.store(out, (dq * scale).to(DQ.dtype.element_ty), mask=live[:, None] & (dims < D)[None, :])


@triton.jit
def _accumulate_dkdv(
    dk, dv, k, v, Q, stride_qt, DOUT, stride_gt, LSE, DELTA, stat_base, heads_per_batch,
    rows, first, last, lo, hi, begin, end, gap_begin, gap, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As the forward's walk with queries for columns: scores are (keys, queries)."""
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    for step in range(begin, end):
        block = step
        if MASKED:
            block = step + tl.where(step >= gap_begin, gap, 0)
        cols = first + block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_rows(Q, cols, stride_qt, dims, cols < last, MASKED, D, BLOCK_D)
        at = stat_base + cols.to(tl.int64) * heads_per_batch
        if MASKED:
            lse2 = tl.load(LSE + at, mask=cols < last, other=float("inf")) * LOG2E
            delta = tl.load(DELTA + at, mask=cols < last, other=0.0)
        else:
            lse2 = tl.load(LSE + at) * LOG2E
            delta = tl.load(DELTA + at)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dout = load_rows(DOUT, cols, stride_gt, dims_v, cols < last, MASKED, DV, BLOCK_DV)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        seen = visible(rows, cols, last, lo, hi)
        p, ds = _score_gradient(s, dp, lse2[None, :], delta[None, :], scale, softcap, seen, MASKED, SOFTCAP)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "heads_per_batch", "wave", "group", "num_rows",
        "stride_qb", "stride_qt", "stride_qh", "stride_kb", "stride_kt", "stride_kh", "stride_vb", "stride_vt", "stride_vh",
        "stride_gb", "stride_gt", "stride_gh", "stride_dkb", "stride_dkt", "stride_dkh",
        "stride_dvb", "stride_dvt", "stride_dvh",
    ]
)  # fmt: skip
def dkdv_kernel(
    Q, stride_qb: tl.int64, stride_qt: tl.int64, stride_qh: tl.int64,
    K, stride_kb: tl.int64, stride_kt: tl.int64, stride_kh: tl.int64,
    V, stride_vb: tl.int64, stride_vt: tl.int64, stride_vh: tl.int64,
    DOUT, stride_gb: tl.int64, stride_gt: tl.int64, stride_gh: tl.int64,
    DK, stride_dkb: tl.int64, stride_dkt: tl.int64, stride_dkh: tl.int64,
    DV_OUT, stride_dvb: tl.int64, stride_dvt: tl.int64, stride_dvh: tl.int64,
    LSE, DELTA,  # fp32 (B, T, H), contiguous
    TILES, BAND_LIST, BANDS, num_tiles, num_heads, heads_per_batch, wave, group, num_rows,
    scale: tl.float32, softcap: tl.float32,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``num_heads`` counts batch * K/V heads, ``heads_per_batch`` K/V heads; ``num_rows`` is the number of queries."""
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
    live_and_seen = live & (list_count > 0)
    k = load_rows(K, keys, stride_kt, dims, live_and_seen, True, D, BLOCK_D)
    v = load_rows(V, keys, stride_vt, dims_v, live_and_seen, True, DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    for member in range(0, group):
        head = kv_head * group + member
        q_head = head_of(Q, batch, head, stride_qb, stride_qh)
        dout_head = head_of(DOUT, batch, head, stride_gb, stride_gh)
        num_q_heads = heads_per_batch * group
        stat_base = batch.to(tl.int64) * num_rows * num_q_heads + head
        for item in range(list_begin, list_begin + list_count):
            q0, q1, k0, k1, lo, hi = load_band(BANDS, tl.load(BAND_LIST + item))
            first, last, num_blocks, full_begin, full_end = run_of(
                key_begin, key_end, q0, q1, k0, k1, lo, hi, BLOCK_M
            )
            num_full = full_end - full_begin
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, q_head, stride_qt, dout_head, stride_gt, LSE, DELTA, stat_base, num_q_heads,
                keys, first, last, lo, hi, full_begin, full_end, 0, 0, scale, softcap,
                False, SOFTCAP, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
            dk, dv = _accumulate_dkdv(
                dk, dv, k, v, q_head, stride_qt, dout_head, stride_gt, LSE, DELTA, stat_base, num_q_heads,
                keys, first, last, lo, hi, 0, num_blocks - num_full, full_begin, num_full, scale, softcap,
                True, SOFTCAP, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
    out = rows_at(head_of(DK, batch, kv_head, stride_dkb, stride_dkh), keys, stride_dkt, dims)
    tl.store(out, (dk * scale).to(DK.dtype.element_ty), mask=live[:, None] & (dims < D)[None, :])
    out = rows_at(head_of(DV_OUT, batch, kv_head, stride_dvb, stride_dvh), keys, stride_dvt, dims_v)
    tl.store(out, dv.to(DV_OUT.dtype.element_ty), mask=live[:, None] & (dims_v < DV)[None, :])
