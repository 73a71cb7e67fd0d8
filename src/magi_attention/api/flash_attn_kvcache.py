"""FlashAttention 2's ``flash_attn_with_kvcache``: attention to a cache of keys and values, and appending to it."""

from __future__ import annotations

import torch

from magi_attention.api.flash_attn_cache import (
    Cache,
    New,
    Queries,
    Reach,
    append_new,
    attend_cached,
    check_cache,
)
from magi_attention.api.flash_attn_core import Options, check_together, sink_of, to_softmax_lse
from magi_attention.api.flash_attn_mask import Side, Window, window_of
from magi_attention.errors import check_count, check_tensor, check_type, complaint


@torch.no_grad()
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new queries to the first ``cache_seqlens`` keys of a cache and, if given, to new ones behind them.

    New keys and values are written into the cache, in place, at positions ``cache_seqlens`` and on; cache_seqlens itself
    stays. Query i of sq sees key j of sk (the cached and the new ones, counted from cache_leftpad) iff
    ``i + sk - sq - left <= j <= i + sk - sq + right``. Without gradients.

    On a GPU the host does not wait, and nothing but what is in use is read: lengths beyond the cache are cut off at its
    end, entries of block_table and cache_batch_idx beyond it too, and new keys beyond it are not written.
    MAGI_ATTENTION_SANITY_CHECK=1 makes such a call a ValueError. On a CPU, new keys beyond the cache always are.

    Args:
        q: (batch, seqlen, nheads, headdim), fp16, bf16, fp32 or fp64.
        k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table (num_blocks, page_size,
            nheads_k, headdim) with any page size; of q's dtype, last stride 1, others free.
        k, v: (batch, seqlen_new, nheads_k, headdim), new ones, or None.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), with k and v: k is turned by its position in the cache; q by
            its own when causal or with a window, else by the position cache_seqlens.
        cache_seqlens: an integer or (batch,) int32 or int64; None is the whole cache.
        cache_batch_idx: (batch,) int32 or int64, row of the cache, or of block_table, of each entry; the entry's own
            number when None.
        cache_leftpad: (batch,) int32 or int64, first position in use.
        block_table: (batch, blocks) int32. Entries behind a sequence's last page may be anything.
        num_splits: a performance hint, without effect: keys are shared out over the GPU by lengths that it knows alone.
        return_softmax_lse: return (out, softmax_lse), (batch, nheads, seqlen) fp32, +inf for a row that sees nothing.
        The others: as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: arguments that do not fit together. NotImplementedError: alibi_slopes with keep_first.
    """
    check_tensor("q", q, shape=("batch", "seqlen", "nheads", "headdim"))
    check_count("num_splits", num_splits)
    check_count("keep_first", keep_first)
    check_type("return_softmax_lse", return_softmax_lse, bool)
    check_together(alibi_slopes, keep_first)
    queries = Queries(q)
    cache = cache_of(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, queries)
    window = window_of(window_size, causal, cache.capacity)
    new = new_of(k, v, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, moves(window))
    queries = append_new(queries, cache, new)
    options = Options(0.0, softmax_scale, softcap, alibi_slopes, False, sink_of(s_aux, learnable_sink))
    out, lse = attend_cached(queries, cache, new, Reach(window, keep_first, force_fa_decode), options)
    return (out, to_softmax_lse(lse)) if return_softmax_lse else out


def moves(window: tuple[Side, Side]) -> bool:
    """Whether queries stand at positions of their own: without a limit on either side it makes no difference."""
    return any(isinstance(side, torch.Tensor) or side != -1 for side in window)


def cache_of(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: int | torch.Tensor | None,
    rows: torch.Tensor | None,
    leftpad: torch.Tensor | None,
    table: torch.Tensor | None,
    queries: Queries,
) -> Cache:
    """The cache that these arguments describe, checked."""
    check_tensor("k_cache", k_cache, shape=("rows", "positions", "nheads_k", "headdim"))
    if table is not None:
        check_tensor(
            "block_table", table, shape=("batch", "blocks"), dtypes=(torch.int32,), device=k_cache.device
        )
        if rows is not None:
            table, rows = table.index_select(0, rows), None
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] * (1 if table is None else table.shape[1])
    elif not isinstance(cache_seqlens, torch.Tensor):
        check_count("cache_seqlens", cache_seqlens)
    cache = Cache(k_cache, v_cache, cache_seqlens, rows, leftpad, table)
    check_cache(cache, queries)
    return cache


def new_of(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    cache_seqlens: int | torch.Tensor | None,
    interleaved: bool,
    queries_move: bool,
    cuts: torch.Tensor | None = None,
    begins: torch.Tensor | None = None,
) -> New | None:
    """What these arguments append to a cache, or None."""
    if (k is None) != (v is None) or (cos is None) != (sin is None):
        raise ValueError(complaint("k, v and rotary_cos, rotary_sin", "both of a pair", "one"))
    if k is None or v is None:
        for name, x in (("rotary_cos", cos), ("cu_seqlens_k_new", cuts), ("rotary_seqlens", begins)):
            if x is not None:
                raise ValueError(complaint(name, "None without k and v", "a tensor"))
        return None
    if cache_seqlens is None:
        remedy = "It says where k and v go."
        raise ValueError(complaint("cache_seqlens", "lengths beside k and v", None, remedy))
    check_type("rotary_interleaved", interleaved, bool)
    angles = None if cos is None or sin is None else (cos, sin)
    return New(k, v, cuts, angles, begins, interleaved, queries_move)
