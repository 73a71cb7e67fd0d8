"""Backward on Hopper: one program owns 128 keys, walks the queries that see them, and adds to dQ through the copy engine.

    S^T = K Q^T    P^T = exp2(S^T scale - lse)    dP^T = V dO^T - delta    dS^T = P^T dP^T
    dV += P^T dO   dK += dS^T Q                   dQ   += dS K

Two consumer warpgroups own 64 keys each and keep dK and dV in registers. dS goes through shared memory, because each
warpgroup computes one half of dQ from all 128 keys; that product is taken one block late, so the warpgroups may drift
apart by a block and one computes exponentials while the other multiplies. A writer warp reduces dQ into an
fp32 buffer in global memory. A scheduler warp pulls tiles off a work counter and sends their runs to a producer warp,
which feeds K, V and the Q, dO rings; an eraser warp zeroes rows beyond a run. The query heads of a K/V head are walked
inside a tile: dK and dV need no atomics.

Tiles and runs are those of the transposed mask: a tile's rows are keys, a run's columns queries. PACK query heads share a
Q block: its BLOCK_Q rows are BLOCK_Q / PACK tokens x PACK heads. Q blocks begin at multiples of BLOCK_Q / PACK tokens,
wherever a run begins: so every block has a tile of statistics of its own (BLOCK_Q times -lse in units of log2, BLOCK_Q
times -delta) and a tile of fp32 dQ, which lies in memory in the order in which registers hold it.
"""

from __future__ import annotations

from magi_attention.kernels.hopper.backward_operands import (
    BLOCK_WORDS,
    CUT_ABOVE,
    CUT_BELOW,
    CUT_ROWS,
    DQ_SLOTS,
    DQ_STATES,
    DQ_STORED,
    DQ_WORDS,
    ERASE_DO,
    ERASE_K,
    ERASE_SLOTS,
    ERASE_V,
    ERASE_WORDS,
    TILE_WORDS,
    eraser,
    hide,
    in_lines,
    send_operand,
    send_q,
)
from magi_attention.kernels.hopper.compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_add,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from magi_attention.kernels.hopper.modifiers import bias, marked, marked_gradient, row_keys, slope_of
from magi_attention.kernels.hopper.primitives import (
    await_published,
    claim,
    fence_proxy,
    get_uniform,
    get_word,
    get_words,
    named_arrive,
    named_sync,
    opaque_next,
    pinned,
    publish,
    put_word,
    put_words,
    raw_arrive,
    raw_arrive_released,
    raw_base,
    raw_init,
    raw_wait,
    tanh,
)
from magi_attention.kernels.hopper.schedule import (
    NEAR_END,
    await_run,
    init_runs,
    release_run,
    scheduler,
    take_run,
)

BLOCK_K = gl.constexpr(128)

# Raw barriers.
KV_FREE = gl.constexpr(0)
Q_FREE = gl.constexpr(4)
DO_FREE = gl.constexpr(8)
DQ_FULL = gl.constexpr(12)
DQ_FREE = gl.constexpr(14)
DS_FULL = gl.constexpr(16)
DS_FREE = gl.constexpr(18)
TILE_FULL = gl.constexpr(20)
TILE_FREE = gl.constexpr(22)
# Named barriers: both consumers together, and the second one's start.
TOGETHER = gl.constexpr(8)
STAGGER = gl.constexpr(9)


@gluon.jit
def producer(
    Q_DESC, K_DESC, V_DESC, DO_DESC, STATS_DESC, k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs,
    k_full, v_full, q_full, do_full, dirty, raw, DQ_STATE, heads_per_batch, units_per_kv, tiles_per_unit, num_keys,
    SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
    PACK: gl.constexpr, BLOCK_Q: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = BLOCK_Q // PACK
    it = 0
    erased = 0
    tiles = 0
    received = 0
    kv_phase = 1
    run_blocks = await_run(raw, received)
    while run_blocks >= 0:
        first, last, all_from, all_to, lo, hi, total, row_begin, row_end, batch, kv_head, unit, band = (
            take_run(raw, received)
        )
        if run_blocks == 0:
            release_run(raw, received)
        diagonal = 0
        slope = 0
        if ALIBI:
            diagonal = gl.load(DIAGONALS + band)
            slope = slope_of(SLOPES, stride_ab, stride_an, stride_ah, batch, band, unit)
        # Beyond the tensor the copy engine fills with zeros.
        live_keys = gl.where(row_end < num_keys, row_end - row_begin, BLOCK_K)
        if total > 0:
            slot = tiles & 1
            raw_wait(raw + (TILE_FREE + slot) * 8, ((tiles >> 1) & 1) ^ 1)
            put_words(raw + TILE_WORDS + slot * 32, gl.where(run_blocks > 0, total, 0), row_begin, row_end, 0)
            put_words(raw + TILE_WORDS + slot * 32 + 16, batch, kv_head, 0, 0)
            raw_arrive(raw + (TILE_FULL + slot) * 8)
            tiles += 1
            if run_blocks > 0:
                raw_wait(raw + KV_FREE * 8, kv_phase)
                kv_phase ^= 1
                erased = send_operand(K_DESC, k_bufs, k_full, dirty, raw, batch, row_begin, kv_head, 0, 0, live_keys, 0,
                                      erased, ERASE_K, BLOCK_K)  # fmt: skip
        rows_cut = gl.where(row_end - row_begin < BLOCK_K, CUT_ROWS, 0)
        first_q_tile = (batch * heads_per_batch * units_per_kv + unit) * tiles_per_unit
        start = first // TOKENS * TOKENS
        # Tiles that see the same queries begin at different ones: their sums meet less often.
        b = (gl.maximum(row_begin - start, 0) // TOKENS) % gl.maximum(run_blocks, 1)
        for left in range(run_blocks, 0, -1):
            if left == gl.minimum(run_blocks, NEAR_END):
                release_run(raw, received)
            column = start + b * TOKENS
            cuts = gl.where(column + TOKENS > all_to, CUT_ABOVE, 0) + rows_cut
            cuts += gl.where(column < all_from, CUT_BELOW, 0)
            begin = gl.maximum(first - column, 0) * PACK
            end = gl.minimum((last - column) * PACK, BLOCK_Q)
            q_tile = first_q_tile + column // TOKENS
            stage = it % Q_STAGES
            raw_wait(raw + (Q_FREE + stage) * 8, ((it // Q_STAGES) & 1) ^ 1)
            put_words(raw + BLOCK_WORDS + stage * 32, lo - column, hi - column, last - 1 - column, cuts)
            put_words(raw + BLOCK_WORDS + stage * 32 + 16, first - column, column + diagonal, slope, 0)
            erased = send_q(Q_DESC, STATS_DESC, q_bufs, stats_bufs, q_full, dirty, raw, batch, unit * PACK, column, begin,
                            end, q_tile, stage, erased, BLOCK_Q)  # fmt: skip
            if total > 0:
                erased = send_operand(V_DESC, v_bufs, v_full, dirty, raw, batch, row_begin, kv_head, 0, 0, live_keys, 0,
                                      erased, ERASE_V, BLOCK_K)  # fmt: skip
                total = 0
            # Before dO, which every turn of the writer comes after.
            put_word(raw + DQ_WORDS + (it % DQ_SLOTS) * 4, q_tile * DQ_STATES + claim(DQ_STATE + q_tile))
            stage = it % DO_STAGES
            raw_wait(raw + (DO_FREE + stage) * 8, ((it // DO_STAGES) & 1) ^ 1)
            erased = send_operand(DO_DESC, do_bufs, do_full, dirty, raw, batch, column, unit * PACK, 0, begin, end, stage,
                                  erased, ERASE_DO, BLOCK_Q)  # fmt: skip
            it += 1
            b += 1
            b = gl.where(b == run_blocks, 0, b)
        received += 1
        run_blocks = await_run(raw, received)
    slot = tiles & 1
    raw_wait(raw + (TILE_FREE + slot) * 8, ((tiles >> 1) & 1) ^ 1)
    put_words(raw + TILE_WORDS + slot * 32, -1, 0, 0, 0)
    put_word(raw + DQ_WORDS + (it % DQ_SLOTS) * 4, -1)
    raw_arrive(raw + (TILE_FULL + slot) * 8)
    # The eraser's last message: every earlier one has been read once all operands are consumed.
    raw_wait(raw + KV_FREE * 8, kv_phase)
    put_words(raw + ERASE_WORDS + (erased % ERASE_SLOTS) * 16, -1, 0, 0, 0)
    mbarrier.arrive(dirty.index(erased % ERASE_SLOTS), count=1)


@gluon.jit
def dq_writer(DQ_DESC, DQ_STATE, dq_bufs, raw, BLOCK_Q: gl.constexpr, D: gl.constexpr):
    """Store or add the two staged halves of each dQ block.

    The first program to claim a block stores it, and nobody need fill dQ with zeros. A program claims its blocks in
    the order in which it writes them: who waits here waits for an earlier claim, and so never in a circle.
    """
    LINES: gl.constexpr = BLOCK_Q * D // 32
    it = 0
    word = 0
    while word >= 0:
        raw_wait(raw + DQ_FULL * 8, it & 1)
        word = get_word(raw + DQ_WORDS + (it % DQ_SLOTS) * 4)
        if word >= 0:
            q_tile = word // DQ_STATES
            line = q_tile * LINES
            state = word % DQ_STATES
            if state == 0:
                tma_store(DQ_DESC, [line, 0], dq_bufs.index(0))
                raw_wait(raw + (DQ_FULL + 1) * 8, it & 1)
                tma_store(DQ_DESC, [line + 128, 0], dq_bufs.index(1))
            else:
                if (state & DQ_STORED) == 0:
                    await_published(DQ_STATE + q_tile, DQ_STORED)
                tma_add(DQ_DESC, [line, 0], dq_bufs.index(0))
                raw_wait(raw + (DQ_FULL + 1) * 8, it & 1)
                tma_add(DQ_DESC, [line + 128, 0], dq_bufs.index(1))
            tma_store_wait(1)
            raw_arrive_released(raw + DQ_FREE * 8)
            tma_store_wait(0)
            raw_arrive_released(raw + (DQ_FREE + 1) * 8)
            if state == 0:
                publish(DQ_STATE + q_tile, DQ_STORED)
        it += 1


@gluon.jit
def put_dq(dq, dq_bufs, raw, it, W: gl.constexpr):
    """Hand this warpgroup's half of block ``it`` of dQ to the writer, in the order in which registers hold it."""
    raw_wait(raw + (DQ_FREE + W) * 8, (it & 1) ^ 1)
    dq_bufs.index(W).store(in_lines(dq))
    fence_proxy()
    raw_arrive_released(raw + (DQ_FULL + W) * 8)


@gluon.jit
def store_gradient(DESC, GRAD, stride_b, stride_t, stride_h, grad, staging, batch, first_row, row_end, kv_head,
                   DV: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """A warpgroup's 64 rows of dK or dV; strides in units of 8 elements."""
    if first_row + 64 <= row_end:
        staging.reshape((64, D)).store(grad)
        fence_proxy()
        tma_store(DESC, [batch, first_row, kv_head, 0], staging)
    else:
        row = first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        at = row.to(gl.int64) * stride_t + batch.to(gl.int64) * stride_b + kv_head.to(gl.int64) * stride_h
        gl.store(
            GRAD + at[:, None] * 8 + column[None, :],
            grad,
            mask=(row < row_end)[:, None] & (column < DV)[None, :],
        )


@gluon.jit
def dq_product(ds, k_smem, W: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """This warpgroup's half of dQ = dS K, in flight: half the columns, or with D = 64 half the rows."""
    zero = gl.zeros([64, 64], gl.float32, layout)
    if D > 64:
        half = k_smem.slice(W * 64, 64, dim=1)
        return warpgroup_mma(ds.permute((1, 0)), half, zero, use_acc=False, is_async=True)
    else:
        half = ds.slice(W * 64, 64, dim=1)
        return warpgroup_mma(half.permute((1, 0)), k_smem, zero, use_acc=False, is_async=True)


@gluon.jit
def consumer(
    DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
    k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, ds_bufs, dq_bufs, k_full, v_full, q_full, do_full, raw,
    scale, cap_scale, softmax_scale, COL_KEYS, kept_below, kept_scale,
    W: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr,
    Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, SOFTCAP: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    """``scale`` takes a score (capped, if SOFTCAP) to units of log2; ``cap_scale`` a raw score to tanh's argument.

    With dropout dP - delta is, up to a factor 1 / kept_scale that the gradients get at their end, either the product
    begun at -delta / kept_scale, or only that beginning; the weight's sign says which.
    """
    dtype: gl.constexpr = k_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_Q, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    k_smem = k_bufs.index(0).reshape((BLOCK_K, D))
    k_own = k_smem.slice(W * 64, 64, dim=0)
    v_own = v_bufs.index(0).reshape((BLOCK_K, D)).slice(W * 64, 64, dim=0)
    DS_PARTS: gl.constexpr = BLOCK_K * BLOCK_Q // (64 * D)
    staging = reinterpret(ds_bufs, dtype, [2 * DS_PARTS, 1, 64, 1, D], DK_DESC.layout).index(W * DS_PARTS)
    s_zero = gl.zeros([64, BLOCK_Q], gl.float32, s_layout)
    if DROPOUT:
        kept_share = 1.0 / kept_scale
    it = 0
    # Counted instead of it % Q_STAGES: there is no uniform division by three.
    stage = 0
    phase = 0
    kv_phase = 0
    tiles = 0
    raw_wait(raw + TILE_FULL * 8, 0)
    num_blocks = get_uniform(raw + TILE_WORDS)
    while num_blocks >= 0:
        tile_words = raw + TILE_WORDS + (tiles & 1) * 32
        dk = gl.zeros([64, D], gl.float32, o_layout)
        dv = gl.zeros([64, D], gl.float32, o_layout)
        next_cuts = 0
        key = get_word(tile_words + 4) + W * 64 + gl.arange(0, 64, layout=rows)
        if DROPOUT:
            column_keys = gl.load(COL_KEYS + key, mask=key < get_word(tile_words + 8), other=0)
        if num_blocks > 0:
            mbarrier.wait(k_full.index(0), kv_phase)
            mbarrier.wait(q_full.index(stage), phase)
            mbarrier.wait(v_full.index(0), kv_phase)
            kv_phase ^= 1
            next_cuts = get_uniform(raw + BLOCK_WORDS + stage * 32 + 12)
            if W == 1:
                named_sync(STAGGER, 256)  # begins when the other has finished its first exponentials
        for i in range(num_blocks):
            do_stage = it % DO_STAGES
            cuts = next_cuts
            next_stage = gl.where(stage + 1 == Q_STAGES, 0, stage + 1)
            next_phase = phase ^ (next_stage == 0).to(gl.int32)
            q = q_bufs.index(stage).reshape((BLOCK_Q, D))
            do = do_bufs.index(do_stage).reshape((BLOCK_Q, D))
            delta = stats_bufs.index(stage).slice(BLOCK_Q, BLOCK_Q, dim=0).load(columns)
            if DROPOUT:
                delta = delta * kept_share
            dp_start, _wide = gl.broadcast(delta[None, :], s_zero)
            dp_start = pinned(dp_start)
            s = warpgroup_mma(k_own, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(do_stage), (it // DO_STAGES) & 1)
            dp = warpgroup_mma(v_own, do.permute((1, 0)), dp_start, is_async=True)
            lse = stats_bufs.index(stage).slice(0, BLOCK_Q, dim=0).load(columns)
            s = warpgroup_mma_wait(1, deps=(s,))
            if SOFTCAP:
                s = tanh(s * cap_scale)
            if ALIBI:
                _, first_query, slope, _ = get_words(raw + BLOCK_WORDS + stage * 32 + 16)
                slope = gl.full([64], slope, gl.int32, rows).to(gl.float32, bitcast=True)
                line = bias(slope, (first_query - key).to(gl.float32), BLOCK_Q, s_layout)
                p = gl.exp2(s * scale + (lse[None, :] + line))
            else:
                p = gl.exp2(s * scale + lse[None, :])
            if cuts != 0:
                p = hide(p, tile_words, raw + BLOCK_WORDS + stage * 32, W * 64, PACK, BLOCK_Q, s_layout)
            weights = p
            if DROPOUT:
                multiplier = row_keys(stats_bufs, stage, 2, BLOCK_Q, columns)
                offset = row_keys(stats_bufs, stage, 3, BLOCK_Q, columns)
                p = marked(p, multiplier[None, :], offset[None, :], column_keys[:, None], kept_below)
                weights = gl.maximum(p, 0.0)
            dv = warpgroup_mma(gl.convert_layout(weights.to(dtype), a_layout), do, dv, is_async=True)
            if SOFTCAP:
                p = p * (1.0 - s * s)
            if W == 0:  # noqa: SIM102  (one is known when compiling)
                if i == 0:
                    named_arrive(STAGGER, 256)
            # The spin loop is a border: ptxas would move the wait above the exponentials.
            mbarrier.wait(q_full.index(next_stage), next_phase, pred=i + 1 < num_blocks)
            next_cuts = get_uniform(raw + BLOCK_WORDS + next_stage * 32 + 12)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            if DROPOUT:
                delta = stats_bufs.index(stage).slice(BLOCK_Q, BLOCK_Q, dim=0).load(columns) * kept_share
                ds = marked_gradient(p, dp, delta[None, :]).to(dtype)
            else:
                ds = (p * dp).to(dtype)
            raw_wait(raw + (DS_FREE + (it & 1)) * 8, ((it >> 1) & 1) ^ 1)
            ds_bufs.index(it & 1).slice(W * 64, 64, dim=0).store(ds)
            fence_proxy()
            raw_arrive_released(raw + (DS_FULL + (it & 1)) * 8)
            late = (it + 1) & 1
            if i > 0:
                raw_wait(raw + (DS_FULL + late) * 8, ((it - 1) >> 1) & 1)
            dq = dq_product(ds_bufs.index(late), k_smem, W, D, dq_layout)
            dk = warpgroup_mma(gl.convert_layout(ds, a_layout), q, dk, is_async=True)
            dv, dq = warpgroup_mma_wait(1, deps=(dv, dq))
            raw_arrive(raw + (DO_FREE + do_stage) * 8)
            if i > 0:
                raw_arrive(raw + (DS_FREE + late) * 8)
                put_dq(dq, dq_bufs, raw, it - 1, W)
            dk = warpgroup_mma_wait(0, deps=(dk,))
            raw_arrive(raw + (Q_FREE + stage) * 8)
            stage = next_stage
            phase = next_phase
            it = opaque_next(it)
        if num_blocks > 0:
            late = (it + 1) & 1
            raw_wait(raw + (DS_FULL + late) * 8, ((it - 1) >> 1) & 1)
            dq = dq_product(ds_bufs.index(late), k_smem, W, D, dq_layout)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            raw_arrive(raw + (DS_FREE + late) * 8)
            put_dq(dq, dq_bufs, raw, it - 1, W)
            raw_arrive(raw + KV_FREE * 8)
        named_sync(TOGETHER, 256)  # the other has read dS: its buffers stage the gradients
        _, row_begin, row_end, _ = get_words(tile_words)
        batch, kv_head, _, _ = get_words(tile_words + 16)
        raw_arrive(raw + (TILE_FREE + (tiles & 1)) * 8)
        first_row = row_begin + W * 64
        if DROPOUT:
            dv = dv * kept_scale
        store_gradient(DV_DESC, DV, stride_vb, stride_vt, stride_vh, dv.to(dtype), staging, batch, first_row, row_end,
                       kv_head, HEAD_DIM, D, o_layout)  # fmt: skip
        tma_store_wait(0)
        dk = (dk * softmax_scale).to(dtype)
        store_gradient(DK_DESC, DK, stride_kb, stride_kt, stride_kh, dk, staging, batch, first_row, row_end,
                       kv_head, HEAD_DIM, D, o_layout)  # fmt: skip
        tiles += 1
        raw_wait(raw + (TILE_FULL + (tiles & 1)) * 8, (tiles >> 1) & 1)
        num_blocks = get_uniform(raw + TILE_WORDS + (tiles & 1) * 32)
        tma_store_wait(0)
        named_sync(TOGETHER, 256)
    # The writer finds the last message; it may still be at the other half of the block before.
    raw_wait(raw + (DQ_FREE + W) * 8, (it & 1) ^ 1)
    raw_arrive_released(raw + (DQ_FULL + W) * 8)


RUNTIME_SIZES = [
    *(
        "num_tiles",
        "num_heads_kv",
        "heads_per_batch",
        "units_per_kv",
        "wave",
        "parts",
        "tiles_per_unit",
        "num_keys",
    ),
    *(f"stride_{tensor}{axis}" for tensor in "kv" for axis in "bth"),
    *("kept_below", "stride_ab", "stride_an", "stride_ah"),
]


@gluon.jit(do_not_specialize=RUNTIME_SIZES)
def backward_kernel(
    Q_DESC, K_DESC, V_DESC, DO_DESC, STATS_DESC, DQ_DESC, DK_DESC, DV_DESC,
    DQ_STATE,  # int32, one a Q block: 0 at the start, and at the end where the block has no dQ
    DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,  # strides in units of 8 elements
    TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_heads_kv, heads_per_batch, units_per_kv, wave, parts,
    tiles_per_unit, num_keys, scale, cap_scale,
    softmax_scale,  # of dK: with dropout times kept_scale
    COL_KEYS,  # the dropout's keys of columns, int32 (S,)
    kept_below, kept_scale, SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
    PACK: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr,
    Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, SOFTCAP: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """``num_heads_kv`` counts batch * K/V heads; ``units_per_kv`` units of PACK query heads read each of them."""
    dtype: gl.constexpr = Q_DESC.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_bufs = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, 1, D], K_DESC.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, 1, D], V_DESC.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, BLOCK_Q // PACK, PACK, D], Q_DESC.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [DO_STAGES, 1, BLOCK_Q // PACK, PACK, D], DO_DESC.layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, BLOCK_K, BLOCK_Q], swizzled)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2, 128, 32], DQ_DESC.layout)
    STATISTICS: gl.constexpr = STATS_DESC.block_type.shape[0]
    stats_bufs = gl.allocate_shared_memory(gl.float32, [Q_STAGES, STATISTICS], STATS_DESC.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    dirty = gl.allocate_shared_memory(gl.int64, [ERASE_SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full.index(0), count=1)
    mbarrier.init(v_full.index(0), count=1)
    raw = raw_base()
    raw_init(raw + KV_FREE * 8, 8)
    for s in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(s), count=1)
        raw_init(raw + (Q_FREE + s) * 8, 8)
    for s in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(s), count=1)
        raw_init(raw + (DO_FREE + s) * 8, 8)
    for s in gl.static_range(ERASE_SLOTS):
        mbarrier.init(dirty.index(s), count=1)
    for w in gl.static_range(2):
        raw_init(raw + (TILE_FULL + w) * 8, 1)
        raw_init(raw + (TILE_FREE + w) * 8, 8)
        raw_init(raw + (DQ_FULL + w) * 8, 4)
        raw_init(raw + (DQ_FREE + w) * 8, 1)
        raw_init(raw + (DS_FULL + w) * 8, 8)
        raw_init(raw + (DS_FREE + w) * 8, 8)
    init_runs(raw)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
                k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, ds_bufs, dq_bufs, k_full, v_full, q_full, do_full,
                raw, scale, cap_scale, softmax_scale, COL_KEYS, kept_below, kept_scale,
                gl.constexpr(0), PACK, D, HEAD_DIM, BLOCK_Q, Q_STAGES, DO_STAGES, SOFTCAP, DROPOUT, ALIBI,
            )),
            (consumer, (
                DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
                k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, ds_bufs, dq_bufs, k_full, v_full, q_full, do_full,
                raw, scale, cap_scale, softmax_scale, COL_KEYS, kept_below, kept_scale,
                gl.constexpr(1), PACK, D, HEAD_DIM, BLOCK_Q, Q_STAGES, DO_STAGES, SOFTCAP, DROPOUT, ALIBI,
            )),
            (producer, (
                Q_DESC, K_DESC, V_DESC, DO_DESC, STATS_DESC, k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs,
                k_full, v_full, q_full, do_full, dirty, raw, DQ_STATE,
                heads_per_batch, units_per_kv, tiles_per_unit, num_keys,
                SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS, PACK, BLOCK_Q, Q_STAGES, DO_STAGES, ALIBI,
            )),
            (scheduler, (
                raw, TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_heads_kv, heads_per_batch, units_per_kv, wave,
                parts, BLOCK_Q // PACK, gl.constexpr(True),
            )),
            (dq_writer, (DQ_DESC, DQ_STATE, dq_bufs, raw, BLOCK_Q, D)),
            (eraser, (
                k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, k_full, v_full, q_full, do_full, dirty, raw,
                D, D, BLOCK_K, BLOCK_Q, Q_STAGES, DO_STAGES,
            )),
        ],
        [4, 1, 1, 1, 1],
        [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS],
    )  # fmt: skip
