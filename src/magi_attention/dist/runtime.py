"""Attention of tokens that are dealt to ranks: own keys first, those of others as they come, gradients back the same way.

Keys and values travel in one tensor, side by side. While a stage is computed the next one is on its way. Partial results
are merged in fp32 in the order of stages; gradients of keys are summed in fp32 on their owner, rank after rank: the same
bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from magi_attention.attention import accumulate, attention_backward
from magi_attention.dist.exchange import Share, Stage
from magi_attention.kernels.problem import stats_dtype
from magi_attention.mask import Mask


@dataclass(frozen=True, eq=False)
class Move:
    """A stage on a device.

    Attributes:
        mask: own queries against the keys received. takes: to each rank in turn, which of the own keys it gets.
        send_sizes, receive_sizes: keys to and from each rank.
    """

    mask: Mask
    takes: tuple[torch.Tensor, ...]
    send_sizes: list[int]
    receive_sizes: list[int]


@dataclass(frozen=True, eq=False)
class Work:
    """A rank's share on a device, and the group it is shared with. ``mask`` is that of own queries and keys."""

    mask: Mask
    moves: tuple[Move, ...]
    group: dist.ProcessGroup | None

    @staticmethod
    def of(share: Share, device: torch.device, group: dist.ProcessGroup | None) -> Work:
        """``share`` on ``device``."""
        moves = tuple(_move(stage, share.num_rows, device) for stage in share.stages)
        return Work(Mask(share.bands, share.num_rows, share.num_cols), moves, group)


def _move(stage: Stage, num_rows: int, device: torch.device) -> Move:
    takes = tuple(
        torch.cat([torch.arange(0), *(torch.arange(begin, end) for begin, end in ranges.tolist())]).to(device)
        for ranges in stage.send
    )
    sizes = stage.receive_sizes
    return Move(Mask(stage.bands, num_rows, sum(sizes)), takes, stage.send_sizes, sizes)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    work: Work,
    *,
    sink: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    return_max_logits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out (T, H, DV) in q's dtype and lse (T, H) fp32 of a rank's own rows; every rank of the group must call it.

    And, if asked for, the largest logit of each head over the rows of all ranks, (H,) fp32.

    Args:
        q: (T, H, D) own queries. k, v: (S, HK, D or DV) own keys and values.
        sink: (s_sink, H), equal on all ranks; its gradient is that of the own rows.
    """
    settings = {"softmax_scale": softmax_scale, "softcap": softcap}
    return _Attend.apply(q, k, v, sink, work, settings, return_max_logits)


def _arriving(packed: torch.Tensor, work: Work) -> Iterator[tuple[Move, torch.Tensor]]:
    """Each stage with its keys and values, (received, HK, D + DV); the next one is on its way meanwhile."""
    flights = iter([_depart(packed, move, work.group) for move in work.moves[:1]])
    for number, move in enumerate(work.moves):
        buffer, handle, _ = next(flights)
        handle.wait()
        if number + 1 < len(work.moves):
            flights = iter([_depart(packed, work.moves[number + 1], work.group)])
        yield move, buffer


def _depart(
    packed: torch.Tensor, move: Move, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """The buffer of a stage, what to wait for, and what must live as long."""
    sent = packed.index_select(0, torch.cat(move.takes))
    buffer = packed.new_empty(sum(move.receive_sizes), *packed.shape[1:])
    handle = dist.all_to_all_single(
        buffer, sent, move.receive_sizes, move.send_sizes, group=group, async_op=True
    )
    return buffer, handle, sent


def _give_back(gradient: torch.Tensor, move: Move, into: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """Add the gradients of received keys to those of their owners."""
    returned = gradient.new_empty(sum(move.send_sizes), *gradient.shape[1:])
    dist.all_to_all_single(returned, gradient, move.send_sizes, move.receive_sizes, group=group)
    for take, part in zip(move.takes, returned.split(move.send_sizes), strict=True):
        into.index_add_(0, take, part.to(into.dtype))  # a rank gets no key twice


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx: Any, q, k, v, sink, work: Work, settings: dict, return_max_logits: bool
    ) -> tuple:
        stats = stats_dtype(q.dtype)
        out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=stats, device=q.device)
        lse = torch.full(q.shape[:-1], -torch.inf, dtype=stats, device=q.device)
        packed = torch.cat([k, v], dim=-1)
        stages = _arriving(packed, work)
        given = {**settings, "return_max_logits": return_max_logits}
        tops = [accumulate(out, lse, q, k, v, work.mask, sink=sink, **given)]
        for move, buffer in stages:
            keys, values = buffer.split([k.shape[-1], v.shape[-1]], dim=-1)
            tops.append(accumulate(out, lse, q, keys, values, move.mask, **given))
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink, result, lse)
        ctx.work, ctx.settings = work, settings
        ctx.set_materialize_grads(False)
        if not return_max_logits:
            return result, lse, None
        top = torch.stack([x for x in tops if x is not None]).amax(0)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=work.group)
        ctx.mark_non_differentiable(top)
        return result, lse, top

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _: None
    ) -> tuple:
        q, k, v, sink, out, lse = ctx.saved_tensors
        work, settings = ctx.work, ctx.settings
        dout = torch.zeros_like(out) if dout is None else dout
        given = {**settings, "dlse": dlse}
        dq, dk, dv = (
            x.to(lse.dtype) for x in attention_backward(dout, q, k, v, out, lse, work.mask, **given)
        )
        own = torch.cat([dk, dv], dim=-1)
        widths = [k.shape[-1], v.shape[-1]]
        for move, buffer in _arriving(torch.cat([k, v], dim=-1), work):
            keys, values = buffer.split(widths, dim=-1)
            more, *back = attention_backward(dout, q, keys, values, out, lse, move.mask, **given)
            dq += more
            _give_back(torch.cat(back, dim=-1), move, own, work.group)
        dk, dv = own.split(widths, dim=-1)
        dsink = None if sink is None else _gradient_of_sink(sink, out, lse, dout, dlse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


def _gradient_of_sink(
    sink: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> torch.Tensor:
    """``- sum_i exp(z - lse_i) (out_i . dout_i - dlse_i)``."""
    delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    weights = torch.exp(sink.to(lse.dtype)[:, None] - lse)  # (s_sink, T, H)
    return -(weights * delta).sum(1).to(sink.dtype)
