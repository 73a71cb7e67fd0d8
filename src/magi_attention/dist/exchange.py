"""What each rank computes by itself and what it receives for the rest: found on every rank alike, without collectives.

Queries and keys are dealt to ranks as ranges of global positions; a rank's own ones lie one behind the other in the order
given. Of the keys that its rows see, those on other ranks come in stages. In a stage a rank receives from each other rank
one block of keys; the blocks, in the order of ranks, are the buffer whose positions the stage's bands are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from magi_attention.common.intervals import Intervals, chunks, difference, merge, offsets, overlap, total_size
from magi_attention.mask.bands import K0, K1, Q0, Bands, compact, localise, split, tighten

UNIT = 128
"""Keys that stages are cut between: whole tiles, but for the last ones of a block."""

Ranges = Sequence[Intervals]
"""(m, 2) ranges of global positions of each rank."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """The mask of ``bands`` over queries and keys that are dealt to ranks.

    Attributes:
        bands: (n, 6) of the whole mask.
        queries, keys: each rank's ranges, disjoint; together they are all rows, and all keys that somebody sees.
        degree: stages of what is received; fewer where there is little.
    """

    bands: Bands
    queries: Ranges
    keys: Ranges
    degree: int = 1

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return len(self.queries)

    @cached_property
    def _seen(self) -> list[Intervals]:
        """Keys that each rank's rows see, merged."""
        tight = compact(self.bands)
        found = []
        for ranges in self.queries:
            pieces = tighten(split(tight, _sorted(ranges), Q0)[0])
            found.append(merge(pieces[pieces[:, K1] > pieces[:, K0]][:, K0 : K1 + 1]))
        return found

    def blocks(self, to: int) -> list[list[Intervals]]:
        """What rank ``to`` receives: of each stage and each rank the ranges of keys, in order."""
        remote = difference(self._seen[to], merge(_sorted(self.keys[to])))
        of_ranks = [
            np.empty((0, 2), dtype=np.int64) if rank == to else overlap(remote, merge(_sorted(keys)))
            for rank, keys in enumerate(self.keys)
        ]
        most = max(map(total_size, of_ranks), default=0)
        num_stages = min(self.degree, -(-most // UNIT))
        return [[_part(ranges, stage, num_stages) for ranges in of_ranks] for stage in range(num_stages)]

    @cached_property
    def num_stages(self) -> int:
        """Stages of all ranks: a rank that receives less takes part with empty blocks."""
        return max((len(self.blocks(rank)) for rank in range(self.num_ranks)), default=0)

    def share(self, rank: int) -> Share:
        """What one rank has to do."""
        queries, keys = self.queries[rank], self.keys[rank]
        received = self.blocks(rank)
        received += [[np.empty((0, 2), dtype=np.int64)] * self.num_ranks] * (self.num_stages - len(received))
        sent = [self.blocks(to) for to in range(self.num_ranks)]
        stages = []
        for number, blocks in enumerate(received):
            send = [_within(keys, part[number][rank]) if number < len(part) else blocks[0][:0] for part in sent]
            table = localise(self.bands, queries, np.concatenate(blocks))
            stages.append(Stage(tuple(blocks), tuple(send), table))
        sizes = total_size(queries), total_size(keys)
        return Share(rank, *sizes, localise(self.bands, queries, keys), tuple(stages))


@dataclass(frozen=True, eq=False)
class Stage:
    """Keys that come together, and what is computed with them.

    Attributes:
        receive: of each rank the global ranges of keys that come from it.
        send: to each rank the local ranges of keys that it gets, in the order in which it gets them.
        bands: (n, 6) local queries against the keys received, one block behind the other.
    """

    receive: tuple[Intervals, ...]
    send: tuple[Intervals, ...]
    bands: Bands

    @property
    def receive_sizes(self) -> list[int]:
        """Keys from each rank."""
        return [total_size(part) for part in self.receive]

    @property
    def send_sizes(self) -> list[int]:
        """Keys to each rank."""
        return [total_size(part) for part in self.send]


@dataclass(frozen=True, eq=False)
class Share:
    """One rank's part of the attention.

    Attributes:
        rank: whose. num_rows, num_cols: its own queries and keys.
        bands: (n, 6) its own queries against its own keys. stages: what else it sees.
    """

    rank: int
    num_rows: int
    num_cols: int
    bands: Bands
    stages: tuple[Stage, ...]


def _sorted(ranges: Intervals) -> Intervals:
    ranges = np.asarray(ranges, dtype=np.int64).reshape(-1, 2)
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    return ranges[np.argsort(ranges[:, 0], kind="stable")]


def _part(ranges: Intervals, stage: int, num_stages: int) -> Intervals:
    """The ``stage``-th of ``num_stages`` parts of ranges laid end to end, cut at multiples of ``UNIT``."""
    units = chunks(ranges, UNIT)
    begin, end = (len(units) * n // num_stages for n in (stage, stage + 1))
    mine = units[begin:end]
    return merge(np.concatenate(mine)) if mine else np.empty((0, 2), dtype=np.int64)


def _within(own: Intervals, ranges: Intervals) -> Intervals:
    """Global ``ranges`` of keys as positions among the ``own`` ones of a rank, in the order of ``ranges``."""
    own = np.asarray(own, dtype=np.int64).reshape(-1, 2)
    begins = offsets(own)[:-1]
    order = np.argsort(own[:, 0], kind="stable")
    found = []
    for begin, end in ranges.tolist():
        first = np.searchsorted(own[order, 1], begin, side="right")
        last = np.searchsorted(own[order, 0], end, side="left")
        for place in order[first:last]:
            shift = begins[place] - own[place, 0]
            found.append((max(begin, own[place, 0]) + shift, min(end, own[place, 1]) + shift))
    return np.array(found, dtype=np.int64).reshape(-1, 2)
