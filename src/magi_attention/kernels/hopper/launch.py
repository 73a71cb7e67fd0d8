"""Host side of the Hopper kernels: tiles by table, plans by cache, one persistent launch per kernel."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton

from magi_attention.kernels.hopper.backward import backward_kernel
from magi_attention.kernels.hopper.backward_wide import backward_wide_kernel
from magi_attention.kernels.hopper.compat import TensorDescriptor, gl
from magi_attention.kernels.hopper.forward import forward_kernel
from magi_attention.kernels.operands import ALIGN, aligned, optional, strides, wave
from magi_attention.kernels.problem import Problem
from magi_attention.kernels.triton import launch as portable
from magi_attention.kernels.triton.backward import delta_kernel, gather_dq_kernel, scale_dq_kernel
from magi_attention.plan.cache import PlanKey, plan_cache
from magi_attention.plan.tiling import (
    has_short_runs,
    hopper_backward_tile,
    hopper_forward_tile,
    packed_heads,
    packed_heads_backward,
)

_LOG2E = 1.4426950408889634
_TINY = 1e-30
_INT32 = 2**31 - 1
_DELTA_ROWS = 64
_DQ_ROWS = 64
# The longest quarter of the tiles runs first, over all heads: what is left for the end is short.
_PARTS = 4


def forward(problem: Problem, need_max_logits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, max_logits) of one call."""
    if _has_no_tokens(problem):
        return portable.forward(problem, need_max_logits)
    q, k, v = (_readable(x) for x in (problem.q, problem.k, problem.v))
    batch, num_rows, num_heads, head_dim = q.shape
    num_cols, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    pack = packed_heads(group)
    tile = hopper_forward_tile(head_dim, has_short_runs(num_rows, problem.bands.shape[0]))
    accumulate = problem.earlier is not None
    out, lse = problem.earlier or (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32))
    max_logits = (
        torch.full((num_heads,), -torch.inf, dtype=torch.float32, device=q.device)
        if need_max_logits
        else lse.new_empty(num_heads)
    )
    key = PlanKey(num_rows, num_cols, tile.block_rows(pack), tile.block_cols, False, q.device)
    plan = plan_cache.plan_for(problem.bands, key)
    units = num_heads // pack
    dim = _padded(head_dim)
    rows, columns = (1, 64 // pack, pack, dim), (1, tile.block_cols, 1, dim)
    scale, cap_scale = _scales(problem)
    grid = min(plan.num_tiles * batch * units, _num_programs(q.device, problem.sm_margin))
    sizes = (
        plan.num_tiles, batch * units, units, group // pack, wave(k, v, units), _PARTS, num_rows, num_cols, num_heads,
    )  # fmt: skip
    arguments = (
        _descriptor(q, rows), _descriptor(k, columns), _descriptor(v, columns),
        _descriptor(q if accumulate else out, rows),
        out, *strides(out), *optional(problem.sink, lse), lse, max_logits,
        plan.tiles, plan.band_list, plan.bands, _work_counter(q.device), *sizes, scale, cap_scale,
    )  # fmt: skip
    constants = {
        "PACK": pack, "D": dim, "DV": head_dim, "BLOCK_N": tile.block_cols, "STAGES": tile.num_stages,
        "SOFTCAP": problem.softcap > 0, "HAS_SINK": problem.sink is not None, "HAS_MAX": need_max_logits,
        "ACCUMULATE": accumulate, "STAGED": tile.staged_out and not accumulate, "Q_BUFS": tile.num_q_buffers,
        "CONSUMER_REGS": tile.consumer_registers, "PRODUCER_REGS": tile.producer_registers,
    }  # fmt: skip
    _start(forward_kernel, grid, arguments, constants, tile.max_registers, q, problem.sink, out, lse)
    return out, lse, max_logits


def backward(
    problem: Problem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsink) of one call; dsink is (B, T, H), or empty without a sink."""
    # dQ is summed in the order of arrival here; the portable kernels own every row that they write.
    if _has_no_tokens(problem) or problem.deterministic:
        return portable.backward(problem, out, lse, dout, dlse)
    q, k, v, dout = (_readable(x) for x in (problem.q, problem.k, problem.v, dout))
    batch, num_rows, num_heads, head_dim = q.shape
    num_cols, num_kv_heads = k.shape[1:3]
    group = num_heads // num_kv_heads
    pack = packed_heads_backward(group, has_short_runs(num_rows, problem.bands.shape[0]))
    tile, dim = hopper_backward_tile(head_dim), _padded(head_dim)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    key = PlanKey(num_rows, num_cols, tile.block_keys, tile.block_queries // pack, True, q.device)
    plan = plan_cache.plan_for(problem.bands, key)
    grid = min(plan.num_tiles * batch * num_kv_heads, _num_programs(q.device, problem.sm_margin))
    work = (
        plan.tiles, plan.band_list, plan.bands, _work_counter(q.device), plan.num_tiles, batch * num_kv_heads,
        num_kv_heads, group // pack, wave(q, dout, num_kv_heads), _PARTS,
    )  # fmt: skip
    scales = (*_scales(problem), problem.softmax_scale)
    constants = {
        "PACK": pack, "D": dim, "HEAD_DIM": head_dim, "BLOCK_Q": tile.block_queries, "Q_STAGES": tile.q_stages,
        "DO_STAGES": tile.do_stages, "SOFTCAP": problem.softcap > 0,
        "CONSUMER_REGS": tile.consumer_registers, "PRODUCER_REGS": tile.producer_registers,
    }  # fmt: skip
    rows, keys = (1, tile.block_queries // pack, pack, dim), (1, tile.block_keys, 1, dim)
    grads = (*strides(dk), dv, *strides(dv))
    if dim > 128:
        # The wide kernel takes dO in halves, and each of its warpgroups stores half of the columns of dK and dV.
        lse2, delta, dsink = _row_statistics(problem, out, lse, dout, dlse, pack)
        dq_sum = torch.zeros(batch * num_heads * num_rows, head_dim, dtype=torch.float32, device=q.device)
        half, block = (1, 64, 1, dim // 2), (tile.block_queries,)
        arguments = (
            _descriptor(q, rows), _descriptor(k, keys), _descriptor(v, keys), _descriptor(dout, (*rows[:3], dim // 2)),
            _descriptor(lse2.view(-1), block), _descriptor(delta.view(-1), block), _descriptor(dq_sum, (64, 64)),
            _descriptor(dk, half), _descriptor(dv, half), dk, *grads, *work, num_rows, num_cols, lse2.shape[1], *scales,
        )  # fmt: skip
        _start(backward_wide_kernel, grid, arguments, constants, tile.max_registers, q)
        dq = torch.empty_like(q)
        scale_dq_kernel[(triton.cdiv(num_rows, _DQ_ROWS) * num_heads, batch)](
            dq_sum, dq, *strides(dq), num_rows, num_heads, problem.softmax_scale,
            PACK=pack, D=head_dim, BLOCK_M=_DQ_ROWS, BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
        )  # fmt: skip
        return dq, dk, dv, dsink
    tiles_per_unit = triton.cdiv(num_rows * pack, tile.block_queries)
    num_blocks = batch * num_heads // pack * tiles_per_unit
    tiled, _, dsink = _row_statistics(problem, out, lse, dout, dlse, pack, tile.block_queries)
    dq_sum = torch.zeros(
        num_blocks * tile.block_queries * dim // 32, 32, dtype=torch.float32, device=q.device
    )
    half = (1, 64, 1, dim)
    arguments = (
        _descriptor(q, rows), _descriptor(k, keys), _descriptor(v, keys), _descriptor(dout, rows),
        _descriptor(tiled, (2 * tile.block_queries,)), _descriptor(dq_sum, (128, 32)),
        _descriptor(dk, half), _descriptor(dv, half), dk, *grads, *work, tiles_per_unit, num_cols, *scales,
    )  # fmt: skip
    _start(backward_kernel, grid, arguments, constants, tile.max_registers, q)
    dq = torch.empty_like(q)
    gather_dq_kernel[(num_blocks, 2)](
        dq_sum, dq, *strides(dq), num_rows, num_heads, tiles_per_unit, problem.softmax_scale,
        PACK=pack, D=head_dim, WIDE=dim == 128, num_warps=4,
    )  # fmt: skip
    return dq, dk, dv, dsink


def _row_statistics(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    pack: int,
    tile: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-lse in units of log2, -delta and dsink; the first two as copies, or, with ``tile``, together in tiles of rows."""
    batch, num_rows, num_heads, head_dim = problem.q.shape
    sink = problem.sink
    if tile:
        stride = triton.cdiv(num_rows * pack, tile)
        lse2 = delta = lse.new_empty(batch * num_heads // pack * stride * 2 * tile)
    else:
        stride = triton.cdiv(lse.numel(), 4) * 4
        lse2, delta = (lse.new_empty(max(1, 4 // pack), stride) for _ in range(2))
    dsink = torch.empty_like(lse) if sink is not None else lse.new_empty(0)
    delta_kernel[(triton.cdiv(num_rows, _DELTA_ROWS) * num_heads, batch)](
        out, *strides(out), dout, *strides(dout), *optional(sink, lse), *optional(dlse, lse),
        lse, dsink, lse2, delta, stride, num_rows, num_heads, HAS_SINK=sink is not None, HAS_DLSE=dlse is not None,
        SHIFTED=not tile, TILE=tile, PACK=pack, DV=head_dim, BLOCK_M=_DELTA_ROWS,
        BLOCK_DV=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return lse2, delta, dsink


_started: dict[tuple, tuple[Any, tuple]] = {}


def _start(
    kernel: Any,
    programs: int,
    arguments: tuple,
    constants: dict[str, Any],
    max_registers: int,
    q: torch.Tensor,
    *foreign: torch.Tensor | None,
) -> None:
    """Launch a kernel; from the second time on past Triton's look-up, which costs several times the launch.

    What the compiled form depends on is all here: constants, element type, device, whether the pointers that are not
    ours are aligned, and whether an integer needs 64 bits.
    """
    alignments = [x is None or x.data_ptr() % 16 == 0 for x in foreign]
    wide = max(x for x in arguments if type(x) is int) > _INT32
    key = (id(kernel), *constants.values(), q.dtype, q.device, *alignments, wide)
    if key in _started:
        compiled, tail = _started[key]
        compiled[(programs, 1, 1)](*arguments, *tail)
        return
    compiled = kernel[(programs,)](
        *arguments, **constants, num_warps=4, maxnreg=max_registers, enable_fp_fusion=True
    )
    if compiled is not None:
        _started[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def _has_no_tokens(problem: Problem) -> bool:
    """The copy engine refuses tensors without rows."""
    return 0 in problem.q.shape or 0 in problem.k.shape


@functools.cache
def _padded(head_dim: int) -> int:
    return next(size for size in (64, 128, 256) if size >= head_dim)


def _scales(problem: Problem) -> tuple[float, float]:
    """What takes a (capped) score to units of log2, and what takes a raw score to tanh's argument."""
    if problem.softcap > 0:
        return problem.softcap * _LOG2E, problem.softmax_scale / problem.softcap
    # A scale of zero would turn the -inf of a hidden score into NaN; this one turns every finite score into zero as well.
    return max(problem.softmax_scale, _TINY) * _LOG2E, 0.0


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` if the copy engine can read it in place, else a copy."""
    return aligned(x, repeats=False)


def _descriptor(x: torch.Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Descriptor of ``x`` in blocks; ``x`` is one of ours or ``_readable``."""
    # The constructor would check again, at several times the cost of the launch, what holds for such tensors.
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {"base": x, **_frame(x.shape, x.stride(), block, x.element_size())}
    return descriptor


@functools.lru_cache(maxsize=4096)
def _frame(
    shape: tuple[int, ...], stride: tuple[int, ...], block: tuple[int, ...], element_size: int
) -> dict[str, Any]:
    # The stride of an axis of length one is arbitrary; the engine wants whole 16-byte steps.
    steps = [s if n > 1 else ALIGN for s, n in zip(stride[:-1], shape, strict=False)]
    return {
        "shape": list(shape),
        "strides": [*steps, 1],
        "block_shape": list(block),
        "layout": _layout(len(block), element_size),
        "padding": "zero",
    }


@functools.cache
def _layout(rank: int, element_size: int) -> gl.NVMMASharedLayout:
    swizzle = 128 if rank > 1 else 0
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * element_size, rank=rank)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _num_programs(device: torch.device, sm_margin: int) -> int:
    return max(1, _num_multiprocessors(device) - sm_margin)


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def _work_counter(device: torch.device) -> torch.Tensor:
    """The stream's work counter: kernels of one stream run one after the other, and each leaves it at zero.

    A captured graph may be replayed beside anything: it gets a counter of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]
