"""Host side of the Hopper kernel for caches: one launch of a program a multiprocessor."""

from __future__ import annotations

import functools
import math

import torch

from magi_attention.kernels.cache_problem import CacheProblem
from magi_attention.kernels.hopper.compat import TensorDescriptor, gl
from magi_attention.kernels.hopper.decode import decode_kernel
from magi_attention.kernels.operands import ALIGN, engine_strides, power_of_two, unit_of, units
from magi_attention.kernels.triton.counters import zeroed
from magi_attention.kernels.triton.decode_launch import (
    MOST_PIECES,
    merged_at_a_time,
    num_programs_on,
    workspace,
)

BLOCK_ROWS = 64
_BLOCK_COLS = 64
_BOX_DIMS = 64
_RING_BYTES = 96 << 10
"""Of the ring where each program has one item at most; with more keys on their way memory answers later."""
_LONG_RING_BYTES = 128 << 10
_LEAST_BOX = 8
_MOST_SEQUENCES = 1024
_PRODUCER_REGISTERS = 40
_LOG2E = 1.4426950408889634


def takes(problem: CacheProblem) -> bool:
    """Whether the kernel runs this problem: few rows, memory that the copy engine can read."""
    q, k, v = problem.q, problem.k, problem.v
    paged = problem.block_table is not None
    return (
        q.dtype in (torch.float16, torch.bfloat16)
        and problem.rows <= BLOCK_ROWS
        and problem.batch <= _MOST_SEQUENCES
        and unit_of(q, k, v) == ALIGN
        and v.shape[3] % ALIGN == 0
        and (not paged or _box_of(k.shape[1]) >= _LEAST_BOX)
    )


def is_faster(problem: CacheProblem) -> bool:
    """Whether the portable kernel, of which a multiprocessor runs two programs, is the slower one."""
    return problem.block_table is not None or _has_few_items(problem)


def _has_few_items(problem: CacheProblem) -> bool:
    return problem.batch * problem.num_kv_heads <= num_programs_on(problem.q.device, 1, problem.sm_margin)


def decode(problem: CacheProblem, stages: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as ``CacheProblem.results``."""
    q, k, v = problem.q, problem.k, problem.v
    out, lse = problem.results()
    if lse.numel() == 0:
        return out, lse
    head_dim, head_dim_v = q.shape[-1], v.shape[3]
    padded = max(_BOX_DIMS, power_of_two(max(head_dim, head_dim_v)))
    box = _BLOCK_COLS if problem.block_table is None else _box_of(k.shape[1])
    num_programs = num_programs_on(q.device, 1, problem.sm_margin)
    parts, stats = workspace(num_programs, BLOCK_ROWS, padded, q.device)
    live = problem.live_rows(BLOCK_ROWS)
    ring_bytes = _RING_BYTES if _has_few_items(problem) else _LONG_RING_BYTES
    softcap, scale = problem.softcap, problem.softmax_scale
    scales = (softcap * _LOG2E, scale / softcap) if softcap > 0 else (scale * _LOG2E, 0.0)
    decode_kernel[(num_programs,)](
        _descriptor(k, box), _descriptor(v, box), q, *units(q, ALIGN),
        out, q.shape[-2] * head_dim_v // ALIGN, head_dim_v // ALIGN, lse, *problem.numbers(), parts, stats,
        zeroed(problem.items(BLOCK_ROWS), q.device), *problem.sizes(), *scales,
        HAS_KEPT=problem.has_kept, MASKED=problem.is_masked, SOFTCAP=softcap > 0, D=head_dim, DV=head_dim_v, BOX=box,
        BLOCK_B=max(32, power_of_two(problem.batch)), BLOCK_M=BLOCK_ROWS, BLOCK_R=live, BLOCK_N=_BLOCK_COLS,
        DP=padded, STAGES=stages or max(ring_bytes // (4 * _BLOCK_COLS * padded), 2),
        AT_A_TIME=merged_at_a_time(live, padded, 4), MOST_PIECES=MOST_PIECES, PRODUCER_REGS=_PRODUCER_REGISTERS,
        num_warps=4,
    )  # fmt: skip
    return out, lse


def _box_of(page_size: int) -> int:
    """Keys of a page that are moved together: the most that whole pages and whole blocks are made of."""
    return math.gcd(page_size, _BLOCK_COLS)


def _descriptor(x: torch.Tensor, box: int) -> TensorDescriptor:
    layout = _layout(8 * x.element_size())
    return TensorDescriptor(
        x, [*x.shape], engine_strides(x.shape, x.stride()), [1, box, 1, _BOX_DIMS], layout
    )


@functools.cache
def _layout(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4)
