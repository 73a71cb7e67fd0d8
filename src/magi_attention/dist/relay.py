"""Two hops instead of one: a key that several ranks of a node need comes to it once, and is handed on there.

The ranks of a group are a grid, a row for each node. A rank is the lane by which keys of its column come to its node: the
first hop is from owners to the lanes of their column, the second from lanes to the ranks of their node. What a rank sends
in both follows from what its column sends in one hop, which every rank finds by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import Intervals, hosts, merge, offsets, total_size

Ints = NDArray[np.int64]
NOTHING: Intervals = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Relay:
    """One rank's part of a stage in two hops.

    The lane's rows are those of its own keys that its node needs, then what comes from the others of its column. Peers
    are in ascending order.

    Attributes:
        own: places of own keys that ranks of the own node need.
        send: to each rank of the column, places of own keys that its node needs; none to this one.
        arrive_sizes: keys from each rank of the column; none from this one.
        hand: to each rank of the node, which of the lane's rows it gets, in the order of owners.
        receive_sizes: keys from each rank of the node.
        order: all ranks in the order in which keys of theirs lie in what is received.
    """

    own: Intervals
    send: tuple[Intervals, ...]
    arrive_sizes: list[int]
    hand: tuple[Intervals, ...]
    receive_sizes: list[int]
    order: list[int]

    @staticmethod
    def of(
        rank: int, nodes: Ints, sent: Sequence[Sequence[Intervals]], receive_sizes: Sequence[int]
    ) -> Relay:
        """That of ``rank``.

        Args:
            nodes: (n, m) the ranks of each node.
            sent: of each rank of the column the places of its keys that go to each rank in one hop.
            receive_sizes: keys that come from each rank in one hop.
        """
        column, mates = column_of(nodes, rank), node_of(nodes, rank)
        me = int(np.searchsorted(column, rank))
        held = [_union(ranges, mates) for ranges in sent]
        sizes = np.array([total_size(ranges) for ranges in held])
        lanes = np.argsort(column != rank, kind="stable")  # the own keys first
        begins = np.zeros_like(sizes)
        begins[lanes] = np.cumsum(sizes[lanes]) - sizes[lanes]
        return Relay(
            held[me],
            tuple(
                NOTHING if peer == rank else _union(sent[me], node_of(nodes, peer))
                for peer in column.tolist()
            ),
            np.where(column == rank, 0, sizes).tolist(),
            tuple(
                np.concatenate([_within(sent[n][mate], held[n]) + begins[n] for n in range(len(column))])
                for mate in mates.tolist()
            ),
            [
                sum(receive_sizes[owner] for owner in column_of(nodes, mate).tolist())
                for mate in mates.tolist()
            ],
            np.concatenate([column_of(nodes, mate) for mate in mates.tolist()]).tolist(),
        )


def column_of(nodes: Ints, rank: int) -> Ints:
    """The ranks that have the place of ``rank`` in their nodes, ascending."""
    return np.sort(nodes[:, (nodes == rank).any(axis=0)].ravel())


def node_of(nodes: Ints, rank: int) -> Ints:
    """The ranks of the node of ``rank``, ascending."""
    return np.sort(nodes[(nodes == rank).any(axis=1)].ravel())


def _union(sent: Sequence[Intervals], ranks: Ints) -> Intervals:
    """What goes to any of ``ranks``, once, ascending."""
    return merge(np.concatenate([sent[rank] for rank in ranks.tolist()]))


def _within(ranges: Intervals, whole: Intervals) -> Intervals:
    """Where ``ranges`` are, each a part of a merged interval of ``whole``, once these lie end to end."""
    host = hosts(whole, ranges)
    begin = offsets(whole)[host] + ranges[:, 0] - whole[host, 0]
    return np.stack([begin, begin + ranges[:, 1] - ranges[:, 0]], axis=1)
