"""A tensor that every rank has, dealt to the ranks and gathered again: rows along the first axis, any trailing shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from magi_attention.common.intervals import Intervals, total_size
from magi_attention.dist.outside_graphs import outside_graphs

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The older name is deprecated in torch 2.13, the newer one absent before."""


@dataclass(frozen=True, eq=False)
class Shards:
    """Which rows of a tensor with ``length`` of them each rank holds, in order.

    Attributes:
        length: rows of the tensor. Rows from there on are padding, which every rank adds for itself.
        ranges: of each rank, disjoint; together all rows, padding included.
        rank: this one. group: of the ranks, None for the default one.
    """

    length: int
    ranges: Sequence[Intervals]
    rank: int
    group: dist.ProcessGroup | None = None

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of each rank."""
        return [total_size(np.asarray(part).reshape(-1, 2)) for part in self.ranges]

    @cached_property
    def positions(self) -> tuple[torch.Tensor, ...]:
        """Global positions of the rows of each rank, on the host."""
        return tuple(positions_of(part) for part in self.ranges)

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], torch.Tensor]:
        return {}

    @outside_graphs
    def _on(self, device: torch.device, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``make`` gives, copied to a device once."""
        found = self._copies.get((name, device))
        if found is None:
            found = self._copies[name, device] = make().to(device)
        return found

    def own(self, device: torch.device) -> torch.Tensor:
        """Positions of this rank's rows, padding included: global ones, of tokens."""
        return self._on(device, "own", lambda: self.positions[self.rank])

    def together(self, device: torch.device) -> torch.Tensor:
        """Positions of the rows of all ranks, padding included, one rank's behind the other's."""
        return self._on(device, "together", lambda: torch.cat(self.positions))

    def order(self, device: torch.device) -> torch.Tensor:
        """Where each row is, padding included, once those of all ranks lie one behind the other."""
        return self._on(device, "order", lambda: torch.cat(self.positions).argsort())

    def take(self, x: torch.Tensor, pad_value: float = 0.0) -> torch.Tensor:
        """This rank's rows of ``x``, rows of ``pad_value`` where it has none."""
        own = self.own(x.device)
        if len(x) == sum(self.sizes):
            return x.index_select(0, own)
        found = x.index_select(0, own.clamp(max=max(self.length - 1, 0)))
        is_padding = (own >= self.length).view(-1, *[1] * (x.dim() - 1))
        return found.masked_fill(is_padding, pad_value)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The tensor whose rows the ranks hold, without padding; on every rank."""
        most = max(self.sizes)
        padded = local.new_zeros(most, *local.shape[1:])
        padded[: len(local)] = local
        whole = padded.new_empty(most * len(self.sizes), *local.shape[1:])
        all_gather(whole, padded, group=self.group)
        parts = [part[:size] for part, size in zip(whole.split(most), self.sizes, strict=True)]
        return torch.cat(parts).index_select(0, self.order(local.device)[: self.length])

    def scatter_sum(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum of all ranks' ``x``, added in the order of ranks; zeros for padding."""
        padded = torch.cat([x, x.new_zeros(sum(self.sizes) - len(x), *x.shape[1:])])
        sent = padded.index_select(0, self.together(x.device))
        own = self.sizes[self.rank]
        received = x.new_empty(own * len(self.sizes), *x.shape[1:])
        dist.all_to_all_single(received, sent, [own] * len(self.sizes), self.sizes, group=self.group)
        return received.view(len(self.sizes), own, *x.shape[1:]).sum(0)


def positions_of(ranges: Intervals) -> torch.Tensor:
    """All positions in ranges, one range's behind the other's."""
    parts = [np.arange(begin, end) for begin, end in np.asarray(ranges, dtype=np.int64).reshape(-1, 2)]
    return torch.from_numpy(np.concatenate([np.arange(0), *parts]))


@outside_graphs
def dispatch(x: torch.Tensor, shards: Shards, pad_value: float = 0.0) -> torch.Tensor:
    """This rank's rows of ``x``, which all ranks have; the gradient of ``x`` is complete on every rank."""
    return _Dispatch.apply(x, shards, pad_value)


@outside_graphs
def undispatch(local: torch.Tensor, shards: Shards, is_partial_grad: bool = False) -> torch.Tensor:
    """The tensor whose rows the ranks hold, on every rank.

    Args:
        is_partial_grad: the gradients of the ranks are parts of a sum; else each is the whole, and a rank takes its own
            rows of it.
    """
    return _Undispatch.apply(local, shards, is_partial_grad)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shards: Shards, pad_value: float) -> torch.Tensor:  # type: ignore[override]
        ctx.shards = shards
        return shards.take(x, pad_value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        return ctx.shards.gather(gradient), None, None


class _Undispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, shards: Shards, is_partial_grad: bool) -> torch.Tensor:  # type: ignore[override]
        ctx.shards, ctx.is_partial_grad = shards, is_partial_grad
        return shards.gather(local)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        shards = ctx.shards
        found = shards.scatter_sum(gradient) if ctx.is_partial_grad else shards.take(gradient)
        return found, None, None
