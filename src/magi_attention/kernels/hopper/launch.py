"""Host side of the Hopper kernels: tiles by table, plans by cache, one persistent launch per kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from magi_attention.kernels.hopper.backward import backward_kernel
from magi_attention.kernels.hopper.backward_wide import backward_wide_kernel
from magi_attention.kernels.hopper.compat import gl
from magi_attention.kernels.hopper.direct import Frame, Launch, described, launcher_of
from magi_attention.kernels.hopper.forward import forward_kernel
from magi_attention.kernels.operands import (
    aligned,
    engine_strides,
    heads_in_cache,
    in_place,
    num_multiprocessors,
    optional,
    power_of_two,
    steps,
    strides,
    wave,
)  # fmt: skip
from magi_attention.kernels.problem import Problem
from magi_attention.kernels.triton import launch as portable
from magi_attention.kernels.triton.backward import delta_kernel, gather_dq_kernel
from magi_attention.plan.cache import PlanKey, current_stream, plan_cache
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
# The longest quarter of the tiles runs first, over all heads: what is left for the end is short.
_PARTS = 4
_NO_MODIFIERS = (None, None, 0, 0, 1.0, None, 0, 0, 0, None)
FORWARD_TAKES_PACKED = True
"""Views with a batch axis, and of the results without it, would take as long as a launch."""


@dataclass(frozen=True)
class _Forward:
    """What shapes, strides and options decide of a forward: worked out once, looked up in every call.

    Attributes:
        plan_key: of the plan to run. num_units: groups of heads, over the batch, that walk each of its tiles.
        max_programs: one for each multiprocessor that may be used.
        frames: of the descriptors of q, k, v and out. out_strides: as the kernel takes them.
        lse_shape, lse_stride: of lse, whose strides save torch the time to find them.
        rest: the kernel's last arguments, those after the number of tiles.
        is_wide: whether one of these integers needs 64 bits.
        form: the kernel with its constants.
    """

    plan_key: PlanKey
    num_units: int
    max_programs: int
    frames: tuple[Frame, ...]
    out_strides: tuple[int, ...]
    lse_shape: tuple[int, ...]
    lse_stride: tuple[int, ...]
    rest: tuple[int | float, ...]
    is_wide: bool
    form: _Form


def forward(
    problem: Problem, need_max_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(out, lse, max_logits) of one call; q, k, v, out and lse with a batch axis or without."""
    q, k, v, sink = problem.q, problem.k, problem.v, problem.sink
    device = q.device
    call = _forward_of(
        q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, device, problem.bands.shape[0], sink is not None,
        need_max_logits, problem.earlier is not None, problem.rng_state is not None, problem.alibi is not None,
        problem.softmax_scale, problem.softcap, problem.sm_margin,
    )  # fmt: skip
    if call is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return _forward_of_others(problem, need_max_logits)
    if problem.earlier is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty_strided(call.lse_shape, call.lse_stride, dtype=torch.float32, device=device)
        framed_out = (call.frames[3], out)
    else:
        out, lse = problem.earlier
        # A stand-in: the kernel adds to the fp32 rows without the copy engine.
        framed_out = (call.frames[0], q)
    max_logits = None
    if need_max_logits:
        max_logits = torch.full((q.shape[-2],), -torch.inf, dtype=torch.float32, device=device)
    plan = plan_cache.plan_for(problem.bands, call.plan_key)
    num_tiles = plan.num_tiles
    modifiers = _modifiers(problem, call.plan_key.block_cols)
    arguments = (
        (call.frames[0], q), (call.frames[1], k), (call.frames[2], v), framed_out,
        out, *call.out_strides, *optional(sink), lse, max_logits,
        plan.tiles, plan.band_list, plan.bands, _work_counter(device), num_tiles, *call.rest, *modifiers,
    )  # fmt: skip
    programs = min(num_tiles * call.num_units, call.max_programs)
    is_wide = call.is_wide or num_tiles > _INT32 or (sink is not None and max(sink.stride()) > _INT32)
    is_wide = is_wide or (modifiers is not _NO_MODIFIERS and _needs_64_bits(modifiers))
    call.form.start((programs,), arguments, is_wide, sink, *(problem.earlier or ()), *_slopes(problem))
    return out, lse, max_logits


def _forward_of_others(
    problem: Problem, need_max_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the copy engine cannot read in place: on copies, or, without tokens, on the portable kernels."""
    q, k, v = problem.q, problem.k, problem.v
    if q.dim() == 3:
        problem = replace(problem, q=q[None], k=k[None], v=v[None])
        out, lse, max_logits = _forward_of_others(problem, need_max_logits)
        return out[0], lse[0], max_logits
    if _has_no_tokens(problem):
        return portable.forward(problem, need_max_logits)
    copies = replace(problem, q=_readable(q), k=_readable(k), v=_readable(v))
    return forward(copies, need_max_logits)


@functools.lru_cache(maxsize=1024)
def _forward_of(
    q_shape: tuple[int, ...], q_stride: tuple[int, ...], k_shape: tuple[int, ...], k_stride: tuple[int, ...],
    v_stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, num_bands: int, has_sink: bool,
    need_max_logits: bool, accumulate: bool, dropout: bool, alibi: bool, softmax_scale: float, softcap: float,
    sm_margin: int,
) -> _Forward | None:  # fmt: skip
    """None where the copy engine cannot read the tensors in place. v has the shape of k."""
    lse_shape = q_shape[:-1]
    if len(q_shape) == 3:
        q_shape, k_shape = (1, *q_shape), (1, *k_shape)
        q_stride, k_stride, v_stride = (0, *q_stride), (0, *k_stride), (0, *v_stride)
    given = ((q_shape, q_stride), (k_shape, k_stride), (k_shape, v_stride))
    if not all(0 not in shape and in_place(shape, stride, repeats=False) for shape, stride in given):
        return None
    batch, num_rows, num_heads, head_dim = q_shape
    num_cols, num_kv_heads = k_shape[1:3]
    group = num_heads // num_kv_heads
    pack = packed_heads(group)
    tile = hopper_forward_tile(head_dim, has_short_runs(num_rows, num_bands))
    units, dim, size = num_heads // pack, _padded(head_dim), dtype.itemsize
    rows, columns = (1, 64 // pack, pack, dim), (1, tile.block_cols, 1, dim)
    blocks = (rows, columns, columns, (*rows[:3], min(dim, 128)))
    out_stride = (num_rows * num_heads * head_dim, num_heads * head_dim, head_dim, 1)
    tensors = (*given, (q_shape, out_stride))
    side_by_side = heads_in_cache(num_kv_heads, 2 * num_cols * head_dim * size, units)
    constants = {
        "PACK": pack, "D": dim, "DV": head_dim, "BLOCK_N": tile.block_cols, "STAGES": tile.num_stages,
        "SOFTCAP": softcap > 0, "HAS_SINK": has_sink, "HAS_MAX": need_max_logits,
        "ACCUMULATE": accumulate, **_features(dropout, alibi, num_bands),
        "STAGED": tile.staged_out and not accumulate, "Q_BUFS": tile.num_q_buffers,
        "CONSUMER_REGS": tile.consumer_registers, "PRODUCER_REGS": tile.producer_registers,
    }  # fmt: skip
    out_strides = steps(q_shape, out_stride)
    sizes = (batch * units, units, group // pack, side_by_side, _PARTS, num_rows, num_cols, num_heads)
    return _Forward(
        plan_key=PlanKey(num_rows, num_cols, tile.block_rows(pack), tile.block_cols, False, device),
        num_units=batch * units,
        max_programs=_num_programs(device, sm_margin),
        frames=tuple(_frame(*x, block, dtype) for x, block in zip(tensors, blocks, strict=True)),
        out_strides=out_strides,
        lse_shape=tuple(lse_shape),
        lse_stride=(num_rows * num_heads, num_heads, 1)[-len(lse_shape) :],
        rest=(*sizes, *_scales(softmax_scale, softcap)),
        is_wide=max(*sizes, *out_strides) > _INT32,
        form=_form(forward_kernel, tuple(constants.items()), tile.max_registers, dtype, device),
    )


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
    short = has_short_runs(num_rows, problem.bands.shape[0])
    pack = packed_heads_backward(group, short, problem.alibi is not None)
    tile, dim = hopper_backward_tile(head_dim), _padded(head_dim)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    key = PlanKey(num_rows, num_cols, tile.block_keys, tile.block_queries // pack, True, q.device)
    plan = plan_cache.plan_for(problem.bands, key)
    programs = min(plan.num_tiles * batch * num_kv_heads, _num_programs(q.device, problem.sm_margin))
    work = (
        plan.tiles, plan.band_list, plan.bands, _work_counter(q.device), plan.num_tiles, batch * num_kv_heads,
        num_kv_heads, group // pack, wave(q, dout, num_kv_heads), _PARTS,
    )  # fmt: skip
    *row_keys, col_keys = portable.dropout_keys(problem)
    gradient_scale = problem.softmax_scale / (1.0 - problem.dropout_p)
    scales = (*_scales(problem.softmax_scale, problem.softcap), gradient_scale)
    constants = {
        "PACK": pack, "D": dim, "HEAD_DIM": head_dim, "BLOCK_Q": tile.block_queries, "Q_STAGES": tile.q_stages,
        "DO_STAGES": tile.do_stages, "SOFTCAP": problem.softcap > 0,
        "CONSUMER_REGS": tile.consumer_registers, "PRODUCER_REGS": tile.producer_registers,
    }  # fmt: skip
    tiles_per_unit = triton.cdiv(num_rows * pack, tile.block_queries)
    num_blocks = batch * num_heads // pack * tiles_per_unit
    tiled, dsink = _row_statistics(problem, out, lse, dout, dlse, row_keys, pack, tile.block_queries)
    dq_sum = lse.new_empty(num_blocks * tile.block_queries * dim // 32, 32)
    dq_state = torch.zeros(num_blocks, dtype=torch.int32, device=q.device)
    # The wide kernel takes dO in halves, and each of its warpgroups stores half of the columns of dK and dV.
    rows, keys = (1, tile.block_queries // pack, pack, dim), (1, tile.block_keys, 1, dim)
    dout_rows, part = (*rows[:3], min(dim, 128)), (1, 64, 1, min(dim, 128))
    arguments = (
        _framed(q, rows), _framed(k, keys), _framed(v, keys), _framed(dout, dout_rows),
        _framed(tiled, (_statistics(problem) * tile.block_queries,)), _framed(dq_sum, (128, 32)),
        _framed(dk, part), _framed(dv, part), dq_state, dk, *strides(dk), dv, *strides(dv),
        *work, tiles_per_unit, num_cols, *scales,
    )  # fmt: skip
    kernel: Any = backward_wide_kernel
    if dim <= 128:
        kernel = backward_kernel
        arguments += (col_keys, *portable.modifiers(problem))
        constants |= _features(problem.rng_state is not None, problem.alibi is not None, len(problem.bands))
    _start(kernel, (programs,), arguments, constants, tile.max_registers, q, *_slopes(problem))
    dq = torch.empty_like(q)
    parts = tile.block_queries * dim // 4096
    arguments = (
        dq_sum, dq_state, dq, *strides(dq), num_rows, num_heads, tiles_per_unit, gradient_scale,
    )  # fmt: skip
    constants = {"PACK": pack, "D": head_dim, "BLOCK_Q": tile.block_queries, "PARTS": parts}
    _start(gather_dq_kernel, (num_blocks, parts), arguments, constants, None, q)
    return dq, dk, dv, dsink


def _statistics(problem: Problem) -> int:
    """Values that the backward reads of a row."""
    return 2 if problem.rng_state is None else 4


def _features(dropout: bool, alibi: bool, num_bands: int) -> dict[str, bool]:
    """What kernels leave out when it is not asked for; without bands there are no slopes to read."""
    return {"DROPOUT": dropout, "ALIBI": alibi and num_bands > 0}


def _slopes(problem: Problem) -> tuple[torch.Tensor, ...]:
    return () if problem.alibi is None else (problem.alibi.slopes, problem.alibi.diagonals)


def _modifiers(problem: Problem, block_cols: int) -> tuple:
    """What the forward is told of dropout and ALiBi."""
    if problem.rng_state is None and problem.alibi is None:
        return _NO_MODIFIERS
    row_keys, num_keys, col_keys = portable.dropout_keys(problem)
    columns = None if col_keys is None else _framed(col_keys.view(-1), (block_cols,))
    return (columns, row_keys, num_keys, *portable.modifiers(problem))


def _row_statistics(
    problem: Problem,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    row_keys: Sequence[Any],
    pack: int,
    tile: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-lse in units of log2, -delta and the dropout's keys, together in tiles of ``tile`` rows; dsink."""
    batch, num_rows, num_heads, head_dim = problem.q.shape
    sink = problem.sink
    tiles_per_unit = triton.cdiv(num_rows * pack, tile)
    tiled = lse.new_empty(batch * num_heads // pack * tiles_per_unit * _statistics(problem) * tile)
    dsink = torch.empty_like(lse) if sink is not None else lse.new_empty(0)
    arguments = (
        out, *strides(out), dout, *strides(dout), *optional(sink), *optional(dlse),
        lse, dsink, tiled, tiled, *row_keys, tiles_per_unit, num_rows, num_heads,
    )  # fmt: skip
    constants = {
        "HAS_SINK": sink is not None, "HAS_DLSE": dlse is not None,
        "DROPOUT": problem.rng_state is not None, "TILE": tile, "PACK": pack,
        "DV": head_dim, "BLOCK_M": _DELTA_ROWS, "BLOCK_DV": power_of_two(head_dim),
    }  # fmt: skip
    grid = (triton.cdiv(num_rows, _DELTA_ROWS) * num_heads, batch)
    _start(delta_kernel, grid, arguments, constants, None, problem.q, out, dout, sink, dlse, lse)
    return tiled, dsink


class _Form:
    """A kernel with its constants, for one element type and device.

    From the second time on it is launched past Triton's look-up, which costs several times the launch. What else the
    compiled kernel depends on: whether the pointers that are not ours are aligned, and whether an integer needs 64 bits.
    """

    def __init__(
        self, kernel: Any, constants: dict[str, Any], options: dict[str, Any], device: torch.device
    ) -> None:
        self._kernel, self._constants, self._options, self._device = kernel, constants, options, device
        self._launches: dict[tuple[bool, ...], Launch] = {}

    def start(
        self, grid: tuple[int, ...], arguments: tuple, is_wide: bool, *foreign: torch.Tensor | None
    ) -> None:
        """Launch a grid of programs, of at most two axes, with these arguments.

        Args:
            is_wide: whether an integer needs 64 bits.
            foreign: those of the arguments that are not ours, but for those that the copy engine reads.
        """
        key = (is_wide, *[x is None or x.data_ptr() % 16 == 0 for x in foreign])
        launch = self._launches.get(key)
        if launch is not None:
            launch(grid, arguments)
            return
        compiled = self._kernel[grid](*described(arguments), **self._constants, **self._options)
        if compiled is not None:
            rest = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._launches[key] = launcher_of(compiled, arguments, rest, self._device)


@functools.cache
def _form(
    kernel: Any, constants: tuple, max_registers: int | None, dtype: torch.dtype, device: torch.device
) -> _Form:
    """With ``max_registers`` for a Gluon kernel, None for one of Triton's."""
    options: dict[str, Any] = {"num_warps": 4}
    if max_registers is not None:
        options |= {"maxnreg": max_registers, "enable_fp_fusion": True}
    return _Form(kernel, dict(constants), options, device)


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple,
    constants: dict[str, Any],
    max_registers: int | None,
    q: torch.Tensor,
    *foreign: torch.Tensor | None,
) -> None:
    is_wide = _needs_64_bits(arguments)
    form = _form(kernel, tuple(constants.items()), max_registers, q.dtype, q.device)
    form.start(grid, arguments, is_wide, *foreign)


def _needs_64_bits(arguments: tuple) -> bool:
    return max(x for x in arguments if type(x) is int) > _INT32


def _has_no_tokens(problem: Problem) -> bool:
    """The copy engine refuses tensors without rows."""
    return 0 in problem.q.shape or 0 in problem.k.shape


@functools.cache
def _padded(head_dim: int) -> int:
    return next(size for size in (64, 128, 256) if size >= head_dim)


def _scales(softmax_scale: float, softcap: float) -> tuple[float, float]:
    """What takes a (capped) score to units of log2, and what takes a raw score to tanh's argument."""
    if softcap > 0:
        return softcap * _LOG2E, softmax_scale / softcap
    # A scale of zero would turn the -inf of a hidden score into NaN; this one turns every finite score into zero as well.
    return max(softmax_scale, _TINY) * _LOG2E, 0.0


def _readable(x: torch.Tensor) -> torch.Tensor:
    """``x`` if the copy engine can read it in place, else a copy."""
    return aligned(x, repeats=False)


def _framed(x: torch.Tensor, block: tuple[int, ...]) -> tuple[Frame, torch.Tensor]:
    """What a descriptor of ``x`` in blocks is made of; ``x`` is one of ours or ``_readable``."""
    return _frame(x.shape, x.stride(), block, x.dtype), x


@functools.lru_cache(maxsize=4096)
def _frame(
    shape: tuple[int, ...], stride: tuple[int, ...], block: tuple[int, ...], dtype: torch.dtype
) -> Frame:
    fields = {
        "shape": list(shape),
        "strides": engine_strides(shape, stride),
        "block_shape": list(block),
        "layout": _layout(len(block), dtype.itemsize),
        "padding": "zero",
    }
    return Frame(fields)


@functools.cache
def _layout(rank: int, element_size: int) -> gl.NVMMASharedLayout:
    swizzle = 128 if rank > 1 else 0
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * element_size, rank=rank)


def _num_programs(device: torch.device, sm_margin: int) -> int:
    return max(1, num_multiprocessors(device) - sm_margin)


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def _work_counter(device: torch.device) -> torch.Tensor:
    """The stream's work counter: kernels of one stream run one after the other, and each leaves it at zero.

    A captured graph may be replayed beside anything: it gets a counter of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device, current_stream(device.index))
    counter = _counters.get(key)
    if counter is None:
        counter = _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return counter
