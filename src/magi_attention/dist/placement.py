"""Which rank gets which chunks: every documented algorithm, and one that weighs work against keys to receive.

All of it is a function of the mask and the configuration: every rank finds the same placement without asking the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import singledispatch

import numpy as np
from numpy.typing import NDArray

from magi_attention.config import (
    BalancedDispatchAlg,
    BSDispatchAlg,
    BTPDispatchAlg,
    DispatchAlg,
    DPDispatchAlg,
    LBDispatchAlg,
    MinHeapDispatchAlg,
    RandomSelectDispatchAlg,
    SequentialDispatchAlg,
    SortedSequentialSelectAlg,
    ToppHeapDispatchAlg,
    ZigzagDispatchAlg,
)
from magi_attention.dist.chunks import Chunks, Ints
from magi_attention.errors import complaint

Partition = list[list[int]]
"""The chunks of each rank, ascending."""

MOST_FOR_EXACT = 24
"""Chunks that exponential algorithms take."""


def place(alg: DispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    """The chunks of each rank, ascending.

    Raises:
        ValueError: fewer chunks than ranks, an algorithm without placements, or too many chunks for an exponential one.
    """
    if len(chunks) < num_ranks:
        remedy = "Choose a smaller chunk_size, or fewer ranks."
        raise ValueError(complaint("chunks", f"at least {num_ranks}, one a rank", len(chunks), remedy))
    if not alg.has_partitions:
        raise ValueError(complaint("alg", "one that places chunks", type(alg).__name__))
    return [sorted(map(int, part)) for part in _place(alg, chunks, num_ranks)]


def bound(alg: DispatchAlg, chunks: Chunks, num_ranks: int) -> float:
    """The largest area of a rank that an algorithm without placements promises: LB's mean, DP's optimum."""
    if isinstance(alg, LBDispatchAlg):
        return int(chunks.areas.sum()) / num_ranks
    if isinstance(alg, DPDispatchAlg):
        best = _exact(chunks.areas, num_ranks, len(chunks))
        return float(max(chunks.areas[part].sum() for part in best))
    raise ValueError(complaint("alg", "LBDispatchAlg or DPDispatchAlg", type(alg).__name__))


@singledispatch
def _place(alg: DispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    raise ValueError(complaint("alg", "an algorithm of magi_attention.config", type(alg).__name__))


@_place.register
def _(alg: MinHeapDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    return _by_heap(chunks.areas, num_ranks)


def _by_heap(weights: Ints, num_ranks: int) -> Partition:
    """The heaviest first, the later of equal ones, to the lightest rank that is not full."""
    most = -(-len(weights) // num_ranks)
    parts: Partition = [[] for _ in range(num_ranks)]
    heap = [(0, rank) for rank in range(num_ranks)]
    for chunk in np.argsort(weights, kind="stable")[::-1].tolist():
        load, rank = heapq.heappop(heap)
        parts[rank].append(chunk)
        if len(parts[rank]) < most:
            heapq.heappush(heap, (load + int(weights[chunk]), rank))
    return parts


@_place.register
def _(alg: BSDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    return _exact(chunks.areas, num_ranks, len(chunks))


@_place.register
def _(alg: BTPDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    return _exact(chunks.areas, num_ranks, -(-len(chunks) // num_ranks))


def _exact(weights: Ints, num_ranks: int, most: int) -> Partition:
    """A placement of at most ``most`` chunks a rank whose largest weight is the least there is, by trying them all."""
    if len(weights) > MOST_FOR_EXACT:
        remedy = "Use MinHeapDispatchAlg()."
        raise ValueError(complaint("chunks", f"at most {MOST_FOR_EXACT}", len(weights), remedy))
    order = np.argsort(weights, kind="stable")[::-1].tolist()
    best = _by_heap(weights, num_ranks)
    top = max(int(weights[part].sum()) for part in best)
    floor = max(-(-int(weights.sum()) // num_ranks), int(weights.max(initial=0)))
    parts: Partition = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks

    def descend(depth: int) -> None:
        nonlocal best, top
        if depth == len(order):
            best, top = [list(part) for part in parts], max(loads)
            return
        chunk, tried = order[depth], set()
        for rank in range(num_ranks):
            state = (loads[rank], len(parts[rank]))
            # Ranks in the same state are the same choice.
            if state in tried or len(parts[rank]) == most or loads[rank] + int(weights[chunk]) >= top:
                continue
            tried.add(state)
            parts[rank].append(chunk)
            loads[rank] += int(weights[chunk])
            descend(depth + 1)
            loads[rank] -= int(weights[chunk])
            parts[rank].pop()
            if top <= floor:
                return

    if top > floor:
        descend(0)
    return best


@_place.register
def _(alg: ToppHeapDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    """Also of ``BatchToppHeapDispatchAlg``: the likest pair of one of several chunks and one of the lightest ranks."""
    edges, needed, _ = chunks.cells()
    lengths, weights = np.diff(edges), chunks.areas
    most, together = -(-len(chunks) // num_ranks), getattr(alg, "num_of_select_chunk", 1)
    num_candidates = max(1, int(np.ceil(alg.top_p * num_ranks)))
    left = np.argsort(weights, kind="stable")[::-1].tolist()
    parts: Partition = [[] for _ in range(num_ranks)]
    loads = np.zeros(num_ranks, dtype=np.int64)
    seen = np.zeros((num_ranks, len(lengths)), dtype=bool)
    while left:
        free = [rank for rank in range(num_ranks) if len(parts[rank]) < most]
        candidates = sorted(free, key=lambda rank: (loads[rank], rank))[:num_candidates]
        pairs = [(chunk, rank) for chunk in left[:together] for rank in candidates]
        chunk, rank = max(pairs, key=lambda pair: _likeness(needed[pair[0]], seen[pair[1]], lengths))
        left.remove(chunk)
        parts[rank].append(chunk)
        loads[rank] += weights[chunk]
        seen[rank] |= needed[chunk]
    return parts


def _likeness(one: NDArray[np.bool_], other: NDArray[np.bool_], lengths: Ints) -> float:
    """Keys that both need over keys that one of them needs."""
    either = int(lengths[one | other].sum())
    return int(lengths[one & other].sum()) / either if either else 0.0


@_place.register
def _(alg: RandomSelectDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    order = np.random.default_rng(0).permutation(len(chunks))
    return [part.tolist() for part in np.array_split(order, num_ranks)]


@_place.register
def _(alg: SequentialDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    return [part.tolist() for part in np.array_split(np.arange(len(chunks)), num_ranks)]


@_place.register
def _(alg: ZigzagDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    blocks = [part.tolist() for part in np.array_split(np.arange(len(chunks)), 2 * num_ranks)]
    return [blocks[rank] + blocks[-1 - rank] for rank in range(num_ranks)]


@_place.register
def _(alg: SortedSequentialSelectAlg, chunks: Chunks, num_ranks: int) -> Partition:
    weights, samples = chunks.areas, chunks.sample
    of_sample = np.zeros(samples.max(initial=-1) + 2, dtype=np.int64)
    np.add.at(of_sample, samples + 1, weights)
    order = np.lexsort((np.arange(len(chunks)), samples, -of_sample[samples + 1])).tolist()
    most = -(-len(chunks) // num_ranks)
    enough = alg.allocation_ratio * int(weights.sum()) / num_ranks
    parts: Partition = [[] for _ in range(num_ranks)]
    load, rank = 0, 0
    for place_of, chunk in enumerate(order):
        fits = len(order) - place_of <= (num_ranks - rank - 1) * most
        if len(parts[rank]) == most or (parts[rank] and load >= enough and fits):
            load, rank = 0, rank + 1
        parts[rank].append(chunk)
        load += int(weights[chunk])
    return parts


@_place.register
def _(alg: BalancedDispatchAlg, chunks: Chunks, num_ranks: int) -> Partition:
    if num_ranks == 1:
        return [list(range(len(chunks)))]
    # A placement without regard to neighbours is the better start where whole chunks are alike, runs where they are not.
    starts: list[Callable[[], Partition]] = [
        lambda: _by_heap(chunks.work, num_ranks),
        lambda: _place(SequentialDispatchAlg(), chunks, num_ranks),
    ]
    found = [_Exchange(chunks, start(), num_ranks, alg.slack).refined(alg.rounds) for start in starts]
    return min(found, key=lambda each: each.cost).parts()


class _Exchange:
    """A placement that gets better by swapping chunks: less work above the limit, then fewer keys to receive."""

    def __init__(self, chunks: Chunks, parts: Partition, num_ranks: int, slack: float) -> None:
        edges, self.needed, self.held = chunks.cells()
        self.needed, self.held = self.needed.astype(np.int32), self.held.astype(np.int32)
        self.lengths, self.work, self.num_ranks = np.diff(edges), chunks.work, num_ranks
        self.limit = int((1 + slack) * chunks.work.sum()) // num_ranks
        self.rank = np.empty(len(chunks), dtype=np.int64)
        for rank, part in enumerate(parts):
            self.rank[part] = rank
        self.loads = np.bincount(self.rank, self.work, num_ranks).astype(np.int64)
        self.needs = np.zeros((num_ranks, len(self.lengths)), dtype=np.int32)
        self.holds = np.zeros_like(self.needs)
        np.add.at(self.needs, self.rank, self.needed)
        np.add.at(self.holds, self.rank, self.held)
        self.received = self._received(self.needs, self.holds)

    def _received(self, needs: NDArray[np.int32], holds: NDArray[np.int32]) -> Ints:
        return ((needs > 0) & (holds == 0)) @ self.lengths

    @property
    def cost(self) -> tuple[int, int]:
        """Work above the limit, then twice the most that a rank receives and the mean."""
        over = np.maximum(self.loads - self.limit, 0).max()
        return int(over), int(2 * self.num_ranks * self.received.max() + self.received.sum())

    def refined(self, rounds: int) -> _Exchange:
        """Try each chunk against all others, ``rounds`` times or until nothing changes."""
        for _ in range(rounds):
            if not sum(self._swap(chunk) for chunk in range(len(self.rank))):
                break
        return self

    def _swap(self, chunk: int) -> bool:
        """Swap ``chunk`` with the one that helps most; whether there was one."""
        own = self.rank[chunk]
        others = np.flatnonzero(self.rank != own)
        theirs = self.rank[others]
        more = self.work[others] - self.work[chunk]
        loads = np.stack([self.loads[own] + more, self.loads[theirs] - more])
        over = np.maximum(loads - self.limit, 0).max(axis=0)
        now = np.maximum(np.maximum(self.loads[own], self.loads[theirs]) - self.limit, 0)
        keep = over <= now
        others, theirs, over, now = (x[keep] for x in (others, theirs, over, now))
        if not len(others):
            return False
        needed = self.needed[others] - self.needed[chunk]
        held = self.held[others] - self.held[chunk]
        here = self._received(self.needs[own] + needed, self.holds[own] + held)
        there = self._received(self.needs[theirs] - needed, self.holds[theirs] - held)
        rest = np.broadcast_to(self.received, (len(others), self.num_ranks)).copy()
        rest[:, own], rest[np.arange(len(others)), theirs] = here, there
        cost = 2 * self.num_ranks * rest.max(axis=1) + rest.sum(axis=1)
        gain = np.stack([over - now, cost - self.cost[1]])
        best = np.lexsort((gain[1], gain[0]))[0]
        if tuple(gain[:, best]) >= (0, 0):
            return False
        self._exchange(chunk, int(others[best]))
        return True

    def _exchange(self, one: int, other: int) -> None:
        here, there = self.rank[one], self.rank[other]
        for rank, leaving, coming in ((here, one, other), (there, other, one)):
            self.loads[rank] += self.work[coming] - self.work[leaving]
            self.needs[rank] += self.needed[coming] - self.needed[leaving]
            self.holds[rank] += self.held[coming] - self.held[leaving]
        both = [here, there]
        self.received[both] = self._received(self.needs[both], self.holds[both])
        self.rank[one], self.rank[other] = there, here

    def parts(self) -> Partition:
        """The chunks of each rank."""
        return [np.flatnonzero(self.rank == rank).tolist() for rank in range(self.num_ranks)]


