"""The end of a tile in the Hopper forward: log-sum-exp, sink, an earlier result, and the way out."""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import gl, gluon, tma_store, tma_store_wait
from magi_attention.kernels.hopper.primitives import LN2, LOG2E, fence_proxy, get_words

STAGED_COLUMNS = gl.constexpr(128)


@gluon.jit
def conclude(
    SINK, stride_sb, stride_st, stride_sh, LSE, MAX_LOGITS, pivot, total, tile_words, num_rows, num_heads,
    W: gl.constexpr, PACK: gl.constexpr, HAS_SINK: gl.constexpr, HAS_MAX: gl.constexpr, ACCUMULATE: gl.constexpr,
    rows: gl.constexpr,
):  # fmt: skip
    """lse of a tile, sink and earlier result included; what its accumulators and what the earlier rows are weighed by."""
    row_begin, row_end, batch, head = get_words(tile_words)
    packed = gl.arange(0, 64, layout=rows)
    row = row_begin + W * (64 // PACK) + packed // PACK
    live = row < row_end
    head_of_row = head + packed % PACK
    if HAS_MAX:
        at_head = gl.where(live, pivot * LN2, -float("inf"))
        gl.atomic_max(MAX_LOGITS + head_of_row, at_head, mask=at_head > -float("inf"), sem="relaxed")
    weight = gl.full([64], 1.0, gl.float32, rows)
    if HAS_SINK:
        at_sink = (
            batch.to(gl.int64) * stride_sb
            + row.to(gl.int64) * stride_st
            + head_of_row.to(gl.int64) * stride_sh
        )
        sink = gl.load(SINK + at_sink, mask=live, other=-float("inf")) * LOG2E
        peak = gl.maximum(pivot, sink)
        base = gl.where(peak == -float("inf"), 0.0, peak)
        weight = gl.exp2(pivot - base)
        total = total * weight + gl.exp2(sink - base)
        pivot = peak
    at_lse = (batch.to(gl.int64) * num_rows + row) * num_heads + head_of_row
    share = gl.zeros([64], gl.float32, rows)
    if ACCUMULATE:
        earlier = gl.load(LSE + at_lse, mask=live, other=-float("inf")) * LOG2E
        peak = gl.maximum(pivot, earlier)
        base = gl.where(peak == -float("inf"), 0.0, peak)
        fade = gl.exp2(pivot - base)
        share = gl.exp2(earlier - base)
        weight = weight * fade
        total = total * fade + share
        pivot = peak
    seen = total > 0.0
    lse = gl.where(seen, (pivot + gl.log2(total)) * LN2, -float("inf"))
    gl.store(LSE + at_lse, lse, mask=live)
    return gl.where(seen, weight / total, 0.0), gl.where(seen, share / total, 0.0)


@gluon.jit
def rows_of_out(OUT, stride_ob, stride_ot, stride_oh, batch, head, first_row, row_end,
                PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Pointers to a warpgroup's rows, and which of them are before ``row_end``; strides in units of 8 elements."""
    packed = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    row = first_row + packed // PACK
    column = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = (
        row.to(gl.int64) * stride_ot
        + (head + packed % PACK).to(gl.int64) * stride_oh
        + batch.to(gl.int64) * stride_ob
    )
    return OUT + at[:, None] * 8 + column[None, :], (row < row_end)[:, None] & (column < DV)[None, :]


@gluon.jit
def stage_out(O_DESC, o_bufs, out, batch, first_row, head, column, W: gl.constexpr):
    """Send the columns from ``column`` on of a warpgroup's rows out through its stage, once that has been read."""
    tma_store_wait(0)
    o_bufs.index(W).reshape((64, out.shape[1])).store(out)
    fence_proxy()
    tma_store(O_DESC, [batch, first_row, head, column], o_bufs.index(W))


@gluon.jit
def store_out(
    O_DESC, OUT, stride_ob, stride_ot, stride_oh, o_bufs, out, tile_words,
    W: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, STAGED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Write a warpgroup's rows of a finished tile."""
    row_begin, row_end, batch, head = get_words(tile_words)
    first_row = row_begin + W * (64 // PACK)
    if STAGED:
        staged = first_row + 64 // PACK <= row_end
    else:
        staged = False
    if staged:
        if D > STAGED_COLUMNS:  # there is room for half of the columns
            left, right = out.reshape([64, 2, STAGED_COLUMNS]).permute([0, 2, 1]).split()
            stage_out(O_DESC, o_bufs, left, batch, first_row, head, 0, W)
            stage_out(O_DESC, o_bufs, right, batch, first_row, head, STAGED_COLUMNS, W)
        else:
            stage_out(O_DESC, o_bufs, out, batch, first_row, head, 0, W)
    else:  # rows of the next tile must stay untouched
        at, live = rows_of_out(
            OUT, stride_ob, stride_ot, stride_oh, batch, head, first_row, row_end, PACK, D, DV, layout
        )
        gl.store(at, out, mask=live)


@gluon.jit
def add_out(OUT, stride_ob, stride_ot, stride_oh, out, share, tile_words,
            W: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Add ``share`` of the rows that OUT (fp32) holds, and write the sum there."""
    row_begin, row_end, batch, head = get_words(tile_words)
    first_row = row_begin + W * (64 // PACK)
    at, live = rows_of_out(
        OUT, stride_ob, stride_ot, stride_oh, batch, head, first_row, row_end, PACK, D, DV, layout
    )
    # Rows without an earlier result may hold anything.
    earlier = gl.load(at, mask=live & (share > 0.0)[:, None], other=0.0)
    gl.store(at, out + earlier * share[:, None], mask=live)
