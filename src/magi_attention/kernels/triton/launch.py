"""Host side of the Triton kernels: tiles by table, plans by cache, one launch per kernel."""

from __future__ import annotations

import functools

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from magi_attention.kernels.operands import aligned, engine_strides, optional, power_of_two, strides, wave
from magi_attention.kernels.problem import Problem
from magi_attention.kernels.reference.modifiers import kept_below
from magi_attention.kernels.triton.backward import delta_kernel, dkdv_kernel, dq_kernel
from magi_attention.kernels.triton.forward import forward_kernel
from magi_attention.kernels.triton.modifiers import keys_kernel
from magi_attention.plan.cache import PlanKey, plan_cache
from magi_attention.plan.tiles import TilePlan
from magi_attention.plan.tiling import TileConfig, choose_tiles

_DELTA_ROWS = 64
_KEY_BLOCK = 128
_COPIES = 4


def forward(problem: Problem, need_max_logits: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, max_logits) of one call."""
    q, k, v = (aligned(x) for x in (problem.q, problem.k, problem.v))
    batch, num_rows, num_heads, head_dim = q.shape
    head_dim_v = v.shape[3]
    out, lse = problem.earlier or (
        q.new_empty(batch, num_rows, num_heads, head_dim_v),
        q.new_empty(batch, num_rows, num_heads, dtype=torch.float32),
    )
    max_logits = torch.full((num_heads,), -torch.inf, dtype=torch.float32, device=q.device)
    tile, plan = _plan("forward", problem)
    work = _work(plan, q, num_heads, num_heads // k.shape[2], wave(k, v, num_heads))
    grid = (plan.num_tiles * batch * num_heads,)
    if grid[0]:
        forward_kernel[grid](
            q, *strides(q), k, *strides(k), v, *strides(v), out, *strides(out),
            *optional(problem.sink), lse, max_logits, *work, problem.softmax_scale, problem.softcap,
            *dropout_keys(problem), *modifiers(problem),
            HAS_SINK=problem.sink is not None, HAS_MAX=need_max_logits, ACCUMULATE=problem.earlier is not None,
            **_features(problem), D=head_dim, DV=head_dim_v, **_padded(head_dim, head_dim_v),
            BLOCK_M=tile.block_rows, BLOCK_N=tile.block_cols, **_options(tile, q),
        )  # fmt: skip
    return out, lse, max_logits


def backward(
    problem: Problem, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dsink) of one call; dsink is (B, T, H), or empty without a sink."""
    q, k, v, dout = (aligned(x) for x in (problem.q, problem.k, problem.v, dout))
    sink, scalars = problem.sink, (problem.softmax_scale, problem.softcap)
    batch, num_rows, num_heads, head_dim = q.shape
    num_kv_heads, head_dim_v = k.shape[2], v.shape[3]
    group = num_heads // num_kv_heads
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsink = torch.empty_like(lse) if sink is not None else lse.new_empty(0)
    lse2, delta = lse.new_empty(batch, num_heads, num_rows), lse.new_empty(batch, num_heads, num_rows)
    tma = _has_copy_engine(q, k)
    padded = _padded(head_dim, head_dim_v)
    shape = {**_features(problem), "D": head_dim, "DV": head_dim_v, "TMA": tma, **padded}
    if num_rows and batch:
        delta_kernel[(triton.cdiv(num_rows, _DELTA_ROWS) * num_heads, batch)](
            out, *strides(out), dout, *strides(dout), *optional(sink), *optional(dlse),
            lse, dsink, lse2, delta, None, 0, 0, num_rows, num_heads, HAS_SINK=sink is not None,
            HAS_DLSE=dlse is not None, DROPOUT=False, TILE=0, PACK=1, DV=head_dim_v, BLOCK_M=_DELTA_ROWS,
            BLOCK_DV=padded["BLOCK_DV"], num_warps=4,
        )  # fmt: skip
    scalars = (*scalars, *dropout_keys(problem), *modifiers(problem))
    tile, plan = _plan("backward_dq", problem)
    if plan.num_tiles and batch:
        rows_tma = tma and tile.rows_in_registers
        dq_kernel[(plan.num_tiles * batch * num_heads,)](
            q, *strides(q), k, *strides(k), v, *strides(v), dout, *strides(dout),
            *_blocks(tile.block_rows, rows_tma, q, dout), *_blocks(tile.block_cols, tma, k, v),
            dq, *strides(dq), lse2, delta, *_work(plan, q, num_heads, group, wave(k, v, num_heads)), *scalars,
            BLOCK_M=tile.block_rows, BLOCK_N=tile.block_cols, ROWS_TMA=rows_tma, **shape, **_options(tile, q),
        )  # fmt: skip
    tile, plan = _plan("backward_dkdv", problem)
    if plan.num_tiles and batch:
        dkdv_kernel[(plan.num_tiles * batch * num_kv_heads,)](
            q, *strides(q), k, *strides(k), v, *strides(v), dout, *strides(dout),
            *_blocks(tile.block_cols, tma, q, dout),
            dk, *strides(dk), dv, *strides(dv), lse2, delta,
            *_work(plan, q, num_kv_heads, group, wave(q, dout, num_kv_heads)), *scalars,
            BLOCK_M=tile.block_cols, BLOCK_N=tile.block_rows, **shape, **_options(tile, q),
        )  # fmt: skip
    return dq, dk, dv, dsink


def _features(problem: Problem) -> dict[str, bool]:
    """What the kernels leave out when it is not asked for."""
    return {
        "SOFTCAP": problem.softcap > 0,
        "DROPOUT": problem.rng_state is not None,
        "ALIBI": problem.alibi is not None,
    }


def modifiers(problem: Problem) -> tuple:
    """What kernels are told of dropout and ALiBi, but for keys."""
    dropout = (kept_below(problem.dropout_p), 1.0 / (1.0 - problem.dropout_p))
    if problem.alibi is None:
        return *dropout, None, 0, 0, 0, None
    return *dropout, problem.alibi.slopes, *problem.alibi.slopes.stride(), problem.alibi.diagonals


def dropout_keys(problem: Problem) -> tuple[torch.Tensor | None, int, torch.Tensor | None]:
    """The dropout's keys of all rows, how many pairs of them there are, and those of all columns.

    The latter four times, (4, S), moved by 0 to 3 columns: the copy engine reads from multiples of 16 bytes on.
    """
    if problem.rng_state is None:
        return None, 0, None
    num_rows, num_heads = problem.q.shape[-3:-1]
    owners = num_heads * (problem.q.shape[0] if problem.q.dim() == 4 else 1)
    num_keys, num_cols = owners * num_rows, problem.k.shape[-3]
    row_keys = torch.empty(2, num_keys, dtype=torch.int32, device=problem.q.device)
    col_keys = torch.empty(
        _COPIES, triton.cdiv(num_cols, _COPIES) * _COPIES, dtype=torch.int32, device=problem.q.device
    )
    programs = triton.cdiv(num_rows, _KEY_BLOCK) * owners + triton.cdiv(num_cols, _KEY_BLOCK)
    if programs:
        keys_kernel[(programs,)](
            problem.rng_state, row_keys, col_keys, owners, num_rows, num_cols, col_keys.stride(0),
            BLOCK=_KEY_BLOCK, COPIES=_COPIES, num_warps=4,
        )  # fmt: skip
    return row_keys, num_keys, col_keys


def _plan(kernel: str, problem: Problem) -> tuple[TileConfig, TilePlan]:
    q, k, v = problem.q, problem.k, problem.v
    tile = choose_tiles(kernel, max(q.shape[3], v.shape[3]), q.element_size())
    key = PlanKey(
        q.shape[1], k.shape[1], tile.block_rows, tile.block_cols, kernel == "backward_dkdv", q.device
    )
    return tile, plan_cache.plan_for(problem.bands, key)


def _work(plan: TilePlan, q: torch.Tensor, num_heads: int, group: int, wave: int) -> tuple:
    """What a kernel over ``num_heads`` heads is told of the plan, the heads and the number of queries."""
    heads = (q.shape[0] * num_heads, num_heads, wave, group, q.shape[1])
    return (plan.tiles, plan.band_list, plan.bands, plan.num_tiles, *heads)


def _blocks(rows: int, tma: bool, *tensors: torch.Tensor) -> tuple:
    """Tensor descriptors of blocks of ``rows`` rows for the copy engine; stand-ins without it."""
    return tuple(_descriptor(x, rows) for x in tensors) if tma else tensors


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    dim = max(16, power_of_two(x.shape[3]))
    return TensorDescriptor(x, list(x.shape), engine_strides(x.shape, x.stride()), [1, rows, 1, dim])


def _has_copy_engine(q: torch.Tensor, k: torch.Tensor) -> bool:
    # The engine refuses tensors of no rows.
    return _is_hopper_or_later(q.device) and min(q.shape[1], k.shape[1]) > 0


@functools.cache
def _is_hopper_or_later(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _padded(head_dim: int, head_dim_v: int) -> dict[str, int]:
    return {
        "BLOCK_D": max(16, power_of_two(head_dim)),
        "BLOCK_DV": max(16, power_of_two(head_dim_v)),
    }


def _options(tile: TileConfig, q: torch.Tensor) -> dict:
    # fp32 inputs ask for fp32 products, not tf32.
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return {"PRECISION": precision, "num_warps": tile.num_warps, "num_stages": tile.num_stages}
