"""Host side of the append kernel."""

from __future__ import annotations

import torch

from magi_attention.kernels.operands import power_of_two, unit_of, units
from magi_attention.kernels.triton.append import append_kernel


def append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q: torch.Tensor,
    used: torch.Tensor | int,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_new: torch.Tensor | None = None,
    cache_rows: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    interleaved: bool = False,
    queries_move: bool = True,
) -> torch.Tensor:
    """Write k and v into the caches, in place, behind the keys in use; returns q, turned if there are angles.

    Args:
        k_cache, v_cache: (rows, positions, HK, D or DV), or pages of as many positions with ``block_table``. What lies
            beyond them is not written.
        k, v: (B, new, HK, D or DV), or (tokens, HK, D or DV) with ``cu_seqlens_new``, (B + 1,) int32.
        q: (B, T, H, D), or (tokens, H, D) with ``cu_seqlens_q``, (B + 1,) int32.
        used: (B,) int32 or int64, or a number: positions in use.
        cos, sin: (angles, R / 2). positions: (B,), where each sequence's angles begin; ``used`` when None.
        queries_move: query i has the angle of its own position; else all have that of the first.
    """
    batch = len(q) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    num_new = 0 if cu_seqlens_new is not None else k.shape[1]
    num_queries = 0 if cu_seqlens_q is not None else q.shape[1]
    new_tokens, query_tokens = k.shape[:-2].numel(), q.shape[:-2].numel()
    is_turned = cos is not None
    result = torch.empty_like(q, memory_format=torch.contiguous_format) if is_turned else q
    tokens = max(new_tokens, query_tokens if is_turned else 0)
    if tokens == 0:
        return result
    tensors = (k, v, q, k_cache, v_cache)
    unit = unit_of(*tensors)
    strides = [units(x, unit) for x in tensors]
    num_kv_heads, num_heads = k_cache.shape[2], q.shape[-2]
    is_number = isinstance(used, int)
    head_dim, head_dim_v = k_cache.shape[3], v_cache.shape[3]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    append_kernel[(tokens, 3 if is_turned else 2)](
        k, *strides[0], v, *strides[1], q, *strides[2], k_cache, *strides[3], v_cache, *strides[4],
        result, None if is_number else used, cache_rows, positions, cu_seqlens_new, cu_seqlens_q,
        block_table, 0 if block_table is None else block_table.stride(0),
        cos, sin, 0 if cos is None else cos.shape[1], num_new, num_queries, new_tokens, query_tokens, batch,
        num_kv_heads, num_heads, used if is_number else 0, k_cache.shape[1], len(k_cache), capacity,
        0 if cos is None else cos.shape[0], TURNED=is_turned, INTERLEAVED=interleaved, QUERIES_MOVE=queries_move,
        R=0 if cos is None else 2 * cos.shape[1], D=head_dim, DV=head_dim_v, UNIT=unit,
        BLOCK_B=power_of_two(batch), BLOCK_H=min(16, power_of_two(num_heads)),
        BLOCK_D=max(16, power_of_two(max(head_dim, head_dim_v))), num_warps=4,
    )  # fmt: skip
    return result
