"""Attention of a few new queries to a long cache of keys, with the keys shared out evenly over persistent programs.

An item is one tile of rows of one sequence and key head: BLOCK_M rows, new queries times the heads that share the key
head. The keys that all items see lie in one line, STEP a step, sequence after sequence, and program p of P has the p-th
part of it: every program works equally long whatever the lengths, which are known to the device only. An item that
several programs share is put together by the one that arrives last.

Keys lie in rows of a cache, or in pages of any size of which a table gives each sequence its own. Positions that are not
in use, and pages that no sequence has, are never read: they may hold NaN. Lengths, rows and pages beyond the cache are
cut off at its end.

Strides are in units of ``UNIT`` elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from magi_attention.kernels.triton.primitives import LN2, LOG2E, tanh

STEP = tl.constexpr(8)
"""Keys in a step of the line."""
SHORT = tl.constexpr(64)
"""Steps of a program that take no longer than putting an item together."""


@triton.jit
def used_of(USED, CU_NEW, at, live, used, num_new, capacity):
    """Positions in use of sequences ``at``, new keys included: of the tensor, or else ``used`` of each."""
    length = used + at * 0
    if USED is not None:
        length = tl.load(USED + at, mask=live, other=0).to(tl.int32)
    if CU_NEW is not None:
        num_new = tl.load(CU_NEW + at + 1, mask=live, other=0) - tl.load(CU_NEW + at, mask=live, other=0)
    return tl.minimum(tl.maximum(length, 0) + num_new, capacity)


@triton.jit
def first_of(LEFTPAD, at, live, length):
    """The first position in use."""
    first = length * 0
    if LEFTPAD is not None:
        first = tl.minimum(tl.maximum(tl.load(LEFTPAD + at, mask=live, other=0), 0), length)
    return first


@triton.jit
def queries_of(CU_Q, at, live, num_queries):
    """(the first query, how many) of sequences ``at``."""
    begin, count = at * 0, at * 0 + num_queries
    if CU_Q is not None:
        begin = tl.load(CU_Q + at, mask=live, other=0)
        count = tl.load(CU_Q + at + 1, mask=live, other=0) - begin
    return begin, count


@triton.jit
def seen_of(length, first, num_queries, left, right, keep_first, full_when_one):
    """What the queries of a sequence see of its keys: (how many of the first ones, begin of the window, how many in all).

    Query i stands at length - num_queries + i.
    """
    unlimited = (left < 0) | ((full_when_one != 0) & (num_queries == 1))
    begin = tl.where(unlimited, first, tl.minimum(tl.maximum(first, length - num_queries - left), length))
    end = tl.maximum(tl.where(right < 0, length, tl.minimum(length, length + right)), begin)
    num_kept = tl.minimum(keep_first, begin - first)
    return num_kept, begin, num_kept + end - begin


@triton.jit
def steps_of(num_seen):
    """How many steps of the line ``num_seen`` keys are. A sequence that sees nothing has one: somebody must say so."""
    return tl.maximum((num_seen + STEP - 1) // STEP, 1)


@triton.jit
def round_up(x, multiple):
    return (x + multiple - 1) // multiple * multiple


@triton.jit
def share_of(steps, items, programs, MOST_PIECES: tl.constexpr):
    """(steps of a program, multiple that the steps of an item are rounded up to) for ``items`` of ``steps`` each.

    A program that works on two items waits twice. Where there are few of them, and of much the same length, each gets
    programs of its own; otherwise the line is cut without regard to them.
    """
    line, num_items = tl.sum(steps * items, 0), tl.sum(items, 0)
    share = tl.maximum((line + programs - 1) // programs, 1)
    pieces = tl.minimum(tl.maximum(programs // tl.maximum(num_items, 1), 1), MOST_PIECES)
    longest = tl.max(tl.where(items > 0, steps, 1), 0)
    own_share = (longest + pieces - 1) // pieces
    is_fair = (own_share * 8 <= share * 9) | (own_share <= SHORT)
    is_own = (num_items <= programs) & is_fair
    return tl.where(is_own, own_share, share), tl.where(is_own, own_share, 1)


@triton.jit
def columns(index, first, num_kept, begin, HAS_KEPT: tl.constexpr):
    """Positions of the keys that a sequence sees, by their number: the first ones, then the window."""
    cols = begin + index - num_kept
    if HAS_KEPT:
        cols = tl.where(index < num_kept, first + index, cols)
    return cols


@triton.jit
def pages_at(TABLE, cols, live, page_size, PAGE_SIZE: tl.constexpr):
    """The table's entries for positions of a sequence."""
    if PAGE_SIZE > 0:
        page_size = PAGE_SIZE
    return tl.load(TABLE + cols // page_size, mask=live, other=0)


@triton.jit
def load_keys(X, page, num_pages, cols, live, cache_row, page_size, stride_b, stride_t, dims,
              PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr, SCATTERED: tl.constexpr, D: tl.constexpr,
              UNIT: tl.constexpr):  # fmt: skip
    """Keys or values of a block, zeros where not ``live``."""
    if PAGED:
        if PAGE_SIZE > 0:
            page_size = PAGE_SIZE
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        at = page.to(tl.int64) * (stride_b * UNIT) + (cols % page_size) * (stride_t * UNIT)
        pointers = X + at[:, None] + dims[None, :]
    elif SCATTERED:
        at = cache_row.to(tl.int64) * stride_b + cols.to(tl.int64) * stride_t
        pointers = X + at[:, None] * UNIT + dims[None, :]
    else:
        # One 64-bit address; the offsets in the block are the same for every block of the loop.
        start = cache_row.to(tl.int64) * stride_b + tl.min(cols, 0).to(tl.int64) * stride_t
        offset = tl.arange(0, cols.shape[0])[:, None] * (stride_t * UNIT) + dims[None, :]
        pointers = X + start * UNIT + offset
    if dims.shape[0] == D:
        return tl.load(pointers, mask=live[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=live[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def attend_piece(
    acc, total, top, q, place, slope, K, stride_kb, stride_kt, V, stride_vb, stride_vt, TABLE, cache_row, page_size,
    num_pages, first, num_kept, begin, piece_begin, piece_end, left, right, keep_first, scale, softcap,
    PAGE_SIZE: tl.constexpr, HAS_KEPT: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [piece_begin, piece_end) of those that an item sees; ``place`` is the position that each row stands at."""
    PAGED: tl.constexpr = TABLE is not None
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    within = tl.arange(0, BLOCK_N)
    next_page = within
    if PAGED:
        cols = columns(piece_begin + within, first, num_kept, begin, HAS_KEPT)
        next_page = pages_at(TABLE, cols, piece_begin + within < piece_end, page_size, PAGE_SIZE)
    for start in range(piece_begin, piece_end, BLOCK_N):
        cols = columns(start + within, first, num_kept, begin, HAS_KEPT)
        live = start + within < piece_end
        page = next_page
        if PAGED:
            # A block ahead: the keys wait for it no longer.
            later = start + BLOCK_N + within
            next_page = pages_at(
                TABLE, columns(later, first, num_kept, begin, HAS_KEPT), later < piece_end, page_size, PAGE_SIZE
            )  # fmt: skip
        k = load_keys(K, page, num_pages, cols, live, cache_row, page_size, stride_kb, stride_kt, dims, PAGED,
                      PAGE_SIZE, HAS_KEPT, D, UNIT)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = softcap * LOG2E * tanh(s * (scale / softcap))
        else:
            s = s * (scale * LOG2E)
        if ALIBI:
            s = s - slope[:, None] * tl.abs(cols[None, :] - place[:, None]).to(tl.float32)
        visible = live[None, :]
        if MASKED:
            in_window = (
                (left < 0) | (cols[None, :] >= place[:, None] - left) | (cols < first + keep_first)[None, :]
            )
            visible = visible & in_window & ((right < 0) | (cols[None, :] <= place[:, None] + right))
        s = tl.where(visible, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - pivot[:, None])
        fade = tl.exp2(top - pivot)
        total = total * fade + tl.sum(p, 1)
        v = load_keys(V, page, num_pages, cols, live, cache_row, page_size, stride_vb, stride_vt, dims_v, PAGED,
                      PAGE_SIZE, HAS_KEPT, DV, UNIT)  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def merge_pieces(
    PARTS, STATS, live, line_begin, line_end, share,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr, AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """Sums of all pieces of the item at [line_begin, line_end) of the line, of which each program has ``share`` steps.

    A program's first item is in its first slot, its last one, if another, in the second.
    """
    row, dims_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    last = (line_end - 1) // share
    for base in range(line_begin // share, last + 1, AT_A_TIME):
        # The loads of one turn wait for memory together.
        for offset in tl.static_range(AT_A_TIME):
            program = base + offset
            mine = live & (program <= last)
            slot = 2 * program + tl.where(program * share < line_begin, 1, 0)
            stats = STATS + slot * 2 * BLOCK_M + row
            piece_top = tl.load(stats, mask=mine, other=float("-inf"))
            piece_total = tl.load(stats + BLOCK_M, mask=mine, other=0.0)
            at = (slot * BLOCK_M + row).to(tl.int64) * BLOCK_DV
            piece = tl.load(PARTS + at[:, None] + dims_v[None, :], mask=mine[:, None], other=0.0)
            new_top = tl.maximum(top, piece_top)
            pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
            fade, weight = tl.exp2(top - pivot), tl.exp2(piece_top - pivot)
            acc = acc * fade[:, None] + piece * weight[:, None]
            total = total * fade + piece_total * weight
            top = new_top
    return acc, total, top


@triton.jit
def conclude(
    OUT, stride_ot, stride_oh, LSE, SINK, acc, total, top, token, head, live, num_heads,
    DV: tl.constexpr, UNIT: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Write out and lse of an item's rows."""
    dims_v = tl.arange(0, BLOCK_DV)
    if SINK is not None:
        sink = tl.load(SINK + head, mask=live, other=float("-inf")).to(tl.float32) * LOG2E
        new_top = tl.maximum(top, sink)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - pivot)
        acc, total, top = acc * fade[:, None], total * fade + tl.exp2(sink - pivot), new_top
    seen = total > 0
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    out = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    at = token * stride_ot + head * stride_oh
    tl.store(OUT + at[:, None] * UNIT + dims_v[None, :], out.to(OUT.dtype.element_ty),
             mask=live[:, None] & (dims_v < DV)[None, :])  # fmt: skip
    tl.store(LSE + token * num_heads + head, lse, mask=live)


_SIZES = [
    *("batch_size", "num_queries", "num_heads", "group", "page_size", "num_pages", "capacity", "used", "num_new"),
    *("left", "right", "keep_first", "full_when_one", "stride_qb", "stride_qt", "stride_qh", "stride_ot"),
    *("stride_oh", "stride_kb", "stride_kt", "stride_kh", "stride_vb", "stride_vt", "stride_vh", "stride_table"),
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def decode_kernel(
    Q, stride_qb, stride_qt, stride_qh, K, stride_kb, stride_kt, stride_kh, V, stride_vb, stride_vt, stride_vh,
    OUT, stride_ot, stride_oh,  # (tokens, H, DV)
    LSE,  # fp32 (tokens, H)
    USED, LEFTPAD, ROWS,  # integers (B,), or None
    CU_Q, CU_NEW,  # int32 (B + 1,), or None: num_queries and num_new of each sequence
    TABLE, stride_table,  # int32 (B, blocks), or None
    SINK,  # (H,), or None
    SLOPES,  # fp32 (B, H), contiguous
    PARTS, STATS,  # fp32 (programs, 2, BLOCK_M, BLOCK_DV) and (programs, 2, 2, BLOCK_M)
    COUNTERS,  # int32, one an item, 0 before and after
    batch_size, num_queries, num_heads, group, page_size, num_pages, capacity, used, num_new,
    left, right, keep_first, full_when_one,
    scale: tl.float32, softcap: tl.float32,
    PAGE_SIZE: tl.constexpr, HAS_KEPT: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, UNIT: tl.constexpr, UNIT_O: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, AT_A_TIME: tl.constexpr, MOST_PIECES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        # The launch itself overlaps with the end of what the stream runs before, and that of what comes after with this.
        gdc_wait()
        gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    entries = tl.arange(0, BLOCK_B)
    exists = entries < batch_size
    lengths = used_of(USED, CU_NEW, entries, exists, used, num_new, capacity)
    _, counts = queries_of(CU_Q, entries, exists, num_queries)
    firsts = first_of(LEFTPAD, entries, exists, lengths)
    _, _, seen = seen_of(lengths, firsts, counts, left, right, keep_first, full_when_one)
    items = tl.where(exists, num_heads // group * ((counts * group + BLOCK_M - 1) // BLOCK_M), 0)
    steps = steps_of(seen)
    share, multiple = share_of(steps, items, programs, MOST_PIECES)
    steps = round_up(steps, multiple) * items
    ends = tl.cumsum(steps, 0)
    line = tl.sum(steps, 0)
    at, stop = program * share, tl.minimum((program + 1) * share, line)
    mine = at
    while at < stop:
        batch = tl.sum((ends <= at).to(tl.int32), 0)
        length = used_of(USED, CU_NEW, batch, True, used, num_new, capacity)
        first = first_of(LEFTPAD, batch, True, length)
        query_begin, count = queries_of(CU_Q, batch, True, num_queries)
        num_kept, begin, num_seen = seen_of(length, first, count, left, right, keep_first, full_when_one)
        before = tl.sum(tl.where(entries < batch, steps, 0), 0)
        num_steps = round_up(steps_of(num_seen), multiple)
        item = (at - before) // num_steps
        line_begin = before + item * num_steps
        line_end = line_begin + num_steps
        piece_end = tl.minimum(line_end, stop)
        num_tiles = (count * group + BLOCK_M - 1) // BLOCK_M
        kv_head = item // num_tiles
        first_row = item % num_tiles * BLOCK_M
        row = first_row + tl.arange(0, BLOCK_M)
        live = row < count * group
        query, head = row // group, kv_head * group + row % group
        dims = tl.arange(0, BLOCK_D)
        at_q = (
            batch.to(tl.int64) * stride_qb + (query_begin + query).to(tl.int64) * stride_qt + head * stride_qh
        )
        q = tl.load(
            Q + at_q[:, None] * UNIT + dims[None, :], mask=live[:, None] & (dims < D)[None, :], other=0.0
        )
        slope = tl.zeros([BLOCK_M], tl.float32)
        if SLOPES is not None:
            slope = LOG2E * tl.load(SLOPES + batch * num_heads + head, mask=live, other=0.0)
        cache_row, table = batch, TABLE
        if ROWS is not None:
            cache_row = tl.minimum(tl.maximum(tl.load(ROWS + batch).to(tl.int32), 0), num_pages - 1)
        if TABLE is not None:
            table = TABLE + batch.to(tl.int64) * stride_table
        own_left = tl.where((full_when_one != 0) & (count == 1), -1, left)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        acc, total, top = attend_piece(
            acc, total, top, q, length - count + query, slope, K + kv_head.to(tl.int64) * stride_kh * UNIT, stride_kb,
            stride_kt, V + kv_head.to(tl.int64) * stride_vh * UNIT, stride_vb, stride_vt, table, cache_row, page_size,
            num_pages, first, num_kept, begin, (at - line_begin) * STEP,
            tl.minimum((piece_end - line_begin) * STEP, num_seen), own_left, right, keep_first, scale, softcap,
            PAGE_SIZE, HAS_KEPT, MASKED, SOFTCAP, SLOPES is not None, D, DV, UNIT, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
        token = query_begin.to(tl.int64)
        if CU_Q is None:
            token = batch.to(tl.int64) * num_queries
        if (at == line_begin) & (piece_end == line_end):
            conclude(OUT, stride_ot, stride_oh, LSE, SINK, acc, total, top, token + query, head, live, num_heads, DV,
                     UNIT_O, BLOCK_DV)  # fmt: skip
        else:
            slot = 2 * program + tl.where(mine < line_begin, 1, 0)
            rows, dims_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
            tl.store(STATS + slot * 2 * BLOCK_M + rows, top, mask=live)
            tl.store(STATS + slot * 2 * BLOCK_M + BLOCK_M + rows, total, mask=live)
            at_part = (slot * BLOCK_M + rows).to(tl.int64) * BLOCK_DV
            tl.store(PARTS + at_part[:, None] + dims_v[None, :], acc, mask=live[:, None])
            tl.debug_barrier()
            others = (line_end - 1) // share - line_begin // share
            counter = COUNTERS + tl.sum(tl.where(entries < batch, items, 0), 0) + item
            if tl.atomic_add(counter, 1, sem="acq_rel") == others:
                tl.store(counter, 0)
                few = first_row + tl.arange(0, BLOCK_R)
                is_row = few < count * group
                merged, weight, largest = merge_pieces(
                    PARTS, STATS, is_row, line_begin, line_end, share, BLOCK_M, BLOCK_R, BLOCK_DV, AT_A_TIME
                )
                conclude(OUT, stride_ot, stride_oh, LSE, SINK, merged, weight, largest, token + few // group,
                         kv_head * group + few % group, is_row, num_heads, DV, UNIT_O, BLOCK_DV)  # fmt: skip
        at = piece_end
