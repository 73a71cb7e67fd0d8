"""What each rank computes by itself and what it receives for the rest: found on every rank alike, without collectives.

Queries and keys are dealt to ranks as ranges of global positions; a rank's own ones lie one behind the other in the order
given. Of the keys that its rows see, those on other ranks come in stages. In a stage a rank receives from each other rank
one block of keys; the blocks, in the order of ranks, are the buffer whose positions the stage's bands are in.

What all ranks receive is found at once: intervals of rank r are moved by r times a stride, so that those of different
ranks never meet. Who sends it is found for one rank only, as receiver and as sender.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from magi_attention.common.enum import AttnOverlapMode
from magi_attention.common.intervals import Intervals, difference, merge, offsets, stack, total_size, unstack
from magi_attention.config import GreedyOverlapAlg, OverlapConfig, UniformOverlapAlg
from magi_attention.dist.chunks import Ints, sums, work_of
from magi_attention.dist.cost import Heads, Loads, Machine, choose_degree
from magi_attention.dist.relay import Relay, column_of, node_of
from magi_attention.errors import complaint
from magi_attention.mask.bands import (
    HI,
    K0,
    K1,
    LO,
    Q0,
    Q1,
    Bands,
    areas,
    compact,
    localise,
    overlapping_intervals,
    relax,
    split,
    tighten,
    transpose,
)

UNIT = 128
"""Stages are cut at multiples of so many keys, whole tiles, or of ``min_chunk_size`` if that is less."""

Ranges = Sequence[Intervals]
"""(m, 2) ranges of global positions of each rank."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """The mask of ``bands`` over queries and keys that are dealt to ranks.

    Attributes:
        bands: (n, 6) of the whole mask.
        queries, keys: each rank's ranges, disjoint; together they are all rows, and all keys that somebody sees.
        degree: stages of what is received; fewer where there is little. 0: one that is not overlapped, see ``Share``.
        overlap: how stages are made: ``min_chunk_size``, ``max_num_chunks`` and ``alg``. What a rank receives is cut into
            chunks, each with a part of every sender's block, and these are grouped into stages.
        nodes: (n, m) the ranks of each node, if keys come to a node once and are handed on there, see ``Relay``. What all
            its ranks receive is then cut together, so that a key is in the same stage for each. None: keys go straight
            from owner to receiver.
    """

    bands: Bands
    queries: Ranges
    keys: Ranges
    degree: int = 1
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    nodes: Ints | None = None

    @staticmethod
    def of(
        bands: Bands,
        queries: Ranges,
        keys: Ranges,
        overlap: OverlapConfig,
        heads: Heads,
        *,
        num_nodes: int = 1,
        machine: Machine | None = None,
        nodes: Ints | None = None,
    ) -> Exchange:
        """With the degree of ``overlap``; with ``AttnOverlapMode.DYNAMIC`` that which costs least on ``machine``."""
        if overlap.mode is not AttnOverlapMode.DYNAMIC:
            return Exchange(bands, queries, keys, int(overlap.degree or 0), overlap, nodes)
        one = Exchange(bands, queries, keys, 1, overlap, nodes)
        most = min(overlap.dynamic_max_degree or overlap.max_num_chunks, int(one._num_chunks.max(initial=0)))
        machine = (machine or Machine()).scaled(overlap.calc_cost_factor, overlap.comm_cost_factor)
        degree = choose_degree(one.loads(num_nodes), heads, most, machine)
        # A copy would find again what is known by now, of which nothing depends on the degree.
        object.__setattr__(one, "degree", degree)
        return one

    @property
    def num_ranks(self) -> int:
        """Ranks."""
        return len(self.queries)

    @cached_property
    def stride(self) -> int:
        """Above all positions of keys."""
        ends = [int(np.max(table, initial=0)) for table in self.keys]
        return max(*ends, int(self.bands[:, K1].max(initial=0)), 0) + 1

    @cached_property
    def pieces(self) -> tuple[Bands, Ints]:
        """The mask cut to ranges of queries, tight and none empty, and whose each piece is."""
        ranges, rank = _gathered(self.queries)
        pieces, _, of = split(compact(self.bands), ranges, Q0)
        pieces = tighten(pieces)
        live = pieces[:, K1] > pieces[:, K0]
        return pieces[live], rank[of[live]]

    @cached_property
    def seen(self) -> Intervals:
        """Keys that ranks' rows see, those of rank r moved by r * ``stride``; merged."""
        pieces, rank = self.pieces
        return merge(stack(pieces[:, K0 : K1 + 1], rank, self.stride))

    @cached_property
    def own(self) -> Intervals:
        """Keys that ranks hold, in the same way."""
        ranges, rank = _gathered(self.keys)
        return merge(stack(ranges, rank, self.stride))

    @cached_property
    def remote(self) -> Intervals:
        """Keys that ranks receive, in the same way."""
        return difference(self.seen, self.own)

    @cached_property
    def received(self) -> Ints:
        """(r,) how many keys each rank receives."""
        ranges, rank = unstack(self.remote, self.stride)
        return sums(ranges[:, 1] - ranges[:, 0], rank, self.num_ranks)

    def traffic(self, num_nodes: int = 1) -> Traffic:
        """What travels within and between nodes of as many neighbouring ranks each.

        Raises:
            ValueError: nodes that do not divide the ranks.
        """
        ranks, stride = self.num_ranks, self.stride
        if num_nodes < 1 or ranks % num_nodes:
            raise ValueError(complaint("num_nodes", f"a divisor of the {ranks} ranks", num_nodes))
        size = ranks // num_nodes
        own, owner = unstack(self.own, stride)
        seen, seer = unstack(self.seen, stride)
        on_nodes = merge(stack(own, owner // size, stride))
        once, node = unstack(difference(merge(stack(seen, seer // size, stride)), on_nodes), stride)
        # What a rank's whole node holds, once for each rank of it.
        held, holder = unstack(on_nodes, stride)
        copies = (holder[:, None] * size + np.arange(size)).ravel()
        around = merge(stack(np.repeat(held, size, axis=0), copies, stride))
        far, rank = unstack(difference(self.seen, around), stride)
        between = sums(far[:, 1] - far[:, 0], rank, ranks)
        return Traffic(
            self.received, self.received - between, between, sums(once[:, 1] - once[:, 0], node, num_nodes)
        )

    def loads(self, num_nodes: int = 1) -> Loads:
        """What each rank computes and receives, nodes having as many neighbouring ranks each.

        A key comes to a node once, by whichever rank: each is taken to bring as many.
        """
        pieces, rank = self.pieces
        moved = _moved(pieces, rank, self.stride)
        own, piece, _ = split(moved, self.own, K0)
        ours = sums(areas(own), rank[piece], self.num_ranks)
        whole = sums(areas(pieces), rank, self.num_ranks)
        tight = compact(self.bands)
        work, area = int(work_of(tight, int(tight[:, Q1].max(initial=0)))[0].sum()), max(int(whole.sum()), 1)
        rows = np.array([total_size(np.asarray(table).reshape(-1, 2)) for table in self.queries])
        # Python's integers: pairs times pairs do not fit in 64 bits.
        ours, whole = (
            np.array([int(x) * work // area for x in each], dtype=np.int64) for each in (ours, whole)
        )
        once, size = self.traffic(num_nodes).once, self.num_ranks // num_nodes
        return Loads(rows, ours, whole - ours, self.received, np.repeat(-(-once // size), size))

    @cached_property
    def _parties(self) -> Ints:
        """(p, m) ranks whose keys are cut together: each alone, or those of a node."""
        return np.arange(self.num_ranks)[:, None] if self.nodes is None else self.nodes

    @cached_property
    def _party(self) -> Ints:
        """(r,) which one each rank is in."""
        found = np.zeros(self.num_ranks, dtype=np.int64)
        found[self._parties] = np.arange(len(self._parties))[:, None]
        return found

    @cached_property
    def _num_chunks(self) -> Ints:
        """(p,) chunks of what each party receives: as many as its rank that receives most would have alone."""
        found = np.clip(self.received // self.overlap.min_chunk_size, 1, self.overlap.max_num_chunks)
        return np.where(self.received > 0, found, 0)[self._parties].max(axis=1)

    @cached_property
    def num_stages(self) -> int:
        """Stages of all ranks: a rank that receives less takes part with empty blocks."""
        return int(min(max(self.degree, 1), self._num_chunks.max(initial=0)))

    @property
    def _unit(self) -> int:
        return min(UNIT, self.overlap.min_chunk_size)

    @cached_property
    def _stages(self) -> list[Ints]:
        """Of each party the stage of each chunk."""
        alg, num_stages = self.overlap.alg, self.num_stages
        if isinstance(alg, GreedyOverlapAlg) and num_stages > 1:
            return [_even(costs, num_stages) for costs in self._costs()]
        found = []
        for party, count in enumerate(self._num_chunks.tolist()):
            stage = np.arange(count) * num_stages // max(count, num_stages)
            if isinstance(alg, UniformOverlapAlg) and alg.random_costs:
                stage = np.random.default_rng([alg.random_seed or 0, party]).permutation(stage)
            found.append(stage)
        return found

    def _costs(self) -> list[Ints]:
        """Of each party the visible pairs of each chunk of what it receives."""
        found = []
        for ranks, count in zip(self._parties, self._num_chunks.tolist(), strict=True):
            parts = self._incoming(ranks).cut(
                np.full(self.num_ranks, count), [np.arange(count)] * self.num_ranks, self._unit
            )
            pieces = self.pieces[0][np.isin(self.pieces[1], ranks)]
            order = np.argsort(parts.begin, kind="stable")
            inside, _, of = split(pieces, np.stack([parts.begin, parts.end], axis=1)[order], K0)
            found.append(sums(areas(inside), parts.stage[order][of], count))
        return found

    def _incoming(self, ranks: Ints) -> _Parts:
        """Keys that any of ``ranks`` receives, once, by sender."""
        ranges, label = unstack(self.remote, self.stride)
        ranges = merge(ranges[np.isin(label, ranks)])
        held, holder = _gathered(self.keys)
        which, of = overlapping_intervals(ranges[:, 0], ranges[:, 1], held)
        begin, end = np.maximum(ranges[which, 0], held[of, 0]), np.minimum(ranges[which, 1], held[of, 1])
        order = np.argsort(holder[of], kind="stable")
        return _Parts(holder[of][order], begin[order], end[order], begin[order], self.num_ranks)

    def _outgoing(self, rank: int, receivers: Ints | None) -> _Parts:
        """Keys that ``rank`` sends, to some or to all receivers; places are those among its own."""
        ranges, receiver = unstack(self.remote, self.stride)
        if receivers is not None:
            chosen = np.isin(receiver, receivers)
            ranges, receiver = ranges[chosen], receiver[chosen]
        own = np.asarray(self.keys[rank], dtype=np.int64).reshape(-1, 2)
        begins, order = offsets(own)[:-1], np.argsort(own[:, 0], kind="stable")
        order = order[own[order, 1] > own[order, 0]]
        which, of = overlapping_intervals(ranges[:, 0], ranges[:, 1], own[order])
        of = order[of]
        begin, end = np.maximum(ranges[which, 0], own[of, 0]), np.minimum(ranges[which, 1], own[of, 1])
        return _Parts(receiver[which], begin, end, begin - own[of, 0] + begins[of], self.num_ranks)

    def _sent(self, rank: int, receivers: Ints | None = None) -> list[tuple[Intervals, ...]]:
        """Of each stage the places of keys that ``rank`` sends to each rank; to some of them only, if these are given."""
        outgoing = self._outgoing(rank, receivers)
        if self.num_stages > 1:
            whole = outgoing.joined(self._party, len(self._parties), self.stride)
            whole = whole.cut(self._num_chunks, self._stages, self._unit)
            outgoing = outgoing.cut_like(whole, self._party, self.stride)
        return [outgoing.blocks(number) for number in range(self.num_stages)]

    def _received(self, rank: int) -> list[tuple[Intervals, ...]]:
        """Of each stage the keys that come to ``rank`` from each rank."""
        incoming, every = self._incoming(np.array([rank])), np.arange(self.num_ranks)
        if self.num_stages > 1:
            party = self._party[rank]
            stages = np.full(len(every), self._num_chunks[party]), [self._stages[party]] * len(every)
            whole = self._incoming(self._parties[party]).cut(*stages, self._unit)
            incoming = incoming.cut_like(whole, every, self.stride)
        return [incoming.blocks(number) for number in range(self.num_stages)]

    def _relays(
        self, rank: int, sent: list[tuple[Intervals, ...]], received: list[tuple[Intervals, ...]]
    ) -> Sequence[Relay | None]:
        """Of each stage, from what ``rank`` sends and receives in one hop, the two hops if there are nodes."""
        nodes = self.nodes
        if nodes is None:
            return [None] * self.num_stages
        mates = node_of(nodes, rank)
        column = [
            sent if owner == rank else self._sent(owner, mates) for owner in column_of(nodes, rank).tolist()
        ]
        return [
            Relay.of(rank, nodes, stage, [total_size(block) for block in blocks])
            for *stage, blocks in zip(*column, received, strict=True)
        ]

    def share(self, rank: int) -> Share:
        """What one rank has to do."""
        queries = np.asarray(self.queries[rank], dtype=np.int64).reshape(-1, 2)
        keys = np.asarray(self.keys[rank], dtype=np.int64).reshape(-1, 2)
        sent, received = self._sent(rank), self._received(rank)
        num_rows, all_keys = total_size(queries), np.array([[0, self.stride]])
        by_rows = localise(self.bands, queries, all_keys)
        rows = np.array([[0, num_rows]])
        stages = []
        for blocks, given, relay in zip(received, sent, self._relays(rank, sent, received), strict=True):
            table = fused(localise(by_rows, rows, np.concatenate(blocks)))
            stages.append(Stage(blocks, given, table, relay))
        own = fused(localise(by_rows, rows, keys))
        joined = None
        if self.degree == 0:
            ranges, places = _in_order([keys, *map(np.concatenate, received)])
            joined = Joined(fused(localise(by_rows, rows, ranges)), places)
        return Share(rank, num_rows, total_size(keys), own, tuple(stages), joined)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Keys that ranks receive, each rank's once.

    Attributes:
        received: (r,) by each rank. within: (r,) those of them from its own node. between: (r,) those from other nodes.
        once: (nodes,) from other nodes by each node, if what several of its ranks need comes to it once.
    """

    received: Ints
    within: Ints
    between: Ints
    once: Ints


@dataclass(frozen=True, eq=False)
class Stage:
    """Keys that come together, and what is computed with them.

    Attributes:
        receive: of each rank the global ranges of keys that come from it.
        send: to each rank the local ranges of keys that it gets, in the order in which it gets them.
        bands: (n, 6) local queries against the keys received, one block behind the other.
        relay: how they come by two hops; None if they come by one.
    """

    receive: tuple[Intervals, ...]
    send: tuple[Intervals, ...]
    bands: Bands
    relay: Relay | None = None

    @property
    def receive_sizes(self) -> list[int]:
        """Keys from each rank."""
        return [total_size(part) for part in self.receive]

    @property
    def send_sizes(self) -> list[int]:
        """Keys to each rank."""
        return [total_size(part) for part in self.send]


@dataclass(frozen=True, eq=False)
class Joined:
    """Own keys and all that are received, in the order in which they are in the sequence, where bands are the fewest.

    Attributes:
        bands: (n, 6) own queries against them. places: where own keys go, and those of each stage.
    """

    bands: Bands
    places: tuple[Ints, ...]


@dataclass(frozen=True, eq=False)
class Share:
    """One rank's part of the attention.

    Attributes:
        rank: whose. num_rows, num_cols: its own queries and keys.
        bands: (n, 6) its own queries against its own keys. stages: what else it sees.
        joined: with degree 0: there is at most one stage, and all keys are meant for one call. ``bands`` and ``stages``
            hold as with degree 1.
    """

    rank: int
    num_rows: int
    num_cols: int
    bands: Bands
    stages: tuple[Stage, ...]
    joined: Joined | None = None


@dataclass(frozen=True, eq=False)
class _Parts:
    """Keys that travel between one rank and its peers, sorted by peer and then by global position.

    Attributes:
        peer, begin, end: (m,) with whom, and which keys. place: (m,) where the first of them is for the rank in question.
        stage: (m,) in which stage; all in the first before they are cut.
    """

    peer: Ints
    begin: Ints
    end: Ints
    place: Ints
    num_peers: int
    stage: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def cut(self, num_chunks: Ints, stages: Sequence[Ints], unit: int) -> _Parts:
        """Each peer's block in ``num_chunks[peer]`` parts, alike but for whole units, in the stages that are given."""
        sizes = sums(self.end - self.begin, self.peer, self.num_peers)
        counts = np.where(sizes > 0, num_chunks, 0)
        of = np.repeat(np.arange(self.num_peers), counts)
        number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        units, base = -(-sizes // unit), np.cumsum(sizes) - sizes
        edges = [
            base[of] + np.minimum(units[of] * (number + step) // num_chunks[of] * unit, sizes[of])
            for step in (0, 1)
        ]
        live = edges[1] > edges[0]
        stage = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(stages[peer] for peer in np.flatnonzero(counts))]
        )[live]
        cuts = np.stack(edges, axis=1)[live]
        last = np.cumsum(self.end - self.begin)
        first = last - (self.end - self.begin)
        which, chunk = overlapping_intervals(first, last, cuts)
        skipped = np.maximum(cuts[chunk, 0] - first[which], 0)
        length = np.minimum(cuts[chunk, 1], last[which]) - first[which] - skipped
        begin = self.begin[which] + skipped
        place = self.place[which] + skipped
        return _Parts(self.peer[which], begin, begin + length, place, self.num_peers, stage[chunk])

    def joined(self, label: Ints, num_labels: int, stride: int) -> _Parts:
        """What goes to any peer of a label, once, with labels for peers."""
        ranges = stack(np.stack([self.begin, self.end], axis=1), label[self.peer], stride)
        ranges, of = unstack(merge(ranges), stride)
        return _Parts(of, ranges[:, 0], ranges[:, 1], ranges[:, 0], num_labels)

    def cut_like(self, whole: _Parts, label: Ints, stride: int) -> _Parts:
        """Cut where ``whole`` is, whose peers are labels of these, in the stages that it has there."""
        cuts = stack(np.stack([whole.begin, whole.end], axis=1), whole.peer, stride)
        by = label[self.peer] * stride
        which, of = overlapping_intervals(self.begin + by, self.end + by, cuts)
        begin = np.maximum(self.begin[which], whole.begin[of])
        end = np.minimum(self.end[which], whole.end[of])
        place = self.place[which] + begin - self.begin[which]
        return _Parts(self.peer[which], begin, end, place, self.num_peers, whole.stage[of])

    def blocks(self, stage: int) -> tuple[Intervals, ...]:
        """Of each peer the ranges of places in a stage."""
        peer, begin, size = self.peer, self.place, self.end - self.begin
        if len(self.stage):
            mine = self.stage == stage
            peer, begin, size = peer[mine], begin[mine], size[mine]
        first = np.ones(len(peer), dtype=bool)
        first[1:] = (begin[1:] != begin[:-1] + size[:-1]) | (peer[1:] != peer[:-1])
        last = np.append(first[1:], True)[: len(peer)]
        ranges = np.stack([begin[first], (begin + size)[last]], axis=1)
        return tuple(np.split(ranges, np.searchsorted(peer[first], np.arange(1, self.num_peers))))


def fused(bands: Bands) -> Bands:
    """The same mask with bands joined that continue each other, such as full ones of neighbouring blocks."""
    return transpose(_fused_columns(transpose(_fused_columns(bands))))


def _fused_columns(bands: Bands) -> Bands:
    """Bands with the same rows and diagonals joined where one begins at the column at which the one before ends."""
    bands = relax(bands)
    bands = bands[np.lexsort(bands[:, [K0, HI, LO, Q1, Q0]].T)]
    alike = [Q0, Q1, LO, HI]
    first = np.ones(len(bands), dtype=bool)
    first[1:] = (bands[1:, alike] != bands[:-1, alike]).any(axis=1) | (bands[1:, K0] != bands[:-1, K1])
    joined = bands[first]
    joined[:, K1] = bands[np.append(first[1:], True)[: len(bands)], K1]
    return joined


def _in_order(tables: Sequence[Intervals]) -> tuple[Intervals, tuple[Ints, ...]]:
    """All ranges, ascending, and for each table where its positions are then, if all lie one behind the other."""
    ranges = np.concatenate(tables)
    order = np.argsort(ranges[:, 0], kind="stable")
    begins = np.empty(len(ranges), dtype=np.int64)
    begins[order] = offsets(ranges[order])[:-1]
    before = offsets(ranges)
    places = np.repeat(begins - before[:-1], ranges[:, 1] - ranges[:, 0]) + np.arange(before[-1])
    return ranges[order], tuple(np.split(places, np.cumsum([total_size(table) for table in tables])[:-1]))


def _gathered(tables: Ranges) -> tuple[Intervals, Ints]:
    """All ranges that are not empty, ascending, and whose they are."""
    parts = [np.asarray(table, dtype=np.int64).reshape(-1, 2) for table in tables]
    ranges = np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)
    rank = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(ranges[:, 0], kind="stable")
    order = order[ranges[order, 1] > ranges[order, 0]]
    return ranges[order], rank[order]


def _moved(bands: Bands, rank: Ints, stride: int) -> Bands:
    """Bands with the keys of rank r moved by r * ``stride``."""
    moved = bands.copy()
    by = (rank * stride)[:, None]
    moved[:, K0 : K1 + 1] += by
    moved[:, LO:] += by  # those at infinity too: what they are compared with moves as far
    return moved


def _even(costs: Ints, num_stages: int) -> Ints:
    """The stage of each chunk: the costliest first, to the stage with the least."""
    stage, totals = np.zeros(len(costs), dtype=np.int64), [0] * num_stages
    for chunk in np.argsort(costs, kind="stable")[::-1].tolist():
        stage[chunk] = totals.index(min(totals))
        totals[stage[chunk]] += int(costs[chunk])
    return stage
