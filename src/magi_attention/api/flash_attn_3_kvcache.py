"""FlashAttention 3's ``flash_attn_with_kvcache`` and ``get_scheduler_metadata``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from magi_attention.api.flash_attn_cache import Cache, Queries, Reach, append_new, attend_cached
from magi_attention.api.flash_attn_core import Options, sink_of
from magi_attention.api.flash_attn_kvcache import cache_of, moves, new_of
from magi_attention.api.flash_attn_mask import Window, window_of
from magi_attention.errors import check_count, check_tensor, check_type, complaint


@torch.no_grad()
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    keep_first: int = 0,
    force_fa_decode: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None, None]:
    """FlashAttention 2's function of this name, whose arguments mean the same here, and what version 3 adds.

    Args:
        q: (batch, seqlen, nheads, headdim), or (total_q, nheads, headdim) with ``cu_seqlens_q``, (batch + 1,) int32.
        k, v: (batch, seqlen_new, nheads_k, headdim), or (total_new, nheads_k, headdim) with ``cu_seqlens_k_new``,
            (batch + 1,) int32. v and v_cache may have another head dimension than k.
        qv: as q, of v's head dimension: adds ``qv . v`` to ``q . k``. Computed as one product of longer heads, for which
            the cache is copied.
        page_table: (batch, blocks) int32, the pages of each sequence; with cache_batch_idx of each of its entries.
        max_seqlen_q: queries of the longest sequence, a hint.
        rotary_seqlens: (batch,) int32 or int64, where the angles of each sequence begin; cache_seqlens when None.
        q_descale, k_descale, v_descale: (batch, nheads_k) fp32, what q, keys and values in fp8 e4m3 are multiplied by.
            fp8 is computed in bf16, for which the cache is copied; out is bf16.
        attention_chunk: a query sees only the keys of its own chunk of so many positions; 0 is off.
        scheduler_metadata, num_splits, pack_gqa: performance hints, without effect.
        sm_margin: multiprocessors to leave to others.
        return_softmax_lse: return (out, softmax_lse, None, None): (batch, nheads, seqlen), or (nheads, total_q), fp32,
            -inf for a row that sees nothing.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
    """
    for name, count in (
        ("attention_chunk", attention_chunk),
        ("num_splits", num_splits),
        ("keep_first", keep_first),
    ):
        check_count(name, count)
    check_type("return_softmax_lse", return_softmax_lse, bool)
    queries = _queries(q, cu_seqlens_q, max_seqlen_q)
    cache = cache_of(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, page_table, queries)
    window = window_of(window_size, causal, cache.capacity)
    new = new_of(k, v, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, moves(window), cu_seqlens_k_new,
                 rotary_seqlens)  # fmt: skip
    queries = append_new(queries, cache, new)
    sink = sink_of(s_aux, learnable_sink)
    options = Options(0.0, softmax_scale, softcap, None, False, sink, None, sm_margin)
    queries, cache, v_scale = _in_bf16(queries, cache, (q_descale, k_descale, v_descale))
    if qv is not None:
        queries, cache = _with_values(queries, cache, qv)
    reach = Reach(window, keep_first, force_fa_decode, attention_chunk)
    out, lse = attend_cached(queries, cache, new, reach, options)
    if v_scale is not None:
        out = (out * v_scale[..., None]).to(out.dtype)
    return (out, lse.transpose(-1, -2).contiguous(), None, None) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int, *sizes: Any, cache_seqlens: torch.Tensor, **others: Any
) -> torch.Tensor:
    """An empty int32 tensor on the device of ``cache_seqlens``: the kernel needs no schedule but the lengths."""
    check_count("batch_size", batch_size)
    check_type("cache_seqlens", cache_seqlens, torch.Tensor)
    return torch.empty(0, dtype=torch.int32, device=cache_seqlens.device)


def _queries(q: torch.Tensor, cuts: torch.Tensor | None, longest: int | None) -> Queries:
    if cuts is None:
        check_tensor("q", q, shape=("batch", "seqlen", "nheads", "headdim"))
        return Queries(q)
    check_tensor("q", q, shape=("total_q", "nheads", "headdim"))
    check_tensor("cu_seqlens_q", cuts, shape=("batch + 1",), dtypes=(torch.int32,), device=q.device)
    if not len(cuts):
        raise ValueError(complaint("cu_seqlens_q length", "at least 1", 0))
    if longest is not None:
        check_count("max_seqlen_q", longest)
    return Queries(q, cuts, longest)


def _in_bf16(
    queries: Queries, cache: Cache, scales: tuple[torch.Tensor | None, ...]
) -> tuple[Queries, Cache, torch.Tensor | None]:
    """fp8 queries and cache as bf16, the scales of q and keys in q, and those of values for each query head."""
    q = queries.q
    if q.dtype != torch.float8_e4m3fn:
        if any(scale is not None for scale in scales):
            remedy = "Scale q and the cache themselves."
            raise ValueError(complaint("descales", "None without fp8 inputs", "a tensor", remedy))
        return queries, cache, None
    shape = (queries.batch, cache.k.shape[2])
    group = q.shape[-2] // shape[1]
    found: list[torch.Tensor | None] = []
    for name, scale in zip("qkv", scales, strict=True):
        if scale is not None:
            check_tensor(f"{name}_descale", scale, shape=shape, dtypes=(torch.float32,), device=q.device)
            scale = _of_tokens(scale.repeat_interleave(group, dim=1), queries)
        found.append(scale)
    of_q, of_k, of_v = found
    wide = q.to(torch.bfloat16)
    for scale in (of_q, of_k):
        if scale is not None:
            wide = (wide * scale[..., None]).to(torch.bfloat16)
    k, v = cache.k.to(torch.bfloat16), cache.v.to(torch.bfloat16)
    return replace(queries, q=wide), replace(cache, k=k, v=v), of_v


def _of_tokens(x: torch.Tensor, queries: Queries) -> torch.Tensor:
    """(batch, nheads) as (batch, 1, nheads), or (total_q, nheads) of packed queries."""
    if queries.cuts is None:
        return x[:, None]
    token = torch.arange(len(queries.q), device=x.device)
    return x[torch.bucketize(token, queries.cuts[1:].long(), right=True).clamp(max=queries.batch - 1)]


def _with_values(queries: Queries, cache: Cache, qv: torch.Tensor) -> tuple[Queries, Cache]:
    """``q . k + qv . v`` as one product of longer heads."""
    q = queries.q
    check_tensor("qv", qv, shape=(*q.shape[:-1], cache.v.shape[-1]), dtypes=(q.dtype,), device=q.device)
    keys = torch.cat([cache.k, cache.v], dim=-1)
    return replace(queries, q=torch.cat([q, qv], dim=-1)), replace(cache, k=keys)
