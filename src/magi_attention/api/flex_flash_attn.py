"""``flex_flash_attn_func``: attention under a mask given as query ranges, key ranges and mask types."""

from __future__ import annotations

from typing import Literal

import torch

from magi_attention.api.flex_arguments import (
    KernelHints,
    accept_older_orders,
    check_mask_source,
    check_packed_tokens,
    check_sink_layout,
)
from magi_attention.api.flex_mask import Ranges, Types, mask_of_ranges
from magi_attention.attention import attention
from magi_attention.common import AttnForwardMeta
from magi_attention.errors import check_type


@accept_older_orders
def flex_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: Ranges | None = None,
    k_ranges: Ranges | None = None,
    attn_type_map: Types = None,
    *,
    sink: torch.Tensor | None = None,
    sink_layout: Literal["sh", "ssh", "shd"] = "sh",
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    disable_fwd_atomic_reduction: bool = False,
    disable_bwd_dkv_atomic_reduction: bool = False,
    ref_block_size: tuple[int, int] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    auto_range_merge: bool = False,
    swap_ab: bool = False,
    pack_gqa: bool = False,
    cat_gqa: bool = False,
    sparse_load: bool = False,
    swap_bwd_qk_loop: bool = False,
    return_max_logits: bool = False,
    index_attn_indices: torch.Tensor | None = None,
    q_block_size: int = 1,
    k_block_size: int = 1,
    index_attn: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, AttnForwardMeta]:
    """Attention under the union of n slices: slice s lets rows ``q_ranges[s]`` see columns ``k_ranges[s]``.

    The type of a slice says how much of its rectangle is visible (see ``AttnMaskType``): 0 full, 1 causal,
    2 inverse causal, 3 bidirectional causal. Slices may come in any order, overlap and be empty; a pair
    that two slices show counts twice. A row that sees nothing has out 0, lse -inf (or the sinks' logsumexp)
    and zero gradients. Differentiable in q, k, v and sink, through out and through ``meta.lse``.

    Two older positional orders run as well. After k_ranges come either ``max_seqlen_q, max_seqlen_k,
    attn_type_map, softmax_scale, softcap, deterministic, sm_margin, disable_fwd_atomic_reduction,
    auto_range_merge`` (recognised by the integer) or ``attn_type_map, sink, softmax_scale, softcap,
    deterministic, sm_margin, disable_fwd_atomic_reduction, auto_range_merge, ref_block_size``.

    Args:
        q: (num_tokens_q, num_heads_q, head_dim), fp16, bf16, fp32 or fp64.
        k: (num_tokens_k, num_heads_k, head_dim), same dtype; num_heads_k divides num_heads_q.
        v: (num_tokens_k, num_heads_k, head_dim_v), same dtype.
        q_ranges, k_ranges: (n, 2) half-open ranges: integer tensors, ``AttnRanges``, lists of pairs. On the
            CPU (also for a q on a GPU) they are checked in full and the mask is remembered by their
            content. On q's GPU they are int32 or int64 tensors that the host does not wait for: ends are
            clipped to the tensors, and a slice with start > end or an unknown type shows nothing; the mask
            is remembered by identity and version of the tensors. With MAGI_ATTENTION_SANITY_CHECK=1 they
            are checked on the host, too.
        attn_type_map: (n,) integers 0 to 3 beside the ranges, or names or ``AttnMaskType``, or one of these
            for all; None is full.
        sink: extra logits in the denominator, any number of them, neither scaled nor capped.
        sink_layout: "sh" (s_sink, num_heads_q) or "ssh" (num_tokens_q, s_sink, num_heads_q).
        softmax_scale: head_dim ** -0.5 when None.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off.
        deterministic: the same gradient bits every time, see ``attention``.
        sm_margin: multiprocessors to leave free, see ``attention``.
        disable_fwd_atomic_reduction, disable_bwd_dkv_atomic_reduction, ref_block_size, max_seqlen_q,
            max_seqlen_k, auto_range_merge, swap_ab, pack_gqa, cat_gqa, sparse_load, swap_bwd_qk_loop:
            performance hints. Checked for type, legal values and contradictions; no effect here, results do
            not depend on them. q_ranges may overlap whatever disable_fwd_atomic_reduction promises, and
            sparse_load allows every type.
        return_max_logits: fill ``meta.max_logits``.
        index_attn_indices, index_attn, q_block_size, k_block_size: key rows listed per query; not available.
        backend: a backend by name, or None for the automatic choice; see ``attention``.

    Returns:
        out (num_tokens_q, num_heads_q, head_dim_v) in q's dtype, and ``AttnForwardMeta`` with lse
        (num_tokens_q, num_heads_q) fp32 (fp64 for fp64 inputs) and max_logits (num_heads_q,) or None.

    Raises:
        TypeError, ValueError: arguments that do not fit; ranges on the CPU are named by slice.
        NotImplementedError: index_attn, sink_layout "shd", or a named backend that cannot run the call.
    """
    check_mask_source(q_ranges, k_ranges, index_attn_indices, index_attn, q_block_size, k_block_size)
    assert q_ranges is not None and k_ranges is not None
    check_packed_tokens(q, k)
    check_type("return_max_logits", return_max_logits, bool)
    check_sink_layout(sink, sink_layout)
    KernelHints(
        deterministic, disable_fwd_atomic_reduction, disable_bwd_dkv_atomic_reduction, auto_range_merge,
        swap_ab, pack_gqa, cat_gqa, sparse_load, swap_bwd_qk_loop, ref_block_size, max_seqlen_q, max_seqlen_k,
    ).check(q.shape[1], k.shape[1])  # fmt: skip
    mask = mask_of_ranges(q_ranges, k_ranges, attn_type_map, q.shape[0], k.shape[0], q.device)
    return attention(
        q,
        k,
        v,
        mask,
        sink=sink,
        softmax_scale=softmax_scale,
        softcap=softcap,
        return_max_logits=return_max_logits,
        deterministic=deterministic,
        sm_margin=sm_margin,
        backend=backend,
    )
