"""Attention of tokens that are dealt to ranks: own keys first, those of others as they come, gradients back the same way.

Keys and values travel in one tensor, side by side. While a stage is computed the next one is on its way, and so are the
gradients of the one before. Partial results are merged in fp32 in the order of stages; gradients of keys are summed in
fp32 on their owner, stage after stage and rank after rank: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from magi_attention.attention import accumulate, attention, attention_backward
from magi_attention.dist.exchange import Share
from magi_attention.dist.transport import Flight, Hops, Return, Transport, picked, transport_of
from magi_attention.kernels.problem import stats_dtype
from magi_attention.mask import Mask


@dataclass(frozen=True, eq=False)
class Move:
    """A stage on a device: own queries against the keys received, and the way by which these come."""

    mask: Mask
    way: Transport


@dataclass(frozen=True, eq=False)
class Work:
    """A rank's share on a device, and the group it is shared with.

    Attributes:
        mask: own queries against own keys, or all with ``places``. moves: stages.
        places: nothing is computed before all keys are there, and then all at once: where own keys go, and those of each
            stage. Else None.
        hides_tail: the last stage's keys are kept for the backward, which begins with them and ends with the own ones:
            no gradient is waited for that is not hidden behind these.
        sm_margin: multiprocessors that attention leaves to the transport.
    """

    mask: Mask
    moves: tuple[Move, ...]
    group: dist.ProcessGroup | None
    places: tuple[torch.Tensor, ...] | None = None
    hides_tail: bool = False
    sm_margin: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether there is one call for everything."""
        return self.places is not None or not self.moves

    @staticmethod
    def of(
        share: Share,
        device: torch.device,
        group: dist.ProcessGroup | None,
        *,
        hops: Hops | None = None,
        hides_tail: bool = False,
        sm_margin: int = 0,
    ) -> Work:
        """``share`` on ``device``.

        Args:
            hops: the groups of a share that was planned for nodes.
        """
        ways = [transport_of(stage, device, group, hops) for stage in share.stages]
        moves = tuple(
            Move(Mask(stage.bands, share.num_rows, way.num_received), way)
            for stage, way in zip(share.stages, ways, strict=True)
        )
        joined = share.joined if moves else None
        if joined is None:
            mask = Mask(share.bands, share.num_rows, share.num_cols)
            return Work(mask, moves, group, None, hides_tail, sm_margin)
        num_cols = sum(map(len, joined.places))
        places = tuple(torch.from_numpy(place).to(device) for place in joined.places)
        return Work(Mask(joined.bands, share.num_rows, num_cols), moves, group, places, False, sm_margin)


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
    settings = {"softmax_scale": softmax_scale, "softcap": softcap, "sm_margin": work.sm_margin}
    return _Attend.apply(q, k, v, sink, work, settings, return_max_logits)


class _Arrivals:
    """Keys and values of stages, (received, HK, D + DV): the first leave at once, then always one stage ahead."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, moves: Sequence[Move]) -> None:
        self._own, self._moves = (k, v), moves
        self._flight = self._depart(0)

    def _depart(self, number: int) -> Flight | None:
        return self._moves[number].way.fetch(*self._own) if number < len(self._moves) else None

    def __iter__(self) -> Iterator[tuple[Move, torch.Tensor]]:
        for number, move in enumerate(self._moves):
            flight = self._flight
            assert flight is not None
            rows = flight.land()
            self._flight = self._depart(number + 1)
            yield move, rows


class _Returns:
    """Gradients of keys on their way to the owners."""

    def __init__(self) -> None:
        self._returns: list[Return] = []

    def send(self, gradient: torch.Tensor, move: Move) -> None:
        """Give back that of the keys which ``move`` brought."""
        self._returns.append(move.way.give_back(gradient))

    def add_to(self, own: torch.Tensor) -> torch.Tensor:
        """Those of this rank's keys, in the order of stages and ranks."""
        for each in self._returns:
            each.add_to(own)
        return own


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def,override]
        ctx: Any, q, k, v, sink, work: Work, settings: dict, return_max_logits: bool
    ) -> tuple:
        arrivals = _Arrivals(k, v, work.moves)
        forward = _whole_forward if work.is_whole else _staged_forward
        given = {**settings, "return_max_logits": return_max_logits}
        out, lse, top, kept = forward(q, k, v, sink, work, arrivals, given)
        ctx.save_for_backward(q, k, v, sink, out, lse, kept if work.hides_tail else None)
        ctx.work, ctx.settings = work, settings
        ctx.set_materialize_grads(False)
        if top is not None:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=work.group)
            ctx.mark_non_differentiable(top)
        return out, lse, top

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, _: None
    ) -> tuple:
        q, k, v, sink, out, lse, kept = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        given = {**ctx.settings, "dlse": dlse, "deterministic": torch.are_deterministic_algorithms_enabled()}
        backward = _whole_backward if ctx.work.is_whole else _staged_backward
        dq, dk, dv = backward(dout, q, k, v, out, lse, kept, ctx.work, given)
        dsink = None if sink is None else _gradient_of_sink(sink, out, lse, dout, dlse)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


def _whole_forward(q, k, v, sink, work: Work, arrivals: _Arrivals, given: dict) -> tuple:  # type: ignore[no-untyped-def]
    keys, values = _joined(k, v, work, arrivals)
    out, meta = attention(q, keys, values, work.mask, sink=sink, **given)
    return out, meta.lse, meta.max_logits, None


def _joined(
    k: torch.Tensor, v: torch.Tensor, work: Work, arrivals: _Arrivals
) -> tuple[torch.Tensor, torch.Tensor]:
    """Own keys and values and those received, each in its place."""
    if work.places is None:
        return k, v
    own, *places = work.places
    num_cols = work.mask.num_cols
    keys, values = (x.new_empty(num_cols, *x.shape[1:]).index_copy_(0, own, x) for x in (k, v))
    for place, (_, rows) in zip(places, arrivals, strict=True):
        for whole, part in zip((keys, values), rows.split([k.shape[-1], v.shape[-1]], dim=-1), strict=True):
            whole.index_copy_(0, place, part)
    return keys, values


def _whole_backward(dout, q, k, v, out, lse, _kept, work: Work, given: dict) -> tuple:  # type: ignore[no-untyped-def]
    keys, values = _joined(k, v, work, _Arrivals(k, v, work.moves))
    dq, dk, dv = attention_backward(dout, q, keys, values, out, lse, work.mask, **given)
    if work.places is None:
        return dq, dk, dv
    returns = _Returns()
    own, *gradients = (picked((dk, dv), place) for place in work.places)
    for move, gradient in zip(work.moves, gradients, strict=True):
        returns.send(gradient, move)
    total = returns.add_to(own.to(lse.dtype))
    return dq, *total.split([k.shape[-1], v.shape[-1]], dim=-1)


def _staged_forward(q, k, v, sink, work: Work, arrivals: _Arrivals, given: dict) -> tuple:  # type: ignore[no-untyped-def]
    stats, rows = stats_dtype(q.dtype), None
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=stats, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=stats, device=q.device)
    tops = [accumulate(out, lse, q, k, v, work.mask, sink=sink, **given)]
    for move, rows in arrivals:
        keys, values = rows.split([k.shape[-1], v.shape[-1]], dim=-1)
        tops.append(accumulate(out, lse, q, keys, values, move.mask, **given))
    found = [x for x in tops if x is not None]
    return out.to(q.dtype), lse, torch.stack(found).amax(0) if found else None, rows


def _staged_backward(dout, q, k, v, out, lse, kept, work: Work, given: dict) -> tuple:  # type: ignore[no-untyped-def]
    widths, returns = [k.shape[-1], v.shape[-1]], _Returns()
    own = dq = torch.empty(0)
    for number, (move, keys, values) in enumerate(_parts(k, v, kept, work)):
        mask = work.mask if move is None else move.mask
        more, *gradient = attention_backward(dout, q, keys, values, out, lse, mask, **given)
        # A sum of two is rounded once; more of them are summed in fp32.
        more = more.to(lse.dtype) if len(work.moves) > 1 and number == 0 else more
        dq = dq + more if number else more
        if move is None:
            own = torch.cat(gradient, dim=-1).to(lse.dtype)
        else:
            returns.send(torch.cat(gradient, dim=-1), move)
    return dq, *returns.add_to(own).split(widths, dim=-1)


def _parts(
    k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None, work: Work
) -> Iterator[tuple[Move | None, torch.Tensor, torch.Tensor]]:
    """Keys and values in the order of the backward: own ones, of no move, first, or last if some are kept."""
    widths = [k.shape[-1], v.shape[-1]]
    moves = work.moves if kept is None else work.moves[:-1]
    arrivals = _Arrivals(k, v, moves)
    if kept is None:
        yield None, k, v
    else:
        yield work.moves[-1], *kept.split(widths, dim=-1)
    for move, rows in arrivals:
        yield move, *rows.split(widths, dim=-1)
    if kept is not None:
        yield None, k, v


def _gradient_of_sink(
    sink: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None
) -> torch.Tensor:
    """``- sum_i exp(z - lse_i) (out_i . dout_i - dlse_i)``."""
    delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    weights = torch.exp(sink.to(lse.dtype)[:, None] - lse)  # (s_sink, T, H)
    return -(weights * delta).sum(1).to(sink.dtype)
