"""FlashAttention 2's ``flash_attn_with_kvcache``: attention to a cache of keys and values, and appending to it."""

from __future__ import annotations

import torch

from magi_attention.api.flash_attn_core import Options, check_together, forward, sink_of, to_softmax_lse
from magi_attention.api.flash_attn_mask import Window, cache_mask, window_of, with_pages_together
from magi_attention.api.rotary import apply_rotary
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

    Args:
        q: (batch, seqlen, nheads, headdim).
        k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), or with block_table (num_blocks, page_size,
            nheads_k, headdim). Pages are copied together for the call.
        k, v: (batch, seqlen_new, nheads_k, headdim), new ones, or None.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), with k and v: k is turned by its position in the cache; q by
            its own when causal or with a window, else by the position cache_seqlens.
        cache_seqlens: an integer or (batch,) int32; None is the whole cache.
        cache_batch_idx: (batch,) int32, row of the cache of each entry; the entry's own number when None.
        cache_leftpad: (batch,) int32, first position in use.
        block_table: (batch, blocks) int32. Entries behind a sequence's last page may be anything.
        num_splits: a performance hint, without effect here.
        return_softmax_lse: return (out, softmax_lse), (batch, nheads, seqlen) fp32, +inf for a row that sees nothing.
        The others: as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: arguments that do not fit together. NotImplementedError: block_table with cache_batch_idx
            or cache_leftpad; alibi_slopes with keep_first.
    """
    _check(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, num_splits, return_softmax_lse)
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        remedy = "Give each sequence its pages by the block table."
        got = "cache_batch_idx or cache_leftpad"
        raise NotImplementedError(
            complaint("with block_table", "neither cache_batch_idx nor cache_leftpad", got, remedy)
        )
    check_together(alibi_slopes, keep_first)
    batch, capacity = len(q), _capacity(k_cache, block_table)
    used = _lengths(cache_seqlens, capacity, q)
    window = window_of(window_size, causal, capacity)
    num_new = 0
    if k is not None and v is not None:
        num_new = k.shape[1]
        if rotary_cos is not None and rotary_sin is not None:
            turn = (rotary_cos, rotary_sin, used, None, None, rotary_interleaved)
            k = apply_rotary(k, *turn)
            if window == (-1, -1):  # all queries stand at one position
                q = apply_rotary(q.reshape(batch, 1, -1, q.shape[3]), *turn).view(q.shape)
            else:
                q = apply_rotary(q, *turn)
        _append(k_cache, v_cache, k, v, used, cache_batch_idx, block_table)
    if block_table is not None:
        keys, values, _ = with_pages_together(k_cache, v_cache, block_table)
    else:
        keys, values = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    mask = cache_mask(
        q.shape[:2], len(keys), capacity, used + num_new, cache_batch_idx, cache_leftpad, window, keep_first,
        force_fa_decode,
    )  # fmt: skip
    options = Options(0.0, softmax_scale, softcap, alibi_slopes, False, sink_of(s_aux, learnable_sink))
    out, lse = forward(q.flatten(0, 1), keys, values, mask, options)
    out = out.unflatten(0, q.shape[:2])
    return (out, to_softmax_lse(lse.unflatten(0, q.shape[:2]))) if return_softmax_lse else out


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cache_seqlens: int | torch.Tensor | None,
    num_splits: int,
    return_softmax_lse: bool,
) -> None:
    check_tensor("q", q, shape=("batch", "seqlen", "nheads", "headdim"))
    check_tensor("k_cache", k_cache, shape=("rows", "positions", "nheads_k", q.shape[3]), dtypes=(q.dtype,))
    check_tensor("v_cache", v_cache, shape=(*k_cache.shape[:3], "headdim"), dtypes=(q.dtype,))
    check_count("num_splits", num_splits)
    check_type("return_softmax_lse", return_softmax_lse, bool)
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(complaint("k, v and rotary_cos, rotary_sin", "both of a pair", "one"))
    if k is None or v is None:
        if rotary_cos is not None:
            raise ValueError(complaint("rotary_cos", "None without k and v", "a tensor"))
        return
    if cache_seqlens is None:
        remedy = "It says where k and v go."
        raise ValueError(complaint("cache_seqlens", "lengths beside k and v", None, remedy))
    check_tensor("k", k, shape=(len(q), "seqlen_new", *k_cache.shape[2:]), dtypes=(q.dtype,), device=q.device)
    check_tensor("v", v, shape=(*k.shape[:3], v_cache.shape[3]), dtypes=(q.dtype,), device=q.device)


def _capacity(k_cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    """Positions that a sequence can have."""
    if block_table is None:
        return k_cache.shape[1]
    check_tensor(
        "block_table", block_table, shape=("batch", "blocks"), dtypes=(torch.int32,), device=k_cache.device
    )
    return block_table.shape[1] * k_cache.shape[1]


def _lengths(cache_seqlens: int | torch.Tensor | None, capacity: int, q: torch.Tensor) -> torch.Tensor:
    """(batch,) int32 positions of the cache in use."""
    if isinstance(cache_seqlens, torch.Tensor):
        dtypes = (torch.int32, torch.int64)
        check_tensor("cache_seqlens", cache_seqlens, shape=(len(q),), dtypes=dtypes, device=q.device)
        return cache_seqlens.to(torch.int32)
    if cache_seqlens is not None:
        check_count("cache_seqlens", cache_seqlens)
        capacity = cache_seqlens
    return torch.full((len(q),), capacity, dtype=torch.int32, device=q.device)


def _append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    used: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    """Write k and v behind what is in use; a position beyond the cache is an error, on a GPU one of the device."""
    position = used.long()[:, None] + torch.arange(k.shape[1], device=k.device)
    row = torch.arange(len(k), device=k.device)[:, None].expand_as(position)
    if block_table is not None:
        page_size = k_cache.shape[1]
        row = block_table.long().gather(1, position // page_size)
        position = position % page_size
    elif cache_batch_idx is not None:
        row = cache_batch_idx.long()[:, None].expand_as(position)
    k_cache[row, position] = k
    v_cache[row, position] = v
