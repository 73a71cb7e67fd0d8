"""Dropout and ALiBi of the Hopper kernels, as ``kernels.reference.modifiers`` defines them.

What they need of a block beside its mask is one message, its first column as the diagonal sees it and its band, and the
dropout's keys of its columns, which the copy engine brings.
"""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import gl, gluon
from magi_attention.kernels.hopper.primitives import LOG2E, get_words, put_words

# 16 bytes for each of eight blocks, as for the other messages.
MODIFIER_WORDS = gl.constexpr(256)
MODIFIER_SLOTS = gl.constexpr(8)


@gluon.jit
def bends(begin, end, row_begin, row_end):
    """Whether the bias changes its direction among columns [begin, end), seen from the diagonal, of these rows."""
    return (begin < row_end - 1) & (end - 1 > row_begin)


@gluon.jit
def put_line(raw, block, anchor, band):
    """Say where a block's columns begin, seen from the diagonal, and which band shows them."""
    put_words(raw + MODIFIER_WORDS + block % MODIFIER_SLOTS * 16, anchor, band, 0, 0)


@gluon.jit
def row_modifiers(
    modifiers, raw, block, tile_words, num_rows, num_heads,
    W: gl.constexpr, PACK: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """What a warpgroup's 64 rows need for a block: (slope in units of log2, the block's first column relative to the
    row, multiplier, offset); zeros without ALiBi or dropout."""
    ROW_KEYS, num_keys, SLOPES, stride_ab, stride_an, stride_ah = modifiers
    row_begin, row_end, batch, head = get_words(tile_words)
    packed = gl.arange(0, 64, layout=layout)
    row = row_begin + W * (64 // PACK) + packed // PACK
    head_of_row = head + packed % PACK
    slope = gl.zeros([64], gl.float32, layout)
    ahead = gl.zeros([64], gl.float32, layout)
    multiplier = gl.zeros([64], gl.int32, layout)
    offset = gl.zeros([64], gl.int32, layout)
    if ALIBI:
        anchor, band, _, _ = get_words(raw + MODIFIER_WORDS + block % MODIFIER_SLOTS * 16)
        slope = LOG2E * gl.load(SLOPES + batch * stride_ab + band * stride_an + head_of_row * stride_ah)
        ahead = (anchor - row).to(gl.float32)
    if DROPOUT:
        at = ROW_KEYS + ((batch * num_heads + head_of_row).to(gl.int64) * num_rows + row)
        multiplier = gl.load(at, mask=row < row_end, other=0)
        offset = gl.load(at + num_keys, mask=row < row_end, other=0)
    return slope, ahead, multiplier, offset


@gluon.jit
def line(factor, start, N: gl.constexpr, layout: gl.constexpr):
    """(64, N): ``start + factor * column`` with one fused instruction each, for columns 0 to N - 1.

    The columns that a thread holds are eight apart: a constant of the instruction, and a few starts a row.
    """
    grouped: gl.constexpr = gl.zeros([64, N], gl.float32, layout).reshape([64, N // 8, 8]).type.layout
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, grouped))
    group = gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, grouped))) * 8
    member = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, grouped)))
    factor = gl.convert_layout(factor, rows)[:, None, None]
    start = gl.convert_layout(start, rows)[:, None, None]
    starts = start + factor * member.to(gl.float32)[None, None, :]
    values = starts + factor * group.to(gl.float32)[None, :, None]
    return gl.convert_layout(values.reshape([64, N]), layout, assert_trivial=True)


@gluon.jit
def straight(slope, ahead, pivot, N: gl.constexpr, layout: gl.constexpr):
    """The bias less ``pivot`` of a block in which it does not bend."""
    factor = gl.where(ahead < 0.0, slope, -slope)
    return line(factor, factor * ahead - pivot, N, layout)


@gluon.jit
def bias(slope, ahead, N: gl.constexpr, layout: gl.constexpr):
    """The bias of any block, in units of log2."""
    one = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, layout))
    return -slope[:, None] * gl.abs(line(one, ahead, N, layout))


@gluon.jit
def slope_of(SLOPES, stride_ab, stride_an, stride_ah, batch, band, head):
    """The slope of a band and head in units of log2, in the bits of an integer."""
    slope = LOG2E * gl.load(SLOPES + batch * stride_ab + band * stride_an + head * stride_ah)
    return slope.to(gl.int32, bitcast=True)


@gluon.jit
def row_keys(stats_bufs, stage, part: gl.constexpr, BLOCK_Q: gl.constexpr, layout: gl.constexpr):
    """Keys of rows that came as a part of their block's statistics."""
    return (
        stats_bufs.index(stage).slice(part * BLOCK_Q, BLOCK_Q, dim=0).load(layout).to(gl.int32, bitcast=True)
    )


@gluon.jit
def kept(multiplier, offset, column_keys, kept_below):
    """Which weights dropout keeps; keys of rows and columns broadcast against each other."""
    return multiplier * column_keys + offset < kept_below
