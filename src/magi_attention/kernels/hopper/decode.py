"""Attention of a few new queries to a long cache on Hopper: the work and its division as in kernels.triton.decode.

Partitions of a program: one consumer warpgroup and a producer warp that feeds a ring of K and V blocks by TMA. Both go
through the program's part of the line by the same arithmetic, so that the producer is ahead of the consumer also across
items: while one waits for queries, or puts an item together, keys of the next one come in.

A block arrives in boxes of ``BOX`` keys and 64 channels: as many keys as a page has, at most a block. Blocks of pages
begin at a box's first key. Rows of V that no query sees may hold anything; they are erased.
"""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from magi_attention.kernels.hopper.primitives import (
    LN2,
    LOG2E,
    NAMED_BARRIERS,
    named_sync,
    raw_arrive,
    raw_base,
    raw_init,
    raw_wait,
    rounded,
    tanh,
)

STEP = gl.constexpr(8)
"""Keys in a step of the line."""
SHORT = gl.constexpr(64)
"""Steps of a program that take no longer than putting an item together."""


@gluon.jit
def _sum(a, b):
    return a + b


@gluon.jit
def used_of(USED, CU_NEW, at, live, used, num_new, capacity):
    """Positions in use of sequences ``at``, new keys included: of the tensor, or else ``used`` of each."""
    length = used + at * 0
    if USED is not None:
        length = gl.load(USED + at, mask=live, other=0).to(gl.int32)
    if CU_NEW is not None:
        num_new = gl.load(CU_NEW + at + 1, mask=live, other=0) - gl.load(CU_NEW + at, mask=live, other=0)
    return gl.minimum(gl.maximum(length, 0) + num_new, capacity)


@gluon.jit
def first_of(LEFTPAD, at, live, length):
    """The first position in use."""
    first = length * 0
    if LEFTPAD is not None:
        first = gl.minimum(gl.maximum(gl.load(LEFTPAD + at, mask=live, other=0).to(gl.int32), 0), length)
    return first


@gluon.jit
def queries_of(CU_Q, at, live, num_queries):
    """(the first query, how many) of sequences ``at``."""
    begin = at * 0
    count = at * 0 + num_queries
    if CU_Q is not None:
        begin = gl.load(CU_Q + at, mask=live, other=0)
        count = gl.load(CU_Q + at + 1, mask=live, other=0) - begin
    return begin, count


@gluon.jit
def seen_of(length, first, num_queries, left, right, keep_first, full_when_one):
    """What the queries of a sequence see: (how many of the first keys, begin of the window, how many keys in all)."""
    unlimited = (left < 0) | ((full_when_one != 0) & (num_queries == 1))
    begin = gl.where(unlimited, first, gl.minimum(gl.maximum(first, length - num_queries - left), length))
    end = gl.maximum(gl.where(right < 0, length, gl.minimum(length, length + right)), begin)
    num_kept = gl.minimum(keep_first, begin - first)
    return num_kept, begin, num_kept + end - begin


@gluon.jit
def round_up(x, multiple):
    return (x + multiple - 1) // multiple * multiple


@gluon.jit
def steps_of(num_seen):
    return gl.maximum((num_seen + STEP - 1) // STEP, 1)


@gluon.jit
def share_of(steps, items, programs, MOST_PIECES: gl.constexpr):
    """(steps of a program, multiple that the steps of an item are rounded up to)."""
    line = gl.sum(steps * items, 0)
    num_items = gl.sum(items, 0)
    share = gl.maximum((line + programs - 1) // programs, 1)
    pieces = gl.minimum(gl.maximum(programs // gl.maximum(num_items, 1), 1), MOST_PIECES)
    longest = gl.max(gl.where(items > 0, steps, 1), 0)
    own_share = (longest + pieces - 1) // pieces
    is_fair = (own_share * 8 <= share * 9) | (own_share <= SHORT)
    is_own = (num_items <= programs) & is_fair
    return gl.where(is_own, own_share, share), gl.where(is_own, own_share, 1)


@gluon.jit
def line_of(lengths, sizes, programs, BLOCK_B: gl.constexpr, BLOCK_M: gl.constexpr, MOST_PIECES: gl.constexpr,
            layout: gl.constexpr):  # fmt: skip
    """(items, steps, ends in the line) of each sequence, a program's share, the multiple, the line's length."""
    USED, LEFTPAD, CU_Q, CU_NEW = lengths
    (
        batch_size,
        num_queries,
        num_heads,
        group,
        capacity,
        used,
        num_new,
        left,
        right,
        keep_first,
        full_when_one,
    ) = sizes
    entries = gl.arange(0, BLOCK_B, layout=layout)
    exists = entries < batch_size
    length = used_of(USED, CU_NEW, entries, exists, used, num_new, capacity)
    _begin, counts = queries_of(CU_Q, entries, exists, num_queries)
    first = first_of(LEFTPAD, entries, exists, length)
    _kept, _begin, seen = seen_of(length, first, counts, left, right, keep_first, full_when_one)
    items = gl.where(exists, num_heads // group * ((counts * group + BLOCK_M - 1) // BLOCK_M), 0)
    steps = steps_of(seen)
    share, multiple = share_of(steps, items, programs, MOST_PIECES)
    steps = round_up(steps, multiple) * items
    ends = gl.associative_scan(steps, 0, _sum)
    return entries, items, steps, ends, share, multiple, gl.sum(steps, 0)


@gluon.jit
def piece_at(at, stop, entries, steps, ends, multiple, lengths, sizes):
    """The piece that begins at ``at`` of the line: its sequence, item, where in the line that is, what it sees."""
    USED, LEFTPAD, CU_Q, CU_NEW = lengths
    _size, num_queries, _heads, _group, capacity, used, num_new, left, right, keep_first, full_when_one = (
        sizes
    )
    batch = gl.sum((ends <= at).to(gl.int32), 0)
    before = gl.sum(gl.where(entries < batch, steps, 0), 0)
    length = used_of(USED, CU_NEW, batch, True, used, num_new, capacity)
    first = first_of(LEFTPAD, batch, True, length)
    query_begin, count = queries_of(CU_Q, batch, True, num_queries)
    num_kept, begin, num_seen = seen_of(length, first, count, left, right, keep_first, full_when_one)
    num_steps = round_up(steps_of(num_seen), multiple)
    item = (at - before) // num_steps
    line_begin = before + item * num_steps
    line_end = line_begin + num_steps
    piece_end = gl.minimum(line_end, stop)
    # Numbers of the keys that the item sees, and where they lie: the first ones, then the window.
    from_key = (at - line_begin) * STEP
    to_key = gl.minimum((piece_end - line_begin) * STEP, num_seen)
    kept_from = first + from_key
    kept_to = first + gl.minimum(to_key, num_kept)
    window_from = begin + gl.maximum(from_key, num_kept) - num_kept
    window_to = begin + to_key - num_kept
    where = (kept_from, kept_to, window_from, window_to)
    return batch, item, line_begin, line_end, piece_end, length, first, query_begin, count, where


@gluon.jit
def box_start(column, PAGED: gl.constexpr, BOX: gl.constexpr):
    """Where the box is loaded from that begins with, or holds, a position."""
    if PAGED:
        column = column // BOX * BOX
    return column


@gluon.jit
def blocks_of(part_from, part_to, PAGED: gl.constexpr, BOX: gl.constexpr):
    """Where the blocks of keys [part_from, part_to) begin, and the end of the last one's keys; equal without keys."""
    start = box_start(part_from, PAGED, BOX)
    return start, gl.where(part_from < part_to, part_to, start)


@gluon.jit
def send_part(K_DESC, V_DESC, k_boxes, v_boxes, k_full, v_full, raw, TABLE, row, kv_head, part_from, part_to, page_size,
              num_pages, it, PAGED: gl.constexpr, BOX: gl.constexpr, BLOCK_N: gl.constexpr, HALVES: gl.constexpr,
              STAGES: gl.constexpr, lanes: gl.constexpr):  # fmt: skip
    """Load the blocks of keys [part_from, part_to) of a sequence and head."""
    BOXES: gl.constexpr = BLOCK_N // BOX
    lane = gl.arange(0, 32, layout=lanes)
    start, end = blocks_of(part_from, part_to, PAGED, BOX)
    last_box = box_start(gl.maximum(end, 1) - 1, PAGED, BOX)
    entries = lane * 0
    if PAGED:
        entries = gl.load(TABLE + gl.minimum(start + lane * BOX, last_box) // page_size)
    for column in range(start, end, BLOCK_N):
        now = entries
        if PAGED:
            # A block ahead: its loads wait for the table no longer.
            entries = gl.load(TABLE + gl.minimum(column + BLOCK_N + lane * BOX, last_box) // page_size)
        stage = it % STAGES
        raw_wait(raw + stage * 8, ((it // STAGES) & 1) ^ 1)
        mbarrier.expect(k_full.index(stage), HALVES * BOXES * K_DESC.block_type.nbytes)
        mbarrier.expect(v_full.index(stage), HALVES * BOXES * V_DESC.block_type.nbytes)
        for box in gl.static_range(BOXES):
            place = row
            slot = column
            if PAGED:
                # Boxes behind the part come from its last page: their bytes are counted, too.
                place = gl.sum(gl.where(lane == box, now, 0), 0)
                place = gl.minimum(gl.maximum(place, 0), num_pages - 1)
                slot = gl.minimum(column + box * BOX, last_box) % page_size
            for half in gl.static_range(HALVES):
                at = (stage * HALVES + half) * BOXES + box
                tma_load(K_DESC, [place, slot, kv_head, 64 * half], k_full.index(stage), k_boxes.index(at))
                tma_load(V_DESC, [place, slot, kv_head, 64 * half], v_full.index(stage), v_boxes.index(at))
        it += 1
    return it


@gluon.jit
def producer(
    K_DESC, V_DESC, k_boxes, v_boxes, k_full, v_full, raw, lengths, sizes, ROWS, TABLE, stride_table, page_size,
    num_pages,
    HAS_KEPT: gl.constexpr, BOX: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    HALVES: gl.constexpr, STAGES: gl.constexpr, MOST_PIECES: gl.constexpr,
):  # fmt: skip
    PAGED: gl.constexpr = TABLE is not None
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    entries, _items, steps, ends, share, multiple, line = line_of(
        lengths, sizes, gl.num_programs(0), BLOCK_B, BLOCK_M, MOST_PIECES, lanes
    )
    at = gl.program_id(0) * share
    stop = gl.minimum(at + share, line)
    group = sizes[3]
    it = 0
    while at < stop:
        batch, item, _line_begin, _line_end, piece_end, _length, _first, _begin, count, where = piece_at(
            at, stop, entries, steps, ends, multiple, lengths, sizes
        )
        kv_head = item // ((count * group + BLOCK_M - 1) // BLOCK_M)
        row = batch
        table = TABLE
        if ROWS is not None:
            row = gl.minimum(gl.maximum(gl.load(ROWS + batch).to(gl.int32), 0), num_pages - 1)
        if PAGED:
            table = TABLE + batch.to(gl.int64) * stride_table
        if HAS_KEPT:
            it = send_part(K_DESC, V_DESC, k_boxes, v_boxes, k_full, v_full, raw, table, row, kv_head, where[0], where[1],
                           page_size, num_pages, it, PAGED, BOX, BLOCK_N, HALVES, STAGES, lanes)  # fmt: skip
        it = send_part(K_DESC, V_DESC, k_boxes, v_boxes, k_full, v_full, raw, table, row, kv_head, where[2], where[3],
                       page_size, num_pages, it, PAGED, BOX, BLOCK_N, HALVES, STAGES, lanes)  # fmt: skip
        at = piece_end


@gluon.jit
def attend_part(
    acc, total, top, q_smem, k_bufs, v_bufs, k_full, v_full, raw, it, place, extent, slope, part_from, part_to, first,
    left, right, keep_first, scale, cap_scale,
    PAGED: gl.constexpr, BOX: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DP: gl.constexpr, STAGES: gl.constexpr, s_layout: gl.constexpr,
    o_layout: gl.constexpr,
):  # fmt: skip
    """Keys [part_from, part_to); ``place`` is the position that each row stands at, within ``extent``."""
    dtype: gl.constexpr = k_bufs.dtype
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    within = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    from_block, end = blocks_of(part_from, part_to, PAGED, BOX)
    for start in range(from_block, end, BLOCK_N):
        stage = it % STAGES
        parity = (it // STAGES) & 1
        mbarrier.wait(k_full.index(stage), parity)
        zero = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, s_layout)
        s = warpgroup_mma(q_smem, k_bufs.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        if SOFTCAP:
            s = tanh(s * cap_scale)
        s = s * scale
        column = start + within
        if ALIBI:
            distance = column[None, :] - place[:, None]
            s = s - slope[:, None] * gl.maximum(distance, -distance).to(gl.float32)
        has_strangers = (start < part_from) | (start + BLOCK_N > part_to)
        is_border = has_strangers
        if MASKED:
            is_border = is_border | ((left >= 0) & (start < extent[1] - left))
            is_border = is_border | ((right >= 0) & (start + BLOCK_N > extent[0] + right + 1))
        if is_border:
            visible = ((column >= part_from) & (column < part_to))[None, :]
            if MASKED:
                in_window = (
                    (left < 0)
                    | (column[None, :] >= place[:, None] - left)
                    | (column < first + keep_first)[None, :]
                )
                visible = visible & in_window & ((right < 0) | (column[None, :] <= place[:, None] + right))
            s = gl.where(visible, s, -float("inf"))
        new_top = gl.maximum(top, gl.max(s, 1))
        pivot = gl.where(new_top == -float("inf"), 0.0, new_top)
        p = gl.exp2(s - pivot[:, None])
        fade = gl.exp2(top - pivot)
        total = total * fade + gl.sum(p, 1)
        top = new_top
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
        mbarrier.wait(v_full.index(stage), parity)
        v_smem = v_bufs.index(stage)
        if has_strangers:
            # Zero weight times NaN is NaN.
            row = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, tile))
            keep = ((row >= part_from) & (row < part_to))[:, None]
            v = v_smem.load(tile)
            v_smem.store(gl.where(keep, v, gl.zeros([BLOCK_N, DP], dtype, tile)))
            fence_async_shared()
            named_sync(NAMED_BARRIERS, 128)
        acc = warpgroup_mma(gl.convert_layout(rounded(p, dtype), p_layout), v_smem, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        raw_arrive(raw + stage * 8)
        it += 1
    return acc, total, top, it


@gluon.jit
def merge_pieces(
    PARTS, STATS, live, line_begin, line_end, share,
    BLOCK_M: gl.constexpr, BLOCK_R: gl.constexpr, DP: gl.constexpr, AT_A_TIME: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Sums of all pieces of the item at [line_begin, line_end) of the line, of which each program has ``share`` steps."""
    row = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, layout))
    dims = gl.arange(0, DP, layout=gl.SliceLayout(0, layout))
    acc = gl.zeros([BLOCK_R, DP], gl.float32, layout)
    total = gl.zeros([BLOCK_R], gl.float32, gl.SliceLayout(1, layout))
    top = gl.full([BLOCK_R], -float("inf"), gl.float32, gl.SliceLayout(1, layout))
    last = (line_end - 1) // share
    for base in range(line_begin // share, last + 1, AT_A_TIME):
        # The loads of one turn wait for memory together.
        for offset in gl.static_range(AT_A_TIME):
            program = base + offset
            mine = live & (program <= last)
            slot = 2 * program + gl.where(program * share < line_begin, 1, 0)
            stats = STATS + slot * 2 * BLOCK_M + row
            piece_top = gl.load(stats, mask=mine, other=-float("inf"))
            piece_total = gl.load(stats + BLOCK_M, mask=mine, other=0.0)
            at = (slot * BLOCK_M + row).to(gl.int64) * DP
            piece = gl.load(PARTS + at[:, None] + dims[None, :], mask=mine[:, None], other=0.0)
            new_top = gl.maximum(top, piece_top)
            pivot = gl.where(new_top == -float("inf"), 0.0, new_top)
            fade = gl.exp2(top - pivot)
            weight = gl.exp2(piece_top - pivot)
            acc = acc * fade[:, None] + piece * weight[:, None]
            total = total * fade + piece_total * weight
            top = new_top
    return acc, total, top


@gluon.jit
def conclude(
    OUT, stride_ot, stride_oh, LSE, SINK, acc, total, top, token, head, live, num_heads, dtype: gl.constexpr,
    DV: gl.constexpr, DP: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Write out and lse of an item's rows, all in ``layout``."""
    dims = gl.arange(0, DP, layout=gl.SliceLayout(0, layout))
    if SINK is not None:
        sink = gl.load(SINK + head, mask=live, other=-float("inf")).to(gl.float32) * LOG2E
        new_top = gl.maximum(top, sink)
        pivot = gl.where(new_top == -float("inf"), 0.0, new_top)
        fade = gl.exp2(top - pivot)
        acc = acc * fade[:, None]
        total = total * fade + gl.exp2(sink - pivot)
        top = new_top
    seen = total > 0
    lse = gl.where(seen, (top + gl.log2(gl.where(seen, total, 1.0))) * LN2, -float("inf"))
    out = acc * gl.where(seen, 1.0 / gl.where(seen, total, 1.0), 0.0)[:, None]
    at = token * stride_ot + head * stride_oh
    gl.store(OUT + at[:, None] * 8 + dims[None, :], out.to(dtype), mask=live[:, None] & (dims < DV)[None, :])
    gl.store(LSE + token * num_heads + head, lse, mask=live)


@gluon.jit
def consumer(
    Q, stride_qb, stride_qt, stride_qh, OUT, stride_ot, stride_oh, LSE, SINK, SLOPES, PARTS, STATS, COUNTERS,
    q_smem, k_bufs, v_bufs, k_full, v_full, raw, lengths, sizes, scale, cap_scale,
    PAGED: gl.constexpr, HAS_KEPT: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, D: gl.constexpr,
    DV: gl.constexpr, BOX: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_R: gl.constexpr,
    BLOCK_N: gl.constexpr, DP: gl.constexpr, STAGES: gl.constexpr, AT_A_TIME: gl.constexpr, MOST_PIECES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, DP, 16])
    rows_of_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_of_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    (
        _batch_size,
        num_queries,
        num_heads,
        group,
        _capacity,
        _used,
        _new,
        left,
        right,
        keep_first,
        full_when_one,
    ) = sizes
    programs = gl.num_programs(0)
    entries, items, steps, ends, share, multiple, line = line_of(
        lengths, sizes, programs, BLOCK_B, BLOCK_M, MOST_PIECES, flat
    )
    mine = gl.program_id(0) * share
    at = mine
    stop = gl.minimum(at + share, line)
    it = 0
    while at < stop:
        batch, item, line_begin, line_end, piece_end, length, first, query_begin, count, where = piece_at(
            at, stop, entries, steps, ends, multiple, lengths, sizes
        )
        num_tiles = (count * group + BLOCK_M - 1) // BLOCK_M
        kv_head = item // num_tiles
        first_row = item % num_tiles * BLOCK_M
        num_live = count * group
        token = query_begin.to(gl.int64)
        if lengths[2] is None:
            token = batch.to(gl.int64) * num_queries

        q_row = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, tile))
        q_dim = gl.arange(0, DP, layout=gl.SliceLayout(0, tile))
        at_q = batch.to(gl.int64) * stride_qb + (query_begin + q_row // group).to(gl.int64) * stride_qt
        at_q += (kv_head * group + q_row % group) * stride_qh
        q = gl.load(Q + at_q[:, None] * 8 + q_dim[None, :], mask=(q_row < num_live)[:, None] & (q_dim < D)[None, :],
                    other=0.0)  # fmt: skip
        named_sync(NAMED_BARRIERS, 128)
        q_smem.store(q)
        fence_async_shared()
        named_sync(NAMED_BARRIERS, 128)

        row = first_row + gl.arange(0, BLOCK_M, layout=rows_of_s)
        live = row < num_live
        place = length - count + row // group
        last_row = gl.minimum(first_row + BLOCK_M, num_live) - 1
        extent = (length - count + first_row // group, length - count + last_row // group)
        slope = gl.zeros([BLOCK_M], gl.float32, rows_of_s)
        if SLOPES is not None:
            slope = LOG2E * gl.load(
                SLOPES + batch * num_heads + kv_head * group + row % group, mask=live, other=0.0
            )
        own_left = gl.where((full_when_one != 0) & (count == 1), -1, left)
        acc = gl.zeros([BLOCK_M, DP], gl.float32, o_layout)
        total = gl.zeros([BLOCK_M], gl.float32, rows_of_s)
        top = gl.full([BLOCK_M], -float("inf"), gl.float32, rows_of_s)
        if HAS_KEPT:
            acc, total, top, it = attend_part(
                acc, total, top, q_smem, k_bufs, v_bufs, k_full, v_full, raw, it, place, extent, slope, where[0],
                where[1], first, own_left, right, keep_first, scale, cap_scale, PAGED, BOX, MASKED, SOFTCAP,
                SLOPES is not None, BLOCK_M, BLOCK_N, DP, STAGES, s_layout, o_layout,
            )  # fmt: skip
        acc, total, top, it = attend_part(
            acc, total, top, q_smem, k_bufs, v_bufs, k_full, v_full, raw, it, place, extent, slope, where[2],
            where[3], first, own_left, right, keep_first, scale, cap_scale, PAGED, BOX, MASKED, SOFTCAP,
            SLOPES is not None, BLOCK_M, BLOCK_N, DP, STAGES, s_layout, o_layout,
        )  # fmt: skip

        if (at == line_begin) & (piece_end == line_end):
            o_row = first_row + gl.arange(0, BLOCK_M, layout=rows_of_o)
            conclude(OUT, stride_ot, stride_oh, LSE, SINK, acc, gl.convert_layout(total, rows_of_o),
                     gl.convert_layout(top, rows_of_o), token + o_row // group, kv_head * group + o_row % group,
                     o_row < num_live, num_heads, dtype, DV, DP, o_layout)  # fmt: skip
        else:
            slot = 2 * gl.program_id(0) + gl.where(mine < line_begin, 1, 0)
            s_rows = gl.arange(0, BLOCK_M, layout=rows_of_s)
            gl.store(STATS + slot * 2 * BLOCK_M + s_rows, top, mask=live)
            gl.store(STATS + slot * 2 * BLOCK_M + BLOCK_M + s_rows, total, mask=live)
            o_rows = gl.arange(0, BLOCK_M, layout=rows_of_o)
            o_dims = gl.arange(0, DP, layout=gl.SliceLayout(0, o_layout))
            at_part = (slot * BLOCK_M + o_rows).to(gl.int64) * DP
            gl.store(
                PARTS + at_part[:, None] + o_dims[None, :], acc, mask=(first_row + o_rows < num_live)[:, None]
            )
            named_sync(NAMED_BARRIERS, 128)
            others = (line_end - 1) // share - line_begin // share
            counter = COUNTERS + gl.sum(gl.where(entries < batch, items, 0), 0) + item
            if gl.atomic_add(counter, 1, sem="acq_rel") == others:
                gl.store(counter, 0)
                few = first_row + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, wide))
                is_row = few < num_live
                merged, weight, largest = merge_pieces(
                    PARTS, STATS, is_row, line_begin, line_end, share, BLOCK_M, BLOCK_R, DP, AT_A_TIME, wide
                )
                conclude(OUT, stride_ot, stride_oh, LSE, SINK, merged, weight, largest, token + few // group,
                         kv_head * group + few % group, is_row, num_heads, dtype, DV, DP, wide)  # fmt: skip
        at = piece_end


_SIZES = [
    *("batch_size", "num_queries", "num_heads", "group", "page_size", "num_pages", "capacity", "used", "num_new"),
    *("left", "right", "keep_first", "full_when_one", "stride_qb", "stride_qt", "stride_qh", "stride_ot"),
    *("stride_oh", "stride_table"),
]  # fmt: skip


@gluon.jit(do_not_specialize=_SIZES)
def decode_kernel(
    K_DESC, V_DESC,  # (rows or pages, positions, HK, D) in boxes (1, BOX, 1, 64)
    Q, stride_qb, stride_qt, stride_qh,  # strides in units of 8 elements
    OUT, stride_ot, stride_oh,  # (tokens, H, DV)
    LSE,  # fp32 (tokens, H)
    USED, LEFTPAD, ROWS,  # integers (B,), or None
    CU_Q, CU_NEW,  # int32 (B + 1,), or None: num_queries and num_new of each sequence
    TABLE, stride_table,  # int32 (B, blocks), or None
    SINK,  # (H,), or None
    SLOPES,  # fp32 (B, H), contiguous, or None
    PARTS, STATS,  # fp32 (programs, 2, BLOCK_M, DP) and (programs, 2, 2, BLOCK_M)
    COUNTERS,  # int32, one an item, 0 before and after
    batch_size, num_queries, num_heads, group, page_size, num_pages, capacity, used, num_new,
    left, right, keep_first, full_when_one, scale, cap_scale,
    HAS_KEPT: gl.constexpr, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BOX: gl.constexpr, BLOCK_B: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_N: gl.constexpr,
    DP: gl.constexpr, STAGES: gl.constexpr, AT_A_TIME: gl.constexpr, MOST_PIECES: gl.constexpr,
    PRODUCER_REGS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = K_DESC.dtype
    HALVES: gl.constexpr = DP // 64
    operand: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_smem = gl.allocate_shared_memory(dtype, [BLOCK_M, DP], operand)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DP], operand)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DP], operand)
    boxes: gl.constexpr = [STAGES * HALVES * (BLOCK_N // BOX), 1, BOX, 1, 64]
    k_boxes = reinterpret(k_bufs, dtype, boxes, K_DESC.layout)
    v_boxes = reinterpret(v_bufs, dtype, boxes, V_DESC.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    raw = raw_base()
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        raw_init(raw + s * 8, 4)
    fence_async_shared()
    lengths = (USED, LEFTPAD, CU_Q, CU_NEW)
    sizes = (
        batch_size, num_queries, num_heads, group, capacity, used, num_new, left, right, keep_first, full_when_one,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consumer, (
                Q, stride_qb, stride_qt, stride_qh, OUT, stride_ot, stride_oh, LSE, SINK, SLOPES, PARTS, STATS, COUNTERS,
                q_smem, k_bufs, v_bufs, k_full, v_full, raw, lengths, sizes, scale, cap_scale,
                TABLE is not None, HAS_KEPT, MASKED, SOFTCAP, D, DV, BOX, BLOCK_B, BLOCK_M, BLOCK_R, BLOCK_N, DP, STAGES,
                AT_A_TIME, MOST_PIECES,
            )),
            (producer, (
                K_DESC, V_DESC, k_boxes, v_boxes, k_full, v_full, raw, lengths, sizes, ROWS, TABLE, stride_table,
                page_size, num_pages, HAS_KEPT, BOX, BLOCK_B, BLOCK_M, BLOCK_N, HALVES, STAGES, MOST_PIECES,
            )),
        ],
        [1],
        [PRODUCER_REGS],
    )  # fmt: skip
