"""What the functions on caches of keys and values share: appending, attention to what is in use, checks.

On a GPU kernels made for caches do it. Where they do not apply (many queries, which are a matter of the other kernels;
fp64; chunks, sinks of rows, windows on a GPU), and on a CPU, the cache is taken as one long sequence of keys of which
bands show each query what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from magi_attention import env
from magi_attention.api.flash_attn_core import Options, forward
from magi_attention.api.flash_attn_mask import Side, cache_mask, with_pages_together
from magi_attention.api.rotary import apply_rotary_emb_torch
from magi_attention.errors import check_tensor, complaint
from magi_attention.kernels.cache_ops import append_to_cache, attend_to_cache, kernels_take

_INTEGERS = (torch.int32, torch.int64)
MOST_ROWS = 128
"""Queries times heads that share a key head, of a sequence, up to which the kernels made for caches are faster."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of the sequences of a batch, and where they lie.

    Attributes:
        k, v: (rows, positions, nheads_k, headdim), or with ``table`` pages of as many positions.
        used: (batch,) int32 or int64 positions in use, or one number for all.
        rows: (batch,) int32 or int64, row of each sequence; its own number when None.
        leftpad: (batch,) int32 or int64, first position in use.
        table: (batch, blocks) int32, pages of each sequence.
    """

    k: torch.Tensor
    v: torch.Tensor
    used: torch.Tensor | int
    rows: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None
    table: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Positions that a sequence can have."""
        return self.k.shape[1] * (1 if self.table is None else self.table.shape[1])

    @property
    def lengths(self) -> tuple[torch.Tensor | None, int]:
        """``used`` as the operators take it."""
        return (None, self.used) if isinstance(self.used, int) else (self.used, 0)

    def used_of(self, batch: int) -> torch.Tensor:
        """(batch,) int32."""
        if isinstance(self.used, int):
            return torch.full((batch,), self.used, dtype=torch.int32, device=self.k.device)
        return self.used.to(torch.int32)


@dataclass(frozen=True)
class New:
    """Keys and values to append, (batch, seqlen_new, nheads_k, headdim), or packed with ``cuts``, (batch + 1,) int32.

    Attributes:
        angles: cosines and sines of rotary embeddings, (positions, rotary_dim / 2) each, or None.
        begins: (batch,) position that each sequence's angles begin at; where its new keys begin when None.
        interleaved: which channels make a pair.
        queries_move: whether each query is turned by its own position, or all of a sequence by that of the first.
    """

    k: torch.Tensor
    v: torch.Tensor
    cuts: torch.Tensor | None = None
    angles: tuple[torch.Tensor, torch.Tensor] | None = None
    begins: torch.Tensor | None = None
    interleaved: bool = True
    queries_move: bool = True

    @property
    def each(self) -> int:
        """How many each sequence gets, 0 if that is in ``cuts``."""
        return 0 if self.cuts is not None else self.k.shape[1]

    def counts(self, batch: int) -> torch.Tensor:
        """(batch,) int32."""
        if self.cuts is not None:
            return self.cuts.diff().to(torch.int32)
        return torch.full((batch,), self.each, dtype=torch.int32, device=self.k.device)


@dataclass(frozen=True)
class Queries:
    """q (batch, seqlen, nheads, headdim), or (total, nheads, headdim) with ``cuts``, (batch + 1,) int32.

    ``longest`` is the most that a sequence has, as far as the host knows: a hint.
    """

    q: torch.Tensor
    cuts: torch.Tensor | None = None
    longest: int | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.q) if self.cuts is None else len(self.cuts) - 1

    @property
    def most(self) -> int:
        """Queries of the longest sequence, or of one on average if nothing is known."""
        if self.cuts is None:
            return self.q.shape[1]
        return -(-len(self.q) // max(self.batch, 1)) if self.longest is None else self.longest


@dataclass(frozen=True)
class Reach:
    """What a query sees of its sequence: as in ``flash_attn_func``, with the window of ``window_of``."""

    window: tuple[Side, Side] = (-1, -1)
    keep_first: int = 0
    force_fa_decode: bool = False
    chunk: int = 0


def append_new(queries: Queries, cache: Cache, new: New | None) -> Queries:
    """Write what is new into the cache, in place; returns the queries, turned if there are angles."""
    if new is not None:
        check_new(new, cache, queries)
    is_known = not queries.q.is_cuda and not torch.compiler.is_compiling()
    if env.sanity_check() or (new is not None and is_known):
        check_places(queries.batch, cache, new)
    return queries if new is None else replace(queries, q=_append(queries, cache, new))


def attend_cached(
    queries: Queries, cache: Cache, new: New | None, reach: Reach, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """out of q's shape but for the head dimension of v, and lse without that axis; ``new`` is in the cache already."""
    if _is_for_kernels(queries, cache, reach, options):
        return _by_kernels(queries, cache, new, reach, options)
    return _by_mask(queries, cache, new, reach, options)


def attend_pages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: Side,
    lengths: torch.Tensor,
    table: torch.Tensor,
    leftpad: torch.Tensor | None,
    reach: Reach,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (total_q, nheads, headdim) and lse (total_q, nheads) of packed queries and pages; not differentiable.

    Args:
        lengths: (batch,) keys of each sequence. table: (batch, blocks) int32.
    """
    check_tensor("q", q, shape=("total_q", "nheads", "headdim"))
    check_tensor("cu_seqlens_q", cu_seqlens_q, shape=("batch + 1",), dtypes=_INTEGERS, device=q.device)
    longest = max_seqlen_q if isinstance(max_seqlen_q, int) else None
    queries = Queries(q, cu_seqlens_q.to(torch.int32), longest)
    cache = Cache(k, v, lengths, None, leftpad, table)
    check_cache(cache, queries)
    return attend_cached(append_new(queries, cache, None), cache, None, reach, options)


def check_places(batch: int, cache: Cache, new: New | None) -> None:
    """ValueError for keys beyond the cache; reads lengths and table, on a GPU the host waits for them."""
    used = cache.used_of(batch)
    ends = used if new is None else used + new.counts(batch)
    if batch and int(ends.max()) > cache.capacity:
        got = f"{int(ends.max())} for sequence {int(ends.argmax())}"
        remedy = "Give it more positions or pages."
        raise ValueError(complaint("cache_seqlens and new keys", f"at most {cache.capacity}", got, remedy))
    if batch and int(used.min()) < 0:
        raise ValueError(complaint("cache_seqlens", "at least 0", int(used.min())))
    if cache.table is not None:
        blocks = torch.arange(cache.table.shape[1], device=ends.device) * cache.k.shape[1]
        entries = cache.table[blocks < ends[:, None]]
        _check_indices("block_table", entries, len(cache.k))
    if cache.rows is not None:
        _check_indices("cache_batch_idx", cache.rows, len(cache.k))


def _check_indices(name: str, indices: torch.Tensor, size: int) -> None:
    wrong = indices[(indices < 0) | (indices >= size)]
    if len(wrong):
        raise ValueError(complaint(name, f"indices below {size} where in use", int(wrong[0])))


def check_cache(cache: Cache, queries: Queries) -> None:
    """TypeError or ValueError for tensors that do not fit together."""
    q, k, v = queries.q, cache.k, cache.v
    check_tensor(
        "k_cache", k, shape=("rows", "positions", "nheads_k", q.shape[-1]), dtypes=(q.dtype,), device=q.device
    )
    check_tensor("v_cache", v, shape=(*k.shape[:3], "headdim"), dtypes=(q.dtype,), device=q.device)
    for name, x in (("k_cache", k), ("v_cache", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(complaint(f"{name} last stride", "1", x.stride(-1), "A cache is never copied."))
    if k.shape[2] == 0 or q.shape[-2] % k.shape[2]:
        raise ValueError(complaint("nheads of q", f"a multiple of {k.shape[2]}", q.shape[-2]))
    batch = (queries.batch,)
    if cache.table is not None:
        check_tensor(
            "block_table", cache.table, shape=(*batch, "blocks"), dtypes=(torch.int32,), device=q.device
        )
    elif cache.rows is None and len(k) < queries.batch:
        remedy = "cache_batch_idx says which row is whose."
        raise ValueError(complaint("k_cache rows", f"at least {queries.batch}", len(k), remedy))
    numbers = {"cache_seqlens": cache.used, "cache_batch_idx": cache.rows, "cache_leftpad": cache.leftpad}
    for name, number in numbers.items():
        if isinstance(number, torch.Tensor):
            check_tensor(name, number, shape=batch, dtypes=_INTEGERS, device=q.device)


def check_new(new: New, cache: Cache, queries: Queries) -> None:
    """TypeError or ValueError for new keys, values or angles that do not fit."""
    heads, device, dtypes = cache.k.shape[2:], cache.k.device, (cache.k.dtype,)
    lead = ("total_new",) if new.cuts is not None else (queries.batch, "seqlen_new")
    check_tensor("k", new.k, shape=(*lead, *heads), dtypes=dtypes, device=device)
    check_tensor("v", new.v, shape=(*new.k.shape[:-1], cache.v.shape[3]), dtypes=dtypes, device=device)
    if new.angles is not None:
        cos, sin = new.angles
        check_tensor("rotary_cos", cos, shape=("positions", "rotary_dim / 2"), device=device)
        check_tensor("rotary_sin", sin, shape=cos.shape, dtypes=(cos.dtype,), device=device)
        if 2 * cos.shape[1] > heads[1]:
            raise ValueError(complaint("rotary_dim", f"at most headdim {heads[1]}", 2 * cos.shape[1]))
    if new.begins is not None:
        check_tensor("rotary_seqlens", new.begins, shape=(queries.batch,), dtypes=_INTEGERS, device=device)


def _is_for_kernels(queries: Queries, cache: Cache, reach: Reach, options: Options) -> bool:
    q, sink = queries.q, options.sink
    rows = queries.most * (q.shape[-2] // cache.k.shape[2])
    return (
        kernels_take(q, cache.v, queries.batch)
        and rows <= MOST_ROWS
        and all(isinstance(side, int) for side in reach.window)
        and not reach.chunk
        and (sink is None or sink.dim() == 2)
        and options.dropout_p == 0
    )


def _by_kernels(
    queries: Queries, cache: Cache, new: New | None, reach: Reach, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    q, sink, slopes = queries.q, options.sink, options.alibi_slopes
    settings = options.settings(q.shape[-1])
    if sink is not None:
        check_tensor("s_aux", sink, shape=("s_sink", q.shape[-2]), device=q.device)
        sink = sink[0] if len(sink) == 1 else torch.logsumexp(sink.float(), dim=0)
    if slopes is not None:
        shape = (q.shape[-2],) if slopes.dim() == 1 else (queries.batch, q.shape[-2])
        check_tensor("alibi_slopes", slopes, shape=shape, device=q.device)
        slopes = slopes.float().expand(queries.batch, -1).contiguous()
    cuts_of_new = None if new is None else new.cuts
    return attend_to_cache(
        q if q.stride(-1) == 1 else q.contiguous(), cache.k, cache.v, *cache.lengths, 0 if new is None else new.each,
        queries.cuts, cuts_of_new, cache.leftpad, cache.rows, cache.table, sink, slopes, settings["softmax_scale"],
        settings["softcap"], *reach.window, reach.keep_first, reach.force_fa_decode, options.sm_margin,
    )  # fmt: skip


def _by_mask(
    queries: Queries, cache: Cache, new: New | None, reach: Reach, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    used = cache.used_of(queries.batch)
    ends = used if new is None else used + new.counts(queries.batch)
    k, v = cache.k, cache.v
    if cache.table is not None:
        k, v, _ = with_pages_together(k, v, cache.table)
    else:
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    q = queries.q.flatten(0, 1) if queries.cuts is None else queries.q
    spans = queries.cuts if queries.cuts is not None else queries.q.shape[:2]
    mask = cache_mask(
        spans, len(q), len(k), cache.capacity, ends, cache.rows, cache.leftpad, reach.window, reach.keep_first,
        reach.force_fa_decode, reach.chunk,
    )  # fmt: skip
    out, lse = forward(q, k, v, mask, options)
    if queries.cuts is not None:
        return out, lse
    return out.unflatten(0, queries.q.shape[:2]), lse.unflatten(0, queries.q.shape[:2])


def _append(queries: Queries, cache: Cache, new: New) -> torch.Tensor:
    """Write the new keys and values into the cache; returns q, turned if there are angles."""
    if kernels_take(queries.q, cache.v, queries.batch):
        k, v, q = (x if x.stride(-1) == 1 else x.contiguous() for x in (new.k, new.v, queries.q))
        cos, sin = (None, None) if new.angles is None else new.angles
        turned = append_to_cache(
            cache.k, cache.v, k, v, q, *cache.lengths, cos, sin, new.begins, queries.cuts, new.cuts, cache.rows,
            cache.table, new.interleaved, new.queries_move,
        )  # fmt: skip
        return q if new.angles is None else turned
    used = cache.used_of(queries.batch)
    begins = used if new.begins is None else new.begins.to(torch.int32)
    entry, index = _tokens(new.k, new.cuts, queries.batch)
    k, q = new.k, queries.q
    if new.angles is not None:
        k = _turned(k, begins[entry] + index, new)
        query_entry, query_index = _tokens(q, queries.cuts, queries.batch)
        q = _turned(q, begins[query_entry] + (query_index if new.queries_move else 0), new)
    k, v = k.reshape(-1, *k.shape[-2:]), new.v.reshape(-1, *new.v.shape[-2:])
    if new.cuts is not None:  # tokens behind the last sequence are nobody's
        is_own = torch.arange(len(k), device=k.device) < new.cuts[-1]
        k, v, entry, index = (x[is_own] for x in (k, v, entry, index))
    position, row = (used[entry] + index).long(), entry
    if cache.table is not None:
        row, position = cache.table[entry, position // cache.k.shape[1]], position % cache.k.shape[1]
    elif cache.rows is not None:
        row = cache.rows[entry]
    cache.k[row.long(), position] = k
    cache.v[row.long(), position] = v
    return q


def _tokens(x: torch.Tensor, cuts: torch.Tensor | None, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, number in it) of each token of x, those of a batch one behind the other."""
    if cuts is None:
        numbers = torch.arange(batch * x.shape[1], device=x.device)
        return numbers // max(x.shape[1], 1), numbers % max(x.shape[1], 1)
    numbers = torch.arange(len(x), device=x.device)
    entry = torch.bucketize(numbers, cuts[1:].long(), right=True).clamp(max=batch - 1)
    return entry, numbers - cuts.long()[entry]


def _turned(x: torch.Tensor, angle: torch.Tensor, new: New) -> torch.Tensor:
    """x with each of its tokens turned by a row of the tables; beyond the tables they stay as they are."""
    assert new.angles is not None
    cos, sin = new.angles
    at = angle.long().clamp(0, max(len(cos) - 1, 0))
    tokens = x.reshape(-1, *x.shape[-2:])
    is_inside = ((angle >= 0) & (angle < len(cos)))[:, None, None]
    wide = tokens.float() if x.dtype.itemsize == 1 else tokens
    turned = apply_rotary_emb_torch(wide, cos[at], sin[at], new.interleaved).to(x.dtype)
    return torch.where(is_inside, turned, tokens).view(x.shape)
