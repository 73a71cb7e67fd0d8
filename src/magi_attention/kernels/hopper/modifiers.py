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
    modifiers, raw, block, tile_words, exists,
    W: gl.constexpr, PACK: gl.constexpr, DROPOUT: gl.constexpr, ALIBI: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """What a warpgroup's 64 rows need for a block: (slope in units of log2, the block's first column relative to the
    row, the dropout's multiplier and offset); zeros without ALiBi or dropout. ``modifiers``: as in ``forward_kernel``.

    Without a block that ``exists`` the messages hold anything.
    """
    ROW_KEYS, num_keys, SLOPES, stride_ab, stride_an, stride_ah, num_rows, num_heads = modifiers[0]
    row_begin, row_end, batch, head = get_words(tile_words)
    packed = gl.arange(0, 64, layout=layout)
    row = row_begin + W * (64 // PACK) + packed // PACK
    live = (row < row_end) & (exists != 0)
    head_of_row = head + packed % PACK
    slope = gl.zeros([64], gl.float32, layout)
    ahead = gl.zeros([64], gl.float32, layout)
    multiplier = gl.zeros([64], gl.int32, layout)
    offset = gl.zeros([64], gl.int32, layout)
    if ALIBI:
        anchor, band, _, _ = get_words(raw + MODIFIER_WORDS + block % MODIFIER_SLOTS * 16)
        at = SLOPES + batch * stride_ab + band * stride_an + head_of_row * stride_ah
        slope = LOG2E * gl.load(at, mask=live, other=0.0)
        ahead = (anchor - row).to(gl.float32)
    if DROPOUT:
        at = ROW_KEYS + ((batch * num_heads + head_of_row).to(gl.int64) * num_rows + row)
        multiplier = gl.load(at, mask=live, other=0)
        offset = gl.load(at + num_keys, mask=live, other=0)
    return slope, ahead, multiplier, offset


@gluon.jit
def aligned_keys(column, num_cols):
    """Where the dropout's keys of the columns from this one on are, in four copies moved by 0 to 3 columns.

    The copy engine reads vectors from multiples of 16 bytes on.
    """
    return column % 4 * ((num_cols + 3) // 4 * 4) + column // 4 * 4


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
def dropped(weights, multiplier, offset, column_keys, kept_below):
    """Weights, 0 where dropout drops them; keys of rows and columns broadcast against each other.

    In one piece: ptxas would else compare for all weights at first, and pack what its few predicates cannot hold.
    """
    return gl.inline_asm_elementwise("""{
        .reg .pred keep; .reg .b32 t;
        mad.lo.s32 t, $2, $3, $4;
        setp.lt.s32 keep, t, $5;
        selp.f32 $0, $1, 0f00000000, keep; }""", "=f,f,r,r,r,r",
                                     [weights, multiplier, column_keys, offset, kept_below], dtype=gl.float32,
                                     is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def marked(weights, multiplier, offset, column_keys, kept_below):
    """Weights, with a negative sign where dropout drops them."""
    return gl.inline_asm_elementwise("""{
        .reg .pred keep; .reg .b32 t; .reg .f32 n;
        mad.lo.s32 t, $2, $3, $4;
        setp.lt.s32 keep, t, $5;
        neg.f32 n, $1;
        selp.f32 $0, $1, n, keep; }""", "=f,f,r,r,r,r",
                                     [weights, multiplier, column_keys, offset, kept_below], dtype=gl.float32,
                                     is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def marked_gradient(weights, kept_gradient, dropped_gradient):
    """Gradients of scores from ``marked`` weights and what stands in brackets for kept and for dropped ones."""
    return gl.inline_asm_elementwise("""{
        .reg .pred keep; .reg .f32 a, x;
        setp.gt.f32 keep, $1, 0f00000000;
        selp.f32 x, $2, $3, keep;
        abs.f32 a, $1;
        mul.f32 $0, a, x; }""", "=f,f,f,f", [weights, kept_gradient, dropped_gradient], dtype=gl.float32,
                                     is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def scaled(s, scale, addend):
    """s * scale + addend, fused: LLVM would share the product between branches that each add something else."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [s, scale, addend], dtype=gl.float32, is_pure=True, pack=1
    )
