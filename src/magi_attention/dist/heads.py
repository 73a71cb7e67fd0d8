"""The other way to share attention: each rank takes some heads of all tokens, and gives their results back.

Queries, keys and values change from (own tokens, all heads) to (all tokens, own heads) in one exchange each way, and the
mask is that of one device. More moves than where keys alone travel, and as much from every rank to every other, but
nothing is merged, and work is balanced whatever the mask: of use where it hides little and there are many key heads.
The method is that of DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from magi_attention.attention import attention
from magi_attention.dist.shard import Shards, all_gather
from magi_attention.errors import complaint
from magi_attention.mask import Mask


@dataclass(frozen=True, eq=False)
class HeadWork:
    """The mask of all tokens, padding included, where they lie, and multiprocessors that attention leaves to others."""

    mask: Mask
    q_shards: Shards
    k_shards: Shards
    sm_margin: int = 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks."""
        return self.q_shards.group

    @property
    def num_ranks(self) -> int:
        """How many."""
        return len(self.q_shards.sizes)


def can_split(num_heads: int, num_kv_heads: int, num_ranks: int) -> bool:
    """Whether every rank can have as many heads."""
    return num_heads % num_ranks == 0 and num_kv_heads % num_ranks == 0


def attend_by_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work: HeadWork,
    *,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As ``runtime.attend``; the sink's gradient is that of this rank's heads, zero for others.

    Raises:
        ValueError: the ranks do not divide the heads.
    """
    num_heads, ranks = q.shape[-2], work.num_ranks
    if not can_split(num_heads, k.shape[-2], ranks):
        expected = f"multiples of {ranks}, the ranks"
        raise ValueError(complaint("heads of q and k", expected, (num_heads, k.shape[-2])))
    rank, share = work.q_shards.rank, num_heads // ranks
    own = None if sink is None else sink[..., rank * share : (rank + 1) * share]
    queries, packed = _ToHeads.apply(q, torch.cat([k, v], dim=-1), work)
    keys, values = packed.split([k.shape[-1], v.shape[-1]], dim=-1)
    out, meta = attention(
        queries, keys, values, work.mask, sink=own, softmax_scale=softmax_scale, softcap=softcap,
        return_max_logits=return_max_logits, sm_margin=work.sm_margin,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    assert meta.lse is not None
    out, lse = _ToRows.apply(out, meta.lse[..., None], work)
    if meta.max_logits is None:
        return out, lse[..., 0], None
    top = meta.max_logits.new_empty(num_heads)
    all_gather(top, meta.max_logits, group=work.group)
    return out, lse[..., 0], top


def _to_heads(x: torch.Tensor, shards: Shards, work: HeadWork) -> torch.Tensor:
    """(own tokens, heads, ...) to (all tokens in order, own heads, ...)."""
    sent = x.unflatten(1, (work.num_ranks, -1)).transpose(0, 1).contiguous()
    received = x.new_empty(sum(shards.sizes), *sent.shape[2:])
    dist.all_to_all_single(
        received, sent.flatten(0, 1), shards.sizes, [len(x)] * work.num_ranks, group=work.group
    )
    return received.index_select(0, shards.order(x.device))


def _to_rows(x: torch.Tensor, shards: Shards, work: HeadWork) -> torch.Tensor:
    """(all tokens in order, own heads, ...) to (own tokens, heads, ...)."""
    own, ranks = shards.sizes[shards.rank], work.num_ranks
    received = x.new_empty(ranks * own, *x.shape[1:])
    sent = x.index_select(0, shards.together(x.device))
    dist.all_to_all_single(received, sent, [own] * ranks, shards.sizes, group=work.group)
    return received.unflatten(0, (ranks, own)).transpose(0, 1).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, packed: torch.Tensor, work: HeadWork) -> tuple:  # type: ignore[override]
        ctx.work = work
        return _to_heads(q, work.q_shards, work), _to_heads(packed, work.k_shards, work)

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dpacked: torch.Tensor) -> tuple:  # type: ignore[override]
        work = ctx.work
        return _to_rows(dq, work.q_shards, work), _to_rows(dpacked, work.k_shards, work), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, lse: torch.Tensor, work: HeadWork) -> tuple:  # type: ignore[override]
        ctx.work = work
        return _to_rows(out, work.q_shards, work), _to_rows(lse, work.q_shards, work)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple:  # type: ignore[override]
        work = ctx.work
        return _to_heads(dout, work.q_shards, work), _to_heads(dlse, work.q_shards, work), None
