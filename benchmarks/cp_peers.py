"""The usual ways to share attention between GPUs, with this library's kernels: what context parallelism is compared with.

ring: keys and values go round, a rank's in each step, and their gradients with them (Ring Attention, arXiv:2310.01889),
tokens in zigzag. all-gather: every rank gets all keys, and gradients are summed by reduce-scatter, tokens in zigzag.
ulysses: heads are shared instead of tokens (arXiv:2309.14509), tokens as they come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from magi_attention.attention import accumulate, attention, attention_backward
from magi_attention.config import SequentialDispatchAlg, ZigzagDispatchAlg
from magi_attention.dist.chunks import cut
from magi_attention.dist.exchange import fused
from magi_attention.dist.heads import HeadWork, attend_by_heads
from magi_attention.dist.placement import place
from magi_attention.dist.shard import Shards
from magi_attention.mask import Mask
from magi_attention.mask.bands import localise

CHUNKS_A_RANK = 16


def shards_of(mask: Mask, name: str, rank: int, ranks: int) -> Shards:
    """Where a peer has its tokens."""
    chunks = cut(mask.bands, mask.num_rows, mask.num_cols, mask.num_rows // (CHUNKS_A_RANK * ranks))
    alg = SequentialDispatchAlg() if name == "ulysses" else ZigzagDispatchAlg()
    return Shards(mask.num_rows, [chunks.rows[part] for part in place(alg, chunks, ranks)], rank)


@dataclass
class Peer:
    """``name`` on this rank's rows: ``peer(q, k, v)`` is out (rows, heads, dim), differentiable."""

    name: str
    mask: Mask
    shards: Shards
    work: Any = field(init=False)

    def __post_init__(self) -> None:
        ranges, mask = self.shards.ranges, self.mask
        own, sizes = ranges[self.shards.rank], self.shards.sizes
        rows = sizes[self.shards.rank]
        if self.name == "ulysses":
            self.work = HeadWork(mask, self.shards, self.shards)
        elif self.name == "ring":
            parts = [fused(localise(mask.bands, own, keys)) for keys in ranges]
            self.work = [Mask(part, rows, size) for part, size in zip(parts, sizes, strict=True)]
        else:
            self.work = Mask(fused(localise(mask.bands, own, np.concatenate(ranges))), rows, sum(sizes))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.name == "ulysses":
            return attend_by_heads(q, k, v, self.work)[0]
        return (_Ring if self.name == "ring" else _AllGather).apply(q, k, v, self.work)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:  # type: ignore[override]
        keys, values = _gathered(k, v)
        out, meta = attention(q, keys, values, mask)
        ctx.save_for_backward(q, k, v, out, meta.lse)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        keys, values = _gathered(k, v)
        dq, dk, dv = attention_backward(dout, q, keys, values, out, lse, ctx.mask)
        whole = torch.cat([dk, dv], dim=-1)
        own = whole.new_empty(len(k), *whole.shape[1:])
        dist.reduce_scatter_tensor(own, whole)
        return dq, *own.split([k.shape[-1], v.shape[-1]], dim=-1), None


def _gathered(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    packed = torch.cat([k, v], dim=-1)
    whole = packed.new_empty(dist.get_world_size() * len(k), *packed.shape[1:])
    dist.all_gather_into_tensor(whole, packed)
    return whole.split([k.shape[-1], v.shape[-1]], dim=-1)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: list[Mask]
    ) -> torch.Tensor:  # type: ignore[override]
        rank, ranks = dist.get_rank(), len(masks)
        out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:-1], -torch.inf, device=q.device)
        packed = torch.cat([k, v], dim=-1)
        for step in range(ranks):
            coming, handles = _pass_on(packed) if step + 1 < ranks else (packed, [])
            keys, values = packed.split([k.shape[-1], v.shape[-1]], dim=-1)
            accumulate(out, lse, q, keys, values, masks[(rank - step) % ranks])
            _wait(handles)
            packed = coming
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, lse)
        ctx.masks = masks
        return result

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        masks, rank, ranks = ctx.masks, dist.get_rank(), len(ctx.masks)
        widths, packed = [k.shape[-1], v.shape[-1]], torch.cat([k, v], dim=-1)
        total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        gradient, handles = torch.zeros(0), []
        for step in range(ranks):
            coming, fetching = _pass_on(packed) if step + 1 < ranks else (packed, [])
            keys, values = packed.split(widths, dim=-1)
            dq, dk, dv = attention_backward(dout, q, keys, values, out, lse, masks[(rank - step) % ranks])
            total += dq
            _wait(handles)  # the sum of the ranks before, for the same keys
            here = torch.cat([dk, dv], dim=-1).float()
            gradient = here if step == 0 else gradient + here
            gradient, handles = _pass_on(gradient)
            _wait(fetching)
            packed = coming
        _wait(handles)
        dk, dv = gradient.split(widths, dim=-1)
        return total.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _pass_on(x: torch.Tensor) -> tuple[torch.Tensor, list[dist.Work]]:
    """What the rank before sends, to be waited for, while ``x`` goes to the next one."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, coming = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    to, source = (rank + 1) % ranks, (rank - 1) % ranks
    pair = [dist.P2POp(dist.isend, x, to), dist.P2POp(dist.irecv, coming, source)]
    return coming, dist.batch_isend_irecv(pair)


def _wait(handles: list[dist.Work]) -> None:
    for handle in handles:
        handle.wait()
