"""Rows of a tensor that is dealt to ranks, moved along the sequence as ``torch.roll`` does: only what moves is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from magi_attention.common.recent import Recent
from magi_attention.dist.outside_graphs import outside_graphs
from magi_attention.dist.shard import Shards


@dataclass(frozen=True, eq=False)
class _Move:
    """Which local rows go to each rank in turn, where what comes from each belongs, and how many they are."""

    takes: torch.Tensor
    places: torch.Tensor
    send_sizes: list[int]
    receive_sizes: list[int]


_moves: Recent[tuple[Shards, _Move]] = Recent(64)


@outside_graphs
def roll(local: torch.Tensor, shift: int, shards: Shards) -> torch.Tensor:
    """This rank's rows of the tensor rolled by ``shift`` along its real rows; padding stays where it is."""
    shift = shift % shards.length if shards.length else 0
    return _Roll.apply(local, shift, shards) if shift else local.clone()


def _move(shift: int, shards: Shards, device: torch.device) -> _Move:
    place = id(shards), shift, device
    found = _moves.get(place)
    if found is not None and found[0] is shards:
        return found[1]
    everywhere = torch.cat(shards.positions)
    sizes = torch.tensor(shards.sizes)
    owner, local = torch.empty_like(everywhere), torch.empty_like(everywhere)
    owner[everywhere] = torch.arange(len(sizes)).repeat_interleave(sizes)
    local[everywhere] = torch.cat([torch.arange(size) for size in shards.sizes])
    takes, places, sent, received = [], [], [], []
    sources = [
        torch.where(rows < shards.length, (rows - shift) % shards.length, rows) for rows in shards.positions
    ]
    for rank, wanted in enumerate(sources):
        mine = wanted[owner[wanted] == shards.rank]
        coming = torch.nonzero(owner[sources[shards.rank]] == rank).flatten()
        takes.append(local[mine])
        places.append(coming)
        sent.append(len(mine))
        received.append(len(coming))
    move = _Move(torch.cat(takes).to(device), torch.cat(places).to(device), sent, received)
    _moves.put(place, (shards, move))
    return move


class _Roll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, shift: int, shards: Shards) -> torch.Tensor:  # type: ignore[override]
        ctx.shift, ctx.shards = shift, shards
        move = _move(shift, shards, local.device)
        received = local.new_empty(sum(move.receive_sizes), *local.shape[1:])
        sent = local.index_select(0, move.takes)
        dist.all_to_all_single(received, sent, move.receive_sizes, move.send_sizes, group=shards.group)
        return torch.empty_like(received).index_copy_(0, move.places, received)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:  # type: ignore[override]
        return roll(gradient.contiguous(), -ctx.shift, ctx.shards), None, None
