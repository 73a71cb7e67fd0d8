"""What both backward kernels do with their operands: messages, loads, rows beyond a run, masks, the order of dQ."""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import gl, gluon, mbarrier, reinterpret, tma_load
from magi_attention.kernels.hopper.primitives import (
    erase_rows,
    fence_proxy,
    get_word,
    get_words,
    put_words,
)

# Messages: tile (32 bytes a slot), Q block (32 a stage), rows to erase (16 a slot), where dQ goes (4 a slot).
TILE_WORDS = gl.constexpr(512)
BLOCK_WORDS = gl.constexpr(512 + 64)
ERASE_WORDS = gl.constexpr(512 + 192)
DQ_WORDS = gl.constexpr(512 + 320)
# Unread at most: one each for K and V, those in the rings of Q and dO, and the last one.
ERASE_SLOTS = gl.constexpr(8)
DQ_SLOTS = gl.constexpr(8)
# Where dQ goes is its block's number times DQ_STATES plus what ``claim`` said. A block's state: whether it is claimed,
# and which parts of it the one who claimed it has stored: all of it, or one of two halves.
DQ_STATES = gl.constexpr(8)
DQ_STORED = gl.constexpr(2)
# What to erase.
ERASE_K = gl.constexpr(0)
ERASE_V = gl.constexpr(1)
ERASE_Q = gl.constexpr(2)
ERASE_DO = gl.constexpr(3)

# What cuts a block: the upper diagonal or the run's end, the lower one or the run's beginning, the tile's end.
CUT_ABOVE = gl.constexpr(1)
CUT_BELOW = gl.constexpr(2)
CUT_ROWS = gl.constexpr(4)


@gluon.jit
def send_q(
    Q_DESC, STATS_DESC, q_bufs, stats_bufs, q_full, dirty, raw, batch, head, column, begin, end, q_tile, stage, erased,
    BLOCK_Q: gl.constexpr,
):  # fmt: skip
    """Load a block of Q and its tile of statistics, by way of the eraser when rows before ``begin`` or from ``end`` on
    are not the run's."""
    nbytes: gl.constexpr = Q_DESC.block_type.nbytes + STATS_DESC.block_type.nbytes
    first_statistic = q_tile * STATS_DESC.block_type.shape[0]
    if (begin > 0) | (end < BLOCK_Q):
        slot = erased % ERASE_SLOTS
        put_words(raw + ERASE_WORDS + slot * 16, ERASE_Q, stage, begin, end)
        mbarrier.expect(dirty.index(slot), nbytes)
        tma_load(Q_DESC, [batch, column, head, 0], dirty.index(slot), q_bufs.index(stage))
        tma_load(STATS_DESC, [first_statistic], dirty.index(slot), stats_bufs.index(stage))
        erased += 1
    else:
        mbarrier.expect(q_full.index(stage), nbytes)
        tma_load(Q_DESC, [batch, column, head, 0], q_full.index(stage), q_bufs.index(stage))
        tma_load(STATS_DESC, [first_statistic], q_full.index(stage), stats_bufs.index(stage))
    return erased


@gluon.jit
def send_operand(DESC, bufs, full, dirty, raw, batch, first, head, column, begin, end, stage, erased,
                 KIND: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Load ROWS rows from ``column`` on, by way of the eraser when some of them do not belong to the tile or the run."""
    if (begin > 0) | (end < ROWS):
        slot = erased % ERASE_SLOTS
        put_words(raw + ERASE_WORDS + slot * 16, KIND, stage, begin, end)
        mbarrier.expect(dirty.index(slot), DESC.block_type.nbytes)
        tma_load(DESC, [batch, first, head, column], dirty.index(slot), bufs.index(stage))
        erased += 1
    else:
        mbarrier.expect(full.index(stage), DESC.block_type.nbytes)
        tma_load(DESC, [batch, first, head, column], full.index(stage), bufs.index(stage))
    return erased


@gluon.jit
def eraser(
    k_bufs, v_bufs, q_bufs, do_bufs, stats_bufs, k_full, v_full, q_full, do_full, dirty, raw,
    D: gl.constexpr, DO_COLUMNS: gl.constexpr, BLOCK_K: gl.constexpr, BLOCK_Q: gl.constexpr,
    Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
):  # fmt: skip
    """Zero operand rows beyond their tile or run, between their arrival and their announcement to the consumers.

    All four operands and delta: a weight of zero times NaN would be NaN. A buffer of dO has DO_COLUMNS columns.
    """
    SLICES: gl.constexpr = D // 64
    DO_SLICES: gl.constexpr = DO_COLUMNS // 64
    K_GROUPS: gl.constexpr = BLOCK_K // 8 * SLICES
    Q_GROUPS: gl.constexpr = BLOCK_Q // 8 * SLICES
    DO_GROUPS: gl.constexpr = BLOCK_Q // 8 * DO_SLICES
    part: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_groups = reinterpret(k_bufs, k_bufs.dtype, [K_GROUPS, 8, 64], part)
    v_groups = reinterpret(v_bufs, v_bufs.dtype, [K_GROUPS, 8, 64], part)
    q_groups = reinterpret(q_bufs, q_bufs.dtype, [Q_STAGES * Q_GROUPS, 8, 64], part)
    do_groups = reinterpret(do_bufs, do_bufs.dtype, [DO_STAGES * DO_GROUPS, 8, 64], part)
    done = 0
    kind = 0
    while kind >= 0:
        slot = done % ERASE_SLOTS
        mbarrier.wait(dirty.index(slot), (done // ERASE_SLOTS) & 1)
        kind, stage, begin, end = get_words(raw + ERASE_WORDS + slot * 16)
        if kind == ERASE_K:
            erase_rows(k_groups, 0, begin, end, BLOCK_K, SLICES)
            fence_proxy()
            mbarrier.arrive(k_full.index(0), count=1)
        if kind == ERASE_V:
            erase_rows(v_groups, 0, begin, end, BLOCK_K, SLICES)
            fence_proxy()
            mbarrier.arrive(v_full.index(0), count=1)
        if kind == ERASE_Q:
            erase_rows(q_groups, stage * Q_GROUPS, begin, end, BLOCK_Q, SLICES)
            line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
            row = gl.arange(0, BLOCK_Q, layout=line)
            delta_smem = stats_bufs.index(stage).slice(BLOCK_Q, BLOCK_Q, dim=0)
            delta_smem.store(gl.where((row >= begin) & (row < end), delta_smem.load(line), 0.0))
            fence_proxy()
            mbarrier.arrive(q_full.index(stage), count=1)
        if kind == ERASE_DO:
            erase_rows(do_groups, stage * DO_GROUPS, begin, end, BLOCK_Q, DO_SLICES)
            fence_proxy()
            mbarrier.arrive(do_full.index(stage), count=1)
        done += 1


@gluon.jit
def hide(p, tile_words, block_words, first_row: gl.constexpr, PACK: gl.constexpr, BLOCK_Q: gl.constexpr,
         layout: gl.constexpr):  # fmt: skip
    """Weights of 64 keys of a partial block, from the tile's ``first_row`` on: 0 where the band shows nothing.

    The messages are read here to spare registers.
    """
    _, row_begin, row_end, _ = get_words(tile_words)
    lo, hi, end, cuts = get_words(block_words)  # relative to the block's first query
    begin = get_word(block_words + 16)
    row = row_begin + first_row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, layout)) // PACK
    above = gl.where(row < row_end, gl.minimum(row + hi, end), -1)
    p = gl.where(column[None, :] <= above[:, None], p, 0.0)
    if (cuts & CUT_BELOW) != 0:
        p = gl.where(column[None, :] >= gl.maximum(row + lo, begin)[:, None], p, 0.0)
    return p


@gluon.jit
def in_lines(x):
    """A (64, 64) fp32 accumulator as (128, 32), in the order in which registers hold it.

    It has row = 16 warp + 8 h + r and column = 8 j + 2 c + p in a thread of (warp, r, c); the order is
    (j, warp, r, c, h, p): whole vectors a thread, no bank conflicts, and one address for all of them.
    """
    lines: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    x = x.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([128, 32])
    return gl.convert_layout(x, lines, assert_trivial=True)
