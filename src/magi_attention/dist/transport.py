"""How a stage's keys come to a rank and how their gradients go home: straight from owner to receiver, or node by node.

Both ways end with the same rows in the same order, that of owners. Gradients are summed in fp32 in a fixed order, so that
bits are the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from magi_attention.common.intervals import Intervals, offsets, total_size
from magi_attention.dist.exchange import Stage
from magi_attention.dist.relay import Relay

Hops = tuple[dist.ProcessGroup, dist.ProcessGroup]
"""This rank's column, which the first hop is in, and its node, which the second is in."""


class Flight(Protocol):
    """Rows under way."""

    def land(self) -> torch.Tensor:
        """The rows received: the device waits for them, without one the host."""


class Return(Protocol):
    """Gradients under way."""

    def add_to(self, own: torch.Tensor) -> None:
        """Add what comes to the gradients of own keys."""


class Transport(Protocol):
    """The way of one stage; every rank of the group must call both functions."""

    @property
    def num_received(self) -> int:
        """Keys that come to this rank."""

    def fetch(self, k: torch.Tensor, v: torch.Tensor) -> Flight:
        """Send rows of own keys and values, side by side, and receive those of others in the order of owners."""

    def give_back(self, gradient: torch.Tensor) -> Return:
        """Send home the gradients of what was received."""


def transport_of(
    stage: Stage, device: torch.device, group: dist.ProcessGroup | None, hops: Hops | None
) -> Transport:
    """That of a stage on a device; by two hops where the stage was planned for nodes."""
    if stage.relay is None:
        return OneHop(_Rows.of(stage.send, device), stage.receive_sizes, group)
    assert hops is not None
    return TwoHops.of(stage.relay, stage.receive_sizes, device, hops)


def picked(parts: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Rows of tensors, side by side along the last axis."""
    return torch.cat([part.index_select(0, index) for part in parts], dim=-1)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which rows go to each peer: ``index`` is all of them, ``sizes`` how many each gets."""

    index: torch.Tensor
    sizes: list[int]

    @staticmethod
    def of(parts: Sequence[Intervals], device: torch.device) -> _Rows:
        ranges = np.concatenate(parts)
        shift = np.repeat(ranges[:, 0] - offsets(ranges)[:-1], ranges[:, 1] - ranges[:, 0])
        index = torch.from_numpy(shift + np.arange(len(shift)))
        return _Rows(index.to(device), [total_size(part) for part in parts])

    def add(self, total: torch.Tensor, rows: torch.Tensor) -> None:
        """Peer after peer, each of which has no row twice: the same order of sums every time."""
        for index, part in zip(self.index.split(self.sizes), rows.split(self.sizes), strict=True):
            total.index_add_(0, index, part.to(total.dtype))


class _Hop:
    """One exchange within a group, and the memory that must live as long."""

    def __init__(
        self, sent: torch.Tensor, sent_sizes: list[int], into: torch.Tensor, sizes: list[int],
        group: dist.ProcessGroup | None,
    ) -> None:  # fmt: skip
        self._sent, self._rows = sent, into
        self._handle = dist.all_to_all_single(into, sent, sizes, sent_sizes, group=group, async_op=True)

    def land(self) -> torch.Tensor:
        self._handle.wait()
        return self._rows


@dataclass(frozen=True, eq=False)
class OneHop:
    """From each owner to each receiver: ``send`` is what each rank gets of the own keys."""

    send: _Rows
    receive_sizes: list[int]
    group: dist.ProcessGroup | None

    @property
    def num_received(self) -> int:
        return sum(self.receive_sizes)

    def fetch(self, k: torch.Tensor, v: torch.Tensor) -> Flight:
        sent = picked((k, v), self.send.index)
        return _Hop(sent, self.send.sizes, _empty(sent, self.num_received), self.receive_sizes, self.group)

    def give_back(self, gradient: torch.Tensor) -> Return:
        into = _empty(gradient, sum(self.send.sizes))
        return _Home(_Hop(gradient, self.receive_sizes, into, self.send.sizes, self.group), self.send)


@dataclass(frozen=True, eq=False)
class _Home:
    hop: Flight
    send: _Rows

    def add_to(self, own: torch.Tensor) -> None:
        self.send.add(own, self.hop.land())


@dataclass(frozen=True, eq=False)
class TwoHops:
    """From each owner once to each node, and on from there; as ``Relay`` says it.

    The hop between nodes is the one that is hidden behind computation. What comes next on the device waits for the other,
    which takes little time within a node.

    Gradients that ranks of a node have of the same key are summed in fp32 before they leave it. The sum crosses in the
    gradients' own dtype: it is rounded once more, as each of its terms was, but twice as many bytes between nodes would
    cost much of what summing before saves. What stays in the node is not rounded again.

    Attributes:
        own: of own keys, what the node needs. send, hand: rows for the column and for the node.
        arrive_sizes, passed_sizes: rows from each rank of the column and of the node.
        order: all ranks as their keys lie in what the node sends. sizes: keys of each rank.
    """

    own: _Rows
    send: _Rows
    arrive_sizes: list[int]
    hand: _Rows
    passed_sizes: list[int]
    order: list[int]
    sizes: list[int]
    across: dist.ProcessGroup
    within: dist.ProcessGroup

    @staticmethod
    def of(relay: Relay, sizes: list[int], device: torch.device, hops: Hops) -> TwoHops:
        """``relay`` on ``device``; ``sizes`` is how many keys of each rank are received."""
        return TwoHops(
            _Rows.of([relay.own], device), _Rows.of(relay.send, device), relay.arrive_sizes,
            _Rows.of(relay.hand, device), relay.receive_sizes, relay.order, sizes, *hops,
        )  # fmt: skip

    @property
    def num_received(self) -> int:
        return sum(self.sizes)

    @property
    def _lane_sizes(self) -> list[int]:
        """Rows of the lane: own ones, and those that arrive."""
        return [*self.own.sizes, sum(self.arrive_sizes)]

    def fetch(self, k: torch.Tensor, v: torch.Tensor) -> Flight:
        sent = picked((k, v), self.send.index)
        lane = _empty(sent, sum(self._lane_sizes))
        near, far = lane.split(self._lane_sizes)
        near.copy_(picked((k, v), self.own.index))
        first = _Hop(sent, self.send.sizes, far, self.arrive_sizes, self.across)
        received = _empty(sent, self.num_received)

        def second() -> _Hop:
            first.land()
            handed = lane.index_select(0, self.hand.index)
            return _Hop(handed, self.hand.sizes, received, self.passed_sizes, self.within)

        return _HandedOn(second, self)

    def give_back(self, gradient: torch.Tensor) -> Return:
        passed = _empty(gradient, sum(self.hand.sizes))
        within = _Hop(self._by_lane(gradient), self.passed_sizes, passed, self.hand.sizes, self.within)
        sums = torch.promote_types(gradient.dtype, torch.float32)
        lane = gradient.new_zeros(sum(self._lane_sizes), *gradient.shape[1:], dtype=sums)
        near, far = lane.split(self._lane_sizes)
        self.hand.add(lane, within.land())
        arrived = _empty(gradient, sum(self.send.sizes))
        across = _Hop(far.to(gradient.dtype), self.arrive_sizes, arrived, self.send.sizes, self.across)
        return _Summed(across, near, self)

    def by_owner(self, received: torch.Tensor) -> torch.Tensor:
        """What the node's ranks sent, in the order of owners."""
        parts = received.split([self.sizes[owner] for owner in self.order])
        return torch.cat([parts[place] for place in np.argsort(self.order).tolist()])

    def _by_lane(self, rows: torch.Tensor) -> torch.Tensor:
        parts = rows.split(self.sizes)
        return torch.cat([parts[owner] for owner in self.order])


@dataclass(frozen=True, eq=False)
class _HandedOn:
    """Rows whose second hop begins when they are wanted."""

    second: Callable[[], _Hop]
    way: TwoHops

    def land(self) -> torch.Tensor:
        return self.way.by_owner(self.second().land())


@dataclass(frozen=True, eq=False)
class _Summed:
    flight: Flight
    near: torch.Tensor
    way: TwoHops

    def add_to(self, own: torch.Tensor) -> None:
        self.way.own.add(own, self.near)
        self.way.send.add(own, self.flight.land())


def _empty(like: torch.Tensor, num_rows: int) -> torch.Tensor:
    return like.new_empty(num_rows, *like.shape[1:])
