"""Ranks of context parallelism one after the other on one GPU: what each computes, with nothing to wait for.

Keys that would come from other ranks are there already. The slowest rank tells how far balance and the masks' pieces let
many GPUs come; transfers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from magi_attention import Mask
from magi_attention.common import AttnOverlapMode
from magi_attention.config import BalancedDispatchAlg, OverlapConfig
from magi_attention.dist.chunks import cut
from magi_attention.dist.cost import Heads
from magi_attention.dist.exchange import Exchange
from magi_attention.dist.key import automatic_chunk_size
from magi_attention.dist.placement import place
from magi_attention.dist.runtime import Move, Work, attend
from magi_attention.dist.shard import positions_of


@dataclass(frozen=True)
class There:
    """Rows that are there, as if they had come; gradients go nowhere."""

    rows: torch.Tensor

    @property
    def num_received(self) -> int:
        return len(self.rows)

    def fetch(self, k: torch.Tensor, v: torch.Tensor) -> There:
        return self

    def give_back(self, gradient: torch.Tensor) -> There:
        return self

    def land(self) -> torch.Tensor:
        return self.rows

    def add_to(self, own: torch.Tensor) -> None:
        pass


class Ranks:
    """The plan of a mask for so many ranks."""

    def __init__(self, mask: Mask, ranks: int, heads: Heads) -> None:
        length = mask.num_rows
        chunks = cut(mask.bands, length, length, automatic_chunk_size(length, ranks))
        self.ranges = [chunks.rows[part] for part in place(BalancedDispatchAlg(), chunks, ranks)]
        by_cost = OverlapConfig(mode=AttnOverlapMode.DYNAMIC, degree=None)
        self.exchange = Exchange.of(mask.bands, self.ranges, self.ranges, by_cost, heads)

    def seconds(self, rank: int, data: list[torch.Tensor], rounds: int) -> tuple[float, float]:
        """Median seconds forward and backward of one rank; ``data`` is q, k, v and the gradient of out, of all tokens."""
        share, device = self.exchange.share(rank), data[0].device
        work = Work.of(replace(share, stages=()), device, None)
        received = [np.concatenate(stage.receive) for stage in share.stages]
        moves = tuple(
            Move(Mask(stage.bands, share.num_rows, len(rows)), There(rows))
            for stage, rows in zip(
                share.stages, (self._keys(data, ranges) for ranges in received), strict=True
            )
        )
        if moves and share.joined is not None:
            places = tuple(torch.from_numpy(place).to(device) for place in share.joined.places)
            mask = Mask(share.joined.bands, share.num_rows, sum(map(len, places)))
            work = replace(work, mask=mask, places=places)
        work = replace(work, moves=moves)
        own = positions_of(self.ranges[rank]).to(device)
        *leaves, dout = (x.index_select(0, own) for x in data)
        return median_seconds(leaves, dout, work, rounds)

    def slowest(self, data: list[torch.Tensor], rounds: int) -> tuple[float, float]:
        """Seconds forward and backward of the ranks that take longest."""
        samples = [self.seconds(rank, data, rounds) for rank in range(len(self.ranges))]
        return max(each[0] for each in samples), max(each[1] for each in samples)

    @staticmethod
    def _keys(data: list[torch.Tensor], ranges: np.ndarray) -> torch.Tensor:
        rows = positions_of(ranges).to(data[1].device)
        return torch.cat([x.index_select(0, rows) for x in data[1:3]], dim=-1)


def median_seconds(
    leaves: list[torch.Tensor], dout: torch.Tensor, work: Work, rounds: int
) -> tuple[float, float]:
    """Forward and backward, after two rounds that do not count."""
    for leaf in leaves:
        leaf.requires_grad_()
    samples = [sample(leaves, dout, work) for _ in range(rounds + 2)][2:]
    forward, backward = np.median(samples, axis=0).tolist()
    return forward, backward


def sample(leaves: list[torch.Tensor], dout: torch.Tensor, work: Work) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    stamps = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000)  # the host gets ahead
    stamps[0].record()
    out, _, _ = attend(*leaves, work)
    stamps[1].record()
    torch.cuda._sleep(4_000_000)
    stamps[2].record()
    torch.autograd.grad(out, leaves, dout)
    stamps[3].record()
    torch.cuda.synchronize()
    return stamps[0].elapsed_time(stamps[1]) * 1e-3, stamps[2].elapsed_time(stamps[3]) * 1e-3
