"""What Gluon lacks, in a few lines of PTX each: named barriers, one-arrival-per-warp mbarriers, messages, a work counter.

Raw mbarriers and message words live in a static shared array. It must be exactly 1024 bytes, 1024-aligned: Triton's
dynamic shared memory begins behind it and must keep the alignment of the 128-byte swizzle. Barrier ``i`` is at byte
``8 * i``, words from byte 512 on. Triton owns the hardware barriers 0, 1 and 2 + partition: named barriers begin at 8.
"""

from __future__ import annotations

from magi_attention.kernels.hopper.compat import gl, gluon

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
NAMED_BARRIERS = gl.constexpr(8)


@gluon.jit
def named_sync(barrier, THREADS: gl.constexpr):
    """Wait at a hardware barrier that ``THREADS`` threads reach."""
    gl.inline_asm_elementwise("barrier.cta.sync.aligned $1, $2; mov.u32 $0, 0;", "=r,r,r",
                              [barrier, THREADS], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def named_arrive(barrier, THREADS: gl.constexpr):
    """Count as arrived at a hardware barrier without waiting."""
    gl.inline_asm_elementwise("barrier.cta.arrive.aligned $1, $2; mov.u32 $0, 0;", "=r,r,r",
                              [barrier, THREADS], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def fence_proxy():
    """Order this thread's ordinary shared-memory writes before the copy engine's and the tensor cores' reads.

    Gluon's own fence adds a MEMBAR that waits for everything; the barrier that follows this one orders the rest.
    """
    gl.inline_asm_elementwise("fence.proxy.async.shared::cta; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False,
                              pack=1)  # fmt: skip


@gluon.jit
def raw_base():
    """Shared address of the static array. Once per kernel, before the partitions; with any_in_warp's predicate."""
    gl.inline_asm_elementwise(
        ".reg .pred attn_any; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.inline_asm_elementwise("{ .shared .align 1024 .b64 attn_raw[128]; mov.u32 $0, attn_raw; }",
                                     "=r", [], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def raw_init(address, COUNT: gl.constexpr):
    """Initialise the mbarrier at ``address`` for ``COUNT`` arrivals a phase (call from the whole default partition)."""
    gl.inline_asm_elementwise("""{
        .reg .pred p; .reg .b32 t;
        mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        @p mbarrier.init.shared::cta.b64 [$1], $2;
        mov.u32 $0, 0; }""", "=r,r,r", [address, COUNT], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def raw_arrive(address):
    """One arrival per warp. elect.sync keeps ptxas' uniformity analysis alive; a predicate on %tid.x destroys it."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        elect.sync _|p, -1;
        @p mbarrier.arrive.shared::cta.b64 _, [$1];
        mov.u32 $0, 0; }""", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def raw_arrive_released(address):
    """One arrival per warp that releases the earlier shared-memory writes of all its lanes."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        bar.warp.sync -1;
        elect.sync _|p, -1;
        @p mbarrier.arrive.shared::cta.b64 _, [$1];
        mov.u32 $0, 0; }""", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def raw_wait(address, parity):
    """Wait until the phase of this parity is complete."""
    gl.inline_asm_elementwise("""{
        .reg .pred done;
        rawWait:
        mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
        @!done bra.uni rawWait;
        mov.u32 $0, 0; }""", "=r,r,r", [address, parity], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def put_words(address, a, b, c, d):
    """Store a message of four words, 16-byte aligned; visible to whoever an arrival after it wakes."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        elect.sync _|p, -1;
        @p st.shared.v4.b32 [$1], {$2, $3, $4, $5};
        bar.warp.sync -1;
        mov.u32 $0, 0; }""", "=r,r,r,r,r,r", [address, a, b, c, d], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def put_word(address, a):
    """Store a message of one word."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        elect.sync _|p, -1;
        @p st.shared.b32 [$1], $2;
        bar.warp.sync -1;
        mov.u32 $0, 0; }""", "=r,r,r", [address, a], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def get_words(address):
    """Read a message of four words."""
    return gl.inline_asm_elementwise("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r",
                                     [address], dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
                                     is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def get_word(address):
    """Read one word of a message."""
    return gl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def get_uniform(address):
    """Read one word of a message so that ptxas knows it to be the same in all lanes: loops over it stay uniform."""
    return gl.inline_asm_elementwise("""{
        .reg .b32 t;
        ld.shared.b32 t, [$1];
        shfl.sync.idx.b32 $0, t, 0, 0x1f, -1; }""", "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def any_in_warp(x, limit):
    """1 when some element of ``x`` that this warp holds is above ``limit`` or NaN: a scalar that differs between warps.

    A reduction to a scalar would go through shared memory and a barrier. What depends on the result must be work of
    one warp, without barriers.
    """
    gl.inline_asm_elementwise("setp.ne.u32 attn_any, 0, 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False,
                              pack=1)  # fmt: skip
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        setp.gtu.f32 p, $1, $2;
        vote.sync.any.pred p, p, -1;
        or.pred attn_any, attn_any, p;
        mov.u32 $0, 0; }""", "=r,f,f", [x, limit], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip
    return gl.inline_asm_elementwise(
        "selp.b32 $0, 1, 0, attn_any;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def take_item(counter):
    """Next number of the work counter, the same in all lanes (call from a partition of one warp)."""
    return gl.inline_asm_elementwise("""{
        .reg .pred p; .reg .b32 t, l;
        mov.u32 l, %laneid; setp.eq.u32 p, l, 0;
        mov.u32 t, 0;
        @p atom.global.relaxed.gpu.add.u32 t, [$1], 1;
        shfl.sync.idx.b32 $0, t, 0, 0x1f, 0xffffffff; }""", "=r,l", [counter.to(gl.int64, bitcast=True)],
                                     dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def retire(counter, num_programs):
    """The last program to retire sets the work counter back to zero for the next launch (counter[1] wraps by itself)."""
    gl.inline_asm_elementwise("""{
        .reg .pred p, q; .reg .b32 t, l;
        mov.u32 l, %laneid; setp.eq.u32 p, l, 0;
        mov.u32 t, 0;
        @p atom.global.acq_rel.gpu.inc.u32 t, [$1+4], $2;
        setp.eq.and.u32 q, t, $2, p;
        @q st.global.u32 [$1], 0;
        mov.u32 $0, 0; }""", "=r,l,r", [counter.to(gl.int64, bitcast=True), num_programs - 1],
                              dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def claim(state):
    """What has become of a block of global memory: 0 for the first program that asks, an odd number for all others.

    Call from a partition of one warp. ``publish`` sets the other bits. Relaxed: bulk reductions are made in the L2
    cache, where a store is before its bit is.
    """
    return gl.inline_asm_elementwise("""{
        .reg .pred p; .reg .b32 t, l;
        mov.u32 l, %laneid; setp.eq.u32 p, l, 0;
        mov.u32 t, 0;
        @p atom.global.relaxed.gpu.or.b32 t, [$1], 1;
        shfl.sync.idx.b32 $0, t, 0, 0x1f, 0xffffffff; }""", "=r,l", [state.to(gl.int64, bitcast=True)],
                                     dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def publish(state, bit):
    """Wait until this warp's bulk stores are in global memory, and let other programs' ``await_published`` return."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        cp.async.bulk.wait_group 0;
        bar.warp.sync -1;
        elect.sync _|p, -1;
        @p red.release.gpu.global.or.b32 [$1], $2;
        mov.u32 $0, 0; }""", "=r,l,r", [state.to(gl.int64, bitcast=True), bit], dtype=gl.int32, is_pure=False,
                              pack=1)  # fmt: skip


@gluon.jit
def await_published(state, bit):
    """Wait until the block's first program has published ``bit``: bulk reductions may then add to what it stored."""
    gl.inline_asm_elementwise("""{
        .reg .pred p, first; .reg .b32 t, l;
        mov.u32 l, %laneid; setp.eq.u32 first, l, 0;
        awaitPublished:
        mov.u32 t, 0;
        @first ld.acquire.gpu.global.b32 t, [$1];
        shfl.sync.idx.b32 t, t, 0, 0x1f, 0xffffffff;
        and.b32 t, t, $2;
        setp.eq.u32 p, t, 0;
        @p bra.uni awaitPublished;
        fence.proxy.async;
        mov.u32 $0, 0; }""", "=r,l,r", [state.to(gl.int64, bitcast=True), bit], dtype=gl.int32, is_pure=False,
                              pack=1)  # fmt: skip


@gluon.jit
def pinned(x):
    """Identity that keeps an accumulator's initialisation above a product already in flight."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def opaque_next(x):
    """x + 1, opaque to LLVM: else it keeps a dozen derived addresses in registers."""
    return gl.inline_asm_elementwise("add.s32 $0, $1, 1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def rounded(x, dtype: gl.constexpr):
    """fp32 to bf16 or fp16 here and now: LLVM would sink a plain conversion below a branch, in twice the registers."""
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.bfloat16,
                                         is_pure=True, pack=2)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=gl.float16,
                                         is_pure=True, pack=2)  # fmt: skip


@gluon.jit
def tanh(x):
    """tanh.approx: one special-function instruction, relative error below 2^-11."""
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def erase_rows(groups, first_group, begin, end, ROWS: gl.constexpr, HALVES: gl.constexpr):
    """Zero the rows before ``begin`` and from ``end`` on of a (ROWS, 64 * HALVES) operand, seen as groups of (8, 64).

    Zero weight times NaN is NaN: rows of a block beyond its run may hold anything and must not reach a product.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, layout))
    zeros = gl.zeros([8, 64], groups.dtype, layout)
    for group in range(ROWS // 8):
        if (8 * group < begin) | (8 * group + 8 > end):
            keep = ((row + 8 * group >= begin) & (row + 8 * group < end))[:, None]
            for half in gl.static_range(HALVES):
                part = groups.index(first_group + half * (ROWS // 8) + group)
                if (8 * group + 8 <= begin) | (8 * group >= end):
                    part.store(zeros)
                else:
                    part.store(gl.where(keep, part.load(layout), zeros))
