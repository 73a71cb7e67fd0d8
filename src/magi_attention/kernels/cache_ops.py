"""The registered operators on caches of keys and values: ``magi_attention::append_to_cache`` and ``attend_to_cache``.

Schemas and shapes for tracing; importing this module imports no kernel. Caches (rows, positions, HK, D or DV), or pages
with block_table (B, blocks) int32; q (B, T, H, D), or (tokens, H, D) with cu_seqlens_q (B + 1,) int32. Sequence lengths
are in ``used`` (B,), int32 or int64, or ``used_by_all`` where it is None.
"""

from __future__ import annotations

from typing import Any

import torch

from magi_attention import env
from magi_attention.kernels.cache_problem import CacheProblem
from magi_attention.kernels.select import HAS_TRITON, MAX_HEAD_DIM, runs_on_hopper

MOST_SEQUENCES = 4096
"""Each program holds the lengths of all sequences."""

_APPEND = (
    "append_to_cache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor q, Tensor? used, "
    "SymInt used_by_all, Tensor? cos, Tensor? sin, Tensor? positions, Tensor? cu_seqlens_q, Tensor? cu_seqlens_new, "
    "Tensor? cache_rows, Tensor? block_table, bool interleaved, bool queries_move) -> Tensor"
)
_ATTEND = (
    "attend_to_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? used, SymInt used_by_all, SymInt num_new, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_new, Tensor? leftpad, Tensor? cache_rows, Tensor? block_table, "
    "Tensor? sink, Tensor? alibi_slopes, float softmax_scale, float softcap, SymInt left, SymInt right, "
    "SymInt keep_first, bool full_when_one, int sm_margin) -> (Tensor out, Tensor lse)"
)

_library = torch.library.Library("magi_attention", "FRAGMENT")
_library.define(_APPEND)
_library.define(_ATTEND)


def kernels_take(q: torch.Tensor, v_cache: torch.Tensor, batch: int) -> bool:
    """Whether the kernels on caches take tensors like these: on a GPU, or in Triton's interpreter if asked by name."""
    asked = env.backend_override()
    here = (
        asked in (None, "triton", "hopper") if q.is_cuda else asked == "triton" and env.triton_interpreter()
    )
    return (
        here
        and HAS_TRITON
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and max(q.shape[-1], v_cache.shape[-1]) <= MAX_HEAD_DIM
        and 0 < batch <= MOST_SEQUENCES
    )


def _append(  # type: ignore[no-untyped-def]
    k_cache, v_cache, k, v, q, used, used_by_all, cos, sin, positions, cu_seqlens_q, cu_seqlens_new, cache_rows,
    block_table, interleaved, queries_move,
):  # fmt: skip
    from magi_attention.kernels.triton.append_launch import append

    with torch.cuda.device_of(q):
        turned = append(
            k_cache, v_cache, k, v, q, used_by_all if used is None else used, cos=cos, sin=sin, positions=positions,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_new=cu_seqlens_new, cache_rows=cache_rows, block_table=block_table,
            interleaved=interleaved, queries_move=queries_move,
        )  # fmt: skip
    # An operator's result is new memory: without angles the caller goes on with q.
    return q.new_empty(0) if turned is q else turned


def _attend(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, used, used_by_all, num_new, cu_seqlens_q, cu_seqlens_new, leftpad, cache_rows, block_table, sink,
    alibi_slopes, softmax_scale, softcap, left, right, keep_first, full_when_one, sm_margin,
):  # fmt: skip
    problem = CacheProblem(
        q, k_cache, v_cache, used_by_all if used is None else used, softmax_scale, num_new, cu_seqlens_q, cu_seqlens_new,
        softcap, (left, right), keep_first, full_when_one, leftpad, cache_rows, block_table, sink, alibi_slopes,
        sm_margin,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        return _kernels_for(problem).decode(problem)


def _kernels_for(problem: CacheProblem) -> Any:
    from magi_attention.kernels.triton import decode_launch as portable

    name = env.backend_override()
    if name == "triton" or not runs_on_hopper(problem.q, problem.v):
        return portable
    from magi_attention.kernels.hopper import decode_launch as hopper

    is_wanted = name is not None or hopper.is_faster(problem)
    return hopper if hopper.takes(problem) and is_wanted else portable


for _device in ("CPU", "CUDA"):
    _library.impl("append_to_cache", _append, _device)
    _library.impl("attend_to_cache", _attend, _device)


@torch.library.register_fake("magi_attention::append_to_cache", lib=_library)
def _append_shapes(k_cache, v_cache, k, v, q, used, used_by_all, cos, *others):  # type: ignore[no-untyped-def]
    return q.new_empty(0) if cos is None else q.new_empty(q.shape)


@torch.library.register_fake("magi_attention::attend_to_cache", lib=_library)
def _attend_shapes(q, k_cache, v_cache, *others):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:-1], v_cache.shape[3]), q.new_empty(q.shape[:-1], dtype=torch.float32)


append_to_cache = torch.ops.magi_attention.append_to_cache.default
"""q, turned by its angles, or an empty tensor without angles; k and v are in the caches, in place."""

attend_to_cache = torch.ops.magi_attention.attend_to_cache.default
"""(out, lse) of the last queries of each sequence; not differentiable."""
