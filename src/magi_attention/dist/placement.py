"""Which rank gets which chunks: every documented algorithm, and one that weighs work against keys to receive.

All of it is a function of the mask and the configuration: every rank finds the same placement without asking the others.
"""

from __future__ import annotations

import heapq
from functools import singledispatch

import numpy as np
from numpy.typing import NDArray

from magi_attention.common.intervals import difference, merge, stack, total_size, unstack
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
from magi_attention.dist.balance import balanced
from magi_attention.dist.chunks import Chunks, Ints, sums
from magi_attention.dist.cost import DIRECTIONS, TYPICAL, Machine, attention_us, transfer_us
from magi_attention.errors import complaint

Partition = list[list[int]]
"""The chunks of each rank, ascending."""

MOST_FOR_EXACT = 24
"""Chunks that exponential algorithms take."""


def place(alg: DispatchAlg, chunks: Chunks, num_ranks: int, num_nodes: int = 1) -> Partition:
    """The chunks of each rank, ascending.

    Args:
        num_nodes: of as many neighbouring ranks each. ``BalancedDispatchAlg`` then deals chunks to nodes first, so that
            few keys travel between nodes if each comes to a node once.

    Raises:
        ValueError: fewer chunks than ranks, an algorithm without placements, too many chunks for an exponential one, or
            nodes that another algorithm does not know or that do not divide the ranks.
    """
    if len(chunks) < num_ranks:
        remedy = "Choose a smaller chunk_size, or fewer ranks."
        raise ValueError(complaint("chunks", f"at least {num_ranks}, one a rank", len(chunks), remedy))
    if not alg.has_partitions:
        raise ValueError(complaint("alg", "one that places chunks", type(alg).__name__))
    if num_nodes < 1 or num_ranks % num_nodes:
        raise ValueError(complaint("num_nodes", f"a divisor of the {num_ranks} ranks", num_nodes))
    if num_ranks == 1:
        return [list(range(len(chunks)))]
    if isinstance(alg, BalancedDispatchAlg):
        room = np.array([len(part) for part in np.array_split(np.arange(len(chunks)), num_ranks)])
        seen, _ = unstack(chunks.needed, chunks.stride)
        most = min(total_size(seen) // num_ranks, chunks.num_masks * chunks.num_cols)
        slack = min(alg.slack, _worthwhile(chunks, num_ranks, most))
        rank = balanced(chunks, room, slack, alg.rounds, num_nodes)
        less = _worthwhile(chunks, num_ranks, _received(chunks, rank))
        if less < slack / 4:
            rank = balanced(chunks, room, less, alg.rounds, num_nodes)
        order = np.argsort(rank, kind="stable")
        return [part.tolist() for part in np.split(order, np.cumsum(room)[:-1])]
    if num_nodes > 1:
        remedy = "Use BalancedDispatchAlg(), or a mesh of one dimension."
        raise ValueError(complaint("num_nodes", f"1 with {type(alg).__name__}", num_nodes, remedy))
    return [sorted(map(int, part)) for part in _place(alg, chunks, num_ranks)]


def _worthwhile(chunks: Chunks, num_ranks: int, received: int) -> float:
    """The part of its work that a rank may have more for fewer keys: a quarter of what ``received`` ones cost.

    Long dense sequences are bound by work: a rank with 4 % more of it makes all others wait longer than keys take.
    """
    work, machine = int(chunks.work.sum()) // num_ranks, Machine()
    busy = sum(attention_us(work, TYPICAL, direction, machine) for direction in DIRECTIONS)
    token_bytes = 2 * TYPICAL.kv_bytes + TYPICAL.kv_gradient_bytes
    return transfer_us(received, 0, token_bytes, machine) / (4 * busy) if busy else 1.0


def _received(chunks: Chunks, rank: Ints) -> int:
    """The most keys that a rank receives."""
    needed, held = (
        merge(stack(ranges, rank[chunk], chunks.stride))
        for ranges, chunk in (unstack(table, chunks.stride) for table in (chunks.needed, chunks.held))
    )
    ranges, of = unstack(difference(needed, held), chunks.stride)
    return int(sums(ranges[:, 1] - ranges[:, 0], of, int(rank.max()) + 1).max())


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
    of_sample = sums(weights, samples + 1, int(samples.max(initial=-1)) + 2)
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
