"""Forward on Hopper: persistent, warp-specialised, one pass over the runs of each tile.

Partitions of a program: two consumer warpgroups of 64 query rows each, a scheduler warp that pulls tiles off a work
counter and sends their runs, a producer warp that walks the runs and feeds K and V rings by TMA, and an eraser warp for
rows of V that lie beyond a run. With every K block the producer sends four words: the diagonals and the last column
relative to the block, and which of them cut it. Consumers know neither bands nor plan: they work through one endless
stream of blocks, in which some begin a new tile.

A consumer keeps S(j+1) = Q K^T in flight while it computes the softmax of block j and P(j) V(j) runs, across tiles too:
the first scores of a tile are computed while the last product of the one before runs, so short tiles pay no start. The
warpgroups take turns on the tensor cores. The wait for the next K block stands between softmax and the wait for P V
because ptxas moves a bare wait above the softmax; the spin loop is a border it does not cross.

PACK query heads of one K/V head share a tile: its 64 rows per warpgroup are 64 / PACK tokens x PACK heads.
"""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from magi_attention.kernels.hopper.forward_output import add_out, conclude, store_out
from magi_attention.kernels.hopper.modifiers import (
    aligned_keys,
    bends,
    bias,
    dropped,
    put_line,
    row_modifiers,
    scaled,
    straight,
)
from magi_attention.kernels.hopper.primitives import (
    NAMED_BARRIERS,
    any_in_warp,
    erase_rows,
    fence_proxy,
    get_uniform,
    get_word,
    get_words,
    named_arrive,
    named_sync,
    put_words,
    raw_arrive,
    raw_base,
    raw_init,
    raw_wait,
    rounded,
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

NUM_WG = gl.constexpr(2)

# Raw barriers (schedule.py has its own): Q free (one a buffer), K free, V free (one a stage).
Q_FREE = gl.constexpr(0)
K_FREE = gl.constexpr(8)
V_FREE = gl.constexpr(12)
# Messages of 16 bytes a slot: tile, K block, rows to erase. A block's message is read until its softmax is done, a tile's
# until its last product is; both outlive the K stage, which bounds how far the producer and the other warpgroups are
# ahead: eight slots are never overtaken by a ring of at most four stages.
TILE_WORDS = gl.constexpr(512)
TILE_SLOTS = gl.constexpr(8)
BLOCK_WORDS = gl.constexpr(512 + 128)
BLOCK_SLOTS = gl.constexpr(8)
ERASE_WORDS = gl.constexpr(512 + 256)

# What the producer says of a block.
CUT_ABOVE = gl.constexpr(1)
CUT_BELOW = gl.constexpr(2)
BEGINS = gl.constexpr(4)  # the first block of a tile
STOP = gl.constexpr(8)  # not a block: the stream has ended
BENDS = gl.constexpr(16)  # its linear bias changes direction
COUNT = gl.constexpr(32)  # times the number of blocks, with BEGINS
FAR = gl.constexpr(1 << 30)

# Weights of a block may sum to this before the pivot moves: far from the largest fp16 number.
LIMIT = gl.constexpr(4096.0)


@gluon.jit
def send_k(K_DESC, KEYS_DESC, k_bufs, key_bufs, k_full, raw, num_cols, batch, kv_head, column, lo, hi, end, cuts,
           it, STAGES: gl.constexpr, DROPOUT: gl.constexpr):  # fmt: skip
    """Load the K block at ``column``, with the dropout's keys; ``end`` is one past the last column of its run.

    Those keys are read until the block's softmax is done, which the K stage does not wait for: their ring is longer.
    """
    stage = it % STAGES
    raw_wait(raw + (K_FREE + stage) * 8, ((it // STAGES) & 1) ^ 1)
    put_words(raw + BLOCK_WORDS + it % BLOCK_SLOTS * 16, lo - column, hi - column, end - 1 - column, cuts)
    if DROPOUT:
        mbarrier.expect(k_full.index(stage), K_DESC.block_type.nbytes + KEYS_DESC.block_type.nbytes)
        keys = key_bufs.index(it % (STAGES + 1))
        tma_load(KEYS_DESC, [aligned_keys(column, num_cols)], k_full.index(stage), keys)
    else:
        mbarrier.expect(k_full.index(stage), K_DESC.block_type.nbytes)
    tma_load(K_DESC, [batch, column, kv_head, 0], k_full.index(stage), k_bufs.index(stage))


@gluon.jit
def send_v(V_DESC, v_bufs, v_full, v_dirty, raw, batch, kv_head, column, live, it, erased,
           BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Load the V block at ``column``, by way of the eraser when only ``live`` of its rows belong to the run."""
    stage = it % STAGES
    raw_wait(raw + (V_FREE + stage) * 8, ((it // STAGES) & 1) ^ 1)
    if live < BLOCK_N:
        slot = erased % STAGES
        put_words(raw + ERASE_WORDS + slot * 16, stage, live, 0, 0)
        mbarrier.expect(v_dirty.index(slot), V_DESC.block_type.nbytes)
        tma_load(V_DESC, [batch, column, kv_head, 0], v_dirty.index(slot), v_bufs.index(stage))
        erased += 1
    else:
        mbarrier.expect(v_full.index(stage), V_DESC.block_type.nbytes)
        tma_load(V_DESC, [batch, column, kv_head, 0], v_full.index(stage), v_bufs.index(stage))
    return erased


@gluon.jit
def send_q(Q_DESC, q_bufs, q_full, raw, batch, row_begin, row_end, head, tiles,
           PACK: gl.constexpr, Q_BUFS: gl.constexpr):  # fmt: skip
    """Load each warpgroup's rows of a tile, and say which they are."""
    put_words(raw + TILE_WORDS + (tiles % TILE_SLOTS) * 16, row_begin, row_end, batch, head)
    buffer = tiles % Q_BUFS
    for w in gl.static_range(NUM_WG):
        slot = w * Q_BUFS + buffer
        raw_wait(raw + (Q_FREE + slot) * 8, ((tiles // Q_BUFS) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), Q_DESC.block_type.nbytes)
        tma_load(
            Q_DESC, [batch, row_begin + w * (64 // PACK), head, 0], q_full.index(slot), q_bufs.index(slot)
        )


@gluon.jit
def producer(
    Q_DESC, K_DESC, V_DESC, KEYS_DESC, DIAGONALS, q_bufs, k_bufs, v_bufs, key_bufs, q_full, k_full, v_full, v_dirty, raw,
    num_cols,
    PACK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_BUFS: gl.constexpr, DROPOUT: gl.constexpr,
    ALIBI: gl.constexpr,
):  # fmt: skip
    it = 0
    erased = 0
    tiles = 0
    received = 0
    # V of a block follows K of the next one, also across tiles: the ring must not tie that K to the product with this V.
    v_batch = 0
    v_head = 0
    v_column = 0
    v_live = 0
    run_blocks = await_run(raw, received)
    while run_blocks >= 0:
        first, last, all_from, all_to, lo, hi, total, row_begin, row_end, batch, kv_head, unit, band = (
            take_run(raw, received)
        )
        if run_blocks == 0:
            # A block of zeros beyond the tensor, nothing visible: the rows' empty result.
            first, last, all_from, all_to, lo, hi = num_cols, num_cols, num_cols, num_cols, -FAR, -FAR
            run_blocks = 1
        # From the right: of a causal tile's blocks the first is partial then, and looks for the maximum anyway.
        for left in range(run_blocks, 0, -1):
            if left == gl.minimum(run_blocks, NEAR_END):
                release_run(raw, received)
            column = first + (left - 1) * BLOCK_N
            cuts = gl.where(column + BLOCK_N > all_to, CUT_ABOVE, 0)
            cuts += gl.where(column < all_from, CUT_BELOW, 0)
            # The first block's message says how many the tile has.
            cuts += gl.where(total > 0, BEGINS + COUNT * total, 0)
            if ALIBI:
                anchor = column - gl.load(DIAGONALS + band)
                cuts += gl.where(bends(anchor, anchor + BLOCK_N, row_begin, row_end), BENDS, 0)
                put_line(raw, it, anchor, band)
            send_k(K_DESC, KEYS_DESC, k_bufs, key_bufs, k_full, raw, num_cols, batch, kv_head, column, lo, hi, last, cuts,
                   it, STAGES, DROPOUT)  # fmt: skip
            if total > 0:
                send_q(Q_DESC, q_bufs, q_full, raw, batch, row_begin, row_end, unit * PACK, tiles,
                       PACK, Q_BUFS)  # fmt: skip
                tiles += 1
                total = 0
            if it > 0:
                erased = send_v(V_DESC, v_bufs, v_full, v_dirty, raw, v_batch, v_head, v_column, v_live, it - 1, erased,
                                BLOCK_N, STAGES)  # fmt: skip
            v_batch = batch
            v_head = kv_head
            v_column = column
            # Beyond the tensor the copy engine fills with zeros.
            v_live = gl.where(last < num_cols, last - column, BLOCK_N)
            it += 1
        received += 1
        run_blocks = await_run(raw, received)
    stage = it % STAGES
    raw_wait(raw + (K_FREE + stage) * 8, ((it // STAGES) & 1) ^ 1)
    put_words(raw + BLOCK_WORDS + it % BLOCK_SLOTS * 16, 0, 0, 0, STOP)
    mbarrier.arrive(k_full.index(stage), count=1)
    if it > 0:
        erased = send_v(V_DESC, v_bufs, v_full, v_dirty, raw, v_batch, v_head, v_column, v_live, it - 1, erased,
                        BLOCK_N, STAGES)  # fmt: skip
    for s in gl.static_range(STAGES):
        raw_wait(raw + (V_FREE + (it + s) % STAGES) * 8, (((it + s) // STAGES) & 1) ^ 1)
    put_words(raw + ERASE_WORDS + (erased % STAGES) * 16, -1, 0, 0, 0)
    mbarrier.arrive(v_dirty.index(erased % STAGES), count=1)


@gluon.jit
def eraser(v_bufs, v_full, v_dirty, raw, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Zero the rows of V blocks beyond their run, between their arrival and their announcement to the consumers."""
    HALVES: gl.constexpr = D // 64
    GROUPS: gl.constexpr = BLOCK_N // 8 * HALVES
    part: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    groups = reinterpret(v_bufs, v_bufs.dtype, [STAGES * GROUPS, 8, 64], part)
    done = 0
    stage = 0
    while stage >= 0:
        slot = done % STAGES
        mbarrier.wait(v_dirty.index(slot), (done // STAGES) & 1)
        stage, live, _, _ = get_words(raw + ERASE_WORDS + slot * 16)
        if stage >= 0:
            erase_rows(groups, stage * GROUPS, 0, live, BLOCK_N, HALVES)
            fence_proxy()
            mbarrier.arrive(v_full.index(stage), count=1)
        done += 1


@gluon.jit
def hide(
    s, raw, block, tile, W: gl.constexpr, PACK: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr
):
    """Scores of a partial block: -inf where the band shows nothing. The messages are read here to spare registers."""
    row_begin = get_word(raw + TILE_WORDS + tile % TILE_SLOTS * 16)
    # Relative to the block's first column.
    lo, hi, end, cuts = get_words(raw + BLOCK_WORDS + block % BLOCK_SLOTS * 16)
    row = row_begin + W * (64 // PACK) + gl.arange(0, 64, layout=gl.SliceLayout(1, layout)) // PACK
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    if (cuts & CUT_ABOVE) != 0:
        s = gl.where(column[None, :] <= gl.minimum(row + hi, end)[:, None], s, -float("inf"))
    if (cuts & CUT_BELOW) != 0:
        s = gl.where(column[None, :] >= (row + lo)[:, None], s, -float("inf"))
    return s


@gluon.jit
def take_turn(W: gl.constexpr):
    named_sync(NAMED_BARRIERS + W, 256)


@gluon.jit
def pass_turn(W: gl.constexpr):
    named_arrive(NAMED_BARRIERS + 1 - W, 256)


@gluon.jit
def applied(
    weights, modifiers, rows, block, STAGES: gl.constexpr, DROPOUT: gl.constexpr, layout: gl.constexpr
):
    """The weights that V is multiplied with."""
    if DROPOUT:
        key_bufs, kept_below = modifiers[1]
        _, _, multiplier, offset = rows
        keys = key_bufs.index(block % (STAGES + 1)).load(gl.SliceLayout(0, layout))
        weights = dropped(weights, multiplier[:, None], offset[:, None], keys[None, :], kept_below)
    return weights


@gluon.jit
def weigh(s, pivot, scale, cuts, modifiers, rows, block,
          STAGES: gl.constexpr, HAS_MAX: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr, dtype: gl.constexpr,
          layout: gl.constexpr):  # fmt: skip
    """Weights exp2(s * scale - pivot) of a whole block, their sums, and whether they must be computed anew.

    The pivot may stay below the maximum: weights above one are as precise, so the running maximum is looked for, and the
    accumulator rescaled, only when a row's sum outgrows LIMIT, when nothing was seen before (the pivot is -inf), in
    partial blocks, or when the maximum itself is wanted.
    """
    slow = gl.to_tensor(1)
    p = gl.zeros([64, s.shape[1]], dtype, layout)
    sums = gl.zeros([64], gl.float32, gl.SliceLayout(1, layout))
    if not HAS_MAX:  # noqa: SIM102  (one is known when compiling)
        if cuts == 0:
            if ALIBI:
                slope, ahead, _, _ = rows
                weights = gl.exp2(scaled(s, scale, straight(slope, ahead, pivot, s.shape[1], layout)))
            else:
                weights = gl.exp2(s * scale - pivot[:, None])
            sums = gl.sum(weights, 1)
            weights = applied(weights, modifiers, rows, block, STAGES, DROPOUT, layout)
            p = rounded(weights, dtype)
            slow = any_in_warp(sums, LIMIT)
    return p, sums, slow


@gluon.jit
def reweigh(
    s, pivot, scale, message, raw, block, tile, modifiers, rows,
    W: gl.constexpr, PACK: gl.constexpr, STAGES: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr,
    dtype: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Weights of any block against the maximum so far, their sums, what earlier weights fade by, and that maximum."""
    factor = scale
    if ALIBI:
        slope, ahead, _, _ = rows
        s = scaled(s, scale, bias(slope, ahead, s.shape[1], layout))
        factor = 1.0
    if (message & (CUT_ABOVE + CUT_BELOW)) != 0:
        s = hide(s, raw, block, tile, W, PACK, s.shape[1], layout)
    peak = gl.maximum(pivot, gl.max(s, 1) * factor)
    base = gl.where(peak == -float("inf"), 0.0, peak)
    weights = gl.exp2(s * factor - base[:, None])
    sums = gl.sum(weights, 1)
    weights = applied(weights, modifiers, rows, block, STAGES, DROPOUT, layout)
    return rounded(weights, dtype), sums, gl.exp2(pivot - base), peak


@gluon.jit
def begin(
    s, scale, cap_scale, message, raw, block, tile, modifiers,
    W: gl.constexpr, PACK: gl.constexpr, STAGES: gl.constexpr, SOFTCAP: gl.constexpr, DROPOUT: gl.constexpr,
    ALIBI: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Weights of a tile's first block from its raw scores, their sums and the pivot."""
    if SOFTCAP:
        s = tanh(s * cap_scale)
    rows = row_modifiers(modifiers, raw, block, raw + TILE_WORDS + tile % TILE_SLOTS * 16, (message & STOP) == 0,
                         W, PACK, DROPOUT, ALIBI, gl.SliceLayout(1, layout))  # fmt: skip
    nothing = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    p, total, _fade, pivot = reweigh(s, nothing, scale, message, raw, block, tile, modifiers, rows,
                                     W, PACK, STAGES, DROPOUT, ALIBI, dtype, layout)  # fmt: skip
    return p, total, pivot


@gluon.jit
def score(q_smem, k_smem, BLOCK_N: gl.constexpr, s_layout: gl.constexpr):
    """S = Q K^T, in flight."""
    zero = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    return warpgroup_mma(q_smem, k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def attend(
    q_smem, k_bufs, v_bufs, k_full, v_full, raw, p_op, acc, pivot, total, it, tiles, scale, cap_scale, modifiers,
    W: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SOFTCAP: gl.constexpr, HAS_MAX: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Product of block ``it`` with its V, scores and softmax of the next block of the same tile."""
    dtype: gl.constexpr = k_bufs.dtype
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    stage = it % STAGES
    next_stage = (it + 1) % STAGES
    cuts = get_uniform(raw + BLOCK_WORDS + (it + 1) % BLOCK_SLOTS * 16 + 12)
    rows = row_modifiers(modifiers, raw, it + 1, raw + TILE_WORDS + tiles % TILE_SLOTS * 16, True,
                         W, PACK, DROPOUT, ALIBI, gl.SliceLayout(1, s_layout))  # fmt: skip
    take_turn(W)
    s = score(q_smem, k_bufs.index(next_stage).reshape((BLOCK_N, D)), BLOCK_N, s_layout)
    mbarrier.wait(v_full.index(stage), (it // STAGES) & 1)
    acc = warpgroup_mma(p_op, v_bufs.index(stage).reshape((BLOCK_N, D)), acc, is_async=True)
    pass_turn(W)
    s = warpgroup_mma_wait(1, deps=(s,))
    raw_arrive(raw + (K_FREE + next_stage) * 8)
    if SOFTCAP:
        s = tanh(s * cap_scale)
    p, sums, slow = weigh(s, pivot, scale, cuts, modifiers, rows, it + 1,
                          STAGES, HAS_MAX, DROPOUT, ALIBI, dtype, s_layout)  # fmt: skip
    fade = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, s_layout))
    if slow != 0:
        p, sums, fade, pivot = reweigh(s, pivot, scale, cuts, raw, it + 1, tiles, modifiers, rows,
                                       W, PACK, STAGES, DROPOUT, ALIBI, dtype, s_layout)  # fmt: skip
    total = total * fade + sums
    mbarrier.wait(k_full.index((it + 2) % STAGES), ((it + 2) // STAGES) & 1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    raw_arrive(raw + (V_FREE + stage) * 8)
    if slow != 0:
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
    return gl.convert_layout(p, p_layout), acc, pivot, total


@gluon.jit
def consumer(
    O_DESC, OUT, stride_ob, stride_ot, stride_oh, SINK, stride_sb, stride_st, stride_sh, LSE, MAX_LOGITS,
    q_bufs, k_bufs, v_bufs, o_bufs, q_full, k_full, v_full, raw, num_rows, num_heads, scale, cap_scale,
    modifiers, kept_scale,
    W: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_BUFS: gl.constexpr, SOFTCAP: gl.constexpr, HAS_SINK: gl.constexpr,
    HAS_MAX: gl.constexpr, ACCUMULATE: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr, STAGED: gl.constexpr,
):  # fmt: skip
    """``scale`` takes a score (capped, if SOFTCAP) to units of log2; ``cap_scale`` a raw score to tanh's argument."""
    dtype: gl.constexpr = k_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16]
    )
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    rows_of_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_of_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    if W == 1:
        pass_turn(W)  # the first warpgroup begins
    mbarrier.wait(k_full.index(0), 0)
    message = get_uniform(raw + BLOCK_WORDS + 12)
    if (message & STOP) == 0:
        # The very first block has no product to run beside.
        mbarrier.wait(q_full.index(W * Q_BUFS), 0)
        take_turn(W)
        s = score(
            q_bufs.index(W * Q_BUFS).reshape((64, D)),
            k_bufs.index(0).reshape((BLOCK_N, D)),
            BLOCK_N,
            s_layout,
        )
        pass_turn(W)
        s = warpgroup_mma_wait(0, deps=(s,))
        raw_arrive(raw + K_FREE * 8)
        p, total, pivot = begin(s, scale, cap_scale, message, raw, 0, 0, modifiers,
                                W, PACK, STAGES, SOFTCAP, DROPOUT, ALIBI, dtype, s_layout)  # fmt: skip
        p_op = gl.convert_layout(p, p_layout)
        it = 0
        tiles = 0
        mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES)
        while (message & STOP) == 0:
            # The tile's first block has its weights in p_op, and the message after it has arrived.
            q_smem = q_bufs.index(W * Q_BUFS + tiles % Q_BUFS).reshape((64, D))
            acc = gl.zeros([64, D], gl.float32, o_layout)
            for _block in range(1, message // COUNT):
                p_op, acc, pivot, total = attend(
                    q_smem, k_bufs, v_bufs, k_full, v_full, raw, p_op, acc, pivot, total, it, tiles, scale, cap_scale,
                    modifiers, W, PACK, D, BLOCK_N, STAGES, SOFTCAP, HAS_MAX, DROPOUT, ALIBI, s_layout, o_layout,
                )  # fmt: skip
                it += 1

            # The last product of this tile, beside the first scores of the next one (of leftovers, at the end).
            stage = it % STAGES
            next_stage = (it + 1) % STAGES
            tile_words = raw + TILE_WORDS + tiles % TILE_SLOTS * 16
            message = get_uniform(raw + BLOCK_WORDS + (it + 1) % BLOCK_SLOTS * 16 + 12)
            raw_arrive(raw + (Q_FREE + W * Q_BUFS + tiles % Q_BUFS) * 8)
            tiles += 1
            buffer = W * Q_BUFS + tiles % Q_BUFS
            mbarrier.wait(q_full.index(buffer), (tiles // Q_BUFS) & 1, pred=(message & STOP) == 0)
            take_turn(W)
            s = score(q_bufs.index(buffer).reshape((64, D)), k_bufs.index(next_stage).reshape((BLOCK_N, D)), BLOCK_N,
                      s_layout)  # fmt: skip
            mbarrier.wait(v_full.index(stage), (it // STAGES) & 1)
            acc = warpgroup_mma(p_op, v_bufs.index(stage).reshape((BLOCK_N, D)), acc, is_async=True)
            pass_turn(W)
            weight, share = conclude(SINK, stride_sb, stride_st, stride_sh, LSE, MAX_LOGITS, pivot, total, tile_words,
                                     num_rows, num_heads, W, PACK, HAS_SINK, HAS_MAX, ACCUMULATE, rows_of_s)  # fmt: skip
            s = warpgroup_mma_wait(1, deps=(s,))
            raw_arrive(raw + (K_FREE + next_stage) * 8)
            p, total, pivot = begin(s, scale, cap_scale, message, raw, it + 1, tiles, modifiers,
                                    W, PACK, STAGES, SOFTCAP, DROPOUT, ALIBI, dtype, s_layout)  # fmt: skip
            mbarrier.wait(
                k_full.index((it + 2) % STAGES), ((it + 2) // STAGES) & 1, pred=(message & STOP) == 0
            )
            acc = warpgroup_mma_wait(0, deps=(acc,))
            raw_arrive(raw + (V_FREE + stage) * 8)
            p_op = gl.convert_layout(p, p_layout)
            if DROPOUT:
                weight = weight * kept_scale
            out = acc * gl.convert_layout(weight, rows_of_o)[:, None]
            if ACCUMULATE:
                add_out(OUT, stride_ob, stride_ot, stride_oh, out, gl.convert_layout(share, rows_of_o), tile_words,
                        W, PACK, D, DV, o_layout)  # fmt: skip
            else:
                store_out(O_DESC, OUT, stride_ob, stride_ot, stride_oh, o_bufs, rounded(out, dtype), tile_words,
                          W, PACK, D, DV, STAGED, o_layout)  # fmt: skip
            it += 1
    tma_store_wait(0)
    if W == 0:
        take_turn(W)  # absorbs the last warpgroup's last pass


RUNTIME_SIZES = [
    *(
        "num_tiles",
        "num_units",
        "units_per_batch",
        "units_per_kv",
        "wave",
        "parts",
        "num_rows",
        "num_cols",
        "num_heads",
    ),
    *(f"stride_{tensor}{axis}" for tensor in "os" for axis in "bth"),
    *("num_keys", "kept_below", "stride_ab", "stride_an", "stride_ah"),
]


@gluon.jit(do_not_specialize=RUNTIME_SIZES)
def forward_kernel(
    Q_DESC, K_DESC, V_DESC, O_DESC,
    OUT, stride_ob, stride_ot, stride_oh,  # in units of 8 elements; fp32 with ACCUMULATE
    SINK, stride_sb, stride_st, stride_sh,  # one sink logit a row and head
    LSE,  # fp32 (B, T, H), contiguous; with ACCUMULATE it and OUT hold an earlier result, over other columns
    MAX_LOGITS,  # fp32 (H,), starts at -inf
    TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_units, units_per_batch, units_per_kv, wave, parts,
    num_rows, num_cols, num_heads, scale, cap_scale,
    KEYS_DESC,  # of the dropout's keys of columns, as ``aligned_keys`` finds them
    ROW_KEYS, num_keys,  # int32 (2, B, H, T), contiguous, and half of its size
    kept_below, kept_scale, SLOPES, stride_ab, stride_an, stride_ah, DIAGONALS,
    PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr, HAS_SINK: gl.constexpr, HAS_MAX: gl.constexpr, ACCUMULATE: gl.constexpr,
    DROPOUT: gl.constexpr, ALIBI: gl.constexpr,
    STAGED: gl.constexpr, Q_BUFS: gl.constexpr, CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    """A unit is PACK query heads of one K/V head; ``num_units`` counts those of all batches."""
    dtype: gl.constexpr = Q_DESC.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [NUM_WG * Q_BUFS, 1, 64 // PACK, PACK, D], Q_DESC.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], K_DESC.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, D], V_DESC.layout)
    if STAGED:
        columns: gl.constexpr = O_DESC.block_type.shape[3]
        o_bufs = gl.allocate_shared_memory(dtype, [NUM_WG, 1, 64 // PACK, PACK, columns], O_DESC.layout)
    else:
        o_bufs = q_bufs
    if DROPOUT:
        key_bufs = gl.allocate_shared_memory(gl.int32, [STAGES + 1, BLOCK_N], KEYS_DESC.layout)
    else:
        key_bufs = q_bufs
    # What dropout and ALiBi need to know of rows, and what dropout does of columns.
    modifiers = (
        (ROW_KEYS, num_keys, SLOPES, stride_ab, stride_an, stride_ah, num_rows, num_heads),
        (key_bufs, kept_below),
    )
    q_full = gl.allocate_shared_memory(gl.int64, [NUM_WG * Q_BUFS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_dirty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    raw = raw_base()
    for w in gl.static_range(NUM_WG * Q_BUFS):
        mbarrier.init(q_full.index(w), count=1)
        raw_init(raw + (Q_FREE + w) * 8, 4)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(v_dirty.index(s), count=1)
        raw_init(raw + (K_FREE + s) * 8, 4 * NUM_WG)
        raw_init(raw + (V_FREE + s) * 8, 4 * NUM_WG)
    init_runs(raw)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                O_DESC, OUT, stride_ob, stride_ot, stride_oh, SINK, stride_sb, stride_st, stride_sh, LSE, MAX_LOGITS,
                q_bufs, k_bufs, v_bufs, o_bufs, q_full, k_full, v_full, raw, num_rows, num_heads,
                scale, cap_scale, modifiers, kept_scale,
                gl.constexpr(0), PACK, D, DV, BLOCK_N, STAGES, Q_BUFS, SOFTCAP, HAS_SINK, HAS_MAX, ACCUMULATE,
                DROPOUT, ALIBI, STAGED,
            )),
            (consumer, (
                O_DESC, OUT, stride_ob, stride_ot, stride_oh, SINK, stride_sb, stride_st, stride_sh, LSE, MAX_LOGITS,
                q_bufs, k_bufs, v_bufs, o_bufs, q_full, k_full, v_full, raw, num_rows, num_heads,
                scale, cap_scale, modifiers, kept_scale,
                gl.constexpr(1), PACK, D, DV, BLOCK_N, STAGES, Q_BUFS, SOFTCAP, HAS_SINK, HAS_MAX, ACCUMULATE,
                DROPOUT, ALIBI, STAGED,
            )),
            (producer, (
                Q_DESC, K_DESC, V_DESC, KEYS_DESC, DIAGONALS, q_bufs, k_bufs, v_bufs, key_bufs, q_full, k_full, v_full,
                v_dirty, raw, num_cols, PACK, BLOCK_N, STAGES, Q_BUFS, DROPOUT, ALIBI,
            )),
            (scheduler, (
                raw, TILES, BAND_LIST, BANDS, COUNTER, num_tiles, num_units, units_per_batch, units_per_kv, wave,
                parts, BLOCK_N, gl.constexpr(False),
            )),
            (eraser, (v_bufs, v_full, v_dirty, raw, D, BLOCK_N, STAGES)),
        ],
        [4, 1, 1, 1],
        [CONSUMER_REGS, PRODUCER_REGS, PRODUCER_REGS, PRODUCER_REGS],
    )  # fmt: skip
