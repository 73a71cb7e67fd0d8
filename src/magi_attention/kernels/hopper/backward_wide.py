"""Backward on Hopper for head dimensions of 129 to 256: one program owns 64 keys, two warpgroups with a role each.

    S^T = K Q^T    P^T = exp2(S^T scale - lse)    dP^T = V dO^T - delta    dS^T = P^T dP^T
    dV += P^T dO   dK += dS^T Q                   dQ   += dS K

dK and dV of 64 keys x 256 columns fill half of the register file, so both warpgroups own the same keys and half of the
columns of dK, dV and dQ each. The 64 x 64 scores are not computed twice: the first warpgroup computes S and P, masks
and all, the second dP and dS. P goes to the second and dS to the first through shared memory, 8 KB each.

    score warpgroup:      dQ'(i-1), P(i) > P_FULL,  dV(i), S(i+1),                DS_FULL > dQ(i), dK(i)
    gradient warpgroup:   dQ'(i-1), dP(i),          P_FULL > dV(i), dS(i) >       DS_FULL > dQ(i), dK(i)

S runs one block ahead and the last quarter of dQ (dQ') one behind, so that exponentials and the staging of dQ have a
product of the same warpgroup beside them. One copy of P and of dS is enough: dS(i+1) waits for P(i+1), and the score
warpgroup has multiplied dS(i) by then. With SOFTCAP, P (1 - tanh^2) travels in the buffer of dS, which its reader
overwrites.

Q comes in two stages, dO in halves of its columns: three half buffers do the work of two blocks, because the first half
is free long before the second. A quarter of dQ (64 x 64, fp32) is staged while the one before it goes out; each
warpgroup has a stage and a writer warp of its own, and stages dK and dV there when a tile ends.

Nobody waits in a circle. Products of block i wait for block i, for P read and dS multiplied in i - 1, and for writers,
which wait for memory only. S(i+1) in the midst of block i waits for Q(i+1), which needs dK(i-1) and comes before dO(i+1)
in the producer's order. A consumer frees only what it has seen arrive, so phases cannot be mixed up.

Tiles, runs, packed heads, the grid of Q blocks, row statistics and the order of dQ in memory are those of the narrow
backward.
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
from magi_attention.kernels.hopper.primitives import (
    NAMED_BARRIERS,
    await_published,
    claim,
    fence_proxy,
    get_uniform,
    get_word,
    get_words,
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
    retire,
    take_item,
    tanh,
)
from magi_attention.kernels.hopper.schedule import count_blocks, locate, run_of

BLOCK_K = gl.constexpr(64)
BLOCK_Q = gl.constexpr(64)
D = gl.constexpr(256)
HALF = gl.constexpr(128)
QUARTER_LINES = gl.constexpr(128)
Q_STAGES = gl.constexpr(2)
# Accumulators of scores and quarters of dQ, of halves of dK and dV, and their left operand.
S_LAYOUT = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
)
O_LAYOUT = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
)
A_LAYOUT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT.value, k_width=2))

# Raw barriers.
KV_FREE = gl.constexpr(0)
P_FULL = gl.constexpr(1)
P_FREE = gl.constexpr(2)
DS_FULL = gl.constexpr(3)
DS_FREE = gl.constexpr(4)
DQ_FULL = gl.constexpr(6)
DQ_FREE = gl.constexpr(8)
TILE_FULL = gl.constexpr(10)
TILE_FREE = gl.constexpr(12)
Q_FREE = gl.constexpr(16)
DO_FREE = gl.constexpr(20)


@gluon.jit
def fresh_zero():
    """0, unknown to LLVM and known to ptxas: else LLVM carries the descriptors of a product's operands in registers."""
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def hidden_zero():
    """0 that ptxas does not know either: the grid has one axis."""
    return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.z;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def producer(
    Q_DESC, K_DESC, V_DESC, DO_DESC, STATS_DESC, k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs,
    k_full, v_full, q_full, do_full, dirty, raw, DQ_STATE,
    TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_heads_kv, heads_per_batch, units_per_kv, wave, parts,
    tiles_per_unit, num_keys, PACK: gl.constexpr, DO_STAGES: gl.constexpr,
):  # fmt: skip
    TOKENS: gl.constexpr = BLOCK_Q // PACK
    it = 0
    halves = 0
    erased = 0
    tiles_sent = 0
    kv_phase = 1
    item = gl.program_id(0)
    while item < num_tiles * num_heads_kv:
        next_item = take_item(COUNTER) + gl.num_programs(0)
        tile, kv_head = locate(item, num_tiles, num_heads_kv, wave, parts)
        row_begin, row_end = gl.load(TILES + 4 * tile), gl.load(TILES + 4 * tile + 1)
        list_begin, list_count = gl.load(TILES + 4 * tile + 2), gl.load(TILES + 4 * tile + 3)
        if row_begin < row_end:
            batch = kv_head // heads_per_batch
            kv_head = kv_head % heads_per_batch
            num_blocks = count_blocks(
                BAND_LIST, BANDS, list_begin, list_count, row_begin, row_end, TOKENS, gl.constexpr(True)
            )
            slot = tiles_sent & 1
            raw_wait(raw + (TILE_FREE + slot) * 8, ((tiles_sent >> 1) & 1) ^ 1)
            put_words(raw + TILE_WORDS + slot * 32, num_blocks * units_per_kv, row_begin, row_end, 0)
            put_words(raw + TILE_WORDS + slot * 32 + 16, batch, kv_head, 0, 0)
            raw_arrive(raw + (TILE_FULL + slot) * 8)
            tiles_sent += 1
            if num_blocks > 0:
                raw_wait(raw + KV_FREE * 8, kv_phase)
                kv_phase ^= 1
                # Beyond the tensor the copy engine fills with zeros.
                live_keys = gl.where(row_end < num_keys, row_end - row_begin, BLOCK_K)
                erased = send_operand(K_DESC, k_bufs, k_full, dirty, raw, batch, row_begin, kv_head, 0, 0, live_keys,
                                      0, erased, ERASE_K, BLOCK_K)  # fmt: skip
                started = 0
                rows_cut = gl.where(row_end - row_begin < BLOCK_K, CUT_ROWS, 0)
                for sub in range(units_per_kv):
                    unit = kv_head * units_per_kv + sub
                    first_q_tile = (batch * heads_per_batch * units_per_kv + unit) * tiles_per_unit
                    for at in range(list_begin, list_begin + list_count):
                        first, last, run_blocks, all_from, all_to, lo, hi = run_of(
                            BANDS, gl.load(BAND_LIST + at), row_begin, row_end, TOKENS, gl.constexpr(True)
                        )
                        start = first // TOKENS * TOKENS
                        # Tiles that see the same queries begin at different ones: their sums meet less often.
                        b = (gl.maximum(row_begin - start, 0) // TOKENS) % gl.maximum(run_blocks, 1)
                        for _ in range(run_blocks):
                            column = start + b * TOKENS
                            cuts = gl.where(column + TOKENS > all_to, CUT_ABOVE, 0) + rows_cut
                            cuts += gl.where(column < all_from, CUT_BELOW, 0)
                            begin = gl.maximum(first - column, 0) * PACK
                            end = gl.minimum((last - column) * PACK, BLOCK_Q)
                            q_tile = first_q_tile + column // TOKENS
                            stage = it % Q_STAGES
                            raw_wait(raw + (Q_FREE + stage) * 8, ((it // Q_STAGES) & 1) ^ 1)
                            words = raw + BLOCK_WORDS + stage * 32
                            put_words(words, lo - column, hi - column, last - 1 - column, cuts)
                            put_word(words + 16, first - column)
                            erased = send_q(
                                Q_DESC, STATS_DESC, q_bufs, stats_bufs, q_full, dirty, raw,
                                batch, unit * PACK, column, begin, end, q_tile, stage, erased, BLOCK_Q,
                            )  # fmt: skip
                            if started == 0:
                                erased = send_operand(V_DESC, v_bufs, v_full, dirty, raw, batch, row_begin, kv_head,
                                                      0, 0, live_keys, 0, erased, ERASE_V, BLOCK_K)  # fmt: skip
                                started = 1
                            # Before dO, which every turn of the writers comes after.
                            word = q_tile * DQ_STATES + claim(DQ_STATE + q_tile)
                            put_word(raw + DQ_WORDS + (it % DQ_SLOTS) * 4, word)
                            for half in range(2):
                                stage = halves % DO_STAGES
                                raw_wait(raw + (DO_FREE + stage) * 8, ((halves // DO_STAGES) & 1) ^ 1)
                                erased = send_operand(
                                    DO_DESC, do_bufs, do_full, dirty, raw, batch, column, unit * PACK, half * HALF,
                                    begin, end, stage, erased, ERASE_DO, BLOCK_Q,
                                )  # fmt: skip
                                halves += 1
                            it += 1
                            b += 1
                            b = gl.where(b == run_blocks, 0, b)
        item = next_item
    slot = tiles_sent & 1
    raw_wait(raw + (TILE_FREE + slot) * 8, ((tiles_sent >> 1) & 1) ^ 1)
    put_words(raw + TILE_WORDS + slot * 32, -1, 0, 0, 0)
    put_word(raw + DQ_WORDS + (it % DQ_SLOTS) * 4, -1)
    raw_arrive(raw + (TILE_FULL + slot) * 8)
    # The eraser's last message: every earlier one has been read once all operands are consumed.
    raw_wait(raw + KV_FREE * 8, kv_phase)
    put_words(raw + ERASE_WORDS + (erased % ERASE_SLOTS) * 16, -1, 0, 0, 0)
    mbarrier.arrive(dirty.index(erased % ERASE_SLOTS), count=1)
    retire(COUNTER, gl.num_programs(0))


@gluon.jit
def dq_writer(DQ_DESC, DQ_STATE, dq_bufs, raw, W: gl.constexpr):
    """Store or add a warpgroup's two quarters of each dQ block, one after the other (see backward.py on claims)."""
    it = 0
    word = 0
    while word >= 0:
        raw_wait(raw + (DQ_FULL + W) * 8, 0)
        word = get_word(raw + DQ_WORDS + (it % DQ_SLOTS) * 4)
        if word >= 0:
            q_tile = word // DQ_STATES
            line = (4 * q_tile + 2 * W) * QUARTER_LINES
            state = word % DQ_STATES
            if (state > 0) & ((state & (DQ_STORED << W)) == 0):
                await_published(DQ_STATE + q_tile, DQ_STORED << W)
            for quarter in gl.static_range(2):
                if quarter > 0:
                    raw_wait(raw + (DQ_FULL + W) * 8, 1)
                if state == 0:
                    tma_store(DQ_DESC, [line + quarter * QUARTER_LINES, 0], dq_bufs.index(W))
                else:
                    tma_add(DQ_DESC, [line + quarter * QUARTER_LINES, 0], dq_bufs.index(W))
                tma_store_wait(0)
                raw_arrive_released(raw + (DQ_FREE + W) * 8)
            if state == 0:
                publish(DQ_STATE + q_tile, DQ_STORED << W)
        it += 1


@gluon.jit
def put_dq(dq, dq_bufs, raw, QUARTER: gl.constexpr, W: gl.constexpr):
    """Hand this warpgroup's first or second quarter (0 or 1) of a dQ block to its writer, in the order of registers."""
    raw_wait(raw + (DQ_FREE + W) * 8, QUARTER ^ 1)
    dq_bufs.index(W).store(in_lines(dq))
    fence_proxy()
    raw_arrive_released(raw + (DQ_FULL + W) * 8)


@gluon.jit
def dq_product(ds, k_smem, FIRST: gl.constexpr):
    """64 columns of dQ = dS K from column FIRST on, in flight."""
    zero = gl.zeros([BLOCK_Q, 64], gl.float32, S_LAYOUT)
    return warpgroup_mma(
        ds.permute((1, 0)), k_smem.slice(FIRST, 64, dim=1), zero, use_acc=False, is_async=True
    )


@gluon.jit
def pass_weights(p, p_smem):
    """Store P so that the same thread of the other warpgroup finds its elements: 16-byte pieces from one address."""
    line: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    # A row is (warp, 2 of a thread, 8 lanes), a column (4 pieces, 2 in a piece, 4 lanes, 2 neighbours).
    p = p.reshape([4, 2, 8, 4, 2, 4, 2]).permute([3, 0, 2, 5, 4, 1, 6]).reshape([512, 8])
    p_smem.store(gl.convert_layout(p, line, assert_trivial=True))


@gluon.jit
def passed_weights(p_smem):
    """What pass_weights stored."""
    line: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0])
    p = p_smem.load(line)
    p = p.reshape([4, 4, 8, 4, 2, 2, 2]).permute([1, 5, 2, 0, 4, 3, 6]).reshape([64, 64])
    return gl.convert_layout(p, S_LAYOUT, assert_trivial=True)


@gluon.jit
def store_gradient(DESC, GRAD, stride_b, stride_t, stride_h, grad, staging, batch, row_begin, row_end, kv_head,
                   HEAD_DIM: gl.constexpr, W: gl.constexpr):  # fmt: skip
    """A warpgroup's columns of dK or dV; strides in units of 8 elements."""
    if row_begin + BLOCK_K <= row_end:
        staging.reshape((BLOCK_K, HALF)).store(grad)
        fence_proxy()
        named_sync(NAMED_BARRIERS + W, 128)
        tma_store(DESC, [batch, row_begin, kv_head, W * HALF], staging)
    else:
        row = row_begin + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, O_LAYOUT))
        column = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, O_LAYOUT))
        at = row.to(gl.int64) * stride_t + batch.to(gl.int64) * stride_b + kv_head.to(gl.int64) * stride_h
        mask = (row < row_end)[:, None] & (column < HEAD_DIM)[None, :]
        gl.store(GRAD + at[:, None] * 8 + column[None, :], grad, mask=mask)


@gluon.jit
def finish_tile(
    DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh, dk, dv, dq_bufs, raw,
    tiles, HEAD_DIM: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Store this warpgroup's half of dK and dV by way of its dQ stage; returns the blocks of the next tile."""
    tile_words = raw + TILE_WORDS + (tiles & 1) * 32
    _, row_begin, row_end, _ = get_words(tile_words)
    batch, kv_head, _, _ = get_words(tile_words + 16)
    raw_arrive_released(raw + (TILE_FREE + (tiles & 1)) * 8)
    staging = reinterpret(dq_bufs, DK_DESC.dtype, [2, 1, BLOCK_K, 1, HALF], DK_DESC.layout).index(W)
    raw_wait(raw + (DQ_FREE + W) * 8, 1)  # the writer has read the last quarter
    store_gradient(DV_DESC, DV, stride_vb, stride_vt, stride_vh, dv, staging, batch, row_begin, row_end, kv_head,
                   HEAD_DIM, W)  # fmt: skip
    tma_store_wait(0)
    named_sync(NAMED_BARRIERS + W, 128)
    store_gradient(DK_DESC, DK, stride_kb, stride_kt, stride_kh, dk, staging, batch, row_begin, row_end, kv_head,
                   HEAD_DIM, W)  # fmt: skip
    tiles += 1
    raw_wait(raw + (TILE_FULL + (tiles & 1)) * 8, (tiles >> 1) & 1)
    num_blocks = get_uniform(raw + TILE_WORDS + (tiles & 1) * 32)
    tma_store_wait(0)
    named_sync(NAMED_BARRIERS + W, 128)
    return num_blocks


@gluon.jit
def score_warpgroup(
    DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
    k_bufs, q_bufs, do_bufs, stats_bufs, p_smem, ds_smem, dq_bufs, k_full, q_full, do_full, raw,
    scale, cap_scale, softmax_scale,
    PACK: gl.constexpr, HEAD_DIM: gl.constexpr, DO_STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """S and P, and the first half of the columns of dV, dK and dQ.

    ``scale`` takes a score (capped, if SOFTCAP) to units of log2; ``cap_scale`` a raw score to tanh's argument.
    """
    dtype: gl.constexpr = k_bufs.dtype
    it = 0
    # Counted instead of it % DO_STAGES: there is no uniform division by three.
    do_stage = 0
    do_phase = 0
    kv_phase = 0
    tiles = 0
    raw_wait(raw + TILE_FULL * 8, 0)
    num_blocks = get_uniform(raw + TILE_WORDS)
    while num_blocks >= 0:
        dk = gl.zeros([BLOCK_K, HALF], gl.float32, O_LAYOUT)
        dv = gl.zeros([BLOCK_K, HALF], gl.float32, O_LAYOUT)
        s_zero = gl.zeros([BLOCK_K, BLOCK_Q], gl.float32, S_LAYOUT)
        s = s_zero
        next_cuts = 0
        if num_blocks > 0:
            mbarrier.wait(k_full.index(0), kv_phase)
            mbarrier.wait(q_full.index(it & 1), (it >> 1) & 1)
            kv_phase ^= 1
            next_cuts = get_uniform(raw + BLOCK_WORDS + (it & 1) * 32 + 12)
            # Not fresh_zero: ptxas would share descriptors with the loop and spill them.
            k_smem = k_bufs.index(hidden_zero()).reshape((BLOCK_K, D))
            q = q_bufs.index(it & 1).reshape((BLOCK_Q, D))
            s = warpgroup_mma(k_smem, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
        for i in range(num_blocks):
            stage = it & 1
            cuts = next_cuts
            k_smem = k_bufs.index(fresh_zero()).reshape((BLOCK_K, D))
            # The last quarter of the block before, beside the exponentials. With no block before: of anything.
            dq = dq_product(ds_smem, k_smem, 64)
            lse = stats_bufs.index(stage).slice(0, BLOCK_Q, dim=0).load(gl.SliceLayout(0, S_LAYOUT))
            if SOFTCAP:
                s = tanh(s * cap_scale)
            p = gl.exp2(s * scale + lse[None, :])
            if cuts != 0:
                p = hide(p, raw + TILE_WORDS + (tiles & 1) * 32, raw + BLOCK_WORDS + stage * 32, 0, PACK,
                         BLOCK_Q, S_LAYOUT)  # fmt: skip
            weights = p.to(dtype)
            # The spin loop is a border: ptxas would move the wait above the exponentials.
            raw_wait(raw + P_FREE * 8, (it & 1) ^ 1)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            if i > 0:
                raw_arrive(raw + DS_FREE * 8)
            if SOFTCAP:
                raw_wait(raw + DS_FREE * 8, (it & 1) ^ 1)
                ds_smem.store((p * (1.0 - s * s)).to(dtype))
            pass_weights(weights, p_smem)
            raw_arrive_released(raw + P_FULL * 8)
            mbarrier.wait(do_full.index(do_stage), do_phase)
            do = do_bufs.index(do_stage).reshape((BLOCK_Q, HALF))
            dv = warpgroup_mma(gl.convert_layout(weights, A_LAYOUT), do, dv, is_async=True)
            mbarrier.wait(q_full.index(stage ^ 1), ((it + 1) >> 1) & 1, pred=i + 1 < num_blocks)
            next_cuts = get_uniform(raw + BLOCK_WORDS + (stage ^ 1) * 32 + 12)
            # After the last block of a tile this is a product of anything, and nobody reads it.
            next_q = q_bufs.index((it + 1 + fresh_zero()) & 1).reshape((BLOCK_Q, D))
            s = warpgroup_mma(k_smem, next_q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
            if i > 0:
                put_dq(dq, dq_bufs, raw, 1, 0)
            dv = warpgroup_mma_wait(1, deps=(dv,))
            raw_arrive(raw + (DO_FREE + do_stage) * 8)
            raw_wait(raw + DS_FULL * 8, it & 1)
            # The second half of dO, which this warpgroup never reads: with dS it has certainly arrived.
            raw_arrive(raw + (DO_FREE + gl.where(do_stage + 1 == DO_STAGES, 0, do_stage + 1)) * 8)
            dq = dq_product(ds_smem, k_smem, 0)
            q = q_bufs.index((it + fresh_zero()) & 1).reshape((BLOCK_Q, D))
            dk = warpgroup_mma(ds_smem, q.slice(0, HALF, dim=1), dk, is_async=True)
            s, dq = warpgroup_mma_wait(1, deps=(s, dq))
            put_dq(dq, dq_bufs, raw, 0, 0)
            dk = warpgroup_mma_wait(0, deps=(dk,))
            raw_arrive(raw + (Q_FREE + stage) * 8)
            do_stage += 2
            do_phase ^= (do_stage >= DO_STAGES).to(gl.int32)
            do_stage = gl.where(do_stage >= DO_STAGES, do_stage - DO_STAGES, do_stage)
            it = opaque_next(it)
        if num_blocks > 0:
            dq = dq_product(ds_smem, k_bufs.index(0).reshape((BLOCK_K, D)), 64)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            raw_arrive(raw + KV_FREE * 8)
            raw_arrive(raw + DS_FREE * 8)
            put_dq(dq, dq_bufs, raw, 1, 0)
        num_blocks = finish_tile(
            DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
            (dk * softmax_scale).to(dtype), dv.to(dtype), dq_bufs, raw, tiles, HEAD_DIM, 0,
        )  # fmt: skip
        tiles += 1
    raw_arrive_released(raw + DQ_FULL * 8)  # the writer finds the last message


@gluon.jit
def gradient_warpgroup(
    DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
    k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, p_smem, ds_smem, dq_bufs, k_full, v_full, q_full, do_full, raw,
    softmax_scale, HEAD_DIM: gl.constexpr, DO_STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """dP and dS, and the second half of the columns of dV, dK and dQ."""
    dtype: gl.constexpr = k_bufs.dtype
    k_smem = k_bufs.index(0).reshape((BLOCK_K, D))
    v_smem = v_bufs.index(0).reshape((BLOCK_K, D))
    it = 0
    do_stage = 0
    do_phase = 0
    kv_phase = 0
    tiles = 0
    raw_wait(raw + TILE_FULL * 8, 0)
    num_blocks = get_uniform(raw + TILE_WORDS)
    while num_blocks >= 0:
        dk = gl.zeros([BLOCK_K, HALF], gl.float32, O_LAYOUT)
        dv = gl.zeros([BLOCK_K, HALF], gl.float32, O_LAYOUT)
        like = gl.zeros([BLOCK_K, BLOCK_Q], gl.float32, S_LAYOUT)
        if num_blocks > 0:
            mbarrier.wait(k_full.index(0), kv_phase)
            mbarrier.wait(v_full.index(0), kv_phase)
            kv_phase ^= 1
        for i in range(num_blocks):
            stage = it & 1
            second_stage = gl.where(do_stage + 1 == DO_STAGES, 0, do_stage + 1)
            second_phase = do_phase ^ (second_stage == 0).to(gl.int32)
            q = q_bufs.index(stage).reshape((BLOCK_Q, D))
            first_do = do_bufs.index(do_stage).reshape((BLOCK_Q, HALF))
            second_do = do_bufs.index(second_stage).reshape((BLOCK_Q, HALF))
            mbarrier.wait(q_full.index(stage), (it >> 1) & 1)
            delta = stats_bufs.index(stage).slice(BLOCK_Q, BLOCK_Q, dim=0).load(gl.SliceLayout(0, S_LAYOUT))
            dp, _ = gl.broadcast(delta[None, :], like)
            dp = pinned(dp)
            # Of the block before, as in the other warpgroup.
            dq = dq_product(ds_smem, k_smem, HALF + 64)
            mbarrier.wait(do_full.index(do_stage), do_phase)
            dp = warpgroup_mma(v_smem.slice(0, HALF, dim=1), first_do.permute((1, 0)), dp, is_async=True)
            mbarrier.wait(do_full.index(second_stage), second_phase)
            dp = warpgroup_mma(v_smem.slice(HALF, HALF, dim=1), second_do.permute((1, 0)), dp, is_async=True)
            dq = warpgroup_mma_wait(2, deps=(dq,))
            if i > 0:
                raw_arrive(raw + DS_FREE * 8)
                put_dq(dq, dq_bufs, raw, 1, 1)
            raw_wait(raw + P_FULL * 8, it & 1)
            weights = passed_weights(p_smem)
            if SOFTCAP:
                slope = ds_smem.load(S_LAYOUT)
            else:
                slope = weights
            raw_arrive_released(raw + P_FREE * 8)
            dv = warpgroup_mma(gl.convert_layout(weights, A_LAYOUT), second_do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            raw_arrive(raw + (DO_FREE + do_stage) * 8)
            ds = (slope.to(gl.float32) * dp).to(dtype)
            raw_wait(raw + DS_FREE * 8, (it & 1) ^ 1)
            ds_smem.store(ds)
            fence_proxy()
            raw_arrive_released(raw + DS_FULL * 8)
            raw_wait(raw + DS_FULL * 8, it & 1)
            dq = dq_product(ds_smem, k_smem, HALF)
            dk = warpgroup_mma(gl.convert_layout(ds, A_LAYOUT), q.slice(HALF, HALF, dim=1), dk, is_async=True)
            dv = warpgroup_mma_wait(2, deps=(dv,))
            raw_arrive(raw + (DO_FREE + second_stage) * 8)
            dq = warpgroup_mma_wait(1, deps=(dq,))
            put_dq(dq, dq_bufs, raw, 0, 1)
            dk = warpgroup_mma_wait(0, deps=(dk,))
            raw_arrive(raw + (Q_FREE + stage) * 8)
            do_stage = gl.where(second_stage + 1 == DO_STAGES, 0, second_stage + 1)
            do_phase = second_phase ^ (do_stage == 0).to(gl.int32)
            it = opaque_next(it)
        if num_blocks > 0:
            dq = dq_product(ds_smem, k_smem, HALF + 64)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            raw_arrive(raw + KV_FREE * 8)
            raw_arrive(raw + DS_FREE * 8)
            put_dq(dq, dq_bufs, raw, 1, 1)
        num_blocks = finish_tile(
            DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
            (dk * softmax_scale).to(dtype), dv.to(dtype), dq_bufs, raw, tiles, HEAD_DIM, 1,
        )  # fmt: skip
        tiles += 1
    raw_arrive_released(raw + (DQ_FULL + 1) * 8)  # the writer finds the last message


RUNTIME_SIZES = [
    "num_tiles", "num_heads_kv", "heads_per_batch", "units_per_kv", "wave", "parts", "tiles_per_unit", "num_keys",
    *(f"stride_{tensor}{axis}" for tensor in "kv" for axis in "bth"),
]  # fmt: skip


@gluon.jit(do_not_specialize=RUNTIME_SIZES)
def backward_wide_kernel(
    Q_DESC, K_DESC, V_DESC, DO_DESC, STATS_DESC, DQ_DESC, DK_DESC, DV_DESC, DQ_STATE,
    DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,  # strides in units of 8 elements
    TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_heads_kv, heads_per_batch, units_per_kv, wave, parts,
    tiles_per_unit, num_keys, scale, cap_scale, softmax_scale,
    PACK: gl.constexpr, D: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_Q: gl.constexpr,
    Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, SOFTCAP: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """Arguments as of the narrow backward, but the boxes of dO, dK and dV are 128 columns wide, DO_STAGES counts half
    blocks (2 or 3), and D, BLOCK_Q and Q_STAGES are those of this module."""
    gl.static_assert(D == 256 and BLOCK_Q == 64 and Q_STAGES == 2)
    gl.static_assert(DO_STAGES == 2 or DO_STAGES == 3)
    dtype: gl.constexpr = Q_DESC.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    straight: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    k_bufs = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, 1, D], K_DESC.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_K, 1, D], V_DESC.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, BLOCK_Q // PACK, PACK, D], Q_DESC.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [DO_STAGES, 1, BLOCK_Q // PACK, PACK, HALF], DO_DESC.layout)
    p_smem = gl.allocate_shared_memory(dtype, [BLOCK_K * BLOCK_Q // 8, 8], straight)
    ds_smem = gl.allocate_shared_memory(dtype, [BLOCK_K, BLOCK_Q], swizzled)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [2, QUARTER_LINES, 32], DQ_DESC.layout)
    stats_bufs = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 2 * BLOCK_Q], STATS_DESC.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    dirty = gl.allocate_shared_memory(gl.int64, [ERASE_SLOTS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full.index(0), count=1)
    mbarrier.init(v_full.index(0), count=1)
    raw = raw_base()
    # Arrivals are counted in warps: 4 of one warpgroup, or 8 of both.
    raw_init(raw + KV_FREE * 8, 8)
    raw_init(raw + P_FULL * 8, 4)
    raw_init(raw + P_FREE * 8, 4)
    raw_init(raw + DS_FULL * 8, 4)
    raw_init(raw + DS_FREE * 8, 8)
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
    fence_async_shared()
    gl.warp_specialize(
        [
            (score_warpgroup, (
                DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
                k_bufs, q_bufs, do_bufs, stats_bufs, p_smem, ds_smem, dq_bufs, k_full, q_full, do_full, raw,
                scale, cap_scale, softmax_scale, PACK, HEAD_DIM, DO_STAGES, SOFTCAP,
            )),
            (gradient_warpgroup, (
                DK_DESC, DV_DESC, DK, stride_kb, stride_kt, stride_kh, DV, stride_vb, stride_vt, stride_vh,
                k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, p_smem, ds_smem, dq_bufs, k_full, v_full, q_full, do_full,
                raw, softmax_scale, HEAD_DIM, DO_STAGES, SOFTCAP,
            )),
            (producer, (
                Q_DESC, K_DESC, V_DESC, DO_DESC, STATS_DESC,
                k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, k_full, v_full, q_full, do_full, dirty, raw, DQ_STATE,
                TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_heads_kv, heads_per_batch, units_per_kv, wave, parts,
                tiles_per_unit, num_keys, PACK, DO_STAGES,
            )),
            (dq_writer, (DQ_DESC, DQ_STATE, dq_bufs, raw, gl.constexpr(0))),
            (dq_writer, (DQ_DESC, DQ_STATE, dq_bufs, raw, gl.constexpr(1))),
            (eraser, (
                k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, k_full, v_full, q_full, do_full, dirty, raw,
                D, HALF, BLOCK_K, BLOCK_Q, Q_STAGES, DO_STAGES,
            )),
        ],
        [4, 1, 1, 1, 1],
        [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS],
    )  # fmt: skip
